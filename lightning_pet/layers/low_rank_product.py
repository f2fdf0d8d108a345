"""The products of a low-rank delta: ``y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ``.

There are two ways to compute the forward. The *activation form* adds two skinny products to the
base's; it is right for any dtype and any number of tokens. The *merged form* multiplies with
``W + s B A``, one product as in the base; it is used where it is exact enough (float32 and float64)
and cheaper (many tokens). The backward is the same for both: the gradients of A and B are skinny
products, and the input gradient is the base's, added to the low-rank one in the same product.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_pet.errors import PETError
from lightning_pet.layers.low_rank_source import source_of
from lightning_pet.layers.transforms import apply_node, is_transformed

_PLAIN = (Tensor, nn.Parameter)
_PIECE = 1 << 18  # numbers of a weight that are widened at a time: they stay in a cache
_ROWS = 64  # but never fewer: a strip of a transposed weight should hold whole lines of a cache
_SMALL = 2**15
_NARROW = 2**14
_BITS = 53
_CHUNK = 1 << 16  # numbers that stay in a cache

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

    It is exactly W while A = A0 and B = B0.
    The result has the layout of ``weight``: with another one the product would round differently.
    """
    if not weight.is_contiguous() and weight.t().is_contiguous():
        swapped = None if origin is None else (origin[1].t(), origin[0].t())
        return shifted(weight.t(), b.t(), a.t(), scale, swapped).t()
    if origin is None:
        return torch.addmm(weight, b, a, alpha=scale)
    a, b = _moved(a, b, origin)
    return torch.addmm(weight, b, a, alpha=scale)


def _moved(a: Tensor, b: Tensor, origin: Origin) -> Origin:
    """A and B of rank 2 r whose product is ``B A - B0 A0 = (B - B0) A + B0 (A - A0)``, exactly zero at the start."""
    return torch.cat([a, a - origin[0]]), torch.cat([b - origin[1], origin[1]], 1)


