"""Steps of the optimizers that hold a callback's deltas, where a module steps several optimizers by itself.

Lightning counts the steps of all optimizers together there, and tells the length of a run in batches. A schedule counts
those of its own optimizer, and takes it that each optimizer steps once per batch.
"""

import math
from typing import Any

import lightning.pytorch as pl


class OwnSteps:
    """Counts them; of a run with one optimizer it is the Trainer that counts, and nothing is kept."""

    def __init__(self) -> None:
        self._counts: list[int] | None = None  # of each optimizer
        self._own: list[int] = []  # places of those that hold the deltas
        self._loaded = False

    def begin(self, trainer: pl.Trainer, parameters: set[int]) -> None:
        """A run begins, or goes on.

        Args:
            trainer: its Trainer.
            parameters: ``id`` of what the callback trains.
        """
        optimizers, before, loaded = trainer.optimizers, self._counts, self._loaded
        self._loaded = False
        if not _several(trainer):
            self._counts, self._own = None, []
            return
        held = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
        self._own = [index for index, ids in enumerate(held) if ids & parameters] or list(range(len(optimizers)))
        fits = before is not None and len(before) == len(optimizers)
        if fits and (loaded or (before is not None and sum(before) == trainer.global_step)):
            return  # resumed, or a second fit that goes on
        # A checkpoint from elsewhere does not say how they were shared out.
        self._counts = [math.ceil(trainer.global_step / len(optimizers))] * len(optimizers)

    def count(self, trainer: pl.Trainer, optimizer: Any) -> None:
        """An optimizer is about to step."""
        if self._counts is not None:
            for index, one in enumerate(trainer.optimizers):
                self._counts[index] += one is optimizer

    def made(self, trainer: pl.Trainer) -> int:
        """Steps until now."""
        if self._counts is None:
            return trainer.global_step
        return max(self._counts[index] for index in self._own)

    def total(self, trainer: pl.Trainer) -> float:
        """Steps of the whole run, as far as that is known beforehand; infinity or a negative number if it is not."""
        steps = float(trainer.estimated_stepping_batches)
        if self._counts is None or trainer.max_steps == -1:
            return steps
        return min(steps, math.ceil(trainer.max_steps / len(self._counts)))

    def state(self) -> dict[str, Any]:
        """For a checkpoint; empty where the Trainer counts."""
        return {} if self._counts is None else {"own_steps": list(self._counts)}

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        if "own_steps" in state:
            self._counts, self._loaded = [int(count) for count in state["own_steps"]], True


def _several(trainer: pl.Trainer) -> bool:
    return len(trainer.optimizers) > 1 and not trainer.lightning_module.automatic_optimization
