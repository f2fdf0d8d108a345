"""Optimizer and learning-rate schedule of the ready modules."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim.lr_scheduler import LambdaLR

from lightning_pet.errors import ArgumentError

Schedule = Literal["cosine", "linear", "constant"]


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW with a rate for deltas (2e-3, about ten times that of full fine-tuning) and weight decay 0.01."""
    return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01)


def warmup_then(shape: Schedule, warmup: float, steps: float) -> Callable[[int], float]:
    """Factor of the learning rate at each optimizer step.

    Args:
        shape: what follows the warm-up: ``"cosine"`` or ``"linear"`` decay to zero, or ``"constant"``.
        warmup: share of the steps in which the factor rises linearly to 1.
        steps: optimizer steps of the whole run; may be infinite for ``"constant"`` without warm-up.

    Returns:
        A function of the 0-based step, with values in [0, 1].

    Raises:
        ArgumentError: the share is outside [0, 1), or the run has no known length and the schedule needs one.

    Example:
        >>> factor = warmup_then("linear", 0.5, 4)
        >>> [factor(step) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if not 0.0 <= warmup < 1.0:
        raise ArgumentError(f"warmup={warmup}: expected a share of the run, 0 <= warmup < 1")
    if math.isinf(steps):
        if shape == "constant" and warmup == 0.0:
            return lambda step: 1.0
        raise ArgumentError(
            f"the schedule {shape!r} with warmup={warmup} needs a run of known length: "
            f"set trainer.max_epochs or trainer.max_steps, or use lr_scheduler='constant' with warmup=0"
        )
    rise = round(warmup * steps)
    fall = max(steps - rise, 1)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        done = min((step - rise) / fall, 1.0)
        if shape == "constant":
            return 1.0
        return 1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


def with_schedule(
    module: LightningModule,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: Schedule | LRSchedulerCallable,
    warmup: float,
) -> Any:
    """Pair an optimizer with its schedule, in the form that ``configure_optimizers`` returns.

    Args:
        module: attached to the trainer, which knows the length of the run.
        optimizer: the optimizer.
        lr_scheduler: a built-in schedule, stepped after every batch, or a callable that takes the optimizer
            and returns a torch scheduler, stepped after every epoch.
        warmup: share of the run for the warm-up of a built-in schedule.
    """
    if callable(lr_scheduler):
        return {"optimizer": optimizer, "lr_scheduler": lr_scheduler(optimizer)}
    factor = warmup_then(lr_scheduler, warmup, module.trainer.estimated_stepping_batches)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
