"""Bottleneck adapters: down, a non-linearity, up."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Final, Literal, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.layers.delta import Delta, Host, Path, check_scale
from lightning_pet.layers.gating import opened, reset_gate
from lightning_pet.layers.low_rank_product import compute_dtype
from lightning_pet.layers.row_forms import Parts, bottleneck_rows, stacks_of

# --- activations ----------------------------------------------------------------------------------


Activation = Callable[[Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Final[dict[str, Activation]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "linear": _identity,
}


def activation(name: str) -> Activation:
    """The function of that name.

    Raises:
        ArgumentError: if there is none.
    """
    if name not in ACTIVATIONS:
        raise ArgumentError(f"non_linearity={name!r}: use one of {', '.join(map(repr, ACTIVATIONS))}.")
    return ACTIVATIONS[name]


# --- bottlenecks ----------------------------------------------------------------------------------


Init = Literal["normal", "lora"]


class Bottleneck(Delta):
    """A sequential adapter on what its host returns: ``h + s · up(act(down(norm(h))))``.

    Sources: Houlsby et al. 2019, Pfeiffer et al. 2020; Lin et al. 2020 for the norm at its entrance.

    Args:
        width: features of h, d.
        bottleneck: features in between, k.
        non_linearity: a name in :data:`~lightning_pet.layers.bottleneck.ACTIVATIONS`.
        scale: factor s.
        bias: train biases of both layers: k + d more parameters.
        inner_norm: normalise h on the way in, with trained weight and bias: 2d more parameters.
        gated: multiply what is added by a gate, see :func:`~lightning_pet.layers.gating.opened`: d + 1 more parameters.
        init: ``"normal"``: both layers normal with standard deviation ``init_std``, cut at two of them: nearly the
            identity. ``"lora"``: down uniform within ±1/√d, up zero: exactly the identity.
        init_std: see ``init``.
        device: where the parameters live.
        dtype: their dtype; products run in that of h, or autocast's.

    Raises:
        ArgumentError: if a size is not positive, or a name is unknown.
    """

    path: ClassVar[Path] = "activation"

    dropped: bool = False
    """Pass over this adapter: it costs nothing and gets no gradient."""

    def __init__(
        self,
        width: int,
        bottleneck: int,
        *,
        non_linearity: str = "gelu",
        scale: float = 1.0,
        bias: bool = True,
        inner_norm: bool = False,
        gated: bool = False,
        init: Init = "normal",
        init_std: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for label, size in (("width", width), ("bottleneck", bottleneck)):
            if size < 1:
                raise ArgumentError(f"{label}={size}: an adapter needs at least one feature.")
        if init not in get_args(Init):
            raise ArgumentError(f"init={init!r}: use one of {', '.join(map(repr, get_args(Init)))}.")
        check_scale(scale, "the scale of an adapter")
        activation(non_linearity)
        self.non_linearity, self.scale, self.init, self.init_std = non_linearity, scale, init, init_std

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.norm_weight = empty(width) if inner_norm else None
        self.norm_bias = empty(width) if inner_norm else None
        self.down = empty(bottleneck, width)
        self.down_bias = empty(bottleneck) if bias else None
        self.up = empty(width, bottleneck)
        self.up_bias = empty(width) if bias else None
        self.gate_weight = empty(1, width) if gated else None
        self.gate_bias = empty(1) if gated else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the layers as ``init`` says; biases are zero, and the norm starts without effect of its own."""
        if self.init == "lora":
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            nn.init.zeros_(self.up)
        else:
            edge = math.erf(2 / math.sqrt(2))  # two standard deviations
            for weight in (self.down, self.up):
                weight.uniform_(-edge, edge).erfinv_().mul_(self.init_std * math.sqrt(2))
        for parameter in (self.down_bias, self.up_bias, self.norm_bias):
            if parameter is not None:
                nn.init.zeros_(parameter)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
        if self.gate_weight is not None and self.gate_bias is not None:
            reset_gate(self.gate_weight, self.gate_bias)

    def update(self, h: Tensor) -> Tensor:
        """Up, behind the gate and before it is scaled: [..., width] in the dtype in which the product ran."""
        dtype = compute_dtype(h)
        flat = _cast(h, dtype).reshape(-1, h.shape[-1])  # once, and not in both layers
        if self.norm_weight is not None:
            flat = F.layer_norm(flat, flat.shape[1:], _cast(self.norm_weight, dtype), _cast(self.norm_bias, dtype))
        hidden = F.linear(flat, _cast(self.down, dtype), _cast(self.down_bias, dtype))
        hidden = activation(self.non_linearity)(hidden)
        added = F.linear(hidden, _cast(self.up, dtype), _cast(self.up_bias, dtype)).view(h.shape)
        if self.gate_weight is None or self.gate_bias is None:
            return added
        return added * opened(h, self.gate_weight, self.gate_bias)

    def added(self, h: Tensor, seen: Tensor) -> Tensor:
        """``h + s · update(seen)`` in the dtype of ``h``."""
        return torch.add(h, _cast(self.update(seen), h.dtype), alpha=self.scale)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Adapt ``output`` [..., width]; the host's input is not used."""
        return output if self.dropped else self.added(output, output)

    @staticmethod
    def row_form(
        deltas: Sequence["Bottleneck | None"], ids: Tensor, x: Tensor, output: Tensor, host: Host
    ) -> Tensor | None:
        """All rows at once; see :attr:`Delta.row_form`."""
        return _added_by_rows(deltas, ids, output, output)

    def row_parts(self) -> Parts:
        """The norm, down and up with their biases; the factor is in up."""
        up, bias = self.up, self.up_bias
        if self.scale != 1.0:
            up, bias = up * self.scale, None if bias is None else bias * self.scale  # type: ignore[assignment]
        return self.norm_weight, self.norm_bias, self.down, self.down_bias, up, bias

    def extra_repr(self) -> str:
        """Sizes and options."""
        bottleneck, width = self.down.shape
        return f"{width} → {bottleneck} → {width}, {self.non_linearity}, scale={self.scale:g}"


