"""The products of a low-rank delta: ``y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ``.

There are two ways to compute them. The *activation form* adds two skinny products to the base's; it
is right for any dtype and any number of tokens. The *merged form* forms ``W + s B A`` first, so that
forward and input gradient cost one product each, as in the base; only the gradients of A and B
remain skinny. It keeps nothing but its input, and is used where it is exact enough (float32 and
float64) and cheaper (many tokens).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with ``x`` runs: autocast's where it applies, else that of ``x``."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def prefers_merged(x: Tensor, weight: Tensor) -> bool:
    """Whether the merged form is exact enough and cheaper than the activation form.

    Adding ``s B A`` costs about one skinny product over the weight, the activation form about three
    over the tokens; they break even near ``in · out / (in + out)`` tokens.
    """
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64) or compute_dtype(x) != x.dtype:
        return False
    rows, columns = weight.shape
    return (x.numel() // x.shape[-1]) * (rows + columns) >= rows * columns


def shifted(weight: Tensor, a: Tensor, b: Tensor, scale: float, origin: tuple[Tensor, Tensor] | None) -> Tensor:
    """``W + s (B A - B0 A0)`` for ``weight`` [out, in], with ``origin`` = (A0, B0) or none of it.

    The difference is taken before anything else, so that it is exactly zero while A = A0 and B = B0.
    """
    if origin is None:
        return torch.addmm(weight, b, a, alpha=scale)
    return torch.add(weight, b @ a - origin[1] @ origin[0], alpha=scale)


class _MergedLinear(torch.autograd.Function):
    """``F.linear(x, W + s (B A - B0 A0), bias)`` that saves its inputs and no product of theirs."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        a0: Tensor | None,
        b0: Tensor | None,
        scale: float,
    ) -> Tensor:
        return F.linear(x, shifted(weight, a, b, scale, _pair(a0, b0)), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, a, b, a0, b0, ctx.scale = inputs
        ctx.save_for_backward(x, weight, a, b, a0, b0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, a0, b0 = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        flat = x.reshape(-1, x.shape[-1])
        grads: list[Tensor | None] = [None] * 5
        if need_x:
            grads[0] = (g @ shifted(weight, a, b, ctx.scale, _pair(a0, b0))).view(x.shape)
        if need_weight:
            grads[1] = g.t() @ flat
        if need_bias:
            grads[2] = g.sum(0)
        # [r, tokens] and not [tokens, r]: products with a short first side run two to four times as fast.
        if need_a:
            grads[3] = ((b.t() @ g.t()) @ flat) * ctx.scale
        if need_b:
            grads[4] = (((a @ flat.t()) @ g) * ctx.scale).t()
        return (*grads, None, None, None)


def _pair(a0: Tensor | None, b0: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if a0 is None or b0 is None else (a0, b0)


def merged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    origin: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The merged form.

    Args:
        x: [..., in].
        weight: [out, in], any layout.
        bias: [out] or ``None``.
        a: [r, in], in the dtype of ``x``.
        b: [out, r], in the dtype of ``x``.
        scale: factor s of the low-rank term.
        origin: (A0, B0) whose product is subtracted, in the dtype of ``x``.

    Returns:
        [..., out], differentiable in all tensors but ``origin``.
    """
    a0, b0 = (None, None) if origin is None else origin
    return _MergedLinear.apply(x, weight, bias, a, b, a0, b0, scale)  # type: ignore[no-untyped-call,no-any-return]


def add_low_rank(output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The activation form: ``output + s (x Aᵀ) Bᵀ``.

    Args:
        output: [..., out]; not written to.
        x: [..., in].
        a: [r, in], in the dtype of ``x``.
        b: [out, r], of any floating dtype.
        scale: factor s.

    Returns:
        [..., out] in the dtype of ``output``.
    """
    inner = F.linear(x, a).to(output.dtype)
    total = torch.addmm(
        output.reshape(-1, b.shape[0]), inner.reshape(-1, b.shape[1]), b.to(output.dtype).t(), alpha=scale
    )
    return total.view(output.shape)
