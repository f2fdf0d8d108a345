"""Groups with options of their own, and parameters that are exchanged while a fit runs."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_pet.strategies.optimizers import hold_delta
from lightning_pet.strategies.parameter_groups import Exchange, Wish, exchange, set_option


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))
        self.alpha = nn.Parameter(torch.zeros(3, 4))
        self.head = nn.Parameter(torch.randn(2))


OPTIONS = {"w": {"weight_decay": 0.0}, "alpha": {"weight_decay": 0.0, "lr": 0.1}}
SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=20),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, min_lr=1e-4),
    "nested": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


def held(optimizer: Any, model: Model, scheduler: Any = None) -> None:
    returned = [optimizer] if scheduler is None else ([optimizer], [scheduler])
    delta = {"w": model.w, "alpha": model.alpha}
    hold_delta(returned, model, delta, {}, {}, OPTIONS)


def step(model: Model, optimizer: Any, scheduler: Any = None) -> None:
    optimizer.zero_grad()
    sum((p * torch.linspace(1, 2, p.numel()).view_as(p)).sum() for p in model.parameters()).backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_options_survive_schedules_and_exchanges(kind: str) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    scheduler = SCHEDULERS[kind](optimizer)
    held(optimizer, model, scheduler)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert [groups[id(p)]["weight_decay"] for p in (model.w, model.alpha, model.head)] == [0.0, 0.0, 0.3]
    ratio = groups[id(model.alpha)]["lr"] / groups[id(model.head)]["lr"]
    start = groups[id(model.head)].get("initial_lr", 0.01)
    assert ratio == pytest.approx(0.1 / start)
    for _ in range(3):
        step(model, optimizer, scheduler)
        assert groups[id(model.alpha)]["lr"] / groups[id(model.head)]["lr"] == pytest.approx(ratio, rel=1e-6)
    new = nn.Parameter(model.w.detach().flatten()[[2, 5]])
    moments = optimizer.state[model.w]["exp_avg"].flatten()[[2, 5]]
    exchanges = [Exchange(model.w, new, torch.tensor([2, 5])), Exchange(model.alpha)]
    model.w, model.alpha = new, None
    exchange([optimizer], [scheduler], exchanges, ["w", ""])
    assert len(optimizer.param_groups) == 2
    assert set(optimizer.state) == {model.w, model.head}
    assert torch.equal(optimizer.state[new]["exp_avg"], moments)
    for _ in range(3):
        step(model, optimizer, scheduler)
    assert optimizer.state[new]["step"].item() == 6


def test_what_an_optimizer_does_not_have_is_not_wished_for() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    held(optimizer, model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]  # no decay: w stays where it is
    assert Wish(1.0, (("nonsense", 1.0), ("weight_decay", 0.0))).on(optimizer.param_groups[0]) == Wish()


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adafactor(p)]
)
def test_state_goes_on_only_where_it_has_one_number_per_entry(make: Any) -> None:
    model = Model()
    optimizer = make(model.parameters())
    held(optimizer, model)
    step(model, optimizer)
    new, old = nn.Parameter(torch.zeros(2)), model.w
    momentum = optimizer.state[old].get("momentum_buffer")
    model.w = new
    exchange([optimizer], [], [Exchange(old, new, torch.tensor([0, 11])), Exchange(model.alpha)], ["w", ""])
    if momentum is None:
        assert new not in optimizer.state
    else:
        assert torch.equal(optimizer.state[new]["momentum_buffer"], momentum.flatten()[[0, 11]])
    model.alpha = None
    step(model, optimizer)


def test_named_groups() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    held(optimizer, model)
    new = nn.Parameter(torch.zeros(1))
    exchange([optimizer], [], [Exchange(model.w, new, torch.tensor([3])), Exchange(model.alpha)], ["values", ""])
    assert sorted(name for group in optimizer.param_groups for name in group["param_names"]) == ["head", "values"]


def test_an_option_that_is_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(0.5)
    group: dict[str, Any] = {"lr": rate, "eps": 1e-8}
    set_option(group, "lr", 0.1)
    set_option(group, "eps", 1e-6)
    assert group["lr"] is rate
    assert rate.item() == pytest.approx(0.1)
    assert group["eps"] == 1e-6
