"""Full fine-tuning as a method: the battery, and that nothing is frozen or inserted."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_pet import (
    FullFineTuningCallback,
    LoRACallback,
    TargetError,
    apply,
    inspect_delta,
    load_delta,
    save_delta,
)
from tests.engine.models import Module, Net, ckpt, digest, every_step, fit

from . import zoo
from .battery import Battery, Case, perturb


class TestFullFineTuning(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", FullFineTuningCallback),
        Case("bert", FullFineTuningCallback),
    ]


@pytest.mark.parametrize("build", [zoo.bert, zoo.gpt2, zoo.t5])
def test_all_parameters_train_each_once(build: object) -> None:
    model, _ = build()
    plan = apply(model, [FullFineTuningCallback()]).plan()
    assert plan.share == 1
    assert plan.trainable == sum(p.numel() for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not any("pet" in name for name, _ in model.named_modules())


def test_one_submodule_and_what_the_user_trains_beside_it() -> None:
    model, _ = zoo.bert()
    model.bert.embeddings.requires_grad_(False)
    record = apply(model, [FullFineTuningCallback(module="bert.encoder")]).record
    own = {n for n, _ in model.named_parameters() if n.startswith("bert.encoder.")}
    assert set(record.applied[0].trained) == own
    assert set(record.trained_names) == {n for n, _ in model.named_parameters() if "embeddings" not in n}


def test_it_trains_exactly_as_without_a_callback() -> None:
    plain, tuned = Module(Net()), Module(Net())
    fit(plain)
    fit(tuned, FullFineTuningCallback(verbose=False))
    assert digest(plain) == digest(tuned)


def test_the_file_makes_the_same_model_of_any_base(tmp_path: Path) -> None:
    model, run = zoo.bert()
    perturb(apply(model, [FullFineTuningCallback()]), 0.1)
    save_delta(model, tmp_path / "all.pet.safetensors")
    other, _ = zoo.bert()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    load_delta(other, tmp_path / "all.pet.safetensors")
    assert torch.equal(run(other), run(model))
    assert inspect_delta(tmp_path / "all.pet.safetensors").methods[0].method == "full_fine_tuning"


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = Module(Net(norm=True))
    fit(whole, FullFineTuningCallback(verbose=False), every_step(tmp_path))
    rest = Module(Net(norm=True))
    fit(rest, FullFineTuningCallback(verbose=False), ckpt=ckpt(tmp_path, 7))
    assert digest(rest) == digest(whole)
    assert rest.losses == whole.losses[7:]


def test_beside_another_method() -> None:
    model, run = zoo.mlp()
    before = run(model)
    adapted = apply(model, [FullFineTuningCallback(), LoRACallback(r=2, target_modules="0")])
    perturb(adapted)
    attached = run(model)
    adapted.merge_()
    assert torch.allclose(run(model), attached, atol=1e-5)
    assert not torch.allclose(attached, before)


def test_a_quantised_base_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"1\.weight is stored as torch.int8"):
        apply(model, [FullFineTuningCallback()])
