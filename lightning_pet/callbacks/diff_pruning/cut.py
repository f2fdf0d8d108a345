"""The cut of diff pruning: which entries of all differences stay, and how just these go on training."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_pet.errors import PETError
from lightning_pet.insertion.commit import renew
from lightning_pet.layers.sparse_difference import SparseDifference
from lightning_pet.model.naming import named_tensors
from lightning_pet.strategies.parameter_groups import Exchange
from lightning_pet.strategies.strategy import StrategyAdapter, each_whole

# --- the entries of largest magnitude among many tensors, in little memory ------------------------


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


# --- the cut --------------------------------------------------------------------------------------


Adapter = StrategyAdapter[Any]


def largest_entries(differences: Sequence[SparseDifference], count: int, adapter: Adapter | None) -> list[Tensor]:
    """Find the ``count`` entries of largest magnitude; the same in every process.

    Args:
        differences: those that are compared.
        count: how many entries to find.
        adapter: gathers them, one after the other, in a run.

    Returns:
        Their flat indices in each difference.

    Raises:
        PETError: if an entry is not finite.
    """
    each = each_whole if adapter is None else adapter.whole_modules
    try:
        with torch.no_grad():
            return largest(lambda: (difference.difference(own) for difference, own in each(differences)), count)
    except ValueError:
        raise PETError("the difference holds NaN or infinity; lower the learning rate.") from None


def fix(
    root: nn.Module, differences: Sequence[SparseDifference], places: Sequence[Tensor], adapter: Adapter | None
) -> list[Exchange]:
    """Train differences at these places only.

    Args:
        root: the adapted root.
        differences: gated until now.
        places: flat indices, for each of them.
        adapter: in a run. Where its engine holds the parameters, they stay, and are read at these places.

    Returns:
        Which parameters took the place of which.
    """
    exchanges: list[Exchange] = []
    for difference, place in zip(differences, places, strict=True):
        if adapter is not None and adapter.is_wrapped(root):
            _fix_held(difference, place, adapter)
        else:
            exchanges += [Exchange(old, new, place) for old, new in difference.fix(place)]
    renew(root)
    return exchanges


def _fix_held(difference: SparseDifference, places: Tensor, adapter: Adapter) -> None:
    with torch.no_grad():
        ((_, own),) = adapter.whole_modules([difference])
        kept = {"indices": places, "values": difference.difference(own).reshape(-1)[places]}
    difference.take_form(kept, held=True)
    adapter.fill(named_tensors(difference), difference.spread(kept))


def compare_anew(callbacks: Iterable[pl.Callback], reason: str) -> None:
    """Let the callbacks of a run forget what was best so far: later models compete among themselves only.

    Files that were written stay where they are.

    Args:
        callbacks: of the Trainer.
        reason: why, for the log.
    """
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.best_k_models:
            callback.best_k_models = {}
            callback.best_model_score = callback.current_score = None
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        elif isinstance(callback, EarlyStopping):
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
            callback.wait_count = 0
        else:
            continue
        rank_zero_info(f"{type(callback).__name__} compares {callback.monitor} anew from here: {reason}.")
