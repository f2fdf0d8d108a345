"""Reading tables: every format gives the same rows, and every fault is named."""

import json
import sys
from pathlib import Path

import pytest

from lightning_pet.data.tables import Table, read_splits, read_table
from lightning_pet.errors import ArgumentError
from tests.modules.tiny import write_csv, write_jsonl

ROWS = [("a, b", "x"), ('say "hi"', "y"), ("two\nlines", "x")]
COLUMNS = {"text": ["a, b", 'say "hi"', "two\nlines"], "label": ["x", "y", "x"]}


def test_csv_json_and_parquet_give_the_same_columns(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    objects = [dict(zip(("text", "label"), row, strict=True)) for row in ROWS]
    write_csv(tmp_path / "a.csv", ("text", "label"), ROWS)
    write_jsonl(tmp_path / "a.jsonl", objects)
    (tmp_path / "a.json").write_text(json.dumps(objects))
    datasets.Dataset.from_dict(COLUMNS).to_parquet(tmp_path / "a.parquet")
    for ending in ("csv", "jsonl", "json", "parquet"):
        table = read_table(tmp_path / f"a.{ending}")
        assert {name: list(values) for name, values in table.columns.items()} == COLUMNS, ending
        assert len(table) == 3


def test_parquet_keeps_the_names_of_classes(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").class_names == {"label": ["no", "yes"]}


def test_tsv_does_not_quote(tmp_path: Path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"open quote\t1\nplain\t0\n')
    assert read_table(tmp_path / "a.tsv").columns == {"text": ['"open quote', "plain"], "label": ["1", "0"]}


def test_byte_order_mark_and_blank_lines_are_skipped(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\na,1\r\n\r\nb,0\r\n")
    assert read_table(tmp_path / "a.csv").columns == {"text": ["a", "b"], "label": ["1", "0"]}


def test_fields_may_be_longer_than_the_csv_modules_default(tmp_path: Path):
    text = "x" * 200_000
    write_csv(tmp_path / "a.csv", ("text",), [(text,)])
    assert read_table(tmp_path / "a.csv").columns["text"] == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.json", "", "is empty"),
        ("a.csv", "text,label\na,b,c\n", r"line 2 has 3 fields, the header 2"),
        ("a.csv", 'text,label\n"a"b,c\n', "cannot be read"),
        ("a.csv", 'text,label\n"never closed,c\n', "cannot be read"),
        ("a.csv", "text,text\na,b\n", "twice"),
        ("a.csv", b"text\n\xff\xfe\n", "cannot be read.*UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{text}\n', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "row 1 is .*expected an object"),
        ("a.json", '{"text": "a"}', "expected a list of objects"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "one object per line .jsonl"),
        ("a.xlsx", "text", "unknown ending '.xlsx'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str | bytes, message: str):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ArgumentError, match=message) as error:
        read_table(tmp_path / name)
    assert name in str(error.value)


def test_missing_file_is_an_error_and_not_a_repository(tmp_path: Path):
    for name in ("missing.csv", f"{tmp_path}/missing", "./data/reviews"):
        with pytest.raises(ArgumentError, match="there is no file"):
            read_splits(name)


def test_folder_names_splits_by_files(tmp_path: Path):
    write_csv(tmp_path / "train.csv", ("text",), [("a",)])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "b"}])
    write_csv(tmp_path / "notes.csv", ("text",), [("ignored",)])
    tables = read_splits(str(tmp_path))
    assert {split: list(table.columns["text"]) for split, table in tables.items()} == {"train": ["a"], "val": ["b"]}


def test_folder_with_two_files_for_a_split_is_ambiguous(tmp_path: Path):
    write_csv(tmp_path / "val.csv", ("text",), [("a",)])
    write_csv(tmp_path / "dev.csv", ("text",), [("a",)])
    with pytest.raises(ArgumentError, match="two files for 'val'"):
        read_splits(str(tmp_path))


def test_folder_without_training_split(tmp_path: Path):
    with pytest.raises(ArgumentError, match="no file named by a split"):
        read_splits(str(tmp_path))
    write_csv(tmp_path / "test.csv", ("text",), [("a",)])
    with pytest.raises(ArgumentError, match="no training split"):
        read_splits(str(tmp_path))


def test_hub_repositories_are_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # load_dataset treats a relative folder owner/name as it treats a repository of the hub, without a network.
    pytest.importorskip("datasets")
    import datasets

    write_csv(tmp_path / "owner/name/train.csv", ("text", "label"), [("a", 0), ("b", 1)])
    write_csv(tmp_path / "owner/name/test.csv", ("text", "label"), [("c", 0)])
    real = datasets.load_dataset
    asked = []

    def load(name: str, config: str | None) -> object:
        asked.append((name, config))
        return real(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    tables = read_splits("owner/name:plain")
    assert asked == [("owner/name", "plain")]
    assert {split: list(table.columns["label"]) for split, table in tables.items()} == {"train": [0, 1], "test": [0]}


def test_parquet_without_datasets_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ArgumentError, match=r"pip install 'lightning-pet\[data\]'"):
        read_table(tmp_path / "a.parquet")


def test_missing_column_names_the_nearest():
    table = Table("data.csv", {"sentense": ["a"], "label": ["b"]})
    with pytest.raises(
        ArgumentError, match=r"data.csv has no column 'sentence'.*\['sentense', 'label'\].*'sentense'\?"
    ):
        table.find(["sentence"])


def test_a_missing_text_is_found():
    with pytest.raises(ArgumentError, match="row 2 of column 'text' is None"):
        Table("data.csv", {"text": ["a", None]}).texts("text")
