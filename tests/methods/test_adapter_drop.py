"""Robust AdapterDrop in a Trainer: drawn anew in every batch, from the seed and the step alone."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pet import AdapterCallback
from lightning_pet.layers.bottleneck import Bottleneck

LAYERS = 3


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.net = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.net(batch) - batch.flip(1)).square().mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        assert not any(dropped(self))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def adapters(module: nn.Module) -> list[Bottleneck]:
    return [m for m in module.modules() if isinstance(m, Bottleneck)]


def dropped(module: nn.Module) -> list[bool]:
    return [adapter.dropped for adapter in adapters(module)]


class Watch(Callback):
    """Notes, for every batch, which adapters were dropped and which got a gradient."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[bool], list[bool]]] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.batches.append((dropped(pl_module), [adapter.up.grad is None for adapter in adapters(pl_module)]))


def fit(module: pl.LightningModule, *callbacks: Callback, ckpt: Path | None = None, **options: Any) -> pl.Trainer:
    rows = torch.randn(24, 3, 8, generator=torch.Generator().manual_seed(2))
    defaults: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **defaults, **options)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|log_every_n|max_epochs).*")
        trainer.fit(
            module, DataLoader(rows, batch_size=3, shuffle=True), DataLoader(rows, batch_size=12), ckpt_path=ckpt
        )
    return trainer


def robust(**options: Any) -> AdapterCallback:
    return AdapterCallback(bottleneck_size=2, robust_drop=True, verbose=False, **options)


def test_every_batch_draws_and_the_dropped_get_no_gradient(tmp_path: Path) -> None:
    module, watch = Regression(), Watch()
    fit(module, robust(), watch, max_steps=16, default_root_dir=tmp_path)
    numbers = [sum(flags) // 2 for flags, _ in watch.batches]  # two adapters per layer
    assert set(numbers) == set(range(LAYERS))  # never all of them
    for flags, without in watch.batches:
        assert flags == sorted(flags, reverse=True)  # the first layers
        assert without == flags
    assert not any(dropped(module))


def test_resume_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    whole, straight = Regression(), Watch()
    fit(whole, robust(), straight, max_steps=12, default_root_dir=tmp_path)
    half = Regression()
    fit(half, robust(), max_steps=5, default_root_dir=tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = Regression(), Watch()
    fit(resumed, robust(), again, max_steps=12, default_root_dir=tmp_path, ckpt=tmp_path / "half.ckpt")
    assert again.batches == straight.batches[5:]
    states = [module.state_dict() for module in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = Watch()
    fit(Regression(), robust(seed=1), other, max_steps=12, default_root_dir=tmp_path)
    assert other.batches != straight.batches


def test_an_error_leaves_no_adapter_dropped(tmp_path: Path) -> None:
    class Fails(Regression):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            if sum(dropped(self)):
                raise RuntimeError("in a batch with dropped adapters")
            return super().training_step(batch, index)

    module = Fails()
    with pytest.raises(RuntimeError, match="dropped adapters"):
        fit(module, robust(), max_steps=16, default_root_dir=tmp_path)
    assert not any(dropped(module))
