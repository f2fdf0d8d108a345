"""Tiny modules, data and Trainers for the tests of the engine."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_pet.callbacks.lora import LoRACallback
from lightning_pet.store.entry import MARK

WIDTH, CLASSES, BATCHES, BATCH = 6, 3, 5, 4


class Net(nn.Module):
    """Dropout and batch norm included: random numbers and buffers are what resuming gets wrong."""

    def __init__(self, seed: int = 1, norm: bool = False, dropout: float = 0.3, head: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():  # building the model later must not shift the numbers of the run
            torch.manual_seed(seed)
            self.fc1 = nn.Linear(WIDTH, 8)
            self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
            self.drop = nn.Dropout(dropout)
            self.fc2 = nn.Linear(8, 8)
            if head:
                self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.drop(self.norm(self.fc1(x)).relu())).relu()
        return self.head(x) if hasattr(self, "head") else x


def sgd(module: L.LightningModule) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def adamw(module: L.LightningModule) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.02)


def cosine(module: L.LightningModule, parameters: Any = None) -> Any:
    optimizer = torch.optim.AdamW(parameters or module.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def backwards(module: L.LightningModule) -> Any:
    """The same optimizer, which knows its parameters in another order."""
    return cosine(module, list(module.parameters())[::-1])


class Module(L.LightningModule):
    """A shell around one net; remembers every loss."""

    def __init__(self, net: nn.Module | None = None, optimizers: Callable[[Any], Any] = adamw, lr: float = 0.1) -> None:
        super().__init__()
        if net is not None:
            self.net = net
        self.optimizers_of = optimizers
        self.lr = lr
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x).float(), y)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = BATCH, shuffle: bool = True, rows: int = BATCHES * BATCH) -> None:
        super().__init__()
        self.batch_size, self.shuffle, self.rows = batch_size, shuffle, rows

    def rows_of(self, seed: int) -> Dataset:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.rows, WIDTH, generator=generator)
        return TensorDataset(x, torch.randint(0, CLASSES, (self.rows,), generator=generator))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows_of(0), batch_size=self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows_of(1), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(**{"r": 2, "target_modules": ["fc1", "fc2"], "verbose": False, **options})


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | options)


def fit(
    module: L.LightningModule, *callbacks: L.Callback, data: Any = None, ckpt: Any = None, **options: Any
) -> L.Trainer:
    """Fit with a fixed seed, unless it is a resume."""
    torch.manual_seed(5)
    run = trainer(*callbacks, **options)
    run.fit(module, datamodule=data or Data(), ckpt_path=ckpt)
    return run


def digest(module: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of everything in the state dict."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def classes(module: nn.Module) -> list[type]:
    return [type(child) for child in module.modules()]


def is_pristine(module: nn.Module) -> bool:
    """No delta, no swapped class, no wrapper on the LightningModule."""
    names = [name for name, _ in module.named_modules() if name.rpartition(".")[2] == "pet"]
    swapped = [child for child in module.modules() if hasattr(type(child), "__pet_base__")]
    records = [child for child in module.modules() if "_pet" in child.__dict__]
    hooks = {"setup", "configure_model", "configure_optimizers"} & module.__dict__.keys()
    return not (names or swapped or records or hooks)


def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, **options)


def names_in(saved: Any) -> set[str]:
    """Names of the tensors that a checkpoint holds: all of ``state_dict`` but the note to other loaders."""
    assert MARK in saved["state_dict"]
    return set(saved["state_dict"]) - {MARK}


def ckpt(folder: Path, step: int) -> Path:
    return folder / f"step={step}.ckpt"


def full_run(folder: Path, seed: int = 1) -> Module:
    """Ten steps with a checkpoint of each: dropout, shuffling, batch norm, AdamW and a schedule."""
    module = Module(Net(seed, norm=True), cosine)
    fit(module, lora(dropout=0.2), every_step(folder))
    assert len(module.losses) == 10
    return module
