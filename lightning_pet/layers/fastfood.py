"""Fastfood: a random projection from few numbers to many that is never stored.

``P v = H G Π H B v / c`` with B random signs, H the Walsh–Hadamard matrix, Π a permutation, G standard normal
(Le et al. 2013). Everything random is a function of (seed, index), computed piece by piece where it is needed:
there is nothing to store, and a seed means the same projection on every device and in every release. The
projected vector is zero but for its first numbers, so the inner H has only their length, repeated.
"""

import hashlib
import math
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_pet.layers.transforms import is_transformed

_BLOCK = 1 << 15  # pairs of normal numbers lie half a block apart: part of the definition, and fits a cache
_PIECE = {"cpu": _BLOCK}  # elements that are drawn at a time; elsewhere launches cost more than memory
_PIECE_ELSEWHERE = 1 << 20
LONGEST = 1 << 30


def padded_length(size: int, numel: int) -> int:
    """Length of the transform: the power of two that holds both ends of the projection.

    >>> padded_length(3, 100), padded_length(1000, 100)
    (128, 1024)
    """
    return 1 << max(1, (max(size, numel) - 1).bit_length())


def hadamard_(x: Tensor) -> Tensor:
    """Multiply a contiguous vector by the Walsh–Hadamard matrix (entries ±1), in place and without other memory.

    Args:
        x: [n], n a power of two; n log₂ n additions.

    >>> hadamard_(torch.tensor([1.0, 0.0, 0.0, 2.0]))
    tensor([ 3., -1., -1.,  3.])
    """
    half = 1
    while half < x.numel():
        a, b = x.view(-1, 2, half).unbind(1)
        a.add_(b)
        torch.add(a, b, alpha=-2, out=b)  # (a + b) - 2 b
        half *= 2
    return x


def fastfood(vector: Tensor, numel: int, seed: int) -> Tensor:
    """Project a vector: ``P v``, linear in v, with ``E ‖P v‖ = ‖v‖`` over seeds.

    Args:
        vector: v [d], float32 or float64.
        numel: rows of P.
        seed: P is a function of it, d and ``numel``.

    Returns:
        [numel]. Autograd keeps nothing for the backward pass, which is the transposed projection.
    """
    define()
    if is_transformed():
        return _linear(vector, numel, seed, False)
    projected: Tensor = torch.ops.lightning_pet.fastfood(vector, numel, seed)
    return projected


def _fastfood(vector: Tensor, numel: int, seed: int) -> Tensor:
    length, keys = padded_length(len(vector), numel), _keys(seed)
    table = vector.new_zeros(padded_length(len(vector), 1))
    table[: len(vector)] = vector * _signs(vector, keys)
    hadamard_(table)
    out = vector.new_empty(length)
    total = vector.new_zeros(())
    for start, normal, index in _pieces(out, len(table), keys):
        total += normal.square().sum()
        torch.mul(table.index_select(0, index), normal, out=out[start : start + len(index)])
    return hadamard_(out).mul_(_scale(total, numel))[:numel]


def fastfood_transposed(values: Tensor, size: int, seed: int) -> Tensor:
    """Project back: ``Pᵀ y``.

    Args:
        values: y [numel].
        size: d.
        seed: as in :func:`fastfood`.

    Returns:
        [d].
    """
    define()
    if is_transformed():
        return _linear(values, size, seed, True)
    back: Tensor = torch.ops.lightning_pet.fastfood_transposed(values, size, seed)
    return back


def _fastfood_transposed(values: Tensor, size: int, seed: int) -> Tensor:
    keys = _keys(seed)
    spread = values.new_zeros(padded_length(size, len(values)))
    spread[: len(values)] = values
    hadamard_(spread)
    table = values.new_zeros(padded_length(size, 1))
    total = values.new_zeros(())
    for start, normal, index in _pieces(spread, len(table), keys):
        total += normal.square().sum()
        table.index_add_(0, index, spread[start : start + len(index)] * normal)
    out = hadamard_(table)[:size].mul_(_scale(total, len(values)))
    return out * _signs(out, keys)


# -- the operators: defined with the first projection, as that takes milliseconds -------------------


def define() -> None:
    """Make the operators, once; a compiled projection needs them before."""
    if not torch.compiler.is_compiling():
        _define()


