"""Fastfood: a random projection from few numbers to many that is never stored.

``P v = H G Π H B v / c`` with B random signs, H the Walsh–Hadamard matrix, Π a permutation, G standard normal
(Le et al. 2013). Everything random is a function of (seed, index), computed piece by piece where it is needed:
there is nothing to store, and a seed means the same projection on every device and in every release. The
projected vector is zero but for its first numbers, so the inner H has only their length, repeated. Of the outer
one's output only the first numbers are wanted, so what goes into it is folded to their length.

What is random is kept for tensors that are used again, up to :data:`KEPT_BYTES` in a process; beyond that it is
drawn anew for every use. Either gives the same numbers.
"""

import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import pairwise
from threading import Lock
from typing import Any, Final, NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from lightning_pet.layers.transforms import is_ordinary, is_transformed

_BLOCK = 1 << 15  # pairs of normal numbers lie half a block apart: part of the definition, and fits a cache
_PIECE = {"cpu": _BLOCK}  # elements that are drawn at a time; elsewhere launches cost more than memory
_PIECE_ELSEWHERE = 1 << 20
LONGEST = 1 << 30

KEPT_BYTES: Final = 32 << 20
"""Most bytes that are kept of what is random, in all projections of a process together.

A projection of n numbers (padded to a power of two) takes 8 n in float32 and 12 n in float64.
"""

_PRODUCT_BITS, _FACTOR_BITS = 16, 5  # on a CPU shorter transforms are a few products with small matrices


def padded_length(size: int, numel: int) -> int:
    """Length of the transform: the power of two that holds both ends of the projection.

    >>> padded_length(3, 100), padded_length(1000, 100)
    (128, 1024)
    """
    return 1 << max(1, (max(size, numel) - 1).bit_length())


def hadamard_(x: Tensor) -> Tensor:
    """Multiply a contiguous vector by the Walsh–Hadamard matrix (entries ±1), in place and with 256 KiB beside it.

    Args:
        x: [n], n a power of two; n log₂ n additions.

    >>> hadamard_(torch.tensor([1.0, 0.0, 0.0, 2.0]))
    tensor([ 3., -1., -1.,  3.])
    """
    half = 1
    if multiplies_exactly(x):
        half = min(x.numel(), 1 << _PRODUCT_BITS)
        for block in x.view(-1, half).unbind(0):
            block.copy_(_by_products(block))
    while half < x.numel():
        _butterfly_(x, half)
        half *= 2
    return x


def _hadamard(x: Tensor, exactly: bool) -> Tensor:
    """The same, in place or not."""
    return _by_products(x) if exactly and x.numel() <= 1 << _PRODUCT_BITS else hadamard_(x)


def _butterfly_(x: Tensor, half: int) -> None:
    a, b = x.view(-1, 2, half).unbind(1)
    a.add_(b)
    torch.add(a, b, alpha=-2, out=b)  # (a + b) - 2 b


def _by_products(x: Tensor) -> Tensor:
    """Each product transforms the first of some dimensions, and moves it behind the others."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return _by_products(x)
    size = x.numel()
    for rows, matrix in _matrices(size, x.dtype):
        x = x.view(rows, -1).t() @ matrix
    return x.view(size)


@cache
def _matrices(size: int, dtype: torch.dtype) -> list[tuple[int, Tensor]]:
    """Small ones, with their sizes, whose product, dimension by dimension, is that of this size."""
    bits = size.bit_length() - 1
    factors = max(1, -(-bits // _FACTOR_BITS))
    ends = [bits * step // factors for step in range(factors + 1)]
    sizes = [1 << (end - start) for start, end in pairwise(ends)]
    return [(size, _matrix(size, dtype)) for size in sizes]


@cache
def _matrix(size: int, dtype: torch.dtype) -> Tensor:
    """The Walsh–Hadamard matrix itself."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=dtype)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix


def multiplies_exactly(x: Tensor) -> bool:
    """Whether products are made of the numbers as they are, and not of their first 8 or 11 bits, on a CPU."""
    if not x.is_cpu:
        return False
    if x.dtype == torch.float64:
        return True
    setting = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return setting in ("none", "ieee") and _has_exact_products()


@cache
def _has_exact_products() -> bool:
    """Whether they are by default: an environment variable may say otherwise."""
    with torch.inference_mode(False):
        values = 1 + torch.arange(1 << 10, dtype=torch.float32).view(32, 32) * 2**-23
        return torch.equal(torch.mm(values, torch.eye(32), out=torch.empty(32, 32)), values)


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
    if is_ordinary(vector):
        return _project(vector, numel, seed, False)
    projected: Tensor = torch.ops.lightning_pet.fastfood(vector, numel, seed)
    return projected


