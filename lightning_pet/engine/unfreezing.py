"""Parameters that start to train in the middle of a run: when."""

import math

import lightning.pytorch as pl

from lightning_pet.errors import ArgumentError


def elapsed(trainer: pl.Trainer, interval: str) -> int:
    """Epochs or optimizer steps done; equal after a resume."""
    return trainer.current_epoch if interval == "epoch" else trainer.global_step


def check_long_enough(trainer: pl.Trainer, every: int, interval: str, groups: int) -> None:
    """The last group must get to train, if the length of the run is known.

    Raises:
        ArgumentError: if the run ends before.
    """
    needed = every * (groups - 1)
    length = _length(trainer, interval)
    if length <= needed:
        raise ArgumentError(
            f"unfreeze_every={every}: the last of {groups} groups of layers would start to train after {needed} "
            f"{interval}s, but the run ends after {length:g}. Train longer, unfreeze more often, or train fewer layers."
        )


def _length(trainer: pl.Trainer, interval: str) -> float:
    """Length of the run as far as it is known beforehand; a stop for another reason is not."""
    steps = trainer.estimated_stepping_batches
    steps = math.inf if steps < 0 else steps  # a stream of unknown length, without max_steps
    if interval == "step":
        return steps
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    known = math.isfinite(steps) and math.isfinite(per_epoch) and per_epoch > 0
    return min(epochs, math.ceil(steps / per_epoch)) if known else epochs
