"""Arithmetic on the deltas of a model: several become one more, beside them; the base is at hand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, DeltaFileError, NotMergeableError, PETError
from lightning_pet.insertion.checks import check_intact, refuse_lost
from lightning_pet.insertion.choice import LOCK
from lightning_pet.insertion.tasks.own_values import is_own
from lightning_pet.layers.sharding import holds_parts
from lightning_pet.model.adaptation import Adaptation, record_at
from lightning_pet.model.naming import CHILD, check_delta_name, check_known, delta_of, tensors_at
from lightning_pet.operations.combining.files import by_rules, checked_options, provenance
from lightning_pet.operations.combining.rules import (
    ENTRYWISE,
    RULES,
    Combination,
    How,
    Options,
    Originals,
)
from lightning_pet.operations.combining.weights import through_weights
from lightning_pet.operations.loading import insert
from lightning_pet.operations.saved import packed
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import Stored
from lightning_pet.targets.heads import HEAD

_ADDING: Final = frozenset({"lora", "adalora", "diff_pruning", "what trains in place"})


def combine(
    root: nn.Module,
    name: str,
    weights: Mapping[str, float] | Sequence[str],
    method: How = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Combination:
    """Make one delta of several; see :meth:`lightning_pet.Adapted.combine`."""
    record = record_at(root)
    check_delta_name(name)
    refuse_taken(record, name)
    names, options = options_of(record, weights, method, rank, density, seed)
    stored, made = combined(root, names, options)
    insert_combined(root, name, names, stored)
    return made


def refuse_taken(record: Adaptation, name: str) -> None:
    """Refuse a name that another delta has.

    Raises:
        ArgumentError: saying what to do.
    """
    if name in record.names:
        raise ArgumentError(
            f"name={name!r}: there is a delta of this name in this model already. Give the result another, or remove "
            f"that one first: adapted[{name!r}].remove()."
        )


def insert_combined(root: nn.Module, name: str, names: Sequence[str], stored: Stored) -> None:
    """Let what was made of some deltas be one more, which waits.

    Args:
        root: the adapted root.
        name: what it is called.
        names: of those that it was made of.
        stored: what it holds.
    """
    insert(root, replace(stored, path=Path(name)), "off", name=name)
    record = record_at(root)
    beside: dict[str, str] = {}
    for one in names:
        beside |= record.beside.get(one, {})
    if beside:
        record.beside[name] = beside


def options_of(
    record: Adaptation,
    weights: Mapping[str, float] | Sequence[str],
    method: How,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> tuple[tuple[str, ...], Options]:
    """The deltas that are meant, and what is asked for, checked.

    Raises:
        ArgumentError: naming what is wrong.
    """
    if isinstance(weights, str) or not isinstance(weights, Mapping | Sequence):
        raise ArgumentError(
            f"weights={weights!r}: give a weight for each delta, {{'tone': 0.7, 'topic': 0.3}}, or a list of names."
        )
    names = tuple(weights)
    check_known(names, record.names)
    numbers = list(weights.values()) if isinstance(weights, Mapping) else None
    return names, checked_options(len(names), numbers, method, rank, density, seed, "method")


def combined(root: nn.Module, names: Sequence[str], options: Options) -> tuple[Stored, Combination]:
    """What several deltas make together, as a file would hold it; nothing is changed.

    Where their parameters say it (LoRA beside LoRA, prefixes one behind the other) it is had from these alone, else
    from what each changes of the weights.

    Args:
        root: the adapted root.
        names: of the deltas.
        options: what to do.

    Raises:
        ArgumentError: if that means nothing for them.
        DeltaFileError: if they cannot be combined.
        NotMergeableError: if one is no change of weights.
    """
    record = record_at(root)
    check_intact(root, record)
    with LOCK:
        return _combined(root, record, names, options)


def _combined(
    root: nn.Module, record: Adaptation, names: Sequence[str], options: Options
) -> tuple[Stored, Combination]:
    if holds_parts(root):
        raise PETError(
            "the engine has left each process a part of the parameters, and deltas are combined whole. Save them "
            "(adapted[name].save, or trainer.save_checkpoint) and combine in a model that one process holds, or the "
            "files: lightning-pet combine."
        )
    for name in names:
        refuse_lost(record.of(name), "combined")
    files = _named_alike([file_of(root, record, name) for name in names])
    values = {
        name: {n: tensor for n, tensor in file.tensors.items() if delta_of(n) is None}
        for name, file in zip(names, files, strict=True)
    }
    originals = _originals(root, record, values)
    refused = _refused(files) or _entangled(root, record, names, values, options)
    try:
        if refused is None:
            stored, made = by_rules(_saving_the_same(files), options, originals)
    except (ArgumentError, DeltaFileError) as error:
        if options.how.startswith("peft"):
            raise
        refused = error
    if refused is not None:
        try:
            stored, made = through_weights(root, record, values, originals, options)
        except NotMergeableError as error:
            raise (ArgumentError(f"{refused} {error}") if isinstance(refused, ArgumentError) else refused) from error
    _check_finite(files, stored, options)
    return replace(stored, base=None, notes={"combined": provenance(files, options)}), made


def _check_finite(files: Sequence[Stored], stored: Stored, options: Options) -> None:
    """Refuse weights that carry numbers beyond what a tensor can hold; what was no number before is the user's."""

    def lost(tensors: Mapping[str, Tensor]) -> list[str]:
        return [n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]

    if (names := lost(stored.tensors)) and not any(lost(file.tensors) for file in files):
        raise ArgumentError(
            f"weights={list(options.weights)}: {names[0]} would hold numbers that are not finite. Give smaller weights."
        )


