"""A budget picks the width; the width is what is stored."""

import logging
from pathlib import Path

import pytest
import torch

from lightning_pet import ArgumentError, LoRACallback, PETCallback, apply, inspect_delta, load_delta, save_delta
from tests.engine.models import Module, Net, ckpt, every_step, fit, lora

from . import zoo


def plan_of(callback: PETCallback, build: str = "bert", device: str = "cpu") -> object:
    model, _ = getattr(zoo, build)()
    return apply(model.to(device), [callback]).plan()


def spent(plan: object) -> int:
    return sum(row.parameters for row in plan.rows if row.method != "trained")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("budget", [0.05, 0.08, 0.12])
def test_lora_spends_at_most_the_share_and_one_more_rank_would_not_fit(budget: float, device: str) -> None:
    callback = LoRACallback(budget=budget)
    plan = plan_of(callback, device=device)
    assert spent(plan) <= budget * plan.base
    assert spent(plan_of(LoRACallback(r=callback.r + 1))) > budget * plan.base
    assert spent(plan_of(LoRACallback(r=callback.r))) == spent(plan)


def test_it_says_what_it_picked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        callback = LoRACallback(budget=0.1)
        plan_of(callback)
    assert f"picks r={callback.r}: " in caplog.text


def test_counting_touches_neither_the_model_nor_the_random_state() -> None:
    model, run = zoo.bert()
    before = run(model)
    state = torch.get_rng_state()
    callback = LoRACallback(budget=0.009)
    with pytest.raises(ArgumentError, match=r"r=1 costs 128 numbers.*smallest budget that works is 0\.00963"):
        apply(model, [callback])
    assert callback.r == 8
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(run(model), before)


def test_the_widest_that_hosts_allow() -> None:
    callback = LoRACallback(budget=1.0)
    plan_of(callback)
    assert callback.r == 16


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "pissa"}, {"bias": "lora_only"}])
def test_variants_count_all_that_they_train(options: dict[str, object]) -> None:
    callback = LoRACallback(budget=0.1, modules_to_save=[], **options)
    plan = plan_of(callback)
    assert plan.trainable <= 0.1 * plan.base
    assert plan_of(LoRACallback(r=callback.r + 1, modules_to_save=[], **options)).trainable > 0.1 * plan.base


def test_a_file_holds_the_width_and_loads_without_a_choice(tmp_path: Path) -> None:
    model, run = zoo.bert()
    callback = LoRACallback(budget=0.1)
    apply(model, [callback])
    save_delta(model, tmp_path / "delta.pet.safetensors")
    config = inspect_delta(tmp_path / "delta.pet.safetensors").methods[0].config
    assert config["r"] == callback.r != LoRACallback().r
    fresh, _ = zoo.bert()
    load_delta(fresh, tmp_path / "delta.pet.safetensors")
    assert torch.equal(run(fresh), run(model))
    # The same line of configuration goes on with a model that has the delta already.
    again = LoRACallback(budget=0.1)
    apply(fresh, [again])
    assert again.r == callback.r
    assert len(fresh.bert.encoder.layer[0].attention.self.query.pet) == 1


def test_resume_with_the_budget_or_with_the_width(tmp_path: Path) -> None:
    first = lora(budget=0.6)
    fit(Module(Net()), first, every_step(tmp_path), max_epochs=1)
    for callback in (lora(budget=0.6), lora(r=first.r)):
        fit(Module(Net()), callback, max_epochs=2, ckpt=ckpt(tmp_path, 5))
        assert callback.r == first.r == 3


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, float("nan")])
def test_shares_out_of_range(budget: float) -> None:
    with pytest.raises(ArgumentError, match="share of the base's"):
        LoRACallback(budget=budget)
