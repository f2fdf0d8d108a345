"""One process of a run of two, which kills itself at a given moment; or which resumes such a run.

``python -m benchmarks.crash.member FOLDER ENGINE PHASE VICTIM``; the launcher tells each process its rank. Without a
victim (``-1``) the run goes on from the last good checkpoint to its end.
"""

import logging
import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from engines import make
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from models import Data, Module, lora, trainer

from benchmarks.crash.ranks import JOIN_LIMIT_S, STEPS
from lightning_pet import last_good
from lightning_pet.store import files


def rank() -> int:
    """As the launcher said."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


class Die(L.Callback):
    """Ends its process by SIGKILL when the phase comes."""

    def __init__(self, phase: str, folder: Path) -> None:
        self.phase, self.folder = phase, folder

    def now(self, phase: str) -> None:
        """Die, if this is the phase."""
        if phase == self.phase:
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The group has been formed, nothing is built."""
        self.now("setup")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Before anything was saved."""
        if trainer.global_step == 0:
            self.now("first step")

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        """The others will wait for this gradient."""
        if trainer.global_step == 3:
            self.now("within a step")

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        """Rank 0 dies later, when it has written a part of the file."""
        if trainer.global_step == 3 and self.phase == "save":
            if trainer.is_global_zero:
                files.Disk.sync = lambda *_: self.now("save")  # type: ignore[assignment,method-assign,return-value]
            else:
                self.now("save")

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Validation runs after steps 2 and 4."""
        if trainer.global_step == 4:
            self.now("validation")

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """All steps are done."""
        self.now("end")


class Validated(Module):
    """Its validation is a collective, so that a survivor notices."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean over both processes."""
        self.log("val_loss", self.loss(batch), sync_dist=True)


def train(folder: Path, engine: str, phase: str, victim: int) -> int:
    """Train and save each step; the number of steps."""
    die = Die(phase if rank() == victim else "", folder)
    torch.manual_seed(5)
    module, strategy = make(engine, Validated, 0.3)
    if isinstance(strategy, str):
        strategy = DDPStrategy(process_group_backend="gloo")
    watched = os.environ.get("TORCHELASTIC_RUN_ID", "crash") != "crash"  # by torchrun, which sets a number of its own
    if phase == "joining" and not watched:  # what `timeout=` sets: how long a process waits for one that never joins
        strategy._timeout = timedelta(seconds=JOIN_LIMIT_S)
    join = strategy.setup_environment

    def started() -> None:
        (folder / f"started-{rank()}").touch()
        die.now("joining")
        join()

    strategy.setup_environment = started  # type: ignore[method-assign]
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    options: dict[str, Any] = {"val_check_interval": 2, "limit_val_batches": 2, "max_steps": STEPS, "max_epochs": -1}
    fitted = trainer(die, lora(), saver, strategy=strategy, devices=2, **options)
    fitted.fit(module, datamodule=Data(batch_size=2), ckpt_path=last_good(folder))
    return fitted.global_step


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    train(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
