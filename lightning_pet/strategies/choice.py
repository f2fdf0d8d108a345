"""Which adapter serves the Trainer's strategy; those of the sharding engines are imported when one is in use."""

from importlib import import_module
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy

from lightning_pet.errors import UnsupportedStrategyError
from lightning_pet.strategies.strategy import StrategyAdapter

ADAPTERS: list[tuple[type[Strategy], tuple[str, str] | None]] = [
    (SingleDeviceXLAStrategy, None),
    (XLAStrategy, None),
    (DeepSpeedStrategy, ("deepspeed", "DeepSpeedAdapter")),
    (FSDPStrategy, ("fsdp", "FSDPAdapter")),
    (ModelParallelStrategy, ("model_parallel", "ModelParallelAdapter")),
    (SingleDeviceStrategy, ("strategy", "StrategyAdapter")),
    (DDPStrategy, ("ddp", "DDPAdapter")),
]
"""Strategy class → module and class of its adapter; the first match by ``isinstance`` decides."""


def adapter_for(trainer: pl.Trainer) -> StrategyAdapter[Any]:
    """The adapter of the Trainer's strategy.

    Raises:
        UnsupportedStrategyError: if there is none.
    """
    if any(kind.__module__.partition(".")[0] == "pytorch_lightning" for kind in type(trainer).__mro__):
        raise UnsupportedStrategyError(
            "this Trainer is of the package pytorch_lightning, whose classes are others than those of lightning. "
            "Import Trainer, LightningModule and callbacks from lightning: import lightning as L, or import "
            "lightning.pytorch as pl."
        )
    strategy = trainer.strategy
    if (found := StrategyAdapter.installed(strategy)) is not None:
        return found
    adapter = next((adapter for kind, adapter in ADAPTERS if isinstance(strategy, kind)), None)
    if adapter is None:
        supported = ", ".join(kind.__name__ for kind, adapter in ADAPTERS if adapter is not None)
        raise UnsupportedStrategyError(
            f"{type(strategy).__name__} cannot train a delta: its checkpoints would not hold it, or parameters that "
            f"are replaced after set-up are lost to it. Supported: {supported}; for one process or several, "
            "strategy='auto' or 'ddp'."
        )
    module, name = adapter
    made: StrategyAdapter[Any] = getattr(import_module(f"lightning_pet.strategies.{module}"), name)(strategy)
    return made
