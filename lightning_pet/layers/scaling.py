"""Rescaling by learned vectors, the mathematics of (IA)³.

Every vector starts at one. A product with one is exact, so the first output is the base's bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_pet.layers import rows as ranges
from lightning_pet.layers.delta import Delta, Host, Path
from lightning_pet.layers.low_rank_source import source_of
from lightning_pet.layers.row_forms import beside, stacks_of
from lightning_pet.layers.transforms import is_ordinary, is_transformed


class _Scaling(Delta):
    """What all scalings share: the vector l, named ``scale``, [..., size]."""

    def __init__(
        self, shape: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set l to one: the delta does nothing."""
        nn.init.ones_(self.scale)

    def _factor(self, weight: Tensor) -> Tensor:
        """What merging multiplies a weight with, in a shape that fits it."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The weight rescaled, as a new tensor."""
        return (weight * self._factor(weight)).to(weight.dtype)

    @torch.no_grad()
    def merge_(self, weight: Tensor) -> None:
        """Rescale a weight, in place; see :meth:`Delta.merge_`."""
        weight.mul_(self._factor(weight))

    @torch.no_grad()
    def reach(self, largest: float) -> float:
        """The largest number times the largest factor; see :meth:`Delta.reach`."""
        return largest * (1.0 + float(self.scale.abs().max()))  # beside the ranges of l the factor is one

    def extra_repr(self) -> str:
        """Shape of l."""
        return f"scale={tuple(self.scale.shape)}"