def projected_values(vector: Tensor, numel: int, seed: int) -> Tensor:
    """What :func:`fastfood` returns, without a gradient."""
    return _projected(vector, _drawn(vector, vector.numel(), numel, seed), numel)


def projected_before_back(vector: Tensor, numel: int, seed: int) -> Tensor:
    """The same where :func:`transposed_values` follows soon, which then finds drawn what is random."""
    drawn = _drawn(vector, vector.numel(), numel, seed)
    _kept.lend((seed, vector.numel(), numel, vector.dtype, vector.device), drawn)
    return _projected(vector, drawn, numel)


def _projected(vector: Tensor, drawn: "_Drawn", numel: int) -> Tensor:
    exactly = multiplies_exactly(vector)
    table = vector.new_zeros(drawn.table)
    torch.mul(vector, drawn.signs, out=table[: drawn.size])
    table = _hadamard(table, exactly)
    within = drawn.within
    out: Tensor | None = None
    for start, normal, index in drawn.pieces():
        values = table.index_select(0, index).mul_(normal)
        if values.numel() > within:  # all that a row of the outer matrix adds with one sign, for the wanted rows
            values = values.view(-1, within).sum(0)
        if values.numel() == within:
            out = values if out is None else out.add_(values)
        else:
            out = vector.new_zeros(within) if out is None else out
            out[start % within :][: values.numel()].add_(values)
    assert out is not None
    return _hadamard(out, exactly).mul_(drawn.scale())[:numel]


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
    if is_ordinary(values):
        return _project(values, size, seed, True)
    back: Tensor = torch.ops.lightning_pet.fastfood_transposed(values, size, seed)
    return back


def transposed_values(values: Tensor, size: int, seed: int) -> Tensor:
    """What :func:`fastfood_transposed` returns, without a gradient."""
    drawn, exactly = _drawn(values, size, values.numel(), seed), multiplies_exactly(values)
    within = drawn.within
    spread = values.new_zeros(within)
    spread[: drawn.numel] = values
    spread = _hadamard(spread, exactly)
    table = values.new_zeros(drawn.table)
    for start, normal, index in drawn.pieces():
        if normal.numel() > within:
            part = (normal.view(-1, within) * spread).view(-1)
        else:
            part = normal * spread[start % within :][: normal.numel()]
        table.index_add_(0, index, part)
    return _hadamard(table, exactly)[:size].mul_(drawn.scale()) * drawn.signs


# -- the operators: defined with the first projection, as that takes milliseconds -------------------


def define() -> None:
    """Make the operators, once; a compiled projection needs them before."""
    if not torch.compiler.is_compiling():
        _define()


@cache
def _define() -> None:
    forward = torch.library.custom_op("lightning_pet::fastfood", projected_values, mutates_args=())
    forward.register_fake(lambda vector, numel, seed: vector.new_empty(numel))
    forward.register_autograd(_fastfood_backward, setup_context=_remember)
    back = torch.library.custom_op("lightning_pet::fastfood_transposed", transposed_values, mutates_args=())
    back.register_fake(lambda values, size, seed: values.new_empty(size))
    back.register_autograd(_transposed_backward, setup_context=_remember)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size, ctx.seed = len(inputs[0]), inputs[2]


def _fastfood_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return fastfood_transposed(gradient.contiguous(), ctx.size, ctx.seed), None, None


def _transposed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return fastfood(gradient.contiguous(), ctx.size, ctx.seed), None, None


