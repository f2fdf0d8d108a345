"""LabelWordClassifier: its score, the choice of label tokens, and AutoPrompt on top of it."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import BertConfig, BertForMaskedLM

from lightning_pet.callbacks.auto_prompt import AutoPromptCallback
from lightning_pet.callbacks.lora import LoRACallback
from lightning_pet.data.text_classification import TextClassificationData
from lightning_pet.errors import ArgumentError
from lightning_pet.modules.label_words import LabelWordClassifier, select_label_tokens
from tests.modules.tiny import BERT, REVIEWS, WORDS, write_csv, write_tokenizer

GPT2 = {"model_type": "gpt2", "vocab_size": 259, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its language-modelling head."""
    folder = tmp_path_factory.mktemp("masked")
    write_tokenizer(folder)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=5 + len(WORDS), **BERT)).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> TextClassificationData:
    for split in ("train", "val"):
        write_csv(tmp_path / "d" / f"{split}.csv", ("text", "label"), REVIEWS * 4)
    return TextClassificationData(str(tmp_path / "d"), batch_size=8)


def fit(module: L.LightningModule, data: Any, callbacks: list[Any], folder: Path, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 4, "logger": False, "enable_progress_bar": False}
    path = options.pop("ckpt_path", None)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_model_summary=False,
        callbacks=callbacks,
        **(defaults | options),
    )
    trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return trainer


def test_the_score_of_a_masked_model_is_read_at_the_mask(bert: Path) -> None:
    module = LabelWordClassifier(str(bert), labels=["no", "yes"], label_words=[["bad"], ["good", "film"]]).eval()
    tokenizer = module.tokenizer
    batch = dict(tokenizer(["a good film", "bad"], padding=True, return_tensors="pt"))
    scores = module(batch)
    for row, text in enumerate(["a good film [MASK]", "bad [MASK]"]):  # one by one, without padding
        single = tokenizer(text, return_tensors="pt")
        place = int((single["input_ids"][0] == tokenizer.mask_token_id).nonzero())
        spoken = module.model(**single).logits[0, place].softmax(-1)
        ids = [tokenizer.convert_tokens_to_ids(word) for word in ("bad", "good", "film")]
        expected = torch.stack([spoken[ids[0]], spoken[ids[1]] + spoken[ids[2]]]).log()
        torch.testing.assert_close(scores[row], expected)


def test_the_score_of_a_causal_model_is_read_after_the_text() -> None:
    module = LabelWordClassifier(GPT2, "causal", ["no", "yes"], [["n"], ["y"]], tokenizer="bytes").eval()
    ids = torch.tensor([[70, 71, 72, 0], [80, 81, 0, 0]])
    scores = module({"input_ids": ids, "attention_mask": (ids != 0).long()})
    for row, length in enumerate((3, 2)):
        spoken = module.model(ids[row : row + 1, :length]).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(scores[row], spoken[[ord("n") + 3, ord("y") + 3]])


def test_label_tokens_are_those_that_point_where_the_class_points() -> None:
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(40, 8, generator=generator) * 0.1
    output[7], output[21] = torch.eye(8)[0] * 3, torch.eye(8)[1] * 3
    labels = torch.arange(64) % 2
    features = torch.eye(8)[labels] + torch.randn(64, 8, generator=generator) * 0.1
    chosen = select_label_tokens(features, labels, output, 3)
    assert chosen.shape == (2, 3)
    assert chosen[:, 0].tolist() == [7, 21]


def test_the_search_chooses_words_then_a_trigger(bert: Path, data: Any, tmp_path: Path) -> None:
    module = LabelWordClassifier(str(bert), label_words=2)
    search = AutoPromptCallback(length=2, candidates=4, accumulation=1, tokenizer=str(bert), verbose=False)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(module, data, [search, keep], tmp_path)
    assert module.label_ids.shape == (2, 2)
    assert (module.label_ids >= 0).all()
    stored = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(stored["label_ids"], module.label_ids)
    assert {"train/loss", "val/loss", "val/accuracy", "trigger/default"} <= trainer.logged_metrics.keys()
    again = LabelWordClassifier(str(bert), label_words=2)
    search = AutoPromptCallback(length=2, candidates=4, accumulation=1, tokenizer=str(bert), verbose=False)
    fit(again, data, [search], tmp_path / "again", ckpt_path=tmp_path / "step=2.ckpt")
    assert torch.equal(again.label_ids, module.label_ids)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in module.state_dict().items())


def test_methods_that_train_use_it_too(bert: Path, data: Any, tmp_path: Path) -> None:
    fast = partial(torch.optim.AdamW, lr=3e-2)
    module = LabelWordClassifier(str(bert), label_words=[["bad"], ["good"]], optimizer=fast)
    lora = LoRACallback(r=4, target_modules="all-linear", verbose=False, modules_to_save=[])
    batch = dict(module.tokenizer([text for text, _ in REVIEWS], padding=True, return_tensors="pt"))
    labels = torch.tensor([1, 0, 1, 0])
    module._build(["neg", "pos"])
    start = module.eval()(batch)[range(4), labels].mean().item()
    fit(module.train(), data, [lora], tmp_path, max_epochs=12, enable_checkpointing=False)
    assert module.eval()(batch)[range(4), labels].mean().item() > start + 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_words": [["bad"]]}, "has 1 lists, but there are 2 labels"),
        ({"label_words": [["bad"], ["unheard-of"]]}, "no single token"),
        ({"kind": "spoken"}, "use 'masked' or 'causal'"),
        ({"tokenizer": "bytes"}, "no mask token"),
    ],
)
def test_arguments(bert: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LabelWordClassifier(str(bert), **{"labels": ["no", "yes"], **options})
