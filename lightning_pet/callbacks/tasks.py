"""Several deltas trained in one run, each on the rows of its task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback

from lightning_pet.arguments import checked
from lightning_pet.training.controller import Controller
from lightning_pet.training.tasks.files import SUFFIX, folder_of, write
from lightning_pet.training.tasks.tasks import Tasks


class TasksCallback(Callback):
    """Train one delta for each task in one run, beside any PET callbacks.

    Each task gets a delta of its own, under its name, that the PET callbacks of the Trainer make: with adapters,
    heads and biases of its own, and its own random start. A batch says which rows belong to which task; each row goes
    through the delta of its task, in all steps, without a change to the module. The base is in memory once.

    Args:
        tasks: names, or names with options of their own: ``{"sst2": {"labels": 2}, "trec": {"labels": 6, "r": 4}}``.
            Options are ``labels`` (size of the head's output), ``lr`` and ``weight_decay``, ``seed`` (of the random
            start), and what the PET callbacks take.
        key: where a batch says which task a row belongs to: the name of an entry, its position in a batch that is a
            tuple, or a function of the batch. The entry holds names or numbers (in the order of ``tasks``), one per
            row or one for all, and is taken out before the module sees the batch.
        every_row: every row belongs to every task: several runs on the same data, side by side.
        split: run a training batch task by task, even where one call could do it: figures that ``training_step``
            logs are then logged for each task, too.

        dirpath: folder of the files ``TASK.pet.safetensors``, one for each task, that are written at the end of a fit
            (default: that of the checkpoints, else ``tasks`` in the Trainer's folder).

    Attributes:
        files: where the delta of each task was written.

    Raises:
        ArgumentError: if a task is named twice, or an argument is out of range.

    >>> from lightning_pet import LoRACallback, TasksCallback
    >>> callbacks = [LoRACallback(r=8), TasksCallback(tasks=["sst2", "trec"])]
    """

    @checked
    def __init__(
        self,
        tasks: list[str] | dict[str, dict[str, Any] | None] = ["task"],  # noqa: B006  # never changed
        key: Callable[[Any], Any] | int | str = "task",
        every_row: bool = False,
        split: bool = False,
        dirpath: str | None = None,
    ) -> None:
        super().__init__()
        self._tasks = Tasks(tasks, key, every_row=every_row)
        self.tasks, self.key, self.every_row, self.split = self._tasks.names, key, every_row, split
        self._tasks.split = split
        self.dirpath = dirpath
        self.files: dict[str, Path] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put one PET callback per task in the place of each."""
        self._tasks.spread(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Where the random numbers of runs stand (``every_row``)."""
        return {} if self._tasks.streams is None else self._tasks.streams.saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        if self._tasks.streams is not None and state_dict:
            self._tasks.streams.load_saved(state_dict)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the tasks that have had no row."""
        self._tasks.report_unseen(trainer, f"in epoch {trainer.current_epoch}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write one file for each task."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = folder_of(trainer, self.dirpath)
            self.files = write(Controller.get(trainer), self.tasks, lambda task: folder / f"{task}{SUFFIX}")
