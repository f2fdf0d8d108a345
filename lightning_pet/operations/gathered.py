"""A delta file of a model that an engine has sharded: gathered by all processes, written by one."""

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_pet.model.naming import split_below
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.base_check import base_fingerprint
from lightning_pet.store.delta_file import write_delta
from lightning_pet.store.manifest import Manifest
from lightning_pet.store.reader import PathLike
from lightning_pet.strategies.agreement import together
from lightning_pet.strategies.strategy import StrategyAdapter


def gathering_adapter(model: nn.Module) -> StrategyAdapter[Any] | None:
    """The adapter of the engine that shards a model; ``None`` if none does, or its Trainer is not known."""
    if not isinstance(model, pl.LightningModule):
        return None
    try:
        strategy = model.trainer.strategy
    except RuntimeError:  # it was never attached to a Trainer
        return None
    adapter = StrategyAdapter.installed(strategy)
    return adapter if adapter is not None and adapter.shards else None


def save_gathered(
    adapter: StrategyAdapter[Any], adapted: Adapted, path: PathLike, manifest: Manifest, exact: bool
) -> int:
    """Gather the delta tensor by tensor, and write it in one process; every process calls this.

    Args:
        adapter: of the engine.
        adapted: the sharded model.
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
    # As for a checkpoint: outside of the writing process nothing but shapes is kept.
    tensors, _ = split_below(strategy.lightning_module_state_dict(), manifest.root)
    manifest = replace(manifest, base=base_fingerprint(adapted.root, adapted.record, tensors, exact, adapter.whole))
    write = strategy.is_global_zero
    size = adapter.agreed(f"saving {path}", lambda: write_delta(path, tensors, manifest) if write else 0)
    return int(strategy.broadcast(size))
