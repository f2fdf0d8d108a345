"""The cut of diff pruning: which entries of all differences stay, and how just these go on training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.core.adaptation import renew
from lightning_pet.core.naming import named_tensors
from lightning_pet.engine.parameter_groups import Exchange
from lightning_pet.engine.strategy import StrategyAdapter, each_whole
from lightning_pet.errors import PETError
from lightning_pet.layers.magnitude import largest
from lightning_pet.layers.sparse_difference import SparseDifference

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
