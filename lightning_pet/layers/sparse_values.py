"""A difference at a few places of a weight that are chosen before training (SHiRA)."""

from functools import partial

import torch
from torch import Tensor

from lightning_pet.layers import rows as ranges
from lightning_pet.layers.hard_concrete import HardConcrete
from lightning_pet.layers.sparse_difference import SparseDifference
from lightning_pet.layers.transforms import is_ordinary


class SparseValues(SparseDifference):
    """``W + S`` with values at fixed places, all zero at the start.

    The places are drawn from a seed, or those of the largest entries. Files hold the places themselves, so that no seed
    has to be known, and no generator has to be the same.

    Args:
        shape: of the weight.
        count: how many places, at most as many as there are.
        seed: of the places.
        weight: the weight, if the places are those of its largest entries; ``None``: drawn evenly.
        rows: half-open ranges of one dimension to which the places are confined; ``None``: all of it.
        dim: that dimension.
        device: where the values live.
        dtype: of the values, float32 or float64.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        count: int,
        *,
        seed: int = 0,
        weight: Tensor | None = None,
        rows: ranges.Rows | None = None,
        dim: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, HardConcrete(), device="meta", dtype=dtype)
        self._drawn = partial(_drawn, tuple(shape), count, seed, rows, dim) if weight is None else None
        like = torch.zeros(count, device=device, dtype=dtype)
        if not is_ordinary(like):  # only its size counts
            places = torch.empty(count, dtype=torch.int64, device=like.device)
        else:
            places = _largest(weight, count, rows, dim) if weight is not None else _drawn(shape, count, seed, rows, dim)
        self._take_fixed_form(places, like)

    def reset_parameters(self) -> None:
        """No difference, at places drawn anew: memory that was just given has none."""
        super().reset_parameters()
        drawn = getattr(self, "_drawn", None)
        if drawn is not None and self.values is not None and is_ordinary(self.values):
            self._take_places(drawn(), self.values)


def _candidates(shape: tuple[int, ...], rows: ranges.Rows, dim: int) -> Tensor:
    return ranges.take(torch.arange(torch.Size(shape).numel()).view(shape), rows, dim).reshape(-1)


def _drawn(shape: tuple[int, ...], count: int, seed: int, rows: ranges.Rows | None, dim: int) -> Tensor:
    """So many different flat indices, rising: every choice is equally likely."""
    generator = torch.Generator().manual_seed(seed)
    candidates = None if rows is None else _candidates(shape, rows, dim)
    size = torch.Size(shape).numel() if candidates is None else len(candidates)
    if 2 * count > size:
        found = torch.randperm(size, generator=generator)[:count]
    else:  # a permutation of a large weight takes as much memory as the weight
        found = torch.empty(0, dtype=torch.int64)
        while len(found) < count:
            more = torch.randint(size, (2 * (count - len(found)) + 16,), generator=generator)
            found = torch.cat([found, more]).unique()  # type: ignore[no-untyped-call]
        found = found[torch.randperm(len(found), generator=generator)[:count]]
    return (found if candidates is None else candidates[found]).sort().values


def _largest(weight: Tensor, count: int, rows: ranges.Rows | None, dim: int) -> Tensor:
    """Flat indices of the entries of largest size, rising."""
    own = weight.detach() if rows is None else ranges.take(weight.detach(), rows, dim)
    found = own.reshape(-1).abs().topk(count).indices
    if rows is not None:
        found = _candidates(tuple(weight.shape), rows, dim).to(found.device)[found]
    return found.sort().values
