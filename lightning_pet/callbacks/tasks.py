"""Several deltas trained in one run, each on the rows of its task."""

from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_pet.arguments import checked, one_of
from lightning_pet.strategies.strategy import adapter_for
from lightning_pet.training.controller import Controller
from lightning_pet.training.tasks.files import SUFFIX, folder_of, values_of, write
from lightning_pet.training.tasks.shards import pass_over, refuse_for_shards
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
        every_row: every row belongs to every task: several runs on the same data in one forward, each with the weights,
            dropout and clipping that it has alone, where the loss is a mean or a sum over rows.
        monitor: figure that decides which values of a task its file holds, e.g. ``"val_acc"``, of which each task has
            its own, ``val_acc/TASK``. Without it, the file holds the values of the end.
        mode: ``"min"`` or ``"max"``: which values of it are better.
        split: run a training batch task by task, even where one call could do it: figures that ``training_step``
            logs are then logged for each task, too.

        dirpath: folder of the files ``TASK.pet.safetensors``, one for each task, that are written at the end of a fit
            (default: that of the checkpoints, else ``tasks`` in the Trainer's folder).

    Attributes:
        files: where the delta of each task was written.
        best: the best value of ``monitor`` so far, by task.

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
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        split: bool = False,
        dirpath: str | None = None,
    ) -> None:
        super().__init__()
        one_of("mode", mode, Literal["min", "max"], "use 'min' or 'max'.")
        self._tasks = Tasks(tasks, key, every_row=every_row)
        self.tasks, self.key, self.every_row, self.split = self._tasks.names, key, every_row, split
        self._tasks.split = split
        self.monitor, self.mode, self.dirpath = monitor, mode, dirpath
        self.files: dict[str, Path] = {}
        self.best: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put one PET callback per task in the place of each, and prepare the engine.

        Raises:
            UnsupportedStrategyError: if the engine cannot train several deltas.
        """
        adapter = adapter_for(trainer)
        if adapter.shards:
            refuse_for_shards(trainer, self._tasks)
        if stage == "fit" and not self.every_row and adapter.passes_over:  # a process may have no row of a task
            adapter.expect_gaps(trainer, "TasksCallback")
        self._tasks.spread(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """On an engine that shards, leave tasks as they are that no process has had a row of."""
        adapter = adapter_for(trainer)
        if adapter.shards:
            pass_over(trainer, pl_module, self._tasks, adapter)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the tasks that have had no row."""
        self._tasks.report_unseen(trainer, f"in epoch {trainer.current_epoch}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that is not resumed knows of no best value."""
        if trainer.ckpt_path is None:
            self.best, self.files = {}, {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files of the tasks that are better than before."""
        if self.monitor is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        better = {
            task: value
            for task, value in values_of(trainer, self.monitor, self.tasks).items()
            if (value > self.best.get(task, -inf) if self.mode == "max" else value < self.best.get(task, inf))
        }
        better = trainer.strategy.broadcast(better)  # one process decides: all of them gather
        self.best |= better
        self._write(trainer, better)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files of the tasks that have none yet."""
        self._write(trainer, [task for task in self.tasks if task not in self.best])
        for task, path in self.files.items():
            score = f" ({self.monitor} {self.best[task]:.4g})" if task in self.best else ""
            rank_zero_info(f"delta of {task!r}{score}: {path}")

    def _write(self, trainer: pl.Trainer, tasks: Iterable[str]) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = folder_of(trainer, self.dirpath)
            self.files |= write(Controller.get(trainer), tasks, lambda task: folder / f"{task}{SUFFIX}")

    # --- checkpoints ------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this callback in a checkpoint."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """The best values so far, and where the random numbers of runs stand (``every_row``)."""
        state = {"best": dict(self.best), "files": {task: str(path) for task, path in self.files.items()}}
        return state if self._tasks.streams is None else {**state, **self._tasks.streams.saved()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        if self._tasks.streams is not None:
            self._tasks.streams.load_saved(state_dict)
        self.best = {task: value for task, value in state_dict["best"].items() if task in self.tasks}
        self.files = {task: Path(path) for task, path in state_dict["files"].items() if task in self.tasks}
