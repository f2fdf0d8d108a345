"""The product of a linear layer with DoRA: ``y = bias + f · (x Wᵀ + s · (x Aᵀ) Bᵀ)``, f = magnitude / ‖W + s B A‖.

The norm is a constant to autograd. The gradient of f asks for the layer's product before f scales it. One node keeps
no copy of that where it can be read off the output: whoever follows the layer often keeps the output anyway.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_pet.layers.low_rank_product import Origin, drawn_mask, is_plain, owned
from lightning_pet.layers.low_rank_source import are_packed, source_of
from lightning_pet.layers.transforms import apply_node, is_transformed


class Dora(NamedTuple):
    """What one layer computes with. All tensors have the dtype of the input, but for ``excess`` and ``changed``.

    Attributes:
        weight: W [out, in], any layout.
        bias: [out] or ``None``.
        a: [r, in].
        b: [out, r].
        excess: f - 1, [out]: zero at the start, and where no row of B is.
        scale: factor s.
        origin: (A0, B0), whose product is subtracted from B A.
        changed: ``W + s B A``, a constant in at least float32; may be written to.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    excess: Tensor
    scale: float
    origin: Origin | None
    changed: Tensor

    def low(self, x: Tensor) -> Tensor:
        """``s (x Aᵀ) Bᵀ``, exactly zero at the start."""
        change = F.linear(F.linear(x, self.a), self.b)
        if self.origin is not None:
            change = change - F.linear(F.linear(x, self.origin[0]), self.origin[1])
        return change * self.scale


