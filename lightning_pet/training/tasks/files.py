"""One delta file for each task of a run."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.operations.saved import save
from lightning_pet.training.watch import Run

SUFFIX = ".pet.safetensors"


def folder_of(trainer: pl.Trainer, given: str | None) -> Path:
    """Where the files of tasks go: as given, else beside the checkpoints, else below the run's folder."""
    if given is None:
        folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        given = str(folders[0]) if folders else os.path.join(trainer.log_dir or trainer.default_root_dir, "tasks")
    return Path(trainer.strategy.broadcast(os.path.abspath(given)))


def write(run: Run, tasks: Iterable[str], path_of: Callable[[str], Path], note: str = "") -> dict[str, Path]:
    """Write the deltas of some tasks as they are now; every process calls this.

    A delta with NaN or infinity in it is none, and announced.

    Args:
        run: the Trainer and its module.
        tasks: whose.
        path_of: gives the path of a task's file.
        note: for people, in each file.

    Returns:
        Where each was written.
    """
    written, adapter = {}, run.adapter
    for task in tasks:
        path = path_of(task)
        notes = {"name": task} | ({"note": note} if note else {})
        one = partial(save, run.module, run.root_path, run.adapted.root, path, name=task, notes=notes)
        try:
            if adapter.shards:
                path.parent.mkdir(parents=True, exist_ok=True)
                one()  # all gather, one writes
            else:
                adapter.agreed(f"saving {path}", partial(_first_writes, run, path, one))
            written[task] = path
        except DeltaFileError as error:
            if error.code != "nonfinite":
                raise
            rank_zero_warn(f"{path} is not written: {error}")
    return written


def _first_writes(run: Run, path: Path, one: Callable[[], int]) -> None:
    if run.trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        one()


def values_of(trainer: pl.Trainer, monitor: str, tasks: Sequence[str]) -> dict[str, float]:
    """The present values of a figure, of each task that has one; what is no number is none.

    Raises:
        ArgumentError: if no task has one, naming the figures that tasks have.
    """
    known = trainer.callback_metrics
    found = {task: float(known[name]) for task in tasks if (name := f"{monitor}/{task}") in known}
    if not found:
        ends = tuple(f"/{task}" for task in tasks)
        names = sorted({name.rpartition("/")[0] for name in known if name.endswith(ends)})
        raise ArgumentError(
            f"monitor={monitor!r}: nothing of this name was logged for a task. "
            + (f"There are {', '.join(map(repr, names))}. " if names else "")
            + "Figures are known for each task where validation_step logs them (also with on_epoch=True), not where a "
            "hook at the end of an epoch does."
        )
    return {task: value for task, value in found.items() if value == value}
