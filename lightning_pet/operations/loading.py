"""A stored delta into a model: checked completely before the model changes, and taken out again if anything fails."""

from collections.abc import Iterable

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.insertion.choice import LOCK, exchange, owned, record_at, show_in_blocks, tensors_at
from lightning_pet.insertion.commit import commit, copy_in, renew, undo
from lightning_pet.insertion.method import Method, key_of
from lightning_pet.insertion.widening import widen
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.sharding import without_values
from lightning_pet.model.adaptation import Adaptation, Applied, record_of
from lightning_pet.model.delta_names import check_delta_name, check_known, delta_of
from lightning_pet.model.gate import between_forwards, set_gate
from lightning_pet.model.naming import by_delta, join, named_tensors
from lightning_pet.model.outside import note_changed
from lightning_pet.operations.base_check import check_base, check_beside
from lightning_pet.operations.file_fitting import Fit, faults_of, fitted, methods_of
from lightning_pet.operations.file_names import Rename, back, check_rename, for_model, note_of, without_heads
from lightning_pet.operations.roots import root_of
from lightning_pet.operations.unaccompanied import accompany_runs
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import Stored


def insert(
    model: nn.Module,
    stored: Stored,
    base_check: str = "error",
    *,
    name: str | None = None,
    heads: bool = True,
    rename: Rename | None = None,
) -> nn.Module:
    """Check a stored delta against a model, then insert and load it.

    Args:
        model: what it is for, or what contains that.
        stored: what was read.
        base_check: what to do if the base is another one.
        name: what the delta is called in the model.
        heads: with the heads that it has trained.
        rename: prefixes of paths that are others in this model.

    Returns:
        The adapted root.

    Raises:
        ArgumentError: if a delta of this name, or a method of this name of this delta, is in the model already, or
            ``heads`` is no truth value.
        DeltaFileError: if the delta is not sound, or does not fit. The model is untouched then.
    """
    if not isinstance(heads, bool):
        raise ArgumentError(f"heads={heads!r}: expected True or False; False leaves out all heads of the delta.")
    root_path, root = root_of(model)
    present = record_of(root) or Adaptation()
    delta = _name_of(present, stored, name)
    check_rename(rename, stored)
    stored = for_model(stored, delta, rename)
    methods, left = methods_of(stored, delta), frozenset[str]()
    if not heads:
        stored, left = without_heads(root, stored, methods)
        methods = methods_of(stored, delta)
    acts = not present.applied or delta in present.active
    fit = fitted(root, stored, methods, acts=acts, other_sizes=name is not None or bool(present.applied))
    if stored.base is not None:
        trained = {*fit.trained, *left}
        check_base(stored.base, root, present, stored.path, base_check, trained, back=back(rename) if rename else None)
        check_beside(stored.base, root, present, stored.path, base_check)
    _warn_overwritten(present, delta, fit.trained, stored.path)
    with faults_of(stored.path, f"does not fit this {type(root).__name__}"):
        prepared = fit.build()
        accompany_runs()
        record = commit(root, prepared, acts=acts)
        if name is not None:
            set_gate(root)
        try:
            _fill(model, root, record, stored, fit, delta)
            if acts:
                _copy_beside(model, root_path, stored)
        except BaseException:
            undo(root, [item.key for item in prepared])
            raise
    return root


def _name_of(record: Adaptation, stored: Stored, name: str | None) -> str:
    if name is None:
        delta = note_of(stored)
        if delta in record.names and delta not in record.active:
            raise ArgumentError(
                f"{stored.path}: the delta {delta!r} is in this model already, and does not act. Load the file as a "
                "delta of its own: load_delta(model, path, name='second')."
            )
        return delta
    check_delta_name(name)
    if name in record.names:
        raise ArgumentError(
            f"name={name!r}: there is a delta of this name in this model already. Give this one another, remove that "
            f"one (adapted[{name!r}].remove()), or exchange its values: adapted.replace({name!r}, source)."
        )
    return name


def _warn_overwritten(record: Adaptation, delta: str, trained: Iterable[str], path: object) -> None:
    """A file that joins a delta, as it was given no name of its own, brings its own values of what that has trained."""
    if both := sorted(record.trained_by(delta).keys() & set(trained)):
        rank_zero_warn(
            f"{path}: {', '.join(both[:4])}{' …' * (len(both) > 4)} had values of the delta {delta!r}, which this file "
            "joins, and has those of the file from now on. To keep both, and choose, load the file as a delta of its "
            "own: load_delta(model, path, name='second'); or leave its heads out: heads=False."
        )


