"""The products of a low-rank delta: ``y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ``.

There are two ways to compute the forward. The *activation form* adds two skinny products to the
base's; it is right for any dtype and any number of tokens. The *merged form* multiplies with
``W + s B A``, one product as in the base; it is used where it is exact enough (float32 and float64)
and cheaper (many tokens). The backward is the same for both: the gradients of A and B are skinny
products, and the input gradient is the base's, added to the low-rank one in the same product.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_pet.layers.low_rank_source import source_of
from lightning_pet.layers.transforms import apply_node, is_transformed

_PLAIN = (Tensor, nn.Parameter)
_SMALL = 2**15

Origin = tuple[Tensor, Tensor]
"""(A0, B0), whose product is subtracted from B A."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with ``x`` runs: autocast's where it applies, else that of ``x``."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary tensor (or has the shape of one and no values), not quantised or sharded."""
    return type(weight) in _PLAIN or isinstance(weight, FakeTensor)


def prefers_merged(x: Tensor, weight: Tensor) -> bool:
    """Whether the merged form is exact enough and cheaper than the activation form.

    It copies the weight, where the other reads and writes every token's output once more. Measured
    on CPU they break even between 2 and 4 times ``in · out / (in + out)`` tokens.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return False
    rows, columns = weight.shape
    return (x.numel() // x.shape[-1]) * (rows + columns) >= 4 * rows * columns


def shifted(weight: Tensor, a: Tensor, b: Tensor, scale: float, origin: Origin | None) -> Tensor:
    """``W + s (B A - B0 A0)`` for ``weight`` [out, in].

    The difference is taken before anything else, so that it is exactly zero while A = A0 and B = B0.
    The result has the layout of ``weight``: with another one the product would round differently.
    """
    if not weight.is_contiguous() and weight.t().is_contiguous():
        swapped = None if origin is None else (origin[1].t(), origin[0].t())
        return shifted(weight.t(), b.t(), a.t(), scale, swapped).t()
    if origin is None:
        return torch.addmm(weight, b, a, alpha=scale)
    return torch.add(weight, b @ a - origin[1] @ origin[0], alpha=scale)


class _LowRankLinear(torch.autograd.Function):
    """Base product and low-rank term in one node, in either form.

    Beside its parameters it keeps x (or what gives x) and, in the activation form, x Aᵀ, its second
    output. Skinny products are taken as [r, tokens]: with a short first side they run two to four
    times as fast as with a short last one.
    """

    generate_vmap_rule = True

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
        merged: bool,
        rebuild: Callable[..., Tensor] | None,
        *sources: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        if merged:
            return _own(F.linear(x, shifted(weight, a, b, scale, _pair(a0, b0)), bias)), None
        inner = _reduced(x.reshape(-1, x.shape[-1]), a).t()
        output = F.linear(x, weight, bias).contiguous()
        flat = output.view(-1, output.shape[-1])
        if torch.compiler.is_compiling():  # torch 2.11 loses the node's gradients when it traces the form below
            return _own(torch.addmm(flat, inner.t(), b.t(), alpha=scale).view(output.shape)), inner
        flat.addmm_(inner.t(), b.t(), alpha=scale)
        return _own(output), inner

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, weight, _, a, b, a0, b0, ctx.scale, _, ctx.rebuild, *sources = inputs
        inner = output[1]
        if inner is not None:
            ctx.mark_non_differentiable(inner)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, a, b, a0, b0, inner, *(sources or (x,)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, a, b, a0, b0, inner, *sources = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, *others = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 5
        if grad is None:
            return (*grads, *(None for _ in others))
        g = grad.reshape(-1, grad.shape[-1])
        gb = (b * ctx.scale).t() @ g.t()
        if torch.is_grad_enabled():
            inner = None  # a second derivative is wanted, which a non-differentiable output would lose
        if need_weight or need_a or (need_b and inner is None):
            x = ctx.rebuild(*sources) if ctx.rebuild is not None else sources[0]
            x = x.reshape(-1, x.shape[-1])
        if need_b:
            inner = a @ x.t() if inner is None else inner
            grads[4] = ((inner @ g) * ctx.scale).t()
        if need_a:
            grads[3] = gb @ x
        if need_weight:
            grads[1] = g.t() @ x
        if need_bias:
            grads[2] = g.sum(0)
        if need_x:
            flat = gb.t() @ a
            if a0 is not None:
                flat = flat - (g @ (b0 * ctx.scale)) @ a0
            # The large product adds to the small one, not the reverse: one pass less over the result.
            flat.addmm_(g, weight)
            grads[0] = flat.view(*grad.shape[:-1], flat.shape[-1])
        return (*grads, *(None for _ in others))


def _own(output: Tensor) -> Tensor:
    """The same memory as no view of anything: what follows the layer may write into its output."""
    owned: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return owned


# Autograd asks for the signature at every call; reading it anew takes a quarter of the call.
vars(_LowRankLinear.forward)["__signature__"] = inspect.signature(_LowRankLinear.forward)


def _pair(a0: Tensor | None, b0: Tensor | None) -> Origin | None:
    return None if a0 is None or b0 is None else (a0, b0)


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    merged: bool,
    origin: Origin | None = None,
) -> Tensor:
    """Base product and low-rank term together. All tensors have the dtype of ``x``.

    Args:
        x: [..., in].
        weight: [out, in], any layout.
        bias: [out] or ``None``.
        a: [r, in].
        b: [out, r].
        scale: factor s of the low-rank term.
        merged: use the merged form.
        origin: what is subtracted from B A; only in the merged form.

    Returns:
        [..., out], differentiable in all tensors but ``origin``.
    """
    if is_transformed():  # the node below knows the backward pass only, and writes in place
        if merged:
            return F.linear(x, shifted(weight, a, b, scale, origin), bias)
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)
    output: Tensor
    if not torch.is_grad_enabled():  # a node would cost as much as the products, and end a compiler's graph
        if merged:
            return F.linear(x, shifted(weight, a, b, scale, origin), bias)
        output = F.linear(x, weight, bias).contiguous()
        inner = _reduced(x.reshape(-1, x.shape[-1]), a)  # as in the node, to the bit
        output.view(-1, output.shape[-1]).addmm_(inner, b.t(), alpha=scale)
        return output
    a0, b0 = (None, None) if origin is None else origin
    rebuild, sources = source_of(x) or (None, ())
    output, _ = apply_node(_LowRankLinear, x, weight, bias, a, b, a0, b0, scale, merged, rebuild, *sources)
    return output