class OutputScaling(_Scaling):
    """``y = l ⊙ (W x + b)``, on some of the output features.

    Args:
        features: output features of the host.
        rows: half-open ranges of output features in a fused projection, for each of which l has a
            number; ``None``: all features.
        transposed: the host's weight is [in, out] (transformers' ``Conv1D``).
        spatial: dimensions of the output behind that of the features: those of a convolution.
        device: where l lives.
        dtype: dtype of l; the product is taken in the wider one of it and the output's.
    """

    changes_bias: ClassVar[bool] = True

    def __init__(
        self,
        features: int,
        rows: Sequence[Sequence[int]] | None = None,
        *,
        transposed: bool = False,
        spatial: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.features = features
        self.rows = ranges.whole(rows, features)
        self.transposed = transposed
        self.spatial = spatial
        super().__init__([ranges.size(self.rows)], device=device, dtype=dtype)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Rescale ``output``, [..., features, *spatial]; its dtype stays."""
        return (output * _before(self.wide(), self.spatial)).to(output.dtype)

    @staticmethod
    def row_form(
        deltas: Sequence["OutputScaling | None"], ids: Tensor, x: Tensor, output: Tensor, host: Host
    ) -> Tensor | None:
        """Each row by its own l; see :attr:`Delta.row_form`."""
        own = next(delta for delta in deltas if delta is not None)
        scale = _vectors(deltas)
        return (output * beside(scale, ids, output, own.spatial)).to(output.dtype)

    def _factor(self, weight: Tensor) -> Tensor:
        scale = self.wide()
        return scale if self.transposed else _before(scale, weight.dim() - 1)

    @torch.no_grad()
    def merged_bias(self, bias: Tensor) -> Tensor:
        """``l ⊙ b``."""
        return (bias * self.wide()).to(bias.dtype)

    def wide(self) -> Tensor:
        """The vector for all features."""
        return ranges.spread(self.scale, self.rows, self.features, 1.0)


class InputScaling(_Scaling):
    """``y = W (l ⊙ x) + b``: between the non-linearity of a feed-forward layer and its last product.

    Args:
        features: input features of the host.
        transposed: the host's weight is [in, out] (transformers' ``Conv1D``).
        spatial: dimensions of the input behind that of the features: those of a convolution.
        groups: of a convolution.
        device: where l lives.
        dtype: dtype of l; the product is taken in the wider one of it and the input's.
    """

    path: ClassVar[Path] = "around"

    def __init__(
        self,
        features: int,
        *,
        transposed: bool = False,
        spatial: int = 0,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.transposed = transposed
        self.spatial = spatial
        self.groups = groups
        super().__init__([features], device=device, dtype=dtype)

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the host on ``l ⊙ x``; the dtype of x, [..., features, *spatial], stays."""
        return call(scaled(x, _before(self.scale, self.spatial)), *args, **kwargs)

    @staticmethod
    def row_form(deltas: Sequence["InputScaling | None"], ids: Tensor, owner: Any) -> Callable[..., Any]:
        """The host on each row times its own l; see :attr:`Delta.row_form`."""
        own = next(delta for delta in deltas if delta is not None)
        scale = _vectors(deltas)

        def run(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, *rest = args
            return call(scaled(x, beside(scale, ids.to(x.device), x, own.spatial)), *rest, **kwargs)

        return run

    def wide(self) -> Tensor:
        """The vector for all features."""
        return self.scale

    def _factor(self, weight: Tensor) -> Tensor:
        return self.scale.unsqueeze(-1) if self.transposed else _per_input(self.scale, weight, self.groups)


class ScaledWeight(_Scaling):
    """diag(l) W or W diag(l), for hosts whose weight is read without a call.

    Args:
        shape: shape of the weight: two dimensions, or [n, ...] for n experts with a vector each.
        axis: the dimension that l runs along: -1 or -2.
        rows: half-open ranges along that dimension; ``None``: all of it.
        device: where l lives.
        dtype: dtype of l; the product is taken in the wider one of it and the weight's.
    """

    path: ClassVar[Path] = "weight"

    def __init__(
        self,
        shape: Sequence[int],
        axis: int,
        rows: Sequence[Sequence[int]] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.axis = axis
        self.features = shape[axis]
        self.rows = ranges.whole(rows, self.features)
        super().__init__([*shape[:-2], ranges.size(self.rows)], device=device, dtype=dtype)

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, in the shape and dtype of ``weight``."""
        return (weight * self._factor(weight)).to(weight.dtype)

    def _factor(self, weight: Tensor) -> Tensor:
        scale = ranges.spread(self.scale, self.rows, self.features, 1.0)
        return scale.unsqueeze(-2 if self.axis == -1 else -1)


class ScaledKernel(_Scaling):
    """The weight of a convolution, [out, in / groups, *kernel], rescaled per output or per input channel.

    Args:
        channels: output channels, or input channels.
        inner: the input is rescaled.
        groups: of the convolution.
        device: where l lives.
        dtype: dtype of l; the product is taken in the wider one of it and the weight's.
    """

    path: ClassVar[Path] = "weight"

    def __init__(
        self,
        channels: int,
        *,
        inner: bool = False,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.inner = inner
        self.groups = groups
        super().__init__([channels], device=device, dtype=dtype)

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, in the shape and dtype of ``weight``."""
        return (weight * self._factor(weight)).to(weight.dtype)

    def _factor(self, weight: Tensor) -> Tensor:
        return _per_input(self.scale, weight, self.groups) if self.inner else _before(self.scale, weight.dim() - 1)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """``x ⊙ factor`` in the dtype of x, without keeping x where what it was made from is kept anyway.

    Args:
        x: of any shape; behind an activation function it is made again in the backward pass.
        factor: broadcasts against x.
    """
    if is_transformed() or not is_ordinary(x) or (source := source_of(x)) is None:
        return (x * factor).to(x.dtype)
    rebuild, sources = source
    return _scale(x, factor, rebuild, *sources)


class _Scaled(torch.autograd.Function):
    """The product in a node that keeps the ingredients of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, rebuild: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        ctx.rebuild = rebuild
        ctx.save_for_backward(factor, *sources)
        return (x * factor).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor, *sources = ctx.saved_tensors
        to_x, to_factor, _, *others = ctx.needs_input_grad
        of_x = (gradient * factor).to(gradient.dtype) if to_x else None
        of_factor = None
        if to_factor:
            x = ctx.rebuild(*sources)
            wide = torch.promote_types(x.dtype, factor.dtype)
            of_factor = (gradient.to(wide) * x).sum_to_size(factor.shape).to(factor.dtype)
        return (of_x, of_factor, None, *(None for _ in others))


# Past what ``Function.apply`` does for torch.func, which does not come here.
_scale: Callable[..., Tensor] = super(torch.autograd.Function, _Scaled).apply


def _vectors(deltas: Sequence[Any]) -> Tensor:
    """The vectors of all groups of rows, with ones where nothing acts."""
    dtype = next(delta.scale.dtype for delta in deltas if delta is not None)
    (found,) = stacks_of(deltas, dtype, lambda delta: (delta.wide(),), fill=1.0)
    assert found is not None
    return found


def _before(scale: Tensor, dimensions: int) -> Tensor:
    """The vector with this many dimensions behind it."""
    return scale.view(-1, *(1,) * dimensions) if dimensions else scale


def _per_input(scale: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Factors of the input channels for a weight [out, in / groups, *kernel]: each group of outputs has its own."""
    if groups > 1:
        scale = scale.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return scale.reshape(*scale.shape, *(1,) * (weight.dim() - 2))


class ScaledBias(Delta):
    """``l ⊙ b``: the bias that goes with a :class:`ScaledWeight`. It has no vector of its own.

    Args:
        source: the scaling of the weight; held outside of module registration, so that l is counted and
            stored once.
        features: length of the bias.
        rows: half-open ranges of the bias that l belongs to; ``None``: all of it.
    """

    path: ClassVar[Path] = "weight"

    def __init__(
        self, source: ScaledWeight | ScaledKernel, features: int, rows: Sequence[Sequence[int]] | None = None
    ) -> None:
        super().__init__()
        self.__dict__["source"] = source
        self.features = features
        self.rows = ranges.whole(rows, features)

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    def forward(self, bias: Tensor) -> Tensor:
        """The effective bias, in the shape and dtype of ``bias``."""
        scale = ranges.spread(self.__dict__["source"].scale, self.rows, self.features, 1.0)
        return (bias * scale).to(bias.dtype)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The effective bias as a new tensor."""
        effective: Tensor = self(weight)
        return effective