@cache
def _define() -> None:
    forward = torch.library.custom_op("lightning_pet::fastfood", _fastfood, mutates_args=())
    forward.register_fake(lambda vector, numel, seed: vector.new_empty(numel))
    forward.register_autograd(_fastfood_backward, setup_context=_remember)
    back = torch.library.custom_op("lightning_pet::fastfood_transposed", _fastfood_transposed, mutates_args=())
    back.register_fake(lambda values, size, seed: values.new_empty(size))
    back.register_autograd(_transposed_backward, setup_context=_remember)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size, ctx.seed = len(inputs[0]), inputs[2]


def _fastfood_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return fastfood_transposed(gradient.contiguous(), ctx.size, ctx.seed), None, None


def _transposed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return fastfood(gradient.contiguous(), ctx.size, ctx.seed), None, None


class _Linear(torch.autograd.Function):
    """Both projections where the operators will not do: with all derivatives, each of which is one of them again."""

    @staticmethod
    def forward(vector: Tensor, size: int, seed: int, transposed: bool) -> Tensor:
        return (_fastfood_transposed if transposed else _fastfood)(vector.contiguous(), size, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        vector, ctx.size, ctx.seed, ctx.transposed = inputs
        ctx.length = len(vector)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _linear(gradient, ctx.length, ctx.seed, not ctx.transposed), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _linear(tangent, ctx.size, ctx.seed, ctx.transposed)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], vector: Tensor, size: int, seed: int, transposed: bool
    ) -> tuple[Tensor, int]:
        assert dims[0] is not None
        return torch.stack([_linear(row, size, seed, transposed) for row in vector.unbind(dims[0])]), 0


def _linear(vector: Tensor, size: int, seed: int, transposed: bool) -> Tensor:
    # A compiler traces no forward mode of a function's own.
    apply = torch.compiler.disable(_Linear.apply)  # type: ignore[no-untyped-call]
    projected: Tensor = apply(vector, size, seed, transposed)
    return projected


# -- what is random ---------------------------------------------------------------------------------


class _Keys(NamedTuple):
    """Odd multipliers and offsets of 31 bits, as every operation on indices is one of 32-bit integers."""

    signs: tuple[int, int]
    normal: tuple[int, int]
    permutation: tuple[tuple[int, int], ...]


@lru_cache(maxsize=65536)
def _keys(seed: int) -> _Keys:
    digest = hashlib.sha512(str(seed).encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") >> 1 for i in range(0, 48, 4)]
    pairs = [(words[i] | 1, words[i + 1]) for i in range(0, len(words), 2)]
    return _Keys(pairs[0], pairs[1], tuple(pairs[2:]))


def _pieces(like: Tensor, table: int, keys: _Keys) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first index, normal numbers, positions in the table that the permutation takes them from), in order."""
    length = len(like)
    bits = length.bit_length() - 1
    step = min(length, _PIECE.get(like.device.type, _PIECE_ELSEWHERE))
    for start in range(0, length, step):
        counter = torch.arange(start, start + step, dtype=torch.int32, device=like.device)
        yield (
            start,
            _normal(counter, min(length, _BLOCK), keys, like.dtype),
            _permuted(counter, bits, keys) & (table - 1),
        )


def _permuted(index: Tensor, bits: int, keys: _Keys) -> Tensor:
    """A bijection of the integers below ``2^bits``: every step is one. Changes ``index``."""
    for factor, offset in keys.permutation:
        index.mul_(factor).add_(offset).bitwise_and_((1 << bits) - 1)
        index.bitwise_xor_(index >> (bits + 1) // 2)
    return index


def _normal(counter: Tensor, block: int, keys: _Keys, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers by the Box–Muller transform."""
    first, second = _hash(counter, keys.normal).to(dtype).view(-1, 2, block // 2).unbind(1)
    radius = (first * 2**-32 + 0.5).clamp_(min=2**-33).log_().mul_(-2).sqrt_()
    angle = second * (math.pi * 2**-31)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1).view(-1)


def _signs(like: Tensor, keys: _Keys) -> Tensor:
    counter = torch.arange(len(like), dtype=torch.int32, device=like.device)
    return ((_hash(counter, keys.signs) >> 31) * 2 + 1).to(like.dtype)


def _hash(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Scrambled 32-bit integers: multiplications by odd numbers (which wrap around) between shifts."""
    x = counter * key[0] + key[1]
    for shift, factor in ((16, 0x7FEB352D), (15, 0x46CA68B5)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _scale(total: Tensor, numel: int) -> Tensor:
    """Makes every row count alike: with d numbers padded to a power of two n = numel, columns of norm 1 exactly."""
    return (total * numel).rsqrt()
