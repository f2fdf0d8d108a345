"""Changes of a weight by the product, number by number, of two low-rank matrices (LoHa): ``W + s · (A1 B1) ⊙ (A2 B2)``.

The rank of the change is up to r². Products of products are small numbers: they are taken in at least float32. What is
of the size of the weight is not kept for the backward pass, which makes both matrices again.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers.combining import Factors
from lightning_pet.layers.low_rank_base import check_rank
from lightning_pet.layers.low_rank_product import compute_dtype, is_plain
from lightning_pet.layers.transforms import apply_node, is_transformed
from lightning_pet.layers.weight_change import Drops, Form, OnLinear, OnWeight, WeightChange, draw_

Four = tuple[Tensor, Tensor, Tensor, Tensor]
"""A1 [..., out, r], B1 [..., r, in], A2, B2."""


class Hadamard(WeightChange):
    """What LoHa is on every kind of layer.

    Attributes:
        w1_a: [..., out, r]; with a core [r, out].
        w1_b: [..., r, in · kernel]; with a core [r, in].
        w2_a: like ``w1_a``.
        w2_b: like ``w1_b``.
        t1: core [r, r, *kernel] of a kernel that looks at several places, or ``None``.
        t2: likewise, of the second matrix.
        r: rank of each matrix.
    """

    t1: nn.Parameter | None
    t2: nn.Parameter | None

    def __init__(
        self,
        form: Form,
        r: int,
        *,
        scale: float,
        core: bool = False,
        drops: Drops | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(r)
        super().__init__(form, scale, drops)
        self.r = r
        core = core and form.is_spatial
        e = form.experts

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        a = (r, form.own) if core else (*e, form.own, r)
        b = (r, form.inputs) if core else (*e, r, form.columns)
        self.w1_a, self.w1_b = made(*a), made(*b)
        self.w2_a, self.w2_b = made(*a), made(*b)
        for name in ("t1", "t2"):
            self.register_parameter(name, made(r, r, *form.kernel) if core else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all factors but ``w2_b``, which is zero: the delta does nothing."""
        behind = len(self.form.experts)
        for parameter in self.parameters():
            draw_(parameter, prod(parameter.shape[behind + 1 :]))
        nn.init.zeros_(self.w2_b)

    def four(self, dtype: torch.dtype) -> Four:
        """The two pairs of factors as matrices."""
        pairs = []
        for a, b, core in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)):
            left, right = a.to(dtype), b.to(dtype)
            if core is not None:
                right = torch.einsum("ijk,jn->ink", core.to(dtype).flatten(2), right).flatten(1)
                left = left.t()
            pairs += [left, right]
        return pairs[0], pairs[1], pairs[2], pairs[3]

    def change(self, dtype: torch.dtype) -> Tensor:
        """``s · (A1 B1) ⊙ (A2 B2)``, [..., own outputs, columns]."""
        four = self.four(dtype)
        if is_transformed() or not torch.is_grad_enabled():
            return _product(*four, self.scale)
        changed: Tensor = apply_node(_Change, *four, self.scale)
        return changed

    def matrices(self) -> Factors | None:
        """See :meth:`WeightChange.matrices`: every pair of a row of B1 and one of B2, multiplied; of rank r²."""
        a1, b1, a2, b2 = self.four(self.w1_a.dtype)
        a = (b1.unsqueeze(-2) * b2.unsqueeze(-3)).flatten(-3, -2)
        b = (a1.unsqueeze(-1) * a2.unsqueeze(-2)).flatten(-2)
        return a, b * self.scale

    @torch.no_grad()
    def largest(self) -> float:
        """The product of what no value of either matrix exceeds."""
        a1, b1, a2, b2 = self.four(self.w1_a.dtype)
        sizes = [(a.abs().amax(-2) * b.abs().amax(-1)).sum(-1).max() for a, b in ((a1, b1), (a2, b2))]
        return abs(self.scale) * float(sizes[0] * sizes[1])


