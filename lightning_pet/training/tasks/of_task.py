"""What every method does to be one of several in a run: a callback of its own for each task."""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl

from lightning_pet.errors import ArgumentError
from lightning_pet.model.naming import DEFAULT
from lightning_pet.training.tasks.tasks import tasks_of


class OfTask:
    """Mixed into every method."""

    own_values: bool = False
    """It is one of several that train side by side: what it trains of the base is a parameter of its own."""
    outputs: int | None = None
    """Number of labels of its own head."""
    start_seed: int | None = None
    """Seed of its random start."""
    stream: Any = None
    """The random numbers of the run that it is a part of, if it is one of several beside each other on all rows."""
    as_alone: Any = None
    """Called with the root and the places after it was built, if it is the first of several that are built there."""

    @property
    def not_for_tasks(self) -> str | None:
        """Why this method, with these options, cannot train several deltas in one run; ``None`` if it can."""
        return None

    def for_task(self, task: str, options: Mapping[str, Any]) -> Any:
        """The same for the delta of one task.

        Args:
            task: its name.
            options: arguments of the task's own; those that this method does not take are passed over.

        Raises:
            ArgumentError: if this method cannot be one of several.
        """
        template: Any = self
        name = type(self).__name__
        if template.delta != DEFAULT:
            raise ArgumentError(
                f"{name}(delta={template.delta!r}) beside TasksCallback: each task is a delta under its own name. "
                "Leave delta out."
            )
        if (reason := self.not_for_tasks) is not None:
            raise ArgumentError(f"{name} beside TasksCallback: {reason}")
        arguments: dict[str, Any] = template.arguments()
        own = {option: value for option, value in options.items() if option in arguments}
        mine = type(self)(**{**arguments, **own, "delta": task})
        mine.own_values, mine.outputs, mine.start_seed = True, options.get("labels"), options.get("seed")
        return mine


def for_tasks(setup: Callable[..., None]) -> Callable[..., None]:
    """Let a method's ``setup`` run for the callbacks of single tasks, where there are such, and not for this one."""

    @wraps(setup)
    def run(self: Any, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        first = None
        if (tasks := tasks_of(trainer)) is not None:
            self._of_run = pl_module
            first = tasks.first_of(trainer, self)
        (partial(setup, self) if first is None else first.setup)(trainer, pl_module, stage)

    return run
