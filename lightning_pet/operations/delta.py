"""Deltas outside of a run: save, load, inspect. A file is checked completely before the model changes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, DeltaFileError, PETError
from lightning_pet.insertion.commit import commit, copy_in, renew, undo
from lightning_pet.insertion.method import Method, key_of
from lightning_pet.insertion.widening import widen
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.sharding import holds_parts, whole_shape
from lightning_pet.model.adaptation import Adaptation, adapted_root, record_of
from lightning_pet.model.naming import by_delta, join, named_tensors
from lightning_pet.model.outside import note_changed
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.base_check import Named, Whole, base_fingerprint, check_base
from lightning_pet.operations.file_fitting import faults_of, fitted
from lightning_pet.operations.gathered import gathering_adapter, save_gathered
from lightning_pet.operations.module_from_file import beside, build
from lightning_pet.operations.roots import root_of
from lightning_pet.operations.unaccompanied import accompany_runs
from lightning_pet.store.archive import load_checkpoint
from lightning_pet.store.delta_file import write_delta
from lightning_pet.store.entry import written_by
from lightning_pet.store.manifest import Manifest, MethodRecord
from lightning_pet.store.reader import PathLike, Stored, delta_of, is_delta_file, manifest_of, read

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
    return {
        inserted.path: inserted.delta
        for inserted in record.deltas(root)
        if method is None or inserted.method.key == key_of(method)
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
    module: Module | type[Module],
    path: PathLike,
    *,
    map_location: torch.device | str | int | None = None,
    hparams_file: PathLike | None = None,
    strict: bool | None = None,
    base_check: str = "error",
    **kwargs: Any,
) -> Module:
    """Build a LightningModule, insert the delta of a checkpoint and load it.

    As ``LightningModule.load_from_checkpoint``, for checkpoints that hold a delta. A class is built from the
    hyper-parameters in the checkpoint: arguments, one dictionary, or what LightningCLI noted. Classes in the latter
    must have been imported before, as no name in a file is; with ``_class_path`` a subclass of ``module`` is built.

    Args:
        module: an instance with its base weights, or a class.
        path: a training checkpoint or delta file.
        map_location: the device to put a module on that was built from a class (default: where its constructor
            puts it). An instance stays where it is.
        hparams_file: a ``.yaml`` or ``.csv`` file of hyper-parameters to use instead of those in the checkpoint.
        strict: ``False``: what the checkpoint holds beside the delta need not fit the module (metrics that came or
            went). The delta itself always has to. Default: as the module's ``strict_loading``.
        base_check: what to do if the base is another one: ``"error"``, ``"exact"`` (compare every
            byte), ``"warn"`` or ``"off"``.
        **kwargs: constructor arguments that override the stored hyper-parameters.

    Returns:
        The module, adapted and loaded.

    Raises:
        ArgumentError: if a hyper-parameter that the checkpoint could not hold is not given.
        DeltaFileError: if the file is damaged or does not fit; ``unsafe`` if its hyper-parameters name a class that
            was not imported.
    """
    content = None if is_delta_file(path) else load_checkpoint(path)
    stored = read(path) if content is None else delta_of(content, path)
    built = isinstance(module, type)
    if isinstance(module, type):
        module = build(module, content or {}, path, kwargs, hparams_file)
    elif kwargs or hparams_file is not None:
        given = ", ".join([*kwargs, *(["hparams_file"] if hparams_file is not None else [])])
        raise ArgumentError(f"{given}: this {type(module).__name__} is built already. Pass its class to build another.")
    if isinstance(module, pl.LightningModule):
        if not any(True for _ in module.parameters()):
            module.setup("predict")
        module.configure_model()
    others = beside(module, content, strict, path) if content is not None else {}
    insert(module, stored, base_check)
    copy_in(module, others)
    if content is not None and isinstance(module, pl.LightningModule):
        module.on_load_checkpoint(content)
    return module.to(map_location) if built and map_location is not None else module


def inspect_delta(path: PathLike) -> Manifest:
    """Read what a delta file or a training checkpoint says of its delta, without a model.

    Of a delta file no values are read; a checkpoint is verified as for a load.

    Raises:
        DeltaFileError: if it is not a sound delta file or checkpoint of this library.
    """
    return manifest_of(path)


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
    """Check a stored delta against a model, then insert and load it.

    Raises:
        ArgumentError: if a method of this name is in the model already.
        DeltaFileError: if the delta is not sound, or does not fit. The model is untouched then.
    """
    root_path, root = root_of(model)
    fit = fitted(root, stored)
    if stored.base is not None:
        check_base(stored.base, root, record_of(root) or Adaptation(), stored.path, base_check, fit.trained)
    with faults_of(stored.path, f"does not fit this {type(root).__name__}"):
        prepared = fit.build()
        accompany_runs()
        record = commit(root, prepared)
        try:
            found = by_delta(stored.tensors)
            for prefix, delta in _deltas(root, record).items():
                if prefix in found:
                    delta.unpack(found[prefix])
            renew(root)
            own = set(record.delta_names)
            widen(root, names=_held_wider(stored), model=model)
            copy_in(root, {name: tensor for name, tensor in stored.tensors.items() if name not in own})
            note_changed(root, stored.tensors)
            _copy_beside(model, root_path, stored)
        except BaseException:
            undo(root, [item.key for item in prepared])
            raise
    return Adapted(root)


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
