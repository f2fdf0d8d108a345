"""One delta of a model into a file; gathered by all processes and written by one, where an engine has sharded it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_pet.errors import ArgumentError, PETError
from lightning_pet.insertion.choice import record_at
from lightning_pet.insertion.intact import check_intact
from lightning_pet.insertion.tasks.own_values import as_base_names, is_own
from lightning_pet.layers.sharding import holds_parts
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.delta_names import delta_of, in_file
from lightning_pet.model.naming import split_below
from lightning_pet.operations.base_check import base_fingerprint
from lightning_pet.operations.contents import meant, packed
from lightning_pet.store.delta_file import write_delta
from lightning_pet.store.entry import written_by
from lightning_pet.store.manifest import Manifest, MethodRecord
from lightning_pet.store.reader import PathLike
from lightning_pet.strategies.agreement import together
from lightning_pet.strategies.strategy import StrategyAdapter


def save(
    model: nn.Module,
    root_path: str,
    root: nn.Module,
    path: PathLike,
    *,
    name: str | None = None,
    notes: Mapping[str, str] | None = None,
    exact: bool = False,
) -> int:
    """Write a delta file; see :func:`lightning_pet.save_delta`.

    Args:
        model: what was given: the root, or what contains it.
        root_path: path of the root in it.
        root: the adapted root.
        path: of the file.
        name: of the delta.
        notes: for people.
        exact: digest every byte of the base.
    """
    record = record_at(root)
    delta = meant(record, name)
    view = record.of(delta)
    methods = tuple(MethodRecord(a.method, a.name, a.config, a.targets) for a in view.applied if not is_own(a))
    manifest = Manifest(methods, root=root_path, notes=dict(notes or {}), written_by=written_by())
    if (adapter := _gathering_adapter(model)) is not None:
        return _save_gathered(adapter, root, view, path, manifest, exact)
    if holds_parts(root):
        raise PETError(
            f"this process holds parts of the delta only, and this {type(model).__name__} does not say which Trainer "
            "has the others. Pass the LightningModule, in every process; or use trainer.save_checkpoint, whose file "
            "load_delta reads without any engine."
        )
    check_intact(root, record)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in packed(root, record, delta).items()}
    manifest = replace(manifest, base=base_fingerprint(root, view, tensors, exact))
    return write_delta(path, tensors, manifest)


def _gathering_adapter(model: nn.Module) -> StrategyAdapter[Any] | None:
    """The adapter of the engine that shards a model; ``None`` if none does, or its Trainer is not known."""
    if not isinstance(model, pl.LightningModule):
        return None
    try:
        strategy = model.trainer.strategy
    except RuntimeError:  # it was never attached to a Trainer
        return None
    adapter = StrategyAdapter.installed(strategy)
    return adapter if adapter is not None and adapter.shards else None


def _save_gathered(
    adapter: StrategyAdapter[Any],
    root: nn.Module,
    record: Adaptation,
    path: PathLike,
    manifest: Manifest,
    exact: bool,
) -> int:
    """Gather the delta tensor by tensor, and write it in one process; every process calls this.

    Args:
        adapter: of the engine.
        root: the sharded model.
        record: of the delta, which trains.
        path: the first process's counts.
        manifest: without the base.
        exact: digest every byte of the base, which is gathered tensor by tensor as well.

    Returns:
        Bytes written, in every process.
    """
    if adapter.several:
        together("save_delta")
    strategy = adapter.strategy
    path = strategy.broadcast(path)
    if any(delta in record.waiting for delta in record.names):
        raise ArgumentError(
            f"the delta {record.names[0]!r} does not train in this run, and the engine gathers those that do. Save it "
            "in a process that holds the model as a whole."
        )
    # As for a checkpoint: outside of the writing process nothing but shapes is kept.
    tensors, _ = split_below(strategy.lightning_module_state_dict(), manifest.root)
    own = {n: value for n, value in tensors.items() if delta_of(n) in (None, *record.names)}
    tensors = in_file(as_base_names(own))
    manifest = replace(manifest, base=base_fingerprint(root, record, tensors, exact, adapter.whole))
    write = strategy.is_global_zero
    size = adapter.agreed(f"saving {path}", lambda: write_delta(path, tensors, manifest) if write else 0)
    return int(strategy.broadcast(size))
