"""The data modules for the user's own texts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_pet.data.base import SimilarLengths, split_off
from lightning_pet.data.seq2seq import Seq2SeqData
from lightning_pet.data.tables import Table
from lightning_pet.data.text_classification import TextClassificationData, label_ids, label_names
from lightning_pet.errors import ArgumentError
from tests.modules.tiny import REVIEWS, write_csv, write_jsonl

NOBODY = SimpleNamespace(labels=None)


def reviews(folder: Path, **split_rows: list[tuple[Any, ...]]) -> Path:
    for split, rows in ({"train": REVIEWS, "val": REVIEWS[:2]} | split_rows).items():
        write_csv(folder / f"{split}.csv", ("text", "label"), rows)
    return folder


def encoded(data: TextClassificationData, split: str, module: Any = NOBODY) -> list[dict[str, Any]]:
    data.encode_splits(module, [split])
    return data._examples[split]


# -- labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["pos", "neg", "pos"], ["neg", "pos"]),
        (["10", "9", "0"], ["0", "9", "10"]),
        ([2, 0, 1], ["0", "1", "2"]),
        ([-1, 1], ["-1", "1"]),
    ],
)
def test_label_names_do_not_depend_on_the_order_of_rows(values: list[Any], names: list[str]):
    assert label_names(Table("t", {"label": values}), "label") == names
    assert label_names(Table("t", {"label": values[::-1]}), "label") == names


def test_stored_class_names_win():
    table = Table("t", {"label": [1, 0]}, {"label": ["no", "yes"]})
    assert label_names(table, "label") == ["no", "yes"]
    assert label_ids(table, "label", ["yes", "no"]) == [0, 1]


def test_integers_are_positions_in_a_list_of_names():
    assert label_ids(Table("t", {"label": ["1", "0"]}), "label", ["negative", "positive"]) == [1, 0]
    assert label_ids(Table("t", {"label": ["2", "1"]}), "label", ["1", "2"]) == [1, 0]


@pytest.mark.parametrize("value", [None, "", 0.5, True])
def test_what_is_no_label_is_refused(value: Any):
    with pytest.raises(ArgumentError, match="row 2 of column 'label'"):
        label_names(Table("t", {"label": ["a", value]}), "label")


def test_unknown_label_in_validation_is_named(tmp_path: Path, bert: Path):
    data = TextClassificationData(str(reviews(tmp_path, val=[("a", "pos"), ("b", "unsure")])), tokenizer=str(bert))
    with pytest.raises(ArgumentError, match=r"val.csv: row 2 has the label 'unsure'.*\['neg', 'pos'\]"):
        encoded(data, "val")


def test_the_module_decides_the_order_of_labels(tmp_path: Path, bert: Path):
    data = TextClassificationData(str(reviews(tmp_path)), tokenizer=str(bert))
    assert [e["labels"] for e in encoded(data, "train")] == [1, 0, 1, 0]
    module = SimpleNamespace(labels=["pos", "neg"])
    assert [e["labels"] for e in encoded(data, "train", module)] == [0, 1, 0, 1]  # encoded anew for another module
    assert data.labels == ["pos", "neg"]


# -- columns and splits -----------------------------------------------------------------------------


def test_columns_are_mapped(tmp_path: Path, bert: Path):
    write_csv(tmp_path / "train.csv", ("Review", "other", "stars"), [("a good film", "it is", 5), ("bad", "it", 1)])
    columns = {"text": "Review", "text_pair": "other", "label": "stars"}
    data = TextClassificationData(str(tmp_path / "train.csv"), columns=columns, tokenizer=str(bert), val_fraction=0.5)
    example = encoded(data, "train")[0]
    assert example["token_type_ids"].count(1) > 0  # the pair is there
    assert data.labels in (["1"], ["5"])


def test_wrong_mapping_names_the_columns(tmp_path: Path, bert: Path):
    with pytest.raises(ArgumentError, match=r"\['txt'\] are not read.*'text'"):
        TextClassificationData("train.csv", columns={"txt": "review"})
    data = TextClassificationData(str(reviews(tmp_path)), columns={"text": "labels"}, tokenizer=str(bert))
    with pytest.raises(ArgumentError, match=r"no column 'labels'.*did you mean 'label'"):
        encoded(data, "train")


def test_split_is_a_function_of_the_seed():
    table = Table("t", {"text": [str(i) for i in range(100)]})
    train, val = split_off(table, 0.1, seed=3)
    assert (len(train), len(val)) == (90, 10)
    assert sorted([*train.columns["text"], *val.columns["text"]], key=int) == table.columns["text"]
    torch.manual_seed(99)
    assert split_off(table, 0.1, seed=3) == (train, val)
    assert split_off(table, 0.1, seed=4) != (train, val)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_impossible_splits_are_refused(share: float):
    with pytest.raises(ArgumentError, match="val_fraction"):
        split_off(Table("t", {"text": ["a", "b"]}), share, 0)


def test_a_single_row_cannot_be_split():
    with pytest.raises(ArgumentError, match="too few"):
        split_off(Table("t", {"text": ["a"]}), 0.1, 0)


def test_texts_are_cut_and_padded(tmp_path: Path, bert: Path, caplog: pytest.LogCaptureFixture):
    rows = [("a good film", "pos"), ("very " * 50, "neg")]
    data = TextClassificationData(str(reviews(tmp_path, val=rows)), tokenizer=str(bert), max_length=8)
    data.encode_splits(NOBODY, ["val"])
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [5, 8]
    assert batch["labels"].tolist() == [1, 0]


def test_prediction_needs_no_labels(tmp_path: Path, bert: Path):
    write_csv(tmp_path / "new.csv", ("text",), [("a film",), ("the plot",)])
    data = TextClassificationData(
        str(reviews(tmp_path / "d")), predict=str(tmp_path / "new.csv"), labels=["neg", "pos"], tokenizer=str(bert)
    )
    assert all("labels" not in example for example in encoded(data, "predict"))


def test_missing_split_is_named(tmp_path: Path, bert: Path):
    data = TextClassificationData(str(reviews(tmp_path)), tokenizer=str(bert))
    with pytest.raises(ArgumentError, match=r"no 'test' split, only \['train', 'val'\]; pass test=<file>"):
        encoded(data, "test")


def test_no_tokenizer_is_an_error(tmp_path: Path):
    with pytest.raises(ArgumentError, match="has no attribute `tokenizer`"):
        encoded(TextClassificationData(str(reviews(tmp_path))), "train")


@pytest.mark.parametrize("option", ["max_length", "batch_size"])
def test_sizes_are_checked(option: str):
    with pytest.raises(ArgumentError, match=f"{option}=0"):
        TextClassificationData("train.csv", **{option: 0})


# -- sampler ----------------------------------------------------------------------------------------


def test_batches_have_similar_lengths_and_every_example_once():
    torch.manual_seed(0)
    lengths = torch.randint(5, 100, (1003,)).tolist()
    order = list(SimilarLengths(lengths, batch_size=10))
    assert sorted(order) == list(range(1003))
    padded = sum(max(lengths[i] for i in order[j : j + 10]) * len(order[j : j + 10]) for j in range(0, 1003, 10))
    assert padded < 1.1 * sum(lengths)  # a random order pads to 1.7 times


def test_order_follows_the_global_random_state():
    sampler = SimilarLengths(list(range(100)), batch_size=8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = list(sampler), list(sampler)
    torch.set_rng_state(state)
    assert list(sampler) == first
    assert list(sampler) == second
    assert first != second


# -- source and target ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("source", "target"), ("input", "output"), ("document", "summary")])
def test_seq2seq_columns_have_aliases(tmp_path: Path, names: tuple[str, str]):
    write_jsonl(tmp_path / "train.jsonl", [dict(zip(names, pair, strict=True)) for pair in [("ab", "c"), ("d", "ef")]])
    data = Seq2SeqData(str(tmp_path / "train.jsonl"), tokenizer="bytes", prefix=">", val_fraction=0.5)
    data.encode_splits(None, ["train", "val"])
    rows = sorted((e["input_ids"], e["labels"]) for split in ("train", "val") for e in data._examples[split])
    assert rows == [([65, 100, 101, 1], [102, 1]), ([65, 103, 1], [104, 105, 1])]


def test_seq2seq_targets_are_padded_with_ignored_labels(tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", [{"source": "a", "target": "b"}])
    write_jsonl(tmp_path / "val.jsonl", [{"source": "ab", "target": "c"}, {"source": "d", "target": "efg"}])
    data = Seq2SeqData(str(tmp_path), tokenizer="bytes")
    data.encode_splits(None, ["val"])
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == [[102, 1, -100, -100], [104, 105, 106, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_seq2seq_missing_column(tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", [{"source": "a", "title": "b"}] * 2)
    data = Seq2SeqData(str(tmp_path / "train.jsonl"), tokenizer="bytes")
    with pytest.raises(ArgumentError, match="no column 'target' or 'output' or 'summary'"):
        data.encode_splits(None, ["train"])
