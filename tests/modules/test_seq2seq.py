"""Seq2SeqModule in a real Trainer, on a tiny random T5."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_pet.data.dates import Dates
from lightning_pet.data.seq2seq import Seq2SeqData
from lightning_pet.errors import ArgumentError
from lightning_pet.modules.seq2seq import Scores, Seq2SeqModule, token_accuracy
from tests.modules.tiny import T5, write_jsonl

NEW = {"model_type": "t5", **T5, "dropout_rate": 0.0}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def test_token_accuracy_ignores_padding():
    logits = nn.functional.one_hot(torch.tensor([[1, 2, 0], [2, 2, 2]]), 3).float()
    accuracy, tokens = token_accuracy(logits, torch.tensor([[1, 1, -100], [2, -100, -100]]))
    assert (accuracy.item(), tokens) == (pytest.approx(2 / 3), 3)


def test_scores_weigh_tokens_and_are_reset():
    scores = Scores(["rouge", "bleu", "chrf"])
    scores.update(torch.tensor(1.0), torch.tensor(1.0), 1, ["a b c d e"], ["a b c d e"])
    scores.update(torch.tensor(4.0), torch.tensor(0.0), 3, ["x"], ["y"])
    result = {name: float(value) for name, value in scores.compute().items()}
    assert result["loss"] == pytest.approx(13 / 4)
    assert result["token_accuracy"] == 0.25
    assert result["exact_match"] == 0.5
    assert result["rouge1"] == 0.5
    assert set(result) == {"loss", "token_accuracy", "exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf"}
    scores.update(torch.tensor(1.0), torch.tensor(1.0), 1, ["a"], ["a"])
    assert scores.compute()["exact_match"] == 1.0


def test_fit_learns_generates_and_logs(tmp_path: Path):
    pairs = [{"source": "yes", "target": "ja"}, {"source": "no", "target": "nein"}]
    write_jsonl(tmp_path / "train.jsonl", pairs * 8)
    write_jsonl(tmp_path / "val.jsonl", pairs)
    torch.manual_seed(0)
    module = Seq2SeqModule(
        NEW,
        tokenizer="bytes",
        max_new_tokens=6,
        text_metrics=["chrf"],
        optimizer=partial(torch.optim.AdamW, lr=2e-2),
    )
    trainer = L.Trainer(max_epochs=25, check_val_every_n_epoch=25, **QUIET)
    data = Seq2SeqData(str(tmp_path), batch_size=8)
    trainer.fit(module, data)
    assert set(trainer.callback_metrics) == {
        "train/loss", "val/loss", "val/token_accuracy", "val/exact_match", "val/chrf",
    }  # fmt: skip
    assert trainer.callback_metrics["val/exact_match"] == 1.0
    assert trainer.callback_metrics["val/token_accuracy"] == 1.0
    assert trainer.predict(module, data) == [["ja", "nein"]]


def test_more_loaders_log_under_their_names(t5: Path):
    module = Seq2SeqModule(str(t5), max_new_tokens=2)
    trainer = L.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET)
    trainer.validate(module, Dates(val_size=3), verbose=False)
    assert {name for name in trainer.callback_metrics if name.endswith("exact_match")} == {
        "val/exact_match", "val/eu/exact_match", "val/long/exact_match",
    }  # fmt: skip


def test_label_smoothing_changes_only_the_training_loss(t5: Path):
    batch = {
        "input_ids": torch.tensor([[60, 61, 1]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "labels": torch.tensor([[70, 1, -100]]),
    }
    losses = {}
    for smoothing in (0.0, 0.2):
        module = Seq2SeqModule(str(t5), label_smoothing=smoothing).eval()
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        losses[smoothing] = module.training_step(batch, 0)
    logits = module(batch).logits[0, :2].log_softmax(-1)
    plain = -(logits[0, 70] + logits[1, 1]) / 2
    torch.testing.assert_close(losses[0.0], plain)
    torch.testing.assert_close(losses[0.2], 0.8 * plain - 0.2 * logits.mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"tokenizer": None}, "set tokenizer"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        Seq2SeqModule(NEW, **{"tokenizer": "bytes"} | arguments)
