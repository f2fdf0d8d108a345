"""What a run of our command shows: no line that means nothing to its reader, one total, metrics on one line."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.loggers import CSVLogger

from lightning_pet.callbacks.base import PETCallback

# Logger, how its line begins. What Lightning says on every run, whatever the run is, and of no use to change.
_LINES = (
    ("lightning.pytorch.utilities.rank_zero", "💡 Tip: "),
    ("lightning.pytorch.utilities.rank_zero", "TPU available: False"),
    ("lightning.pytorch.utilities.rank_zero", "Loading `train_dataloader` to estimate"),
    ("torch.utils._pytree", "<enum "),  # packages that tell torch of their constants in the old way
)
_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",  # between Lightning and torch
    "No seed found, seed set to",  # the next line says the same
)
_WIDE = 124  # columns from which a full bar and the speed have room beside two metrics
_BESIDE_BAR = 72


class _Without(logging.Filter):
    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


class _KernelsOfOtherMachines(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return torch.cuda.is_available() or not record.getMessage().startswith("Failed to load")


class _OnItsOwnLine(logging.Filter):
    """The message that ends a fit would stand behind the progress bar."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("`Trainer.fit` stopped") and sys.stderr.isatty():
            record.msg = f"\n{record.msg}"
        return True


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block those lines of other packages are dropped that are the same on every run."""
    filters: list[tuple[str, logging.Filter]] = [(name, _Without(start)) for name, start in _LINES]
    filters += [("torchao", _KernelsOfOtherMachines()), (_LINES[0][0], _OnItsOwnLine())]
    for name, one in filters:
        logging.getLogger(name).addFilter(one)
    try:
        with warnings.catch_warnings():
            for text in _WARNINGS:
                warnings.filterwarnings("ignore", message=text)
            yield
    finally:
        for name, one in filters:
            logging.getLogger(name).removeFilter(one)


class Progress(RichProgressBar):
    """Lightning's, without the number of the log folder; in a narrow window with a short bar, and without the speed."""

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What was logged for the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """What fits."""
        columns, width = super().configure_columns(trainer), shutil.get_terminal_size().columns
        if width >= _WIDE:
            return columns
        columns[1].bar_width = max(8, width - _BESIDE_BAR)
        return columns[:-1]


def with_defaults(settings: MutableMapping[str, Any]) -> None:
    """Fill in what the user left open among the arguments of the Trainer.

    Args:
        settings: those arguments; callbacks are a list.
    """
    if settings.get("barebones"):
        return
    callbacks = settings["callbacks"]
    shown = any(isinstance(callback, PETCallback) and callback.verbose for callback in callbacks)
    if settings.get("enable_model_summary") is None and shown:
        settings["enable_model_summary"] = False  # the table of trained parameters has the total
    if settings.get("enable_progress_bar") in (None, True) and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(Progress())
    if settings.get("logger") in (None, True) and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        settings["logger"] = CSVLogger(
            settings.get("default_root_dir") or os.getcwd()
        )  # what Lightning takes, with a warning
