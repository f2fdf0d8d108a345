"""The entries of largest magnitude among many tensors, exactly as many as asked for, in little memory."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_HALF = 16
_INFINITY = 0x7F800000


def largest(tensors: Callable[[], Iterable[Tensor]], count: int) -> list[Tensor]:
    """Find the ``count`` entries of largest magnitude over all tensors together.

    Ties are broken by order, and zeros are never taken. The tensors are run through three times, so that
    never more than one of them need exist. Magnitudes are compared as float32, whose
    bits rise with them: the limit is found half by half from two histograms.

    Args:
        tensors: gives them, in the same order every time; floating, of any shape.
        count: how many entries to take.

    Returns:
        For each tensor the flat indices of its entries, rising; in all ``count``, or all that are not zero
        if there are fewer.

    Raises:
        ValueError: if an entry is not finite.

    >>> [places.tolist() for places in largest(lambda: [torch.tensor([1.0, -3.0]), torch.tensor([2.0])], 2)]
    [[1], [0]]
    """
    upper, above = _from_top(sum(_histogram(_bits(tensor) >> _HALF, _HALF - 1) for tensor in tensors()), count)
    lower, over = _from_top(
        sum(_histogram(bits[bits >> _HALF == upper] & ((1 << _HALF) - 1), _HALF) for bits in map(_bits, tensors())),
        count - above,
    )
    limit, ties = (upper << _HALF) + lower, count - above - over
    found = []
    for bits in map(_bits, tensors()):
        at_limit = (bits == limit) & (bits > 0)
        taken = at_limit & (at_limit.cumsum(0) <= ties)
        ties -= int(taken.sum())
        found.append(((bits > limit) | taken).nonzero().flatten())
    return found


def _bits(tensor: Tensor) -> Tensor:
    bits = tensor.detach().reshape(-1).float().abs().view(torch.int32)
    if bits.numel() and int(bits.max()) >= _INFINITY:
        raise ValueError("a tensor holds NaN or infinity")
    return bits


def _histogram(values: Tensor, bits: int) -> Tensor:
    return torch.bincount(values, minlength=1 << bits).cpu()


def _from_top(histogram: Tensor | int, count: int) -> tuple[int, int]:
    """The bin in which the ``count``-th value from the top is, and how many values are in the bins above it."""
    if isinstance(histogram, int):
        return 0, 0
    summed = histogram.flip(0).cumsum(0)
    position = min(int((summed < count).sum()), len(summed) - 1)
    index = len(summed) - 1 - position
    return index, int(summed[position] - histogram[index])
