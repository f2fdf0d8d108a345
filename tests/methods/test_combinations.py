"""Several methods in one model and one Trainer: they train, are saved, resumed, switched off and taken out together."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_pet
from lightning_pet import (
    AdapterCallback,
    BitFitCallback,
    CompacterCallback,
    DiffPruningCallback,
    IA3Callback,
    IntrinsicDimensionCallback,
    LoRACallback,
    PETCallback,
    PrefixTuningCallback,
    PromptTuningCallback,
    apply,
    inspect_delta,
    load_delta,
    save_delta,
)
from tests.engine.models import Module, digest, trainer

from . import zoo
from .battery import base_digest, equal_states, frozen_output, perturb

Build = Callable[[], list[PETCallback]]


class Classifier(Module):
    """The model's own loss."""

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net(**batch).loss


def mam() -> list[PETCallback]:
    return [
        PrefixTuningCallback(length=3, projection_size=4),
        AdapterCallback(placement="parallel", bottleneck_size=4, scale=4.0, init="lora"),
    ]


def prompt_adapter_bitfit() -> list[PETCallback]:
    return [PromptTuningCallback(length=2), AdapterCallback(bottleneck_size=4), BitFitCallback(add_missing=True)]


def lora_twice_and_ia3() -> list[PETCallback]:
    return [LoRACallback(r=2), LoRACallback(r=1, name="second", target_modules="ffn"), IA3Callback()]


def compacter_and_lora() -> list[PETCallback]:
    return [CompacterCallback(bottleneck_size=4, phm_dim=2), LoRACallback(r=2, target_modules="all-linear")]


def subspace_and_prefix() -> list[PETCallback]:
    return [IntrinsicDimensionCallback(d=300), PrefixTuningCallback(length=2, projection=False)]


def pruning_and_adapter() -> list[PETCallback]:
    return [DiffPruningCallback(density=0.1), AdapterCallback(placement="pfeiffer", bottleneck_size=4)]


COMBINATIONS = [
    mam,
    prompt_adapter_bitfit,
    lora_twice_and_ia3,
    compacter_and_lora,
    subspace_and_prefix,
    pruning_and_adapter,
]


@pytest.mark.parametrize("model", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("build", COMBINATIONS, ids=lambda build: build.__name__)
def test_together_they_act_and_leave_no_trace(build: Build, model: str, tmp_path: Path) -> None:
    base, run = getattr(zoo, model)()
    before, state = frozen_output(base, run), base_digest(base)
    adapted = apply(base, build())
    assert [a.method for a in adapted.record.applied] == [m.method for m in build()]
    perturb(adapted, 0.1)
    changed = frozen_output(base, run)
    assert not torch.allclose(changed, before)
    with adapted.disabled():
        assert torch.equal(frozen_output(base, run), before)
    path = tmp_path / "both.pet.safetensors"
    save_delta(base, path)
    assert [m.method for m in inspect_delta(path).methods] == [m.method for m in build()]
    fresh, _ = getattr(zoo, model)()
    load_delta(fresh, path)
    assert torch.equal(frozen_output(fresh, run), changed)
    adapted.remove()
    assert equal_states(dict(base.state_dict()), state)
    assert torch.equal(frozen_output(base, run), before)


@pytest.mark.parametrize("build", COMBINATIONS, ids=lambda build: build.__name__)
def test_each_acts_as_if_it_were_alone_while_the_others_are_fresh(build: Build) -> None:
    """What starts as the base does not disturb a trained neighbour, whichever comes first."""
    exact = [m for m in build() if not isinstance(m, PrefixTuningCallback | PromptTuningCallback)]
    exact = [
        m
        for m in exact
        if not (isinstance(m, AdapterCallback | CompacterCallback) and m.config().get("init") != "lora")
    ]
    for alone in exact:
        outputs = []
        for others in ([], [m for m in exact if type(m) is not type(alone)]):
            model, run = zoo.bert()
            model.double()
            adapted = apply(model, [alone, *others])
            own = {n for n in adapted.record.delta_names if f".pet.{alone.method}_{alone.name}" in f".{n}"}
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, parameter in sorted(model.named_parameters()):
                    if name in own and parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            outputs.append(frozen_output(model, run))
        assert (outputs[0] - outputs[1]).abs().max() < 1e-12, alone


@pytest.mark.parametrize("build", [mam, prompt_adapter_bitfit, lora_twice_and_ia3], ids=lambda build: build.__name__)
def test_one_trainer_one_checkpoint_and_an_exact_resume(build: Build, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (6, 5), generator=generator)
    loader = DataLoader([{"input_ids": row, "labels": row[0] % 3} for row in ids], batch_size=2, shuffle=True)

    def fit(folder: Path, ckpt_path: Path | None = None) -> Classifier:
        module = Classifier(zoo.bert()[0])
        torch.manual_seed(5)
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(*build(), saving, max_epochs=2).fit(module, loader, ckpt_path=ckpt_path)
        return module

    whole = fit(tmp_path / "whole")
    for step in (2, 4):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=True)
        assert [m["method"] for m in saved["lightning_pet"]["methods"]] == [m.method for m in build()]
        resumed = fit(tmp_path / f"from{step}", path)
        assert resumed.losses == whole.losses[step:]
        assert digest(resumed) == digest(whole)


def test_the_order_of_the_list_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    for first, second in itertools.permutations(mam()):
        model, run = zoo.bert()
        adapted = apply(model, [first, second])
        assert [a.method for a in adapted.record.applied] == [first.method, second.method]
        perturb(adapted)
        save_delta(model, tmp_path / "delta.pet.safetensors")
        fresh, _ = zoo.bert()
        load_delta(fresh, tmp_path / "delta.pet.safetensors")
        assert torch.equal(run(fresh), run(model))


def test_mam_is_the_papers_combination() -> None:
    """Closed form of the paper, biases apart: 2·l·d for each attention, 2·r·d for each feed-forward."""
    config = Path(__file__).parents[2] / "configs" / "method" / "mam.yaml"
    entries = yaml.safe_load(config.read_text(encoding="utf-8"))["pet"]
    options = [dict(entry["init_args"]) for entry in entries]
    assert [entry["class_path"] for entry in entries] == [
        "lightning_pet.PrefixTuningCallback",
        "lightning_pet.AdapterCallback",
    ]
    options[0] |= {"length": 5, "projection": False}
    options[1] |= {"bottleneck_size": 3, "bias": False}
    model, _ = zoo.bert()
    methods = [
        getattr(lightning_pet, entry["class_path"].rpartition(".")[2])(modules_to_save=[], **own)
        for entry, own in zip(entries, options, strict=True)
    ]
    layers, width = 2, 16
    assert apply(model, methods).plan().trainable == layers * (2 * 5 * width + 2 * 3 * width)
