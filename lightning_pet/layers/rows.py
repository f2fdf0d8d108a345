"""Some rows of a host's weight, or some of its features: taken out, put back, spread over all."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Rows = tuple[tuple[int, int], ...]


def whole(rows: Sequence[Sequence[int]] | None, features: int) -> Rows:
    """The ranges, or one of all features where none are given."""
    return ((0, features),) if rows is None else tuple((start, stop) for start, stop in rows)


def ranges_of(rows: Iterable[int]) -> list[list[int]]:
    """Single rows as ranges.

    >>> ranges_of([7, 2, 3, 4])
    [[2, 5], [7, 8]]
    """
    found: list[list[int]] = []
    for row in sorted(rows):
        if found and found[-1][1] == row:
            found[-1][1] = row + 1
        else:
            found.append([row, row + 1])
    return found


def size(rows: Rows) -> int:
    """Number of features in the ranges."""
    return sum(stop - start for start, stop in rows)


def take(full: Tensor, rows: Rows, dim: int) -> Tensor:
    """What ``full`` holds in the ranges of a dimension."""
    return torch.cat([full.narrow(dim, start, stop - start) for start, stop in rows], dim)


def put(full: Tensor, own: Tensor, rows: Rows, dim: int) -> Tensor:
    """``full`` with ``own`` in place of what :func:`take` returns; a new tensor."""
    pieces, done, used = [], 0, 0
    for start, stop in rows:
        pieces += [full.narrow(dim, done, start - done), own.narrow(dim, used, stop - start)]
        done, used = stop, used + stop - start
    return torch.cat([*pieces, full.narrow(dim, done, full.shape[dim] - done)], dim)


def spread(own: Tensor, rows: Rows, features: int, fill: float = 0.0, dim: int = -1) -> Tensor:
    """``own`` in these ranges of ``features``, with ``fill`` outside of them."""
    if rows == ((0, features),):
        return own
    shape = list(own.shape)
    shape[dim] = features
    return put(own.new_full(shape, fill), own, rows, dim)