class HadamardLinear(OnLinear, Hadamard):
    """LoHa on a linear layer.

    Args:
        in_features: input features of the host.
        out_features: output features of the host.
        r: rank of each of the two matrices.
        scale: factor s, alpha / r.
        transposed: the host's weight is [in, out] (transformers' ``Conv1D``).
        rows: half-open ranges of output features of a fused projection.
        **options: ``drops``, ``device`` and ``dtype`` of :class:`Hadamard`.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    fuses_linear: ClassVar[bool] = True

    def forward(
        self, x: Tensor, output: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The host's output with the change of its weight.

        Args:
            x: input of the host, [..., in].
            output: output of the host, [..., out]; ``None`` to have it computed here.
            weight: the host's weight, if ``output`` is ``None``.
            bias: the host's bias, likewise.

        Returns:
            [..., out].
        """
        dtype = compute_dtype(x)
        x = x.to(dtype)
        if output is None:
            assert weight is not None
            matrix = self.form.matrix(weight)
            # In half precision the sum with the weight would round most of the change away.
            exact = dtype in (torch.float32, torch.float64) and matrix.dtype == dtype
            if exact and is_plain(weight) and self.form.rows is None and not (self.training and self._drops):
                return self._multiplied(x, matrix, bias)
            output = F.linear(x, matrix, bias)
        return self.added(output, self._multiplied(x, None, None))

    @property
    def _drops(self) -> bool:
        return bool(self.drops.features or self.drops.whole)

    def _multiplied(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``x (W + change)ᵀ + bias``; without W the change alone."""
        four = self.four(torch.promote_types(x.dtype, torch.float32))
        if is_transformed() or not torch.is_grad_enabled():
            return _linear(x, weight, bias, *four, self.scale)
        output: Tensor = apply_node(_Linear, x, weight, bias, *four, self.scale)
        return output


class HadamardWeight(OnWeight, Hadamard):
    """LoHa on a weight: of a convolution, of several matrices in one (experts), or one that is read without a call."""


# --- the products ------------------------------------------------------------------------------------------------


def _product(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> Tensor:
    with torch.autocast(a1.device.type, enabled=False):
        return (a1 @ b1) * (a2 @ b2) * scale


def _to_factors(flow: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> Four:
    """Gradients of the factors from that of the change."""
    with torch.autocast(a1.device.type, enabled=False):
        flow = flow * scale
        through = flow * (a2 @ b2)
        first = through @ b1.mT, a1.mT @ through
        through = flow * (a1 @ b1)
        return *first, through @ b2.mT, a2.mT @ through


def _linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a1: Tensor,
    b1: Tensor,
    a2: Tensor,
    b2: Tensor,
    scale: float,
) -> Tensor:
    return F.linear(x, _whole(weight, _product(a1, b1, a2, b2, scale)).to(x.dtype), bias)


def _whole(weight: Tensor | None, change: Tensor) -> Tensor:
    """The sum in the layout of the weight: in another one the product would round differently."""
    if weight is None:
        return change
    if not weight.is_contiguous() and weight.t().is_contiguous():
        return (weight.t() + change.t()).t()
    return weight + change


class _Change(torch.autograd.Function):
    """The change itself; keeps the factors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> Tensor:
        return _product(a1, b1, a2, b2, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *four, ctx.scale = inputs
        ctx.save_for_backward(*four)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a1, b1, a2, b2 = ctx.saved_tensors
        return *_to_factors(grad, a1, b1, a2, b2, ctx.scale), None


class _Linear(torch.autograd.Function):
    """:func:`_linear` in one node; keeps x, the base's weight and the factors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a1: Tensor,
        b1: Tensor,
        a2: Tensor,
        b2: Tensor,
        scale: float,
    ) -> Tensor:
        return _linear(x, weight, bias, a1, b1, a2, b2, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *four, ctx.scale = inputs
        ctx.save_for_backward(x, weight, *four)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a1, b1, a2, b2 = ctx.saved_tensors  # may run the forward again
        need_x, need_weight, need_bias, *need = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        to_x = to_weight = to_bias = None
        if need_x:
            to_x = grad @ _whole(weight, _product(a1, b1, a2, b2, ctx.scale)).to(grad.dtype)
        factors: Sequence[Tensor | None] = (None,) * 4
        if need_weight or any(need):
            flow = flat.t() @ x.reshape(-1, x.shape[-1])
            to_weight = flow if need_weight else None
            factors = _to_factors(flow.to(a1.dtype), a1, b1, a2, b2, ctx.scale)
        if need_bias:
            to_bias = flat.sum(0)
        return to_x, to_weight, to_bias, *factors, None