def low_rank_directly(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor | None:
    """:func:`low_rank_linear`, to the bit, where a node of ours does not pay, and nothing must be converted.

    That is where nobody wants a gradient (in generation a call has one token, and what is not arithmetic costs more
    than the products), and where the layer is small: autograd's own nodes run without Python then, and need no more
    memory. Returns ``None`` where it is not as simple; arguments as there, of any dtype.
    """
    dtype, shape = x.dtype, x.shape
    if (
        torch.compiler.is_compiling()  # what would be gained is not there
        or type(weight) not in _PLAIN
        or a is None
        or b is None
        or not (dtype == a.dtype == b.dtype == weight.dtype)
        or (bias is not None and bias.dtype != dtype)
        or torch._C._is_any_autocast_enabled()
        or is_transformed()
    ):
        return None
    grows = torch.is_grad_enabled()
    if not is_small(x, weight) and (grows or prefers_merged(x, weight)):
        return None
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    output, inner = F.linear(flat, weight, bias), _reduced(flat, a)
    if grows:
        output = torch.addmm(output, inner, b.t(), alpha=scale)
    else:
        output.addmm_(inner, b.t(), alpha=scale)
    return output if flat is x else output.view(*shape[:-1], -1)


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether input and output have so few numbers that a node written in Python would cost more than it saves.

    Measured on CPU: at 2 ** 14 autograd's own nodes take 0.55 to 0.95 of the time, at 2 ** 15 they break even.
    """
    rows, columns = weight.shape
    return x.numel() * max(rows, columns) < _SMALL * columns


def _reduced(flat: Tensor, a: Tensor) -> Tensor:
    """``x Aᵀ`` for x [tokens, in]: the short way where there are few numbers, that of the fast product where many."""
    return F.linear(flat, a) if flat.numel() < _SMALL else (a @ flat.t()).t()


def add_low_rank(output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The activation form for an output that is there already: ``output + s (x Aᵀ) Bᵀ``.

    Args:
        output: [..., out]; not written to.
        x: [..., in].
        a: [r, in], in the dtype of ``x``.
        b: [out, r], of any floating dtype.
        scale: factor s.

    Returns:
        [..., out] in the dtype of ``output``.
    """
    inner = F.linear(x, a).to(output.dtype).reshape(-1, a.shape[0])
    flat = output.reshape(-1, output.shape[-1])
    return torch.addmm(flat, inner, b.to(output.dtype).t(), alpha=scale).view(output.shape)