class _LowRankLinear(torch.autograd.Function):
    """Base product (or one that is there already) and low-rank term in one node, in either form.

    Beside its parameters it keeps x (or what gives x), one byte per number of x where it drops some, and, in the
    activation form, x Aᵀ, its second output. Skinny products are taken as [r, tokens]: with a short first side they
    run two to four times as fast as with a short last one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        a0: Tensor | None,
        b0: Tensor | None,
        scale: float,
        merged: bool,
        rebuild: Callable[..., Tensor] | None,
        product: Tensor | None,
        mask: Tensor | None,
        kept: float,
        *sources: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        if merged:
            assert weight is not None
            return owned(F.linear(x, shifted(weight, a, b, scale, _pair(a0, b0)), bias)), None
        output, inner = _activation_form(x, weight, bias, a, b, _pair(a0, b0), scale, product, mask, kept)
        return owned(output), inner

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, weight, _, a, b, a0, b0, ctx.scale, _, ctx.rebuild, _, mask, ctx.kept, *sources = inputs
        inner = output[1]
        if inner is not None:
            ctx.mark_non_differentiable(inner)
        ctx.set_materialize_grads(False)
        # With an A that does not train, x Aᵀ is all that the backward pass needs of x.
        ctx.reads_x = inner is None or ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(weight, a, b, a0, b0, inner, mask, *((sources or (x,)) if ctx.reads_x else ()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, a, b, a0, b0, inner, mask, *sources = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, *others = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * (5 + len(others))
        if grad is None:
            return tuple(grads)
        if ctx.needs_input_grad[10]:
            grads[10] = grad
        scale = ctx.scale * ctx.kept
        g = grad.reshape(-1, grad.shape[-1])
        together = a0 is not None and mask is None and need_x  # what x gets from both pairs, in one product
        factor = torch.cat([b * scale, b0 * -scale], 1) if together else b * scale
        both = factor.t() @ g.t()
        gb = both[: a.shape[0]]
        if torch.is_grad_enabled():
            if not ctx.reads_x:
                raise PETError("second derivatives need an A that trains: set train_a=True.")
            inner = None  # a second derivative is wanted, which a non-differentiable output would lose
        if mask is not None:
            mask = mask.reshape(-1, mask.shape[-1])
        if need_weight or need_a or (need_b and inner is None):
            x = ctx.rebuild(*sources) if ctx.rebuild is not None else sources[0]
            x = x.reshape(-1, x.shape[-1])
            if need_weight:
                grads[1] = g.t() @ x
            x = x if mask is None else x * mask
            if need_b and inner is None:
                inner = a @ x.t()
            if need_a:
                grads[3] = gb @ x
            del x  # before the gradient of its size is made
        if need_b:
            grads[4] = ((inner @ g) * scale).t()
        if need_bias:
            grads[2] = g.sum(0)
        if need_x:
            flat = both.t() @ (torch.cat([a, a0]) if together else a)
            if mask is not None:
                flat.mul_(mask)
            if a0 is not None and not together:
                flat.addmm_(g @ (b0 * ctx.scale), a0, alpha=-1)
            if weight is not None:  # the large product adds to the small one, not the reverse: one pass less
                flat.addmm_(g, weight)
            grads[0] = flat.view(*grad.shape[:-1], flat.shape[-1])
        return tuple(grads)


def _activation_form(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    origin: Origin | None,
    scale: float,
    product: Tensor | None,
    mask: Tensor | None,
    kept: float,
) -> tuple[Tensor, Tensor]:
    """The output, and x Aᵀ as [r, tokens]."""
    flat_x = x.reshape(-1, x.shape[-1])
    if origin is not None and mask is None:
        a, b = _moved(a, b, origin)
    both = _reduced(flat_x if mask is None else flat_x * mask.reshape(flat_x.shape), a).t()
    inner = both
    if origin is not None and mask is None:  # the other half must not be kept with it
        inner = both[: len(origin[0])].clone(memory_format=torch.contiguous_format)
    if weight is None:
        assert product is not None
        output = product.clone(memory_format=torch.contiguous_format)
    else:
        output = F.linear(x, weight, bias).contiguous()
    flat = output.view(-1, output.shape[-1])
    if torch.compiler.is_compiling():  # torch 2.11 loses the node's gradients when it traces the form below
        return torch.addmm(flat, both.t(), b.t(), alpha=scale).view(output.shape), inner
    flat.addmm_(both.t(), b.t(), alpha=scale * kept)
    if origin is not None and mask is not None:
        flat.addmm_(_reduced(flat_x, -origin[0]), origin[1].t(), alpha=scale)
    return output, inner


def owned(output: Tensor) -> Tensor:
    """The same memory as no view of anything: what follows the layer may write into its output."""
    owned: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return owned


# Autograd asks for the signature at every call; reading it anew takes a quarter of the call.
vars(_LowRankLinear.forward)["__signature__"] = inspect.signature(_LowRankLinear.forward)


def _pair(a0: Tensor | None, b0: Tensor | None) -> Origin | None:
    return None if a0 is None or b0 is None else (a0, b0)


def drawn_mask(x: Tensor, probability: float) -> Tensor:
    """Zeros and ones in one byte each, by the numbers that ``F.dropout(x, probability)`` would draw."""
    if x.device.type in ("cuda", "xpu"):  # its kernel there draws in another order than ``bernoulli_``
        return torch.native_dropout(x.detach(), probability, True)[1]
    if x.device.type != "cpu" or type(x) is not Tensor or not x.is_contiguous():
        return torch.empty_like(x, dtype=torch.uint8, requires_grad=False).bernoulli_(1 - probability)
    # ``bernoulli_`` compares 53 random bits with the probability, number by number: half of the time goes into that.
    mask, numbers = torch.empty(x.numel(), dtype=torch.bool), torch.empty(min(x.numel(), _CHUNK), dtype=torch.int64)
    limit = math.ceil((1 - probability) * 2**_BITS)
    for part in mask.split(_CHUNK):  # type: ignore[no-untyped-call]
        torch.lt(numbers[: len(part)].random_().bitwise_and_(2**_BITS - 1), limit, out=part)
    return mask.view(torch.uint8).view(x.shape)


def low_rank_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    merged: bool,
    origin: Origin | None = None,
    product: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Base product and low-rank term together. All tensors have the dtype of ``x``.

    Args:
        x: [..., in].
        weight: [out, in], any layout; ``None`` if there is a product already.
        bias: [out] or ``None``.
        a: [r, in].
        b: [out, r].
        scale: factor s of the low-rank term.
        merged: use the merged form; not with dropout.
        origin: what is subtracted from B A; it sees x without dropout.
        product: the base product with the bias, [..., out], where it is there already; not written to.
        dropout: probability of zeroing a number of x on the way to A.

    Returns:
        [..., out], differentiable in all tensors but ``origin``.
    """
    # The node below knows the backward pass only, and writes in place; a compiler makes a better one of the rest.
    special = bool(dropout) or product is not None or (origin is not None and not merged)
    if is_transformed() or (special and torch.compiler.is_compiling()) or not _fits(product, x):
        return _written_out(x, weight, bias, a, b, scale, merged, origin, product, dropout)
    mask, kept = drawn_mask(x, dropout) if dropout else None, 1 / (1 - dropout)
    # Without a gradient a node would cost as much as the products, and end a compiler's graph.
    given = (x, a, b, weight, bias, product)
    rests = torch.compiler.is_compiling() and not any(t is not None and t.requires_grad for t in given)
    if rests or not torch.is_grad_enabled():
        if merged and weight is not None:
            return F.linear(x, shifted(weight, a, b, scale, origin), bias)
        return _activation_form(x, weight, bias, a, b, origin, scale, product, mask, kept)[0]
    a0, b0 = (None, None) if origin is None else origin
    rebuild, sources = source_of(x) or (None, ())
    output: Tensor
    output, _ = apply_node(
        _LowRankLinear, x, weight, bias, a, b, a0, b0, scale, merged, rebuild, product, mask, kept, *sources
    )
    return output


