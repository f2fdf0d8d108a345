"""Runs of diff pruning."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from models import Data, Module, Net, cosine, every_step, trainer
from torch import Tensor

from lightning_pet.callbacks.diff_pruning.callback import DiffPruningCallback
from lightning_pet.layers.sparse_difference import SparseDifference

STEPS = 10
DENSITY = 0.1
CLIPPED: dict[str, Any] = {"alpha_init": 1.0, "l0_weight": 0.02, "alpha_clip": 1e-3}  # the clip is always active


def diff(**options: Any) -> DiffPruningCallback:
    """Six steps with gates, four at fixed places."""
    return DiffPruningCallback(**{"density": DENSITY, "l0_weight": 1e-3, "verbose": False, "plot": False, **options})


def differences(module: torch.nn.Module) -> list[SparseDifference]:
    return [part for part in module.modules() if isinstance(part, SparseDifference)]


def run(folder: Path | None, *, path: Path | None = None, seed: int = 5, **options: Any) -> tuple[Module, Trainer]:
    """A fit with dropout and shuffling, a checkpoint of every step."""
    module = Module(Net(norm=True), cosine)
    torch.manual_seed(seed)
    callbacks = [diff(**options.pop("diff", {})), *([every_step(folder)] if folder else []), *options.pop("more", [])]
    fitted = trainer(*callbacks, **options)
    fitted.fit(module, datamodule=options.pop("data", Data()), ckpt_path=path)
    return module, fitted


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([d.difference().detach().flatten() for d in differences(module)])