def _fill(model: nn.Module, root: nn.Module, record: Adaptation, stored: Stored, fit: Fit, delta: str) -> None:
    """Copy the values in: where they act now into the model, else into the record."""
    found = by_delta(stored.tensors)
    for method in fit.methods:
        for prefix, inserted in deltas_of(root, record, method).items():
            if prefix in found:
                inserted.unpack(found[prefix])
    renew(root)
    widen(root, names=_held_wider(stored), model=model)
    values = {name: tensor for name, tensor in stored.tensors.items() if delta_of(name) is None}
    own = tensors_at(root, values)
    for name in own.keys() - record.originals.keys():  # of what lies beside the base
        tensor = own[name]
        record.originals[name] = without_values(tensor) if tensor.is_meta else tensor.detach().to("cpu", copy=True)
    beside = values.keys() - record.trained_by(delta).keys()
    record.claims[delta] = record.claims.get(delta, frozenset()) | beside
    if delta not in record.active:
        record.values[delta] = {name: values[name].to(tensor.dtype) for name, tensor in own.items()}
    elif any(tensor.shape != values[name].shape for name, tensor in own.items()):
        exchange(root, record, values)
    else:
        copy_in(root, values)
    if delta in record.active:
        note_changed(root, values)
    _note(record, stored, delta)


def _note(record: Adaptation, stored: Stored, delta: str) -> None:
    """What a file says of where its values come from."""
    if stored.base is not None and stored.base.beside:
        record.beside[delta] = dict(stored.base.beside)
    if "combined" in stored.notes:
        record.combined[delta] = stored.notes["combined"]


def replace_values(root: nn.Module, delta: str, stored: Stored, base_check: str = "error") -> None:
    """Exchange the values of a delta for those of a file with the same methods, places and shapes.

    Everything is checked first. Forwards of other threads see the values before it or those after it, whole.

    Args:
        root: the adapted root.
        delta: name of the delta.
        stored: what was read.
        base_check: what to do if the base is another one.

    Raises:
        DeltaFileError: naming what is other than in the model, which is as it was then.
    """
    record = record_at(root)
    check_known((delta,), record.names)
    stored, view = for_model(stored, delta), record.of(delta)
    values = {name: tensor for name, tensor in stored.tensors.items() if delta_of(name) is None}
    there = {applied.key: applied for applied in view.applied}
    coming = {key_of(method): own for method, own in zip(methods_of(stored, delta), stored.methods, strict=True)}
    found = by_delta(stored.tensors)
    problems = [f"it holds {', '.join(sorted(coming))}, the model has {', '.join(sorted(there))}"] * (
        there.keys() != coming.keys()
    )
    problems += [f"{key} has other options" for key in there.keys() & coming.keys() if _differ(there[key], coming[key])]
    problems += [
        join(inserted.path, text)
        for inserted in view.deltas(root)
        for text in inserted.delta.misfits(found.get(inserted.path, {}))
    ]
    own = record.values[delta] if delta in record.values else tensors_at(root, owned(root, record, delta))
    trained = record.trained_by(delta).keys()
    problems += [f"{name} is missing" for name in sorted(trained - values.keys())]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape) if name in own else 'none'}"
        for name, tensor in values.items()
        if name not in record.originals or (name in own and own[name].shape != tensor.shape)
    ]
    if problems:
        raise DeltaFileError(
            f"{stored.path} cannot replace {delta!r} in place: {'; '.join(problems[:4])}. Load it as another delta: "
            f"adapted.load('second', path).",
            "mismatch",
        )
    if stored.base is not None:
        check_base(stored.base, root, record, stored.path, base_check, values)
        check_beside(stored.base, root, record, stored.path, base_check)
    with between_forwards(root), LOCK:
        for inserted in view.deltas(root):
            if inserted.path in found:
                inserted.delta.unpack(found[inserted.path])
        renew(root)
        gone = {name: record.originals[name] for name in own.keys() - values.keys()}
        if delta in record.values:
            record.values[delta] = {name: tensor.to(record.originals[name].dtype) for name, tensor in values.items()}
        else:
            exchange(root, record, gone | values)
        show_in_blocks(root, record, delta, gone | values)
    record.claims[delta] = frozenset(values.keys() - trained)
    record.beside.pop(delta, None)
    record.combined.pop(delta, None)
    _note(record, stored, delta)


def _differ(applied: Applied, record: MethodRecord) -> bool:
    return dict(applied.config) != dict(record.config) or set(applied.targets) != set(record.targets)


def deltas_of(root: nn.Module, record: Adaptation, method: Method) -> dict[str, Delta]:
    """Inserted deltas of one method by their path from the root."""
    key = key_of(method)
    return {inserted.path: inserted.delta for inserted in record.deltas(root) if inserted.method.key == key}


def _held_wider(stored: Stored) -> set[str]:
    """Base tensors that a file holds in more than the half precision of the base that it was trained on."""
    # Where all of the base trained, nothing is left that tells; a part may have stayed in half precision.
    half = stored.base is not None and (not stored.base.dtypes or stored.base.dtypes.keys() & {"BF16", "F16"})
    return {name for name, tensor in stored.tensors.items() if half and tensor.dtype.itemsize > 2}


def _copy_beside(model: nn.Module, root_path: str, stored: Stored) -> None:
    """Copy what a checkpoint holds of its LightningModule beside the root, if this is a module of that kind."""
    if root_path != stored.root:
        return
    own = dict(named_tensors(model))
    inside = f"{root_path}."
    fitting = {n: t for n, t in stored.beside.items() if n in own and own[n].shape == t.shape}
    copy_in(model, {name: tensor for name, tensor in fitting.items() if not name.startswith(inside)})
