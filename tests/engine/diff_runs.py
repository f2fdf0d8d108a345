"""Runs of diff pruning, in one process or in one of two.

``python diff_runs.py FOLDER`` is one of two, started by the launcher; it prints what it found as one line of JSON.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

import torch
from lightning.pytorch import LightningModule, Trainer
from models import Data, Module, Net, cosine, digest, every_step, trainer
from torch import Tensor

from lightning_pet.callbacks.diff_pruning import DiffPruningCallback
from lightning_pet.layers.sparse_difference import SparseDifference

STEPS = 10
DENSITY = 0.1


def diff(**options: Any) -> DiffPruningCallback:
    """Six steps with gates, four at fixed places."""
    return DiffPruningCallback(**{"density": DENSITY, "l0_weight": 1e-3, "verbose": False, "plot": False, **options})


def differences(module: torch.nn.Module) -> list[SparseDifference]:
    return [part for part in module.modules() if isinstance(part, SparseDifference)]


class Watching(DiffPruningCallback):
    """Notes the gates of every batch."""

    method = "diff_pruning"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.seen = [
            *getattr(self, "seen", []),
            [d.gates.generator(torch.device("cpu")).initial_seed() for d in differences(pl_module)],
        ]


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


def main(folder: Path) -> dict[str, Any]:
    """Two processes: a run, and one that resumes in each stage."""
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2}
    torch.manual_seed(5)
    module = Module(Net(dropout=0.0), cosine)
    callback = diff()
    fitted = trainer(callback, every_step(folder / "ddp"), **options)
    fitted.fit(module, datamodule=Data(batch_size=2))
    found: dict[str, Any] = {
        "digest": digest(module),
        "losses": module.losses,
        "kept": int(flat(module).count_nonzero()),
    }
    found["again"] = []
    for step in (3, 6, 8):
        again = Module(Net(dropout=0.0), cosine)
        torch.manual_seed(99)
        resumed = trainer(diff(), **options)
        resumed.fit(again, datamodule=Data(batch_size=2), ckpt_path=folder / "ddp" / f"step={step}.ckpt")
        found["again"].append([digest(again), again.losses])
    return found


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]))), flush=True)
    torch.distributed.destroy_process_group()
