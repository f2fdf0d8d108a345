"""What the parts of a run ask of it."""

from typing import Any, Protocol

import lightning.pytorch as pl

from lightning_pet.operations.adapted import Adapted
from lightning_pet.strategies.strategy import StrategyAdapter


class Run(Protocol):
    """One Trainer with one LightningModule; the :class:`~lightning_pet.training.controller.Controller` is one."""

    trainer: pl.Trainer
    module: pl.LightningModule
    adapter: StrategyAdapter[Any]

    @property
    def adapted(self) -> Adapted:
        """Handle on the adapted root."""
        ...

    @property
    def root_path(self) -> str:
        """Path of the adapted root in the LightningModule."""
        ...
