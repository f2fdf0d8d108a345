"""Preference tuning: losses in closed form, the reference, and a model that survives it."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import lightning_pet as pet
from lightning_pet.data.chat.preferences import PreferenceData
from lightning_pet.errors import ArgumentError
from lightning_pet.modules.date_chat import character_tokenizer
from lightning_pet.modules.preference import PreferenceModule
from lightning_pet.modules.preference_loss import (
    Answers,
    ipo_loss,
    margins,
    orpo_loss,
    sigmoid_loss,
    simpo_loss,
)
from tests.modules.test_causal_lm import KINDS

# --- losses ----------------------------------------------------------------------------------------


def answers(chosen: float, rejected: float, tokens: int = 1) -> Answers:
    return Answers(torch.tensor([chosen]), torch.tensor([rejected]), torch.tensor([tokens]), torch.tensor([tokens]))


def test_losses_in_closed_form() -> None:
    margin = margins(answers(-8, -15), answers(-10, -12))
    assert margin.item() == 5
    assert sigmoid_loss(margin, 0.1).item() == pytest.approx(0.474077, abs=1e-6)
    assert sigmoid_loss(0 * margin, 0.1).item() == pytest.approx(math.log(2), abs=1e-6)
    assert sigmoid_loss(-margin, 0.1).item() == pytest.approx(0.974077, abs=1e-6)
    assert sigmoid_loss(margin, 0.1, label_smoothing=0.1).item() == pytest.approx(0.524077, abs=1e-6)
    assert (ipo_loss(margin, 0.1).item(), ipo_loss(0 * margin, 0.1).item()) == (0.0, 25.0)
    assert orpo_loss(answers(-1, -2, tokens=2), 1.0).item() == pytest.approx(0.320300, abs=1e-6)
    assert simpo_loss(answers(-1, -2, tokens=2), 2.0, 0.5).item() == pytest.approx(0.474077, abs=1e-6)


def test_the_gradient_in_closed_form() -> None:
    margin = torch.tensor([5.0], requires_grad=True)
    sigmoid_loss(margin, 0.1).backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(-0.0377541, abs=1e-6)


# --- a module --------------------------------------------------------------------------------------


class Small(PreferenceModule):
    """With the tokenizer of characters, and a small model of random weights with dropout."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        model = {**KINDS["llama"], "attention_dropout": 0.2}
        super().__init__(model=model, tokenizer="bytes", max_new_tokens=3, warmup=0.0, **options)
        self.tokenizer = character_tokenizer()
        self.seen: list[dict[str, float]] = []

    def compare(self, batch: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        found = super().compare(batch, split)
        if split == "train":
            self.seen.append({name: value.item() for name, value in found.items()})
        return found


def pairs(path: Path, count: int = 8, swapped: bool = False) -> str:
    names = ("preferred_output", "non_preferred_output")
    lines = []
    for n in range(count):
        said = [[{"role": "assistant", "content": text}] for text in ("yes" * (1 + n % 3), "no")]
        both = dict(zip(names[::-1] if swapped else names, said, strict=True))
        lines.append(json.dumps({"input": {"messages": [{"role": "user", "content": f"{n}?"}]}, **both}))
    path.write_text("\n".join(lines))
    return str(path)


def fit(module: Small, path: str, callbacks: list[Any], epochs: int = 2, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **{**quiet, **options})
    torch.manual_seed(1)
    trainer.fit(module, PreferenceData(path, val=path, batch_size=4, generate=2))
    return trainer


def lora(**options: Any) -> pet.LoRACallback:
    return pet.LoRACallback(**{"r": 2, "dropout": 0.5, "verbose": False, **options})


def test_live_and_cached_references_are_equal_and_a_run_begins_at_ln_2(tmp_path: Path) -> None:
    path = pairs(tmp_path / "a.jsonl")
    runs = []
    for reference in ("live", "cached"):
        module = Small(reference=reference, sft_weight=0.0)
        fit(module, path, [lora()])
        runs.append(module.seen)
    assert runs[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert runs[0][-1]["loss"] < math.log(2)
    for live, cached in zip(*runs, strict=True):
        assert live == pytest.approx(cached, abs=1e-5)


def test_swapped_pairs_turn_the_margin_round(tmp_path: Path) -> None:
    path, other = pairs(tmp_path / "a.jsonl"), pairs(tmp_path / "b.jsonl", swapped=True)
    module = Small(reference="live")
    trainer = fit(module, path, [lora()])
    straight = trainer.validate(module, PreferenceData(path, val=path, generate=0), verbose=False)[0]
    turned = trainer.validate(module, PreferenceData(other, val=other, generate=0), verbose=False)[0]
    assert straight["val/margin"] > 0
    assert turned["val/margin"] == pytest.approx(-straight["val/margin"], rel=1e-4)


def test_a_run_from_a_delta_compares_with_that_delta(tmp_path: Path) -> None:
    path = pairs(tmp_path / "a.jsonl")
    first = Small(reference="live", sft_weight=0.0)
    fit(first, path, [lora()])
    pet.save_delta(first, tmp_path / "a.pet.safetensors")
    second = Small(sft_weight=0.0)
    fit(second, path, [lora(start_from=str(tmp_path / "a.pet.safetensors"))], epochs=1)
    assert second._adapted is None
    assert second.seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_whole_weights_need_no_second_model(tmp_path: Path) -> None:
    module = Small(sft_weight=0.0)
    fit(module, pairs(tmp_path / "a.jsonl"), [], epochs=1)
    assert module.seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert module.seen[1]["margin"] != 0


@pytest.mark.parametrize("options", [
    {"loss": "ipo"}, {"loss": "orpo"}, {"loss": "simpo"}, {"label_smoothing": 0.1}, {"per_token": True, "beta": 2.0},
])  # fmt: skip
def test_every_loss_trains(options: dict[str, Any], tmp_path: Path) -> None:
    module = Small(**options)
    trainer = fit(module, pairs(tmp_path / "a.jsonl"), [lora()], epochs=6)
    assert module.seen[-1]["loss"] < module.seen[0]["loss"]
    assert {"val/loss", "val/accuracy", "val/exact_match"} <= set(trainer.callback_metrics)


def test_a_resumed_run_keeps_its_reference(tmp_path: Path) -> None:
    path = pairs(tmp_path / "a.jsonl")
    module = Small(sft_weight=0.0, reference="cached")
    trainer = fit(module, path, [lora()], epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Small(sft_weight=0.0, reference="cached")
    more = L.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[lora()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    more.fit(again, PreferenceData(path, val=path, batch_size=4, generate=0), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(again._cached["train"], module._cached["train"])
    assert again.seen[0]["margin"] != 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "kto"}, "expected one of"),
        ({"beta": 0.0}, "beta > 0"),
        ({"label_smoothing": 0.5}, "label_smoothing < 0.5"),
        ({"loss": "ipo", "per_token": True}, "neither label_smoothing nor per_token"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Small(**options)


def test_live_without_a_delta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="needs a delta"):
        fit(Small(reference="live"), pairs(tmp_path / "a.jsonl"), [])
