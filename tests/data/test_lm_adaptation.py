"""Plain texts for language-model adaptation, and the way from there to prompt tuning."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from lightning_pet.callbacks.prompt_tuning import PromptTuningCallback
from lightning_pet.data.lm_adaptation import LMAdaptationData
from lightning_pet.data.seq2seq import Seq2SeqData
from lightning_pet.errors import ArgumentError
from lightning_pet.modules.pretrained import load_tokenizer
from lightning_pet.modules.save_pretrained import SavePretrained
from lightning_pet.modules.seq2seq import Seq2SeqModule
from tests.modules.tiny import write_csv, write_jsonl

TEXTS = ["the plot is great", "a film", "it was very boring and very bad", "good", "not good", "the film was bad"]
BYTES = SimpleNamespace(tokenizer=load_tokenizer("bytes"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    return path


def batches(data: LMAdaptationData, split: str) -> list[dict[str, Any]]:
    data.encode_splits(BYTES, [split])
    return list(data.loader(split))


def parts(batch: dict[str, Any]) -> list[tuple[str, str]]:
    decode = BYTES.tokenizer.decode
    sources = [decode(row, skip_special_tokens=True) for row in batch["input_ids"]]
    return list(
        zip(sources, [decode(row[row != -100], skip_special_tokens=True) for row in batch["labels"]], strict=True)
    )


def test_the_first_part_goes_in_and_the_rest_comes_out(texts: Path) -> None:
    data = LMAdaptationData(str(texts), val=str(texts), batch_size=2)
    seen = [pair for _ in range(3) for batch in batches(data, "train") for pair in parts(batch)]
    assert {a + b for a, b in seen} == set(TEXTS)
    assert all(a and b for a, b in seen)
    assert len({len(a) for a, b in seen if a + b == TEXTS[2]}) > 1  # drawn anew every time
    for _ in range(2):
        middle = [pair for batch in batches(data, "val") for pair in parts(batch)]
        assert middle == [(text[: len(text) // 2], text[len(text) // 2 :]) for text in TEXTS]


def test_the_end_of_a_text_is_marked_and_a_piece_of_one_is_not(texts: Path) -> None:
    data = LMAdaptationData(str(texts), val=str(texts), max_length=10, batch_size=1)
    found = batches(data, "val")
    end = BYTES.tokenizer.eos_token_id
    assert all(int(batch["input_ids"][0, -1]) == end for batch in found)
    ends = [int(batch["labels"][0, -1]) == end for batch in found]
    assert sum(ends) == len(TEXTS)
    assert "".join(a + b for batch in found for a, b in parts(batch)) == "".join(TEXTS)
    assert max(batch["input_ids"].shape[1] + batch["labels"].shape[1] for batch in found) <= 12


def test_columns_and_the_validation_share(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", ("content", "x"), [(text, "1") for text in TEXTS])
    data = LMAdaptationData(str(table), val_fraction=0.5)
    assert {split: len(rows) for split, rows in data.tables.items()} == {"train": 3, "val": 3}
    lines = write_jsonl(tmp_path / "t.jsonl", [{"body": text} for text in TEXTS])
    assert len(batches(LMAdaptationData(str(lines), column="body", val=str(lines), batch_size=6), "val")) == 1


def test_special_tokens_stand_where_the_tokenizer_puts_them(bert: Path, texts: Path) -> None:
    data = LMAdaptationData(str(texts), val=str(texts), tokenizer=str(bert), batch_size=1)
    data.encode_splits(None, ["val"])
    batch = next(iter(data.loader("val")))
    tokenizer = load_tokenizer(str(bert))
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == ["[CLS]", "the", "plot", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(batch["labels"][0]) == ["[CLS]", "is", "great", "[SEP]"]


def test_errors(tmp_path: Path, texts: Path) -> None:
    with pytest.raises(ArgumentError, match="two tokens, one on each side"):
        LMAdaptationData(str(texts), max_length=1)
    (tmp_path / "short.txt").write_text("a\nb\nc\n")
    with pytest.raises(ArgumentError, match="no text in column 'text' has two tokens"):
        batches(LMAdaptationData(str(tmp_path / "short.txt")), "train")
    with pytest.raises(ArgumentError, match="no column 'body'"):
        batches(LMAdaptationData(str(texts), column="body"), "train")


def trainer(folder: Path, *callbacks: Any, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **quiet, **options)


def test_adaptation_then_prompt_tuning(tmp_path: Path, t5: Path, texts: Path) -> None:
    module = Seq2SeqModule(str(t5), max_new_tokens=2)
    before = module.model.state_dict()["encoder.block.0.layer.0.SelfAttention.q.weight"].clone()
    run = trainer(tmp_path, SavePretrained("adapted"), max_epochs=2, enable_checkpointing=False)
    run.fit(module, LMAdaptationData(str(texts), batch_size=2))
    assert run.callback_metrics["train/loss"].isfinite()
    adapted = Seq2SeqModule(str(tmp_path / "adapted"), max_new_tokens=2)
    weight = adapted.model.state_dict()["encoder.block.0.layer.0.SelfAttention.q.weight"].clone()
    assert not torch.equal(weight, before)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"source": text, "target": text[:2]} for text in TEXTS])
    prompt = PromptTuningCallback(length=4, init="text", init_text="copy", tokenizer=str(tmp_path / "adapted"))
    trainer(tmp_path, prompt, max_epochs=1).fit(adapted, Seq2SeqData(str(pairs), batch_size=2))
    assert torch.equal(adapted.model.state_dict()["encoder.block.0.layer.0.SelfAttention.q.weight"], weight)
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)["state_dict"]
    assert [tuple(tensor.shape) for tensor in saved.values() if tensor.ndim and tensor.numel()] == [(4, 16)]


def test_a_module_without_a_model_is_refused_before_the_run(tmp_path: Path) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(ArgumentError, match="BoringModel has no `model`"):
        trainer(tmp_path, SavePretrained(), max_steps=1).fit(BoringModel())