def dora_linear(x: Tensor, layer: Dora, *, product: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """The layer's output: exactly the base's at the start.

    Args:
        x: [..., in].
        layer: what it computes with.
        product: the base product with the bias, [..., out], where it is there already; not written to.
        dropout: probability of zeroing a number of x on the way to everything that DoRA adds.

    Returns:
        [..., out], differentiable in all tensors but ``origin`` and ``changed``.
    """
    # A compiler finds itself what to keep, and the node knows the backward pass only.
    ordinary = is_plain(x) and is_plain(layer.weight) and product is None
    if is_transformed() or torch.compiler.is_compiling() or not ordinary:
        return _written_out(x, layer, product, dropout)
    direct = None
    if not dropout and x.device.type == "cpu" and layer.changed.dtype == x.dtype:
        direct = layer.changed.mul_((1 + layer.excess.detach()).unsqueeze(-1))
    mask, kept = drawn_mask(x, dropout) if dropout else None, 1 / (1 - dropout)
    weight, bias, a, b, excess, scale, origin, _ = layer
    if not torch.is_grad_enabled():
        return F.linear(x, direct, bias) if direct is not None else _activation_form(x, layer, mask, kept)[0]
    rebuild, sources = source_of(x) or (None, ())
    a0, b0 = origin or (None, None)
    output: Tensor = apply_node(
        _Dora, x, weight, bias, a, b, excess, a0, b0, scale, direct, mask, kept, rebuild, *sources
    )
    return output


def _written_out(x: Tensor, layer: Dora, product: Tensor | None, dropout: float) -> Tensor:
    """The same in torch's own operations."""
    output = F.linear(x, layer.weight, layer.bias) if product is None else product
    dropped = F.dropout(x, dropout) if dropout else x
    if dropped is not x:
        product = F.linear(dropped, layer.weight)
    else:
        product = output if layer.bias is None else output - layer.bias.to(output.dtype)
    change = layer.low(dropped)
    return output + change + layer.excess.to(output.dtype) * (product + change)


def _activation_form(x: Tensor, layer: Dora, mask: Tensor | None, kept: float) -> tuple[Tensor, Tensor]:
    """The output, and what f scales in it; exactly the base's output at the start."""
    dropped = x if mask is None else (x * mask).mul_(kept)
    output = owned(F.linear(x, layer.weight, layer.bias))
    if mask is not None:
        u = F.linear(dropped, layer.weight)
    else:
        u = output.clone() if layer.bias is None else output - layer.bias
    low = layer.low(dropped)
    u = u.add_(low)
    return output.add_(low).addcmul_(layer.excess.to(u.dtype), u), u


class _Dora(torch.autograd.Function):
    """Everything in one node, which keeps x (or what gives x), one byte per number of x where it drops some, and u.

    u is what f scales: x̃ Wᵀ + s (x̃ Aᵀ) Bᵀ. With a weight that contains all (``direct``) the node looks at its own
    output instead, while nobody has written into it; else it computes u once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        excess: Tensor,
        a0: Tensor | None,
        b0: Tensor | None,
        scale: float,
        direct: Tensor | None,
        mask: Tensor | None,
        kept: float,
        rebuild: Any,
        *sources: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.kept, ctx.rebuild, ctx.output = scale, kept, rebuild, None
        ctx.set_materialize_grads(False)
        origin = None if a0 is None or b0 is None else (a0, b0)
        u: Tensor | None = None
        if direct is not None:
            output = owned(F.linear(x, direct, bias))
            if are_packed():  # by a hook, which must see what is kept; others may write into the output
                u = output.clone()
            else:
                ctx.output = output.detach()
                ctx.version = output._version
        else:
            output, u = _activation_form(x, Dora(weight, bias, a, b, excess, scale, origin, weight), mask, kept)
        ctx.direct = direct is not None
        ctx.save_for_backward(weight, bias, a, b, excess, a0, b0, mask, u, *(sources or (x,)))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, bias, a, b, excess, a0, b0, mask, u, *sources = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, need_excess, *others = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * (6 + len(others))
        if grad is None:
            return tuple(grads)
        g = grad.reshape(-1, grad.shape[-1])
        mask = None if mask is None else mask.reshape(-1, mask.shape[-1])
        factor = 1 + excess
        known = _known(ctx, u, factor) if need_excess else None
        gb = _times(b.t(), ctx.scale * factor) @ g.t()
        if need_weight or need_a or need_b or (need_excess and known is None):
            x = ctx.rebuild(*sources) if ctx.rebuild is not None else sources[0]
            x = x.reshape(-1, x.shape[-1])
            dropped = x if mask is None else (x * mask) * ctx.kept
            if need_excess and known is None:
                origin = None if a0 is None else (a0, b0)
                low = Dora(weight, bias, a, b, excess, ctx.scale, origin, weight).low(dropped)
                grads[5] = (g * (F.linear(dropped, weight) + low)).sum(0, dtype=excess.dtype)
            if need_weight:
                grads[1] = _times(g, factor).t() @ x if mask is None else g.t() @ x + _times(g, excess).t() @ dropped
            if need_a:
                grads[3] = gb @ dropped
            if need_b:
                grads[4] = _times((a @ dropped.t()) @ g, ctx.scale * factor).t()
            del x, dropped  # before the gradient of their size is made
        if known is not None:
            grads[5] = (g * known.view(g.shape)).sum(0, dtype=excess.dtype)
            if ctx.direct:
                grads[5] = (grads[5] if bias is None else grads[5] - bias * g.sum(0)) / factor
            del known
        if need_bias:
            grads[2] = g.sum(0)
        if need_x:
            flat = gb.t() @ a
            if a0 is not None:
                flat = flat - (_times(g, factor) @ (b0 * ctx.scale)) @ a0
            if mask is None:
                flat.addmm_(*_scaled(g, weight, factor))
            else:
                flat.addmm_(*_scaled(g, weight, excess))
                flat.mul_(mask).mul_(ctx.kept).addmm_(g, weight)
            grads[0] = flat.view(*grad.shape[:-1], flat.shape[-1])
        return tuple(grads)


def _known(ctx: Any, u: Tensor | None, factor: Tensor) -> Tensor | None:
    """What tells what f has scaled: the output, or u; ``None`` if it must be computed anew."""
    output, ctx.output = ctx.output, None  # a loss that is kept must not keep it
    if torch.is_grad_enabled():
        return None  # a second derivative is wanted
    if not ctx.direct:
        return u
    if output is not None and output._version != ctx.version:
        return None  # somebody has written into it
    known = u if output is None else output
    return None if known is None or _has_zero(factor) else known


def _times(rows: Tensor, factor: Tensor) -> Tensor:
    return (rows * factor).to(rows.dtype)


def _scaled(g: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is that of ``g · factor`` and the weight; the smaller one is copied."""
    if len(g) <= weight.shape[1]:
        return _times(g, factor), weight
    return g, _times(weight.t(), factor).t()


def _has_zero(factor: Tensor) -> bool:
    return not isinstance(factor, FakeTensor) and not factor.is_meta and bool((factor == 0).any())
