"""Deltas outside of a run: save, load, inspect. A file is checked completely before the model changes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.core.adaptation import commit, copy_in, renew
from lightning_pet.core.adapted import Adapted
from lightning_pet.core.applied import Adaptation, adapted_root, record_of
from lightning_pet.core.insertion import CHILD
from lightning_pet.core.method import METHODS, Method, key_of
from lightning_pet.core.naming import by_delta, join, named_modules, named_tensors
from lightning_pet.core.outside import note_changed, outside_parameters
from lightning_pet.core.preparation import Prepared, delta_key, prepare
from lightning_pet.core.structure import Target
from lightning_pet.engine.base_check import Named, Whole, base_fingerprint, check_base
from lightning_pet.engine.gathered import gathering_adapter, save_gathered
from lightning_pet.engine.roots import root_of
from lightning_pet.errors import DeltaFileError, PETError, TargetError
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.sharding import holds_parts, whole_shape
from lightning_pet.store.delta_file import read_manifest, write_delta
from lightning_pet.store.entry import written_by
from lightning_pet.store.manifest import Manifest, MethodRecord
from lightning_pet.store.reader import PathLike, Stored, is_delta_file, load_checkpoint, read

Module = TypeVar("Module", bound=nn.Module)
Fill = Callable[[Named, Mapping[str, Tensor]], None]


def save_delta(model: nn.Module, path: PathLike, *, notes: Mapping[str, str] | None = None, exact: bool = False) -> int:
    """Write the delta of a model into one safetensors file, durably.

    Under an engine that shards, every process has to call this with the LightningModule, during ``fit`` (in a hook
    between two steps) or after it. Tensors are gathered one after the other, one process writes, and a failure in
    one process is raised in all of them.

    Args:
        model: the adapted model, or anything that contains it.
        path: usually ends in ``.pet.safetensors``.
        notes: free text for people, at most 4 KB; never interpreted.
        exact: store a digest of every byte of the base (about a second per gigabyte), for
            ``load_delta(base_check="exact")``.

    Returns:
        Bytes written.

    Raises:
        PETError: if nothing was applied to the model; if an engine shards it, and the Trainer cannot be told from
            ``model``, or other processes do not call this.
        DeltaFileError: ``nonfinite`` if a tensor holds NaN or infinity; ``io`` if the disk refuses. A
            file that was there before is untouched then.
    """
    found = adapted_root(model)
    if found is None:
        raise PETError(
            f"nothing was applied to this {type(model).__name__}: there is no delta to save. If it was trained by "
            "ddp_spawn, ddp_fork or in a notebook, load_delta(model, checkpoint) first."
        )
    root_path, root = found
    adapted, adapter = Adapted(root), gathering_adapter(model)
    methods = tuple(MethodRecord(a.method, a.name, a.config, a.targets) for a in adapted.record.applied)
    manifest = Manifest(methods, root=root_path, notes=dict(notes or {}), written_by=written_by())
    if adapter is not None:
        return save_gathered(adapter, adapted, path, manifest, exact)
    if holds_parts(root):
        raise PETError(
            f"this process holds parts of the delta only, and this {type(model).__name__} does not say which Trainer "
            "has the others. Pass the LightningModule, in every process; or use trainer.save_checkpoint, whose file "
            "load_delta reads without any engine."
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _packed(adapted).items()}
    manifest = replace(manifest, base=base_fingerprint(root, adapted.record, tensors, exact))
    return write_delta(path, tensors, manifest)


def _packed(adapted: Adapted) -> dict[str, Tensor]:
    """The delta as files hold it: each delta in its own form, and what trains of the base."""
    own = set(adapted.record.delta_names)
    packed = {name: tensor for name, tensor in adapted.state_dict().items() if name not in own}
    for prefix, delta in _deltas(adapted.root, adapted.record).items():
        packed |= {join(prefix, name): tensor for name, tensor in delta.packed().items()}
    return packed


def _deltas(root: nn.Module, record: Adaptation, method: Method | None = None) -> dict[str, Delta]:
    """Inserted deltas (of one method) by their path from the root."""
    modules = named_modules(root)
    return {
        join(path, CHILD, key): cast(Delta, modules[join(path, CHILD, key)])
        for applied, _, path, key in record.hosts()
        if method is None or applied.key == key_of(method)
    }


def load_delta(model: nn.Module, path: PathLike, *, base_check: str = "error") -> Adapted:
    """Insert a delta from a file into a model and load its values.

    Args:
        model: the base that the delta was trained on: the bare model or a LightningModule around it.
        path: a file of :func:`save_delta`, or a training checkpoint.
        base_check: what to do if the base is another one: ``"error"``, ``"exact"`` (compare every
            byte), ``"warn"`` or ``"off"``.

    Returns:
        The handle on the adapted model.

    Raises:
        DeltaFileError: if the file is damaged or does not fit the model.
        BaseMismatchError: if the base is another one. In all cases the model is untouched.
    """
    return insert(model, read(path), base_check)


def load_from_checkpoint(
    module: Module | type[Module], path: PathLike, *, base_check: str = "error", **kwargs: Any
) -> Module:
    """Build a LightningModule, insert the delta of a checkpoint and load it.

    Args:
        module: an instance with its base weights, or a class; a class is built from the hyper-parameters
            in the checkpoint and ``kwargs``.
        path: a training checkpoint or delta file.
        base_check: what to do if the base is another one: ``"error"``, ``"exact"`` (compare every
            byte), ``"warn"`` or ``"off"``.
        **kwargs: constructor arguments that override the stored hyper-parameters.

    Returns:
        The module, adapted and loaded.

    Raises:
        DeltaFileError: if the file is damaged or does not fit.
    """
    if isinstance(module, type):
        saved = {} if is_delta_file(path) else load_checkpoint(path).get("hyper_parameters", {})
        module = module(**_accepted(module, saved) | kwargs)
    if isinstance(module, pl.LightningModule):
        if not any(True for _ in module.parameters()):
            module.setup("predict")
        module.configure_model()
    load_delta(module, path, base_check=base_check)
    return module


def _accepted(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the constructor takes: a module may save more hyper-parameters than it has arguments."""
    parameters = inspect.signature(cls.__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {name: value for name, value in options.items() if not name.startswith("_")}
    return {name: value for name, value in options.items() if name in parameters}


def inspect_delta(path: PathLike) -> Manifest:
    """Read what a delta file says of itself, without its tensors and without a model.

    Raises:
        DeltaFileError: if the file is not a sound delta file.
    """
    return read_manifest(path)


def start_from(
    adapted: Adapted, method: Method, stored: Stored, base_check: str, whole: Whole = iter, fill: Fill | None = None
) -> None:
    """Copy the values of one method from a file into the same method of an adapted model.

    Args:
        adapted: the model.
        method: one that was just inserted.
        stored: what the file holds.
        base_check: what to do about another base model.
        whole: gathers base tensors of which an engine left this process parts only.
        fill: writes whole values into such tensors.

    Raises:
        DeltaFileError: if the file has no such method, or its tensors do not fit.
    """
    path = stored.path
    holds = ", ".join(f"{m.method}:{m.name}" for m in stored.methods)
    if not any((m.method, m.name) == (method.method, method.name) for m in stored.methods):
        raise DeltaFileError(
            f"start_from={str(path)!r}: there is no {method.method}:{method.name} in it, it holds {holds}. "
            "Give the file, the method and the name that go together.",
            "mismatch",
        )
    if stored.base is not None:
        trained_then = [name for name in stored.tensors if name not in adapted.record.delta_names]
        check_base(stored.base, adapted.root, adapted.record, path, base_check, trained_then, whole)
    deltas = _deltas(adapted.root, adapted.record, method)
    found = by_delta(stored.tensors)
    problems = [join(prefix, text) for prefix, d in deltas.items() for text in d.misfits(found.get(prefix, {}))]
    if problems:
        raise DeltaFileError(
            f"start_from={str(path)!r}: {problems[0]}. It holds {holds}; give the options it was trained with.",
            "mismatch",
        )
    for prefix, delta in deltas.items():
        delta.unpack(found.get(prefix, {}))
    renew(adapted.root)
    mine = next(applied.trained for applied in adapted.record.applied if applied.key == key_of(method))
    if absent := [name for name in mine if name not in stored.tensors]:
        rank_zero_warn(f"{path} does not hold {', '.join(absent[:4])}; they start with the values of the model.")
    values = {name: stored.tensors[name] for name in _same_heads(adapted, stored)}
    if fill is None:
        copy_in(adapted.root, values)
    else:
        fill(named_tensors(adapted.root), values)


def _same_heads(adapted: Adapted, stored: Stored) -> set[str]:
    """Trained base parameters that are in the file in the same shape; the others start as they are, with a warning."""
    own = dict(named_tensors(adapted.root))
    trained = set(adapted.record.trained_names)
    base = {name for name, tensor in own.items() if isinstance(tensor, nn.Parameter)} - set(adapted.record.delta_names)
    there = base & stored.tensors.keys()
    same = {name for name in there & trained if whole_shape(own[name]) == stored.tensors[name].shape}
    if there - same:
        rank_zero_warn(
            f"{stored.path}: {', '.join(sorted(there - same)[:4])} are not taken over, because they do not train here "
            "or have another shape; they keep the values of the model."
        )
    return same


# --- inserting -----------------------------------------------------------------------------------


def insert(model: nn.Module, stored: Stored, base_check: str = "error") -> Adapted:
    """Check a stored delta against a model, then insert and load it."""
    root_path, root = root_of(model)
    methods = [_rebuild(record, stored.path) for record in stored.methods]
    modules = named_modules(root)
    missing = [t.path for m in stored.methods for t in m.targets if not _has(modules, t)]
    if missing:
        raise DeltaFileError(
            f"{stored.path} was trained on a model with {missing[0]}, which this {type(root).__name__} does not have "
            f"({len(missing)} places are missing). Load it into the kind of model it was trained on.",
            "mismatch",
        )
    places, scopes = [record.targets for record in stored.methods], [_scope(m, stored, modules) for m in methods]
    try:
        prepared = prepare(root, methods, None, resolved=places, scopes=scopes, stored=stored.tensors.keys())
    except TargetError as error:
        raise DeltaFileError(f"{stored.path} does not fit this {type(root).__name__}: {error}", "mismatch") from error
    after = Adaptation(
        scopes=tuple(scope for item in prepared for scope in item.scopes),
        apart=tuple(path for item in prepared for path in item.apart),
    )
    outside = set(outside_parameters(root, after))
    _check_fit(root, prepared, stored, outside)
    if stored.base is not None:
        trained = [name for item in prepared for name in item.trained] + [n for n in outside if n in stored.tensors]
        record = record_of(root) or Adaptation()
        check_base(stored.base, root, record, stored.path, base_check, trained)
    record = commit(root, prepared)
    found = by_delta(stored.tensors)
    for prefix, delta in _deltas(root, record).items():
        if prefix in found:
            delta.unpack(found[prefix])
    renew(root)
    own = set(record.delta_names)
    copy_in(root, {name: tensor for name, tensor in stored.tensors.items() if name not in own})
    note_changed(root, stored.tensors)
    _copy_beside(model, root_path, stored)
    return Adapted(root)


def _copy_beside(model: nn.Module, root_path: str, stored: Stored) -> None:
    """Copy what a checkpoint holds of its LightningModule beside the root, if this is a module of that kind."""
    if root_path != stored.root:
        return
    own = dict(named_tensors(model))
    inside = f"{root_path}."
    fitting = {n: t for n, t in stored.beside.items() if n in own and own[n].shape == t.shape}
    copy_in(model, {name: tensor for name, tensor in fitting.items() if not name.startswith(inside)})


def _rebuild(record: MethodRecord, path: Path) -> Method:
    cls = METHODS.get(record.method)
    if cls is None:
        raise DeltaFileError(
            f"{path} holds a delta of method {record.method!r}; this release knows {', '.join(sorted(METHODS))}.",
            "version",
        )
    try:
        method: Method = cls(**record.config)
    except (TypeError, ValueError) as error:
        raise DeltaFileError(
            f"{path}: the options of {record.method}:{record.name} are not valid: {error}", "schema"
        ) from error
    return method


def _scope(method: Method, stored: Stored, modules: Mapping[str, nn.Module]) -> str | None:
    """The submodule that a method is confined to, from the root; ``None`` if it is not."""
    if method.module is None:
        return None
    named = method.module
    scope = "" if named == stored.root else named.removeprefix(f"{stored.root}." if stored.root else "")
    if scope not in modules:
        kind = type(modules[""]).__name__
        raise DeltaFileError(
            f"{stored.path}: {method.method}:{method.name} is confined to {scope!r}, which this {kind} does not have. "
            "Load it into the kind of model it was trained on.",
            "mismatch",
        )
    return scope


def _has(modules: Mapping[str, nn.Module], target: Target) -> bool:
    module = modules.get(target.module)
    if module is None or (target.reads is not None and target.reads not in modules):
        return False
    return not target.parameter or module._parameters.get(target.parameter) is not None


def _check_fit(root: nn.Module, prepared: Sequence[Prepared], stored: Stored, outside: set[str]) -> None:
    """Exactly the tensors of these methods on this model: nothing missing, and no weight of the base."""
    own = dict(named_tensors(root))
    trained = {name for item in prepared for name in item.trained}
    record = record_of(root)
    others = set(record.delta_names if record else ())
    optional = {name for name, tensor in own.items() if not isinstance(tensor, nn.Parameter)} - others
    problems: list[str] = []
    found = by_delta(stored.tensors)
    for item in prepared:
        for insertion in item.insertions:
            prefix = join(insertion.target.module, CHILD, delta_key(item.method, insertion))
            tensors = found.pop(prefix, {})
            problems += [join(prefix, text) for text in insertion.delta.misfits(tensors)]
    left = {join(prefix, name): tensor for prefix, tensors in found.items() for name, tensor in tensors.items()}
    problems += [f"{name} is missing" for name in sorted(trained - left.keys())]
    problems += [f"{name} is unexpected" for name in sorted(left.keys() - trained - optional - outside)]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name, tensor in left.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise DeltaFileError(
            f"{stored.path} does not fit this {type(root).__name__}: {'; '.join(problems[:4])}{more}. Load it into the "
            "kind of model it was trained on.",
            "mismatch",
        )
