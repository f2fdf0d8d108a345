"""Learning rates and decays of several runs in one optimizer: those that each run's own optimizer would have."""

from typing import Any

import torch
from torch import nn

from lightning_pet.strategies.optimizers import hold_delta

RUNS = {"one": {"lr": 0.5}, "two": {"lr": 0.2, "weight_decay": 0.3}, "three": {"weight_decay": 0.05}}


class Model(nn.Module):
    """A base, and three deltas that each have two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(2), requires_grad=False)
        for run in RUNS:
            self.register_parameter(f"{run}_a", nn.Parameter(torch.zeros(2)))
            self.register_parameter(f"{run}_b", nn.Parameter(torch.zeros(2)))


def grouped(build: Any, ratios: dict[str, float] | None = None) -> dict[str, dict[str, Any]]:
    """Options of each parameter's group."""
    model = Model()
    returned = build(model)
    own = {name: p for name, p in model.named_parameters() if name != "base"}
    runs = {name: (name.partition("_")[0], RUNS[name.partition("_")[0]]) for name in own}
    hold_delta(returned, model, own, {}, ratios or {}, {}, runs)
    optimizer = returned[0] if isinstance(returned, list) else returned
    return {
        n: group for n, p in own.items() for group in optimizer.param_groups if any(p is q for q in group["params"])
    }


def halves(model: Model, end: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith(end)]


def rates(groups: dict[str, dict[str, Any]], end: str) -> dict[str, tuple[float, float]]:
    return {
        run: (round(groups[f"{run}{end}"]["lr"], 9), round(groups[f"{run}{end}"]["weight_decay"], 9)) for run in RUNS
    }


def test_they_are_those_of_the_optimizer() -> None:
    groups = grouped(lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01))
    assert rates(groups, "_a") == rates(groups, "_b") == {"one": (0.5, 0.01), "two": (0.2, 0.3), "three": (0.1, 0.05)}
    assert {groups[f"{run}_a"]["name"] for run in RUNS} == set(RUNS)


def test_a_group_that_was_given_others_keeps_them() -> None:
    def build(model: Model) -> Any:
        plain = {"params": halves(model, "_a")}
        return torch.optim.AdamW([plain, {"params": halves(model, "_b"), "lr": 0.7, "weight_decay": 0.0}], lr=0.1)

    groups = grouped(build)
    assert rates(groups, "_a") == {"one": (0.5, 0.01), "two": (0.2, 0.3), "three": (0.1, 0.05)}
    assert rates(groups, "_b") == dict.fromkeys(RUNS, (0.7, 0.0))


def test_where_all_were_given_others_they_go_with_the_first() -> None:
    def build(model: Model) -> Any:
        first = {"params": halves(model, "_a"), "lr": 0.1, "weight_decay": 0.1}
        return torch.optim.AdamW([first, {"params": halves(model, "_b"), "lr": 1.0, "weight_decay": 0.0}])

    groups = grouped(build)
    assert rates(groups, "_a") == {"one": (0.5, 0.1), "two": (0.2, 0.3), "three": (0.1, 0.05)}
    assert rates(groups, "_b") == {"one": (5.0, 0.0), "two": (2.0, 0.0), "three": (1.0, 0.0)}


def test_ratios_and_schedules_act_on_them() -> None:
    schedulers: list[Any] = []

    def build(model: Model) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 4))  # warms up
        return [optimizer], schedulers

    model_groups = grouped(lambda model: build(model)[0] + schedulers, {f"{run}_b": 4.0 for run in RUNS})
    schedulers[0].optimizer.step()
    schedulers[0].step()
    assert rates(model_groups, "_a") == {"one": (0.25, 0), "two": (0.1, 0.3), "three": (0.05, 0.05)}
    assert rates(model_groups, "_b") == {"one": (1.0, 0), "two": (0.4, 0.3), "three": (0.2, 0.05)}
    assert len({group["name"] for group in model_groups.values()}) == 6