def file_of(root: nn.Module, record: Adaptation, name: str) -> Stored:
    """A delta of a model, as a file would hold it."""
    applied = (one for one in record.of(name).applied if not is_own(one))
    methods = tuple(MethodRecord(a.method, a.name, a.config, a.targets) for a in applied)
    tensors = {key: tensor.detach() for key, tensor in packed(root, record, name).items()}
    return Stored(Path(name), methods, tensors, None)


def _named_alike(files: Sequence[Stored]) -> list[Stored]:
    """The same, where deltas of the same methods have other names for them: as the first has it."""
    kinds = [[record.method for record in file.methods] for file in files]
    if any(own != kinds[0] or len(set(own)) < len(own) for own in kinds):
        return list(files)
    return [_renamed(file, [record.name for record in files[0].methods]) for file in files]


def _renamed(file: Stored, names: Sequence[str]) -> Stored:
    keys = {f"{own.method}_{own.name}": f"{own.method}_{name}" for own, name in zip(file.methods, names, strict=True)}

    def moved(name: str) -> str:
        path, found, rest = f".{name}".partition(f".{CHILD}.")
        for old, new in keys.items():
            if found and (rest.startswith((f"{old}.", f"{old}_"))):
                return f"{path}{found}{new}{rest[len(old) :]}"[1:]
        return name

    if all(old == new for old, new in keys.items()):
        return file
    records = tuple(
        replace(own, name=name, config={**own.config, **({"name": name} if "name" in own.config else {})})
        for own, name in zip(file.methods, names, strict=True)
    )
    return replace(file, methods=records, tensors={moved(name): tensor for name, tensor in file.tensors.items()})


def _originals(root: nn.Module, record: Adaptation, values: Mapping[str, Mapping[str, Tensor]]) -> Originals:
    names = {name for own in values.values() for name in own}
    parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    found = {name: tensor.detach() for name, tensor in tensors_at(root, names).items()}  # trained beside it: its own
    found |= {name: record.originals[name] for name in names if name in record.originals}
    return Originals(found, frozenset(names - parameters))


def _refused(files: Sequence[Stored]) -> PETError | None:
    """Why the deltas cannot be combined by what they hold, as far as their methods tell."""
    labels = [[f"{record.method}:{record.name}" for record in file.methods] for file in files]
    for file, own in zip(files, labels, strict=True):
        if own != labels[0]:
            return ArgumentError(
                f"{str(files[0].path)!r} is {', '.join(labels[0])} and {str(file.path)!r} is {', '.join(own)}: deltas "
                "of different methods are combined by their change of the weights, and one of them makes none. Let "
                f"them act together instead: adapted.activate({str(files[0].path)!r}, {str(file.path)!r})."
            )
    for record in files[0].methods:
        if record.method not in RULES:
            return ArgumentError(
                f"{str(files[0].path)!r} holds {record.method}:{record.name}, which is combined by its change of the "
                "weights alone, and makes none here."
            )
    return None


def _entangled(
    root: nn.Module,
    record: Adaptation,
    names: Sequence[str],
    values: Mapping[str, Mapping[str, Tensor]],
    options: Options,
) -> PETError | None:
    """Why the methods cannot be combined each on its own: two of them act on one weight, and do not just add up."""
    acting: dict[int, set[str]] = {}
    for name in names:
        view = record.of(name)
        for inserted in view.deltas(root):
            parameter = inserted.host._parameters.get(inserted.target.parameter)
            if parameter is not None:
                label = "what trains in place" if is_own(inserted.method) else inserted.method.method
                acting.setdefault(id(parameter), set()).add(label)
        for tensor in tensors_at(root, values[name]).values():
            acting.setdefault(id(tensor), set()).add("what trains in place")
    for methods in acting.values():
        if len(methods) > 1 and (options.how in ENTRYWISE or not methods <= _ADDING):
            return ArgumentError(
                f"{options.asked}: {' and '.join(sorted(methods))} act on one weight in these deltas, so they are "
                "combined by their change of the weights together, and one of them makes none."
            )
    return None


def _saving_the_same(files: Sequence[Stored]) -> list[Stored]:
    """The same, with the heads of all named in each: what one does not train is the base's there."""
    kept: list[list[MethodRecord]] = [list(file.methods) for file in files]
    for index in range(len(kept[0])):
        records = [own[index] for own in kept]
        named = [_saved(record) for record in records]
        if all(one == named[0] for one in named):
            continue
        every = sorted({path for one in named for path in one})
        for own, record in zip(kept, records, strict=True):
            config: dict[str, Any] = {**record.config, "modules_to_save": every}
            own[index] = replace(record, config=config, targets=tuple(t for t in record.targets if t.role != HEAD))
    return [replace(file, methods=tuple(own)) for file, own in zip(files, kept, strict=True)]


def _saved(record: MethodRecord) -> list[str]:
    named = record.config.get("modules_to_save")
    if named is not None:
        return sorted([named] if isinstance(named, str) else named)
    return sorted(target.module for target in record.targets if target.role == HEAD)
