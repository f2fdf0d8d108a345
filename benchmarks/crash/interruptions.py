"""Every method, interrupted at every step and every pair of steps, and resumed: bit for bit the undisturbed run."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from method_runs import METHODS
from models import trainer
from resume_runs import Result, SaveAll, double_interruptions, single_interruptions
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.methods import zoo


class Rows(Dataset[dict[str, Tensor]]):
    """Token sequences with labels."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 50, (count, 6), generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Classifier(L.LightningModule):
    """A tiny BERT with dropout; every loss is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.net = zoo.bert()[0].train()
        for module in self.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
        self.events: list[tuple[Any, ...]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Note epoch, batch, step and loss."""
        loss: Tensor = self.net(**batch).loss
        self.events.append(("train", self.current_epoch, batch_idx, self.trainer.global_step, loss.item().hex()))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Note the loss."""
        loss = self.net(**batch).loss
        self.log("val_loss", loss)
        self.events.append(("val", self.current_epoch, batch_idx, loss.item().hex()))

    def configure_optimizers(self) -> Any:
        """Momentum and a schedule: both must come back."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


@dataclass(frozen=True)
class MethodRun:
    """One configuration of one method; :meth:`fit` runs it, from the beginning or from a checkpoint.

    Attributes:
        own: folder for what the method needs, such as files of adapters.
    """

    method: str
    own: Path
    workers: int = 0
    accumulate: int = 1
    val: bool = False
    epochs: int = 2
    batches: int = 4

    def fit(self, folder: Path, ckpt: Path | None = None, extra: None = None) -> Result:
        """Train to the end and save after every step."""
        torch.manual_seed(5 if ckpt is None else 99)  # a resumed process draws other numbers
        module, saver = Classifier(), SaveAll(folder, "batch")
        callbacks = METHODS[self.method](self.own)
        for callback in callbacks:
            callback.verbose = False
        fitted = trainer(
            *callbacks,
            saver,
            max_epochs=self.epochs,
            accumulate_grad_batches=self.accumulate,
            limit_val_batches=2 if self.val else 0,
            val_check_interval=2,
            enable_checkpointing=True,
            default_root_dir=folder,
        )
        options: dict[str, Any] = {"batch_size": 2, "shuffle": True, "num_workers": self.workers}
        train, val = DataLoader(Rows(2 * self.batches), **options), DataLoader(Rows(8), batch_size=2, shuffle=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*bit for bit.*")
            fitted.fit(module, train, val if self.val else None, ckpt_path=ckpt and str(ckpt))
        return Result(module.events, _digest(module), saver.saved, fitted.global_step)


def _digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


VARIANTS: dict[str, dict[str, Any]] = {
    "dropout, shuffle": {},
    "one worker": {"workers": 1},
    "accumulation": {"accumulate": 2},
    "validation": {"val": True},
    "all of them": {"workers": 1, "accumulate": 2, "val": True},
}


def run(folder: Path, short: bool) -> Iterator[dict[str, Any]]:
    """One row for each method."""
    if short:
        for method in ("LoRA", "Diff pruning"):
            own = folder / method
            yield _row(MethodRun(method, own, val=True, accumulate=2), own, {"validation": {}}, only=2)
        return
    for method in METHODS:
        yield _row(MethodRun(method, folder / method), folder / method, VARIANTS, only=None)
    longer, own = MethodRun("LoRA", folder / "91", batches=7), folder / "91"
    yield _row(longer, own, {"dropout, shuffle": {}}, only=None, name="LoRA, 14 steps")


def _row(
    run: MethodRun, folder: Path, variants: dict[str, dict[str, Any]], only: int | None, name: str = ""
) -> dict[str, Any]:
    single, pairs = [0, 0], (0, 0)
    run.own.mkdir(parents=True, exist_ok=True)
    for label, options in variants.items():
        good, count = single_interruptions(replace(run, **options), folder / label, only)
        single = [single[0] + good, single[1] + count]
    pairs = double_interruptions(run, folder / "pairs", only)
    return {
        "method": name or run.method,
        "points": single[1],
        "same": single[0],
        "pairs": pairs[1],
        "pairs_same": pairs[0],
    }
