"""Which adapter serves the Trainer's strategy."""

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

from lightning_pet.engine.deepspeed import DeepSpeedAdapter
from lightning_pet.engine.fsdp import FSDPAdapter
from lightning_pet.engine.model_parallel import ModelParallelAdapter
from lightning_pet.engine.strategy import StrategyAdapter
from lightning_pet.errors import UnsupportedStrategyError

ADAPTERS: list[tuple[type[Strategy], type[StrategyAdapter[Any]] | None]] = [
    (SingleDeviceXLAStrategy, None),
    (XLAStrategy, None),
    (DeepSpeedStrategy, DeepSpeedAdapter),
    (FSDPStrategy, FSDPAdapter),
    (ModelParallelStrategy, ModelParallelAdapter),
    (SingleDeviceStrategy, StrategyAdapter),
    (DDPStrategy, StrategyAdapter),
]
"""Strategy class → adapter; the first match by ``isinstance`` decides."""


def adapter_for(trainer: pl.Trainer) -> StrategyAdapter[Any]:
    """The adapter of the Trainer's strategy.

    Raises:
        UnsupportedStrategyError: if there is none.
    """
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
    return adapter(strategy)