class ParallelBottleneck(Bottleneck):
    """An adapter beside its host: ``f(x) + s · up(act(down(norm(x))))``. Source: He et al. 2022."""

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the adapted ``x`` [..., width] to ``output`` of the same shape."""
        return output if self.dropped else self.added(output, x)

    @staticmethod
    def row_form(
        deltas: Sequence[Bottleneck | None], ids: Tensor, x: Tensor, output: Tensor, host: Host
    ) -> Tensor | None:
        """All rows at once; see :attr:`Delta.row_form`."""
        return _added_by_rows(deltas, ids, output, x)


class BehindNorm(Bottleneck):
    """A sequential adapter between a norm and the sum in front of it: ``LN(s + up(act(down(LN(s)))))``.

    It needs no access to the addends of the sum s, as the norm reads it. Source: Pfeiffer et al. 2020.
    """

    path: ClassVar[Path] = "around"

    def forward(self, call: Callable[..., Any], s: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Run the norm ``call`` on ``s`` [..., width], and again on the adapted sum."""
        normed = call(s, *args, **kwargs)
        return normed if self.dropped else call(self.added(s, normed), *args, **kwargs)

    @staticmethod
    def row_form(  # type: ignore[override]
        deltas: Sequence[Bottleneck | None], ids: Tensor, owner: Any
    ) -> Callable[..., Any] | None:
        """The norm on all rows, and again on each one's adapted sum; see :attr:`Delta.row_form`."""
        if not _are_alike(deltas):
            return None

        def run(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            s, *rest = args
            normed = call(s, *rest, **kwargs)
            adapted = _added_by_rows(deltas, ids.to(s.device), s, normed)
            return call(adapted, *rest, **kwargs)

        return run


def _are_alike(deltas: Sequence[Bottleneck | None]) -> bool:
    """Whether adapters have one function between their layers, all of them a norm or none, and none a gate."""
    if any(delta is not None and delta.gate_weight is not None for delta in deltas):
        return False
    return len({(delta.non_linearity, delta.norm_weight is None) for delta in deltas if delta is not None}) == 1


def _added_by_rows(deltas: Sequence[Bottleneck | None], ids: Tensor, h: Tensor, seen: Tensor) -> Tensor | None:
    """``h`` with what each row's own adapter makes of what it has seen; ``None``: they are not alike."""
    deltas = [None if delta is None or delta.dropped else delta for delta in deltas]
    own = next((delta for delta in deltas if delta is not None), None)
    if own is None:
        return h
    if not _are_alike(deltas):
        return None
    stacks = stacks_of(deltas, compute_dtype(seen), lambda delta: delta.row_parts())
    return bottleneck_rows(h, seen, ids, activation(own.non_linearity), stacks)


@overload
def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...


@overload
def _cast(tensor: None, dtype: torch.dtype) -> None: ...


@overload
def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
