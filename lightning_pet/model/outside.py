"""What a model holds beside its base, and what of all it holds has changed: averages that a module keeps, for example.

A method covers the base. Beside it the user's code may write into parameters that no optimizer holds (the slow copy
of BYOL, MoCo or a mean teacher). What has changed there since the first delta came belongs to the delta.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_pet.model.adaptation import Adaptation, Mark, compare, mark, record_of
from lightning_pet.model.naming import named_tensors, tensors_at

Parameters = dict[str, nn.Parameter]


def outside_parameters(root: nn.Module, record: Adaptation) -> Parameters:
    """Parameters beside the base, under all of their names; one that is tied to a base parameter is of the base."""
    named = [(name, p) for name, p in named_tensors(root) if isinstance(p, nn.Parameter)]
    own = {*record.delta_names, *record.of_base(dict(named))}
    inside = {id(p) for name, p in named if name in own}
    return {name: p for name, p in named if id(p) not in inside}


def frozen_parameters(root: nn.Module, record: Adaptation) -> Parameters:
    """Parameters of the base that do not train, each under one name.

    A table that renormalises its rows as it looks them up (``max_norm``) is left out: it does so on any base alike.
    """
    named = [(name, p) for name, p in named_tensors(root) if isinstance(p, nn.Parameter)]
    planned = {*record.delta_names, *record.trained_names}
    skip = {id(p) for name, p in named if name in planned} | renormalised(root)
    base = record.of_base(dict(named))
    found = {id(p): (name, p) for name, p in reversed(named) if id(p) not in skip and name in base}
    return dict(reversed(list(found.values())))


def renormalised(root: nn.Module) -> set[int]:
    """``id`` of each table that scales its rows down as it looks them up (``max_norm``).

    What it holds depends on what was looked up, and what it returns does not: two such bases are one.
    """
    return {id(m.weight) for m in root.modules() if getattr(m, "max_norm", None) is not None and hasattr(m, "weight")}


def mark_outside(root: nn.Module) -> None:
    """Remember what the parameters beside the base hold, of those that are not remembered yet and do not train."""
    record = record_of(root)
    if record is None:
        return
    trained = set(record.trained_names)
    for name, parameter in outside_parameters(root, record).items():
        if name not in record.marks and name not in trained:
            record.marks[name] = mark(parameter)


def changed_outside(root: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters beside the base that hold something else than when the first delta came, or may do so.

    Those that train are not among them: the record has their names.
    """
    record = record_of(root)
    if record is None:
        return {}
    trained = set(record.trained_names)
    found = {name: p for name, p in outside_parameters(root, record).items() if name not in trained}
    answers = compare((p, record.marks.get(name)) for name, p in found.items())
    return {name: p for (name, p), changed in zip(found.items(), answers, strict=True) if changed is not False}


def changed_buffers(root: nn.Module) -> dict[str, Tensor]:
    """Persistent base buffers that differ from what they were when the first delta was inserted."""
    record = record_of(root)
    if record is None:
        return {}
    trained = {*record.trained_names, *record.trained_in_place}
    there = tensors_at(root, record.originals.keys() - trained)
    return {
        name: there[name]
        for name in record.originals
        if name in there and not _same(there[name], record.originals[name])
    }


def _same(tensor: Tensor, original: Tensor) -> bool:
    if tensor.is_meta or original.is_meta:
        return True
    return torch.equal(tensor.detach(), original.to(tensor.device))


def note_changed(root: nn.Module, names: Iterable[str]) -> None:
    """Parameters beside the base got their values from a file: they belong to the delta from now on."""
    record = record_of(root)
    for name in names if record else ():
        if record is not None and name in record.marks:
            record.marks[name] = None


def mark_anew(root: nn.Module) -> None:
    """A Trainer has set the model up (split it, cast it): remember what it is now.

    What has changed before stays known as changed.
    """
    record = record_of(root)
    if record is None:
        return
    found = outside_parameters(root, record)
    known = [(name, p, record.marks[name]) for name, p in found.items() if name in record.marks]
    answers = compare((p, before) for _, p, before in known)
    for (name, parameter, before), changed in zip(known, answers, strict=True):
        marks: dict[bool | None, Mark | None] = {True: None, False: before}
        record.marks[name] = marks[changed] if changed is not None else (mark(parameter) if before else None)
    mark_outside(root)
