"""Numbers for some of a host's features, spread over all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = tuple[tuple[int, int], ...]


def whole(rows: Sequence[Sequence[int]] | None, features: int) -> Rows:
    """The ranges, or one of all features where none are given."""
    return ((0, features),) if rows is None else tuple((start, stop) for start, stop in rows)


def size(rows: Rows) -> int:
    """Number of features in the ranges."""
    return sum(stop - start for start, stop in rows)


def spread(own: Tensor, rows: Rows, features: int, fill: float) -> Tensor:
    """[..., size of rows] to [..., features], with ``fill`` outside of the ranges."""
    if rows == ((0, features),):
        return own
    lead, pieces, done, used = own.shape[:-1], [], 0, 0
    for start, stop in rows:
        pieces += [own.new_full((*lead, start - done), fill), own[..., used : used + stop - start]]
        done, used = stop, used + stop - start
    return torch.cat([*pieces, own.new_full((*lead, features - done), fill)], dim=-1)
