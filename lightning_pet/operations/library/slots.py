"""Places in a model for deltas of one form: attached once, and written into whenever another delta is wanted there.

A slot is a delta of the model like any other, which never acts by itself. To write into it changes no module, so that
nothing is compiled anew. A further slot of a form that there is one of is its copy: nothing is planned or looked for.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.errors import DeltaFileError
from lightning_pet.insertion.choice import LOCK, remove
from lightning_pet.insertion.commit import renew
from lightning_pet.insertion.host import attach
from lightning_pet.layers.delta import Delta
from lightning_pet.model.adaptation import Adaptation, Inserted, record_at, record_of
from lightning_pet.model.naming import CHILD, by_delta, delta_of, host_key, in_model, join, own_key, walk
from lightning_pet.operations.library.forms import Form, is_of_delta, padded
from lightning_pet.operations.loading import insert
from lightning_pet.store.reader import Stored

NAME: Final = "slot-"


@dataclass(eq=False)
class Slot:
    """One of them.

    Attributes:
        name: of the delta in the model.
        form: of what can lie in it as it is.
        holds: what lies in it now, for whoever has put it there.
        turn: when it was last used.
    """

    name: str
    form: Form
    holds: Any = None
    turn: int = 0


class Slots:
    """The slots of one model.

    Args:
        root: the model.
        most: how many there may be.
    """

    def __init__(self, root: nn.Module, most: int) -> None:
        self.root, self.most = root, most
        self.own: list[Slot] = []
        self._turns = count(1)

    def used(self, slot: Slot) -> None:
        """A slot is used: others are written into before it."""
        slot.turn = next(self._turns)

    def is_there(self, slot: Slot) -> bool:
        """Whether it still is in the model: its owner may take deltas out as he likes."""
        record = record_of(self.root)
        return record is not None and slot.name in record.values

    def place(self, stored: Stored, form: Form, busy: Any) -> Slot:
        """Put a delta into a slot that is free, or into a new one.

        Args:
            stored: what to put there.
            form: of it.
            busy: tells whether a slot is used now.

        Raises:
            DeltaFileError: if the file does not fit the model. Nothing is changed then.
        """
        record = record_of(self.root)
        names = record.names if record is not None else ()
        self.own = [slot for slot in self.own if slot.name in names]
        free = sorted((slot for slot in self.own if not busy(slot)), key=lambda slot: slot.turn)
        slot = next((slot for slot in free if slot.form is form), None)
        tensors: Mapping[str, Tensor] = stored.tensors
        if slot is None:
            for other in free:
                if (wider := self._widened(stored, form, other.form)) is not None:
                    slot, tensors = other, wider
                    break
        if slot is None:
            return self._new(stored, form, free)
        if slot.holds is not None:
            slot.holds.slot = slot.holds = None  # if writing fails, nobody is to find half of something there
        self._write(slot, tensors, stored)
        return slot

    def clear(self, busy: Any) -> None:
        """Take the slots that are free out of the model."""
        for slot in [slot for slot in self.own if not busy(slot)]:
            self._remove(slot)

    def _remove(self, slot: Slot) -> None:
        self.own.remove(slot)
        if self.is_there(slot):
            remove(self.root, slot.name)

    def _widened(self, stored: Stored, form: Form, other: Form) -> dict[str, Tensor] | None:
        if other.places is None:  # there is no low-rank delta of ours in it, or nobody has asked yet
            return None
        own = form.places_in(self.root, stored)
        return padded(stored.tensors, own, other.places) if form.fits_into(other, own, other.places) else None

    def _new(self, stored: Stored, form: Form, free: list[Slot]) -> Slot:
        record = record_of(self.root)
        resting = record.values.keys() if record is not None else ()
        like = next((slot for slot in self.own if slot.form is form and slot.name in resting), None)
        with LOCK:
            name = self._name()
            if like is None:
                insert(self.root, stored, "off", name=name, acts=False)
            else:
                copied(self.root, like.name, name)
        slot = Slot(name, form)
        self.own.append(slot)
        if like is not None:
            self._write(slot, stored.tensors, stored)
        for other in free[: max(len(self.own) - self.most, 0)]:
            self._remove(other)
        return slot

    def _name(self) -> str:
        record = record_of(self.root)
        taken = set(record.names if record is not None else ())
        return next(name for name in map(f"{NAME}{{}}".format, count()) if name not in taken)

    def _write(self, slot: Slot, tensors: Mapping[str, Tensor], stored: Stored) -> None:
        """Write a delta of this form into a slot that nobody uses."""
        record = record_at(self.root)
        own = in_model({name: tensor for name, tensor in tensors.items() if is_of_delta(name)}, slot.name)
        deltas = list(of_delta(self.root, record, slot.name))
        _check(deltas, own, stored)
        with LOCK, torch.inference_mode(False), torch.no_grad():
            targets: list[Tensor] = []
            sources: list[Tensor] = []
            other: list[Inserted] = []
            for inserted in deltas:
                held = _tensors_of(inserted)
                if type(inserted.delta).unpack is Delta.unpack and all(_is_plain(tensor) for tensor in held.values()):
                    targets += held.values()
                    sources += [own[name] for name in held]
                else:
                    other.append(inserted)
            if targets:
                torch._foreach_copy_(targets, sources)  # one call, where there may be hundreds
            grouped = by_delta(own) if other else {}
            for inserted in other:
                inserted.delta.unpack(grouped.get(inserted.path, {}))
            if other:
                renew(self.root)
            values = {name: tensor for name, tensor in tensors.items() if not is_of_delta(name)}
            record.values[slot.name] = {n: t.to(record.originals[n].dtype) for n, t in values.items()}
            record.beside.pop(slot.name, None)
            if stored.base is not None and stored.base.beside:
                record.beside[slot.name] = dict(stored.base.beside)


def of_delta(root: nn.Module, record: Adaptation, name: str) -> list[Inserted]:
    """Where the parts of one delta are."""
    return list(replace(record, applied=[a for a in record.applied if a.delta == name]).deltas(root))


def _tensors_of(inserted: Inserted) -> dict[str, Tensor]:
    return {join(inserted.path, name): tensor for name, tensor in inserted.delta.state_dict(keep_vars=True).items()}


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def _check(deltas: list[Inserted], own: Mapping[str, Tensor], stored: Stored) -> None:
    """What the shapes of tensors do not tell.

    Raises:
        DeltaFileError: naming the first value that cannot be.
    """
    for inserted in deltas:
        tells = type(inserted.delta).misfits is not Delta.misfits
        if tells and (wrong := inserted.delta.misfits(by_delta(own).get(inserted.path, {}))):
            raise DeltaFileError(f"{stored.path}: {join(inserted.path, wrong[0])}.", "mismatch")


def copied(root: nn.Module, like: str, name: str) -> None:
    """Attach a copy of a delta that does not act, under another name.

    Args:
        root: the adapted root.
        like: the delta.
        name: of the copy.
    """
    record = record_at(root)
    present = of_delta(root, record, like)
    base = [module for _, module in walk(root, of_base=True)]
    # What deltas know of the model stays what it is; what they share among themselves is shared among the copies.
    known: list[Any] = [*base, *(module._modules[CHILD] for module in base if CHILD in module._modules)]
    memo: dict[int, Any] = {id(module): module for module in known}
    memo |= {id(i.delta.slot): i.delta.slot for i in present if i.delta.slot is not None}
    deltas = deepcopy([inserted.delta for inserted in present], memo)
    record.switch.selection = record.selection(record.active)  # what comes waits until it is complete
    made = {id(a): replace(a, delta=name, hosts=[], readers=list(a.readers)) for a in record.applied if a.delta == like}
    for inserted, delta in zip(present, deltas, strict=True):
        applied, key = made[id(inserted.method)], host_key(own_key(inserted.key), name)
        reader = applied.readers[len(applied.hosts)]
        host = inserted.path.rpartition(f"{CHILD}.")[0].removesuffix(".")
        attach(root, inserted.target, key, delta.requires_grad_(False), reader, record.switch)
        applied.hosts.append((host, key))
    record.applied.extend(made.values())
    renamed = {n: next(iter(in_model({n: 0}, name))) for n in record.delta_names if delta_of(n) == like}
    record.delta_names = (*record.delta_names, *renamed.values())
    record.waiting[name] = tuple(renamed.get(n, n) for n in record.waiting[like])
    record.values[name] = dict(record.values[like])
    record.claims[name] = record.claims.get(like, frozenset())
    record.act(record.active)
