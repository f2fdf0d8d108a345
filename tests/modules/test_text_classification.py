"""TextClassifier in a real Trainer, on a tiny random BERT."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from lightning_pet.callbacks.lora import LoRACallback
from lightning_pet.data.text_classification import TextClassificationData
from lightning_pet.errors import ArgumentError
from lightning_pet.modules.text_classification import MeanPoolingClassifier, TextClassifier, mean_over_tokens
from tests.modules.tiny import BERT, REVIEWS, write_csv

FAST = partial(torch.optim.AdamW, lr=2e-2)


def trainer(folder: Path, epochs: int = 1, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        **quiet,
        **{"enable_checkpointing": False} | options,
    )


@pytest.fixture
def data(tmp_path: Path) -> TextClassificationData:
    for split in ("train", "val", "test"):
        write_csv(tmp_path / "d" / f"{split}.csv", ("text", "label"), REVIEWS * 4)
    return TextClassificationData(str(tmp_path / "d"), batch_size=8)


def test_mean_counts_only_what_the_mask_shows():
    hidden = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [50.0], [50.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert mean_over_tokens(hidden, mask).tolist() == [[2.0], [2.0]]
    assert mean_over_tokens(hidden[:1], None).tolist() == [[pytest.approx(104 / 3)]]


def test_formula_of_the_mean_pooling_classifier(bert: Path):
    classifier = TextClassifier(str(bert), labels=2).eval()
    batch = dict(classifier.tokenizer(["a good film", "bad"], padding=True, return_tensors="pt"))
    model = classifier.model
    assert isinstance(model, MeanPoolingClassifier)
    rows = []
    for row in range(2):  # one by one, without padding: the same logits
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        mean = model.encoder(input_ids=ids[None]).last_hidden_state[0].mean(0)
        normed = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
        rows.append(model.classifier(normed))
    torch.testing.assert_close(classifier(batch), torch.stack(rows))
    torch.testing.assert_close(model.classifier(classifier.features(batch)), torch.stack(rows))


def test_one_child_holds_all_parameters_and_none_is_useless(bert: Path):
    classifier = TextClassifier(str(bert), labels=3)
    assert {name.partition(".")[0] for name, _ in classifier.named_parameters()} == {"model"}
    classifier({"input_ids": torch.ones(1, 4, dtype=torch.long)}).sum().backward()
    assert [name for name, p in classifier.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_fit_learns_and_logs(tmp_path: Path, bert: Path, data: TextClassificationData, pooling: Any):
    torch.manual_seed(0)
    classifier = TextClassifier(str(bert), pooling=pooling, optimizer=FAST)
    run = trainer(tmp_path, epochs=12)
    run.fit(classifier, data)
    assert set(run.callback_metrics) >= {"train/loss", "val/loss", "val/accuracy", "val/f1"}
    assert run.callback_metrics["val/accuracy"] == 1.0
    assert classifier.labels == ["neg", "pos"]
    run.test(classifier, data, verbose=False)
    assert run.callback_metrics["test/f1"] == 1.0
    predicted = [name for batch in run.predict(classifier, data) or [] for name in batch]
    assert predicted == [label for _, label in REVIEWS * 4]


def test_body_and_head_have_their_own_rates(bert: Path):
    classifier = TextClassifier(str(bert), labels=2, head_lr=5e-3)
    body, head = classifier.param_groups()
    assert "lr" not in body
    assert head["lr"] == 5e-3
    assert {id(p) for p in head["params"]} == {id(p) for p in classifier.model.classifier.parameters()}
    assert len(body["params"]) + len(head["params"]) == len(list(classifier.parameters()))


def test_checkpoint_remembers_labels_without_data(tmp_path: Path, bert: Path, data: TextClassificationData):
    classifier = TextClassifier(str(bert))
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(classifier, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.labels == ["neg", "pos"]
    batch = classifier.tokenizer(["a good film"], return_tensors="pt")
    assert loaded.eval().predict_step(dict(batch), 0) == classifier.eval().predict_step(dict(batch), 0)


def test_a_method_adapts_the_child_whenever_it_is_built(tmp_path: Path, bert: Path, data: TextClassificationData):
    for labels in (None, ["neg", "pos"]):
        classifier = TextClassifier(str(bert), labels=labels)
        run = trainer(tmp_path, callbacks=[LoRACallback(r=2, verbose=False)])
        run.fit(classifier, data)
        trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
        heads = {name for name in trained if ".pet." not in name}
        assert heads == {"model.classifier.weight", "model.classifier.bias"}
        assert len(trained - heads) == 4


def test_number_of_labels_takes_its_names_from_the_data(tmp_path: Path, bert: Path, data: TextClassificationData):
    classifier = TextClassifier(str(bert), labels=2)
    trainer(tmp_path).fit(classifier, data)
    assert classifier.labels == classifier.hparams["labels"] == ["neg", "pos"]
    with pytest.raises(ArgumentError, match=r"labels=3.*\['neg', 'pos'\]"):
        trainer(tmp_path).fit(TextClassifier(str(bert), labels=3), data)


def test_labels_must_come_from_somewhere(tmp_path: Path, bert: Path):
    with pytest.raises(ArgumentError, match="pass TextClassifier"):
        trainer(tmp_path).fit(TextClassifier(str(bert)), train_dataloaders=[{"labels": torch.zeros(1)}])


@pytest.mark.parametrize("labels", [1, ["a"], ["a", "a"]])
def test_a_classifier_needs_two_different_labels(bert: Path, labels: Any):
    with pytest.raises(ArgumentError, match="two or more labels"):
        TextClassifier(str(bert), labels=labels)


def test_new_model_has_no_tokenizer():
    classifier = TextClassifier({"model_type": "bert", "vocab_size": 30, **BERT}, labels=2)
    with pytest.raises(ArgumentError, match=r"set data\.tokenizer"):
        classifier.tokenizer  # noqa: B018
