"""Several runs in one Trainer: each is what it would be alone, with its rates, ranks, seeds and dropout."""

from typing import Any

import lightning as L
import pytest
import torch
from models import Data, Module, Net, trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_pet import (
    Adapted,
    LoRACallback,
    TasksCallback,
)
from lightning_pet.model.naming import as_base_names, in_file

STEPS = 50
Runs = dict[str, dict[str, Any]]
SEEDED: Runs = {
    "a": {"lr": 0.03, "seed": 0},
    "b": {"lr": 0.01, "r": 4, "seed": 1, "weight_decay": 0.1},
    "c": {"r": 3, "alpha": 9},
}
RATES: Runs = {"slow": {"lr": 0.003}, "fast": {"lr": 0.03}, "decays": {"weight_decay": 0.3}}


class Doubled(Data):
    """The same in another precision."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(**options)
        self.dtype = dtype

    def rows_of(self, seed: int) -> TensorDataset:
        x, y = super().rows_of(seed).tensors  # type: ignore[attr-defined]
        return TensorDataset(x.to(self.dtype), y)


def optimizer_of(kind: str, options: dict[str, Any]) -> Any:
    rates = {"lr": options.get("lr", 0.02), "weight_decay": options.get("weight_decay", 0.01)}

    def build(module: nn.Module) -> Any:
        if kind == "sgd":
            made: Any = torch.optim.SGD(module.parameters(), momentum=0.9, **rates)
        else:
            made = torch.optim.AdamW(module.parameters(), **rates)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, T_max=60)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return build


def method(options: dict[str, Any], dropout: float = 0.2) -> LoRACallback:
    own = {name: options[name] for name in ("r", "alpha") if name in options}
    shape = {"r": 2, "alpha": 4, "dropout": dropout, "target_modules": ["fc1", "fc2"], "modules_to_save": ["head"]}
    return LoRACallback(**{**shape, **own}, verbose=False)


def fitted(
    runs: Runs,
    dtype: torch.dtype,
    kind: str = "adamw",
    split: bool = False,
    callbacks: Any = (),
    ckpt: Any = None,
    **options: Any,
) -> L.LightningModule:
    """All of them in one Trainer."""
    torch.manual_seed(3)
    data = Doubled(dtype, shuffle=options.pop("shuffle", True), rows=40)
    module = Module(Net(dropout=0.3).to(dtype), optimizer_of(kind, {}))
    tasks = TasksCallback(tasks=runs, every_row=True, split=split)
    run = trainer(method({}), tasks, *callbacks, **{"max_epochs": STEPS // 10, **options})
    torch.manual_seed(3)
    run.fit(module, data, ckpt_path=ckpt)
    return module


def alone(own: dict[str, Any], dtype: torch.dtype, kind: str = "adamw", **options: Any) -> dict[str, Tensor]:
    """One of them without anything of this: a plain callback, a plain optimizer, a plain seed."""
    torch.manual_seed(3)
    data = Doubled(dtype, shuffle=options.pop("shuffle", True), rows=40)
    module = Module(Net(dropout=0.3).to(dtype), optimizer_of(kind, own))
    run = trainer(method(own), **{"max_epochs": STEPS // 10, **options})
    torch.manual_seed(own.get("seed", 3))
    run.fit(module, data)
    return tensors(module, "default")


def tensors(module: L.LightningModule, name: str) -> dict[str, Tensor]:
    """As a file has them."""
    return {key: tensor.clone() for key, tensor in in_file(as_base_names(Adapted(module)[name].state_dict())).items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).norm() / expected[key].norm()) for key in expected)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str)
def test_seeds_ranks_and_rates_are_as_alone(kind: str, options: dict[str, Any]) -> None:
    """The order of the data is no run's own, so it is drawn from no seed here."""
    module = fitted(SEEDED, torch.float64, kind, shuffle=False, **options)
    for name, own in SEEDED.items():
        assert distance(tensors(module, name), alone(own, torch.float64, kind, shuffle=False, **options)) < 1e-12


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("split", [False, True])
def test_rates_are_as_alone_in_the_order_of_the_data_that_a_run_alone_has(kind: str, split: bool) -> None:
    module = fitted(RATES, torch.float32, kind, split)
    for name, own in RATES.items():
        assert distance(tensors(module, name), alone(own, torch.float32, kind)) < (0 if split else 1e-6) + 1e-12


def test_a_run_more_or_less_changes_no_other() -> None:
    runs = {**SEEDED, "d": {"r": 5, "lr": 0.05, "seed": 7}}
    every = fitted(runs, torch.float64)
    for left in ("a", "d"):
        fewer = fitted({name: own for name, own in runs.items() if name != left}, torch.float64)
        for name in runs:
            if name != left:
                assert distance(tensors(fewer, name), tensors(every, name)) < 1e-12
    one = fitted({"c": runs["c"]}, torch.float64)
    assert distance(tensors(one, "c"), tensors(every, "c")) < 1e-12
