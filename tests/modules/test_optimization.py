import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_pet.errors import ArgumentError
from lightning_pet.modules.optimization import warmup_then, with_schedule


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_decaying_schedules_rise_and_fall_to_zero(shape: Any):
    factor = warmup_then(shape, 0.1, 100)
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert values[100] == pytest.approx(0.0, abs=1e-12)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[55] == pytest.approx(0.5)
    assert factor(1000) == pytest.approx(0.0, abs=1e-12)


def test_constant_schedule_stays():
    assert [warmup_then("constant", 0.5, 4)(step) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]
    assert warmup_then("constant", 0.0, math.inf)(10**9) == 1.0


def test_a_run_without_end_has_no_schedule():
    with pytest.raises(ArgumentError, match=r"known length.*max_epochs"):
        warmup_then("cosine", 0.1, math.inf)


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_warmup_is_a_share(warmup: float):
    with pytest.raises(ArgumentError, match="warmup="):
        warmup_then("cosine", warmup, 10)


def test_schedule_keeps_the_ratio_of_groups():
    head, body = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [body], "lr": 1.0}, {"params": [head], "lr": 3.0}])
    module: Any = SimpleNamespace(trainer=SimpleNamespace(estimated_stepping_batches=10))
    pair = with_schedule(module, optimizer, "linear", 0.0)
    assert pair["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        pair["lr_scheduler"]["scheduler"].step()
    assert rates == [pytest.approx([r, 3 * r]) for r in (1.0, 0.9, 0.8)]


def test_own_scheduler_is_stepped_by_epoch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    pair = with_schedule(None, optimizer, lambda o: torch.optim.lr_scheduler.StepLR(o, 1), 0.1)  # type: ignore[arg-type]
    assert isinstance(pair["lr_scheduler"], torch.optim.lr_scheduler.StepLR)
