"""A run that trains a delta in a model that has others: they stay frozen, and act or not as they did before."""

from collections.abc import Collection

from torch import nn

from lightning_pet.errors import ArgumentError
from lightning_pet.insertion.choice import let_train, place, record_at
from lightning_pet.model.adaptation import deltas_in
from lightning_pet.operations.base_check import digest_of
from lightning_pet.operations.contents import packed


def train_beside(root: nn.Module, deltas: Collection[str]) -> None:
    """Let these deltas train and act, beside those that act already, which are noted as a part of their base.

    Raises:
        ArgumentError: if one that acts has its own values for what these train.
    """
    record = record_at(root)
    others = tuple(name for name in record.active if name not in deltas)
    if set(record.names) <= set(deltas):
        record.beside = {name: own for name, own in record.beside.items() if name not in deltas}
        return
    place(root, (*others, *(name for name in record.names if name in deltas)))
    let_train(root, deltas)
    mine = set(record.trained_names)
    held = {name: owners for name, owners in record.held_by(others).items() if name in mine}
    if held:
        name, (owner, *_) = next(iter(held.items()))
        raise ArgumentError(
            f"the delta {owner!r}, which acts, has its own values for {name}, and this run trains it. Let it not act "
            "meanwhile: adapted.activate() before the fit lets none act, adapted.activate(…) those that are meant."
        )
    found = {}
    for name in others:
        tensors = packed(root, record, name)
        if not any(tensor.is_meta for tensor in tensors.values()):
            found[name] = digest_of(tensors)
    for name in deltas:
        if found:
            record.beside[name] = dict(found)
        else:
            record.beside.pop(name, None)


def let_rest(root: nn.Module) -> None:
    """Deltas that do not train draw nothing at random: they are what they are when they are evaluated."""
    waiting = record_at(root).waiting
    for inserted in deltas_in(root) if waiting else ():
        if inserted.method.delta in waiting and inserted.delta.training:
            inserted.delta.eval()