class _Project(torch.autograd.Function):
    """Both projections in the ordinary case, for a third of what an operator costs."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, size: int, seed: int, transposed: bool) -> Tensor:
        ctx.length, ctx.seed, ctx.transposed = vector.numel(), seed, transposed
        return (transposed_values if transposed else projected_values)(vector, size, seed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _project(gradient.contiguous(), ctx.length, ctx.seed, not ctx.transposed), None, None, None


# Past what ``Function.apply`` does for torch.func, which does not come here.
_project: Callable[..., Tensor] = super(torch.autograd.Function, _Project).apply


class _Linear(torch.autograd.Function):
    """Both projections where the operators will not do: with all derivatives, each of which is one of them again."""

    @staticmethod
    def forward(vector: Tensor, size: int, seed: int, transposed: bool) -> Tensor:
        return (transposed_values if transposed else projected_values)(vector.contiguous(), size, seed)

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


class _Drawn:
    """What is random in one projection.

    Args:
        like: tells device and dtype.
        size: numbers of the vector.
        numel: rows.
        seed: what all of it is a function of.

    Attributes:
        table: length of the inner transform.
        within: length of the outer transform that its wanted rows need.
    """

    def __init__(self, like: Tensor, size: int, numel: int, seed: int) -> None:
        self.size, self.numel = size, numel
        self.table, self.within = padded_length(size, 1), padded_length(1, numel)
        self._length = padded_length(size, numel)
        self._keys = _keys(seed)
        self._like = like.new_empty(0)
        self._total: Tensor | None = None
        self._kept: list[tuple[int, Tensor, Tensor]] = []
        self._scale: Tensor | None = None
        counter = torch.arange(size, dtype=torch.int32, device=like.device)
        self.signs = ((_hash(counter, self._keys.signs) >> 31) * 2 + 1).to(like.dtype)

    def pieces(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first index, normal numbers, positions in the table that the permutation takes them from), in order."""
        if self._kept:
            for start, normal, index in self._kept:
                yield start, normal, index.int()
            return
        bits = self._length.bit_length() - 1
        step = min(self._length, _PIECE.get(self._like.device.type, _PIECE_ELSEWHERE))
        total = self._like.new_zeros(())
        for start in range(0, self._length, step):
            counter = torch.arange(start, start + step, dtype=torch.int32, device=self._like.device)
            normal = _normal(counter, min(self._length, _BLOCK), self._keys, self._like.dtype)
            total += normal.square().sum()
            yield start, normal, _permuted(counter, bits, self._keys) & (self.table - 1)
        self._total = total

    def scale(self) -> Tensor:
        """Makes every row count alike: with d numbers padded to a power of two n = numel, columns of norm 1 exactly.

        Known when all pieces have been drawn.
        """
        if self._scale is not None:
            return self._scale
        assert self._total is not None
        return (self._total * self.numel).rsqrt()

    @property
    def bytes(self) -> int:
        """What it takes to keep all of it."""
        return self._length * (self._like.itemsize + 4) + self.signs.nbytes

    def keep(self, densely: bool = False) -> None:
        """Hold what was drawn.

        Args:
            densely: in less memory, and with a little more work at every use.
        """
        short = torch.int16 if densely and self.table <= 1 << 15 else torch.int32
        self._kept = [(start, normal, index.to(short)) for start, normal, index in self.pieces()]
        self._scale = self.scale()


class _Kept:
    """Projections of this process whose random numbers are held: the first ones that come, while there is room.

    Only of seeds that something holds for use again and again: see :func:`hold`.
    """

    def __init__(self) -> None:
        self.drawn: dict[tuple[Any, ...], _Drawn] = {}
        self.lent: dict[tuple[Any, ...], _Drawn] = {}
        self.users: Counter[int] = Counter()
        self.bytes = 0
        self._released: deque[int] = deque()
        self._lock = Lock()

    def add(self, key: tuple[Any, ...], drawn: _Drawn) -> None:
        """Hold one, if there is room."""
        with self._lock:
            self._settle()
            if key in self.drawn or self.bytes + drawn.bytes > KEPT_BYTES:
                return
            self.bytes += drawn.bytes
            drawn.keep()
            self.drawn[key] = drawn

    def lend(self, key: tuple[Any, ...], drawn: _Drawn) -> None:
        """Hold one until it is used once more, or another takes its place."""
        self.lent.clear()
        if key not in self.drawn and drawn.bytes <= KEPT_BYTES:
            drawn.keep(densely=True)
            self.lent[key] = drawn

    def hold(self, seed: int) -> None:
        """One more uses this seed."""
        with self._lock:
            self.users[seed] += 1
            self._settle()

    def release(self, seed: int) -> None:
        """One less; the last one lets go what belongs to the seed.

        The garbage collector calls it, maybe in the midst of the other methods: it waits for nobody.
        """
        self._released.append(seed)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        while self._released:
            seed = self._released.popleft()
            self.users[seed] -= 1
            if self.users[seed] <= 0:
                del self.users[seed]
                for key in [key for key in self.drawn if key[0] == seed]:
                    self.bytes -= self.drawn.pop(key).bytes


_kept = _Kept()


def hold(owner: object, seed: int) -> None:
    """While ``owner`` lives, the random numbers of this seed may be kept from one projection to the next."""
    _kept.hold(seed)
    finalize(owner, _kept.release, seed).atexit = False


def _drawn(like: Tensor, size: int, numel: int, seed: int) -> _Drawn:
    key = (seed, size, numel, like.dtype, like.device)
    held = _kept.drawn.get(key) or _kept.lent.pop(key, None)
    if held is not None:
        return held
    with torch.inference_mode(False), torch.no_grad():
        drawn = _Drawn(like, size, numel, seed)
        if (
            type(drawn.signs) is Tensor and _kept.users[seed] and not drawn.signs.is_meta
        ):  # else it is another's stand-in for a tensor
            _kept.add(key, drawn)
    return drawn


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


def _hash(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Scrambled 32-bit integers: multiplications by odd numbers (which wrap around) between shifts."""
    x = counter * key[0] + key[1]
    for shift, factor in ((16, 0x7FEB352D), (15, 0x46CA68B5)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
