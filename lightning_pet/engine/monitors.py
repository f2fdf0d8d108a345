"""Callbacks that remember the best value of a metric, when the model becomes another one in the middle of a fit."""

import math
from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


def compare_anew(callbacks: Iterable[pl.Callback], reason: str) -> None:
    """Let the callbacks of a run forget what was best so far: later models compete among themselves only.

    Files that were written stay where they are.

    Args:
        callbacks: of the Trainer.
        reason: why, for the log.
    """
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.best_k_models:
            callback.best_k_models = {}
            callback.best_model_score = callback.current_score = None
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        elif isinstance(callback, EarlyStopping):
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
            callback.wait_count = 0
        else:
            continue
        rank_zero_info(f"{type(callback).__name__} compares {callback.monitor} anew from here: {reason}.")