def _fits(product: Tensor | None, x: Tensor) -> bool:
    return product is None or (is_plain(product) and product.dtype == x.dtype)


def _written_out(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    merged: bool,
    origin: Origin | None,
    product: Tensor | None,
    dropout: float,
) -> Tensor:
    """The same in torch's own operations."""
    if merged and weight is not None:
        return F.linear(x, shifted(weight, a, b, scale, origin), bias)
    if product is None:
        assert weight is not None
        product = F.linear(x, weight, bias)
    change = F.linear(F.linear(F.dropout(x, dropout) if dropout else x, a), b)
    if origin is not None:
        # Both terms first: their difference is exactly zero at the start, their sums with the output are not.
        change = change - F.linear(F.linear(x, origin[0]), origin[1])
    return torch.add(product, change.to(product.dtype), alpha=scale)


def low_rank_directly(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    made: Callable[[], Tensor] | None = None,
    origin: Origin | None = None,
) -> Tensor | None:
    """:func:`low_rank_linear`, to the bit, where a node of ours does not pay, and nothing must be converted.

    That is where nobody wants a gradient (in generation a call has one token, and what is not arithmetic costs more
    than the products), and where the layer is small: autograd's own nodes run without Python then, and need no more
    memory. Returns ``None`` where it is not as simple; arguments as there, of any dtype. ``made`` gives what acts in
    the place of A; it is asked only where the product is computed here, because asking may count (a penalty). An
    ``origin`` must have the dtype of A, and no dropout beside it.
    """
    if a is None or b is None or not is_simple(x, weight, bias, a, b):
        return None
    shape = x.shape
    grows = torch.is_grad_enabled()
    if not is_small(x, weight) and (grows or dropout or prefers_merged(x, weight)):
        return None
    if made is not None:
        a = made()
    if origin is not None:
        a, b = _moved(a, b, origin)
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    # Dropped before it is flattened: what is drawn goes by the memory of x.
    output = F.linear(flat, weight, bias)
    inner = _reduced(F.dropout(x, dropout).reshape(flat.shape) if dropout else flat, a)
    if grows:
        output = torch.addmm(output, inner, b.t(), alpha=scale)
    else:
        output.addmm_(inner, b.t(), alpha=scale)
    return output if flat is x else output.view(*shape[:-1], output.shape[-1])


