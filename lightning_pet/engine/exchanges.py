"""Runs in which a method exchanges parameters, or clips its own: what the Trainer around it must allow."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn

from lightning_pet.engine import private
from lightning_pet.errors import UnsupportedStrategyError


def refuse_exchanges(trainer: pl.Trainer, method: str) -> None:
    """Raise if parameters cannot be exchanged in the middle of this run.

    Raises:
        UnsupportedStrategyError: if the strategy shards parameters, or a callback averages them.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise UnsupportedStrategyError(
            f"{type(strategy).__name__}: {method} exchanges parameters during the fit, which a strategy that shards "
            "them does not allow. Use strategy='ddp' or one device."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UnsupportedStrategyError(
                f"{type(callback).__name__} averages over steps, and {method} exchanges parameters between them. "
                "Leave one of the two out."
            )


def clip_norm(trainer: pl.Trainer, optimizer: Any, parameters: Sequence[nn.Parameter], norm: float) -> None:
    """Clip the gradients of some parameters to a norm, before the optimizer steps.

    Gradients that the optimizer itself will unscale are still scaled, and so is the norm then.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and private.unscales_itself(optimizer):
        norm *= scaler.get_scale()
    torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], norm)
