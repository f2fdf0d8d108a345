"""Tiny runs for the tests of exact resume: everything random, every step recorded."""

import hashlib
import logging
import random
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_pet.training.resume import ExactResume

KEY = "exact_resume"


class Noisy(Dataset):
    """Items with noise from all three global generators, drawn in the main process or in a worker."""

    def __init__(self, size: int) -> None:
        self.data = torch.arange(size * 4, dtype=torch.float32).reshape(size, 4) / size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.data[index] + 0.1 * torch.rand(4) + 0.1 * random.random() + 0.1 * np.random.rand()


class Stream(IterableDataset):
    """No length, no random access; a shuffled order from a generator of its own."""

    def __init__(self, size: int) -> None:
        self.source = Noisy(size)

    def __iter__(self):
        order = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(3))
        return (self.source.data[i] for i in order)


class StatefulLoader:
    """The least that Lightning takes for a loader that can resume itself."""

    def __init__(self, size: int, batch_size: int) -> None:
        self.data, self.batch_size, self.epoch, self.position = Noisy(size).data, batch_size, -1, 0
        self.resumed = False

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __iter__(self):
        if not self.resumed:
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = False
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch))
        while self.position < len(self):
            start = self.position * self.batch_size
            self.position += 1
            yield self.data[order[start : start + self.batch_size]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.resumed = self.position < len(self)


class Module(L.LightningModule):
    """Dropout, noise from ``random`` and NumPy, momentum; loaders and scheduler by option."""

    def __init__(self, run: "Run") -> None:
        super().__init__()
        torch.manual_seed(11)
        self.run = run
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
        self.events: list[tuple[Any, ...]] = []

    def forward(self, batch: Any) -> torch.Tensor:
        if isinstance(batch, dict):
            batch = torch.cat([part for part in batch.values() if part is not None])
        return self.net(batch).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self(batch) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        self.events.append(("train", self.current_epoch, batch_idx, self.trainer.global_step, loss.item().hex()))
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int) -> None:
        loss = self(batch)
        if dataloader_idx == 0:
            self.log("val_loss", loss, add_dataloader_idx=False)
        if not self.trainer.sanity_checking:
            self.events.append(("val", self.current_epoch, batch_idx, loss.item().hex()))

    def on_train_epoch_start(self) -> None:
        self.events.append(("epoch", self.current_epoch, torch.rand(()).item().hex()))

    def on_train_epoch_end(self) -> None:
        self.events.append(("end", self.current_epoch, self.optimizers().param_groups[0]["lr"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        if self.run.plateau:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        steps = self.trainer.estimated_stepping_batches if self.run.estimate else 20
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def digest(self) -> str:
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.parameters())).hexdigest()


class Resume(Callback):
    """Calls the object under test from the hooks of the same names."""

    def __init__(self) -> None:
        self.exact = ExactResume()

    def setup(self, trainer, pl_module, stage) -> None:
        if stage == "fit":
            self.exact.setup(trainer)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.exact.on_train_epoch_start(trainer)

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.exact.teardown(trainer)

    def teardown(self, trainer, pl_module, stage) -> None:
        self.exact.teardown(trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        checkpoint[KEY] = self.exact.state(trainer)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.exact.load_state(checkpoint[KEY])


class SaveAll(Checkpoint):
    """Saves at every place of one kind, after all other callbacks, and notes what had happened by then."""

    def __init__(self, folder: Path, at: str) -> None:
        self.folder, self.at, self.saved = folder, at, {}

    def save(self, trainer: L.Trainer) -> None:
        path = self.folder / f"{len(self.saved):03d}-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        self.saved[path] = len(trainer.lightning_module.events)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.at == "batch" and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.save(trainer)

    def on_validation_end(self, trainer, pl_module) -> None:
        if self.at == "validation" and not trainer.sanity_checking:
            self.save(trainer)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if self.at == "epoch":
            self.save(trainer)


@dataclass
class Run:
    """One configuration; :meth:`fit` runs it, from the beginning or from a checkpoint."""

    epochs: int = 3
    batches: int = 5
    workers: int = 0
    shuffle: bool = True
    plateau: bool = False
    estimate: bool = False
    val: bool = False
    loader: str = "map"
    at: str = "batch"
    devices: int = 1
    trainer: dict[str, Any] = field(default_factory=dict)

    def train_loader(self) -> Any:
        size, options = 2 * self.batches * self.devices, {"batch_size": 2, "num_workers": self.workers}
        if self.loader == "stream":
            return DataLoader(Stream(size), **options)
        if self.loader == "stateful":
            return StatefulLoader(size, 2)
        if self.loader in ("min_size", "max_size", "max_size_cycle"):
            short = DataLoader(Noisy(size - 4), shuffle=self.shuffle, **options)
            parts = {"a": DataLoader(Noisy(size), shuffle=self.shuffle, **options), "b": short}
            return L.pytorch.utilities.CombinedLoader(parts, self.loader)
        options["persistent_workers"] = self.loader == "persistent"
        return DataLoader(Noisy(size), shuffle=self.shuffle, **options)

    def fit(self, folder: Path, ckpt: Path | None = None, extra: list[Callback] | None = None) -> "Result":
        """Train to the end and save at every place ``at``."""
        L.seed_everything(5 if ckpt is None else 99, verbose=False)  # a resumed process has another seed
        saver, module = SaveAll(folder, self.at), Module(self)
        limits = {"max_epochs": self.epochs, "limit_val_batches": 2 if self.val else 0} | self.trainer
        trainer = L.Trainer(
            accelerator="cpu",
            devices=self.devices,
            strategy="auto" if self.devices == 1 else DDPStrategy(process_group_backend="gloo"),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=True,
            default_root_dir=folder,
            callbacks=[Resume(), saver, *(extra or [])],
            **limits,
        )
        # Two validation loaders, one shuffled: their draws come from the generators of the training. (Distributed
        # samplers draw from the process's seed, which differs here on purpose.)
        val = [DataLoader(Noisy(8), batch_size=2), DataLoader(Noisy(8), batch_size=2, shuffle=self.devices == 1)]
        trainer.fit(module, self.train_loader(), val if self.val else None, ckpt_path=ckpt and str(ckpt))
        return Result(module.events, module.digest(), saver.saved, trainer.global_step)


@dataclass
class Result:
    """What a run did: every event in order, the final weights, the checkpoints with their places."""

    events: list[tuple[Any, ...]]
    digest: str
    saved: dict[Path, int]
    steps: int


def same(resumed: Result, reference: Result, place: int) -> bool:
    """Whether a run resumed after ``place`` events did exactly what the reference did from there on."""
    return resumed.events == reference.events[place:] and (resumed.digest, resumed.steps) == (
        reference.digest,
        reference.steps,
    )


def single_interruptions(run: Run, folder: Path, only: int | None = None, last: bool = True) -> tuple[int, int]:
    """Resume from the checkpoints of one run: all, about ``only`` of them, or all but the last.

    Returns:
        How many of the resumed runs were identical to the uninterrupted one, and how many there were.
    """
    reference = run.fit(folder / "reference")
    places = list(reference.saved.items())[: None if last else -1]
    chosen = places if only is None else places[:: max(1, len(places) // only)]
    good = [same(run.fit(folder / f"{i}", path), reference, place) for i, (path, place) in enumerate(chosen)]
    return sum(good), len(good)


def double_interruptions(run: Run, folder: Path, only: int | None = None, last: bool = True) -> tuple[int, int]:
    """Resume from the checkpoints of resumed runs: all pairs, or about ``only`` of them evenly spread."""
    reference = run.fit(folder / "reference")
    places = list(reference.saved.items())[: None if last else -1]
    pairs = [(i, j) for i in range(len(places)) for j in range(i + 1, len(places))]
    chosen = pairs if only is None else pairs[:: max(1, len(pairs) // only)]
    firsts = {i: run.fit(folder / f"{i}", places[i][0]) for i in sorted({i for i, _ in chosen})}
    good = []
    for i, j in chosen:
        path, place = list(firsts[i].saved.items())[j - i - 1]
        good.append(same(run.fit(folder / f"{i}-{j}", path), reference, places[i][1] + place))
    return sum(good), len(good)


def quiet() -> None:
    """Silence what Lightning says about every one of hundreds of tiny runs."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for text in (".*num_workers.*", ".*sampler has shuffling enabled.*", ".*is not resumable.*"):
        warnings.filterwarnings("ignore", message=text)


if __name__ == "__main__":  # one process of a distributed run; arguments: folder, single and double interruptions
    quiet()
    folder, singles, doubles = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    distributed = Run(devices=2, val=True)
    single = single_interruptions(distributed, folder / "single", singles)
    double = double_interruptions(distributed, folder / "double", doubles, last=False)
    print("IDENTICAL", *single, *double, flush=True)