def is_simple(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> bool:
    """Whether nothing must be converted, and neither a compiler nor a transform looks on."""
    dtype = x.dtype
    return not (
        torch.compiler.is_compiling()  # what would be gained is not there
        or type(weight) not in _PLAIN
        or not (dtype == a.dtype == b.dtype == weight.dtype)
        or (bias is not None and bias.dtype != dtype)
        or torch._C._is_any_autocast_enabled()
        or is_transformed()
    )


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether input and output have so few numbers that a node written in Python would cost more than it saves.

    Measured on CPU: at 2 ** 14 autograd's own nodes take 0.55 to 0.95 of the time, at 2 ** 15 they break even.
    """
    rows, columns = weight.shape
    return x.numel() * max(rows, columns) < _SMALL * columns


def is_narrow(x: Tensor, weight: Tensor) -> bool:
    """Whether a small layer's weight is so small, too, that it costs less to change it than to add to its output.

    Measured on CPU with gradients: at 2 ** 12 numbers 0.8 to 0.9 of the time, at 2 ** 14 they break even, whatever the
    tokens. What is kept more is the changed weight, 64 KiB at most in single precision. Half precision would round the
    change away, and in another layout the base's product would round differently.
    """
    exact = x.dtype in (torch.float32, torch.float64) and weight.is_contiguous()
    return exact and weight.numel() <= _NARROW and is_small(x, weight)


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


def add_product_(
    matrix: Tensor,
    b: Tensor,
    a: Tensor,
    scale: float,
    *,
    origin: Origin | None = None,
    magnitude: Tensor | None = None,
    rounds_twice: bool = False,
) -> None:
    """``matrix += s (B A - B0 A0)``, in place, with a few rows of working memory.

    Args:
        matrix: [..., out, in], of at most three dimensions, any floating dtype and any layout.
        b: [..., out, r], in the dtype of the sum: at least float32.
        a: [..., r, in], likewise.
        scale: factor s.
        origin: (A0, B0). The difference comes first, so that it is exactly zero while A = A0 and B = B0.
        magnitude: [..., out]; the norms that the rows of the sum are given (DoRA).
        rounds_twice: the product is rounded before it is added.
    """
    if matrix.dim() == 3:
        for i, part in enumerate(matrix):
            pair = None if origin is None else (origin[0][i], origin[1][i])
            norms = None if magnitude is None else magnitude[i]
            add_product_(part, b[i], a[i], scale, origin=pair, magnitude=norms, rounds_twice=rounds_twice)
        return
    if magnitude is None and matrix.stride(0) < matrix.stride(1):  # rows of what lies together in memory
        swapped = None if origin is None else (origin[1].t(), origin[0].t())
        add_product_(matrix.t(), a.t(), b.t(), scale, origin=swapped, rounds_twice=rounds_twice)
        return
    with torch.autocast(matrix.device.type, enabled=False):  # it would round the product
        if origin is None and magnitude is None and matrix.dtype == b.dtype and not rounds_twice:
            matrix.addmm_(b, a, alpha=scale)
        else:
            for piece, work in _in_pieces(matrix, b, a, scale, origin, magnitude):
                piece.copy_(work)


def sum_is_finite(
    matrix: Tensor,
    b: Tensor,
    a: Tensor,
    scale: float,
    *,
    origin: Origin | None = None,
    magnitude: Tensor | None = None,
    rounds_twice: bool = False,
) -> bool:
    """Whether :func:`add_product_` would leave finite numbers, with the same memory; it changes nothing."""
    if matrix.dim() == 3:
        pairs = [None if origin is None else (origin[0][i], origin[1][i]) for i in range(len(matrix))]
        norms = [None if magnitude is None else magnitude[i] for i in range(len(matrix))]
        return all(
            sum_is_finite(part, b[i], a[i], scale, origin=pairs[i], magnitude=norms[i]) for i, part in enumerate(matrix)
        )
    if not matrix.numel():
        return True
    with torch.autocast(matrix.device.type, enabled=False):
        ends = [torch.stack(torch.aminmax(w)) for _, w in _in_pieces(matrix, b, a, scale, origin, magnitude)]
    return all(bool(end.to(matrix.dtype).isfinite().all()) for end in ends)


def _in_pieces(
    matrix: Tensor, b: Tensor, a: Tensor, scale: float, origin: Origin | None, magnitude: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the matrix, and what they become; the memory of the latter is used again for the next."""
    step = max(_ROWS, _PIECE // max(1, matrix.shape[1]))
    # All memory before the first number changes.
    memory = b.new_empty(1 if origin is None else 2, min(step, len(matrix)), matrix.shape[1])
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        piece = matrix[rows]
        work, other = memory[0, : len(piece)], memory[-1, : len(piece)]
        torch.mm(b[rows], a, out=work)
        if origin is not None:
            work.sub_(torch.mm(origin[1][rows], origin[0], out=other))
        work.mul_(scale).add_(piece)
        if magnitude is not None:
            norm = torch.linalg.vector_norm(work, dim=-1).to(magnitude.dtype)
            work.mul_((magnitude[rows] / norm).to(work.dtype).unsqueeze(-1))
        yield piece, work
