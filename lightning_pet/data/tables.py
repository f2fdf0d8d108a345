"""Tables of examples from CSV, TSV, JSON, JSON lines and text (standard library), Parquet and the hub."""

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lightning_pet.errors import ArgumentError

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test",),
}
"""Splits, and how files and hub repositories name them."""

_LONGEST_FIELD = 1 << 27


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        source: where the rows come from, for messages.
        columns: values by name of the column.
        class_names: names of the classes of integer columns, where the file stores them.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def take(self, rows: Sequence[int]) -> "Table":
        """The given rows, in the given order."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(self.source, columns, self.class_names)

    def find(self, names: Sequence[str]) -> str:
        """Return the first of the names that is a column.

        Raises:
            ArgumentError: none is; the message names the columns and the nearest of them.
        """
        for name in names:
            if name in self.columns:
                return name
        near = get_close_matches(names[0], self.columns, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        wanted = " or ".join(map(repr, names))
        raise ArgumentError(
            f"{self.source} has no column {wanted}; it has {list(self.columns)}; {hint}"
            f"Say which column to read with columns={{...}}"
        )

    def texts(self, name: str) -> list[str]:
        """Values of a column of texts.

        Raises:
            ArgumentError: a value is not a text.
        """
        for row, value in enumerate(self.columns[name]):
            if not isinstance(value, str):
                raise ArgumentError(
                    f"{self.source}: row {row + 1} of column {name!r} is {value!r}, expected a text; "
                    f"fill or remove this row"
                )
        return list(self.columns[name])


def read_table(path: Path) -> Table:
    """Read one file.

    Args:
        path: ``.csv``, ``.tsv`` (without quoting), ``.json`` (a list of objects), ``.jsonl``, ``.parquet``, or
            ``.txt`` (a text per line, as the column ``text``).

    Raises:
        ArgumentError: the file does not exist, has an unknown ending, is empty or malformed, or is Parquet and
            the package ``datasets`` is not installed.
    """
    if not path.is_file():
        raise ArgumentError(f"there is no file {path.absolute()}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ArgumentError(f"{path}: unknown ending {path.suffix!r}; known: {', '.join(_READERS)}")
    try:
        table = reader(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArgumentError(f"{path} cannot be read: {error}; expected UTF-8 text in the form of its ending") from error
    if len(table) == 0:
        raise ArgumentError(f"{path} is empty: expected named columns and at least one row")
    return table


def read_splits(
    train: str, val: str | None = None, test: str | None = None, predict: str | None = None
) -> dict[str, Table]:
    """Read the splits of a data set.

    Args:
        train: a file; a folder with files named by split (``train.csv``, ``validation.csv``, …); or a hub
            repository ``owner/name``, with ``:config`` after it if it has several configurations.
        val: file with the validation split; ``None`` takes the folder's or repository's, if any.
        test: file with the test split, likewise.
        predict: file with rows to predict, likewise.

    Returns:
        Tables under ``"train"`` and, where found, ``"val"``, ``"test"`` and ``"predict"``.

    Raises:
        ArgumentError: a source does not exist or cannot be read, or there is no training split.
    """
    place = Path(train).expanduser()
    if place.is_dir():
        tables = {split: read_table(path) for split, path in _files_by_split(place).items()}
    elif place.is_file() or place.suffix.lower() in _READERS or not re.fullmatch(r"[\w-]+/[\w.-]+(:[\w.-]+)?", train):
        tables = {"train": read_table(place)}
    else:
        tables = _read_hub(train)
    for split, source in (("val", val), ("test", test), ("predict", predict)):
        if source is not None:
            tables[split] = read_table(Path(source).expanduser())
    if "train" not in tables:
        raise ArgumentError(f"train={train!r} has no training split; found {sorted(tables)}")
    return tables


def _files_by_split(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = _split_named(path.stem)
        if split is None or path.suffix.lower() not in _READERS:
            continue
        if split in found:
            raise ArgumentError(f"{folder} has two files for {split!r}: {found[split].name} and {path.name}; keep one")
        found[split] = path
    if not found:
        raise ArgumentError(f"{folder} has no file named by a split, such as train.csv or train.jsonl")
    return found


def _split_named(name: str) -> str | None:
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def _read_delimited(path: Path, **dialect: Any) -> Table:
    limit = csv.field_size_limit(_LONGEST_FIELD)  # documents are longer than the default of 131072 characters
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Strict: a stray quote would otherwise swallow the rows up to the next one in silence.
            reader = csv.reader(file, strict=True, **dialect)
            header = next(reader, [])
            rows = list(_checked_rows(path, reader, header))
    finally:
        csv.field_size_limit(limit)
    if len(set(header)) < len(header):
        raise ArgumentError(f"{path}: the header {header} names a column twice")
    return Table(str(path), {name: [row[i] for row in rows] for i, name in enumerate(header)})


def _checked_rows(path: Path, reader: Any, header: list[str]) -> Iterator[list[str]]:
    for row in reader:
        if not row:  # blank line
            continue
        if len(row) != len(header):
            raise ArgumentError(
                f"{path}: line {reader.line_num} has {len(row)} fields, the header {len(header)} ({header}); "
                f"quote fields that contain the delimiter"
            )
        yield row


def _read_csv(path: Path) -> Table:
    return _read_delimited(path)


def _read_tsv(path: Path) -> Table:
    return _read_delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_text(path: Path) -> Table:
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    return Table(str(path), {"text": [line for line in lines if line]})


def _read_json_lines(path: Path) -> Table:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ArgumentError(f"{path}: line {number} is not JSON: {error}") from error
    return _from_objects(path, rows)


def _read_json(path: Path) -> Table:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except json.JSONDecodeError as error:
        raise ArgumentError(f"{path} is not JSON: {error}; name a file with one object per line .jsonl") from error
    if not isinstance(rows, list):
        raise ArgumentError(f"{path} holds a {type(rows).__name__}, expected a list of objects")
    return _from_objects(path, rows)


def _from_objects(path: Path, rows: list[Any]) -> Table:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ArgumentError(f"{path}: row {number} is {row!r:.60}, expected an object such as {{'text': …}}")
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names})


def _read_parquet(path: Path) -> Table:
    _require_datasets(path)
    import datasets

    parquet = importlib.import_module("pyarrow.parquet")  # comes with datasets, without types
    return _from_dataset(datasets.Dataset(parquet.read_table(path)), str(path))


def _read_hub(repository: str) -> dict[str, Table]:
    _require_datasets(repository)
    import datasets

    name, _, config = repository.partition(":")
    loaded = datasets.load_dataset(name, config or None)
    tables: dict[str, Table] = {}
    for split, names in SPLITS.items():
        found = next((name for name in names if name in loaded), None)
        if found is not None:
            tables[split] = _from_dataset(loaded[found], f"{repository}[{found}]")
    return tables


def _from_dataset(dataset: Any, source: str) -> Table:
    classes = {name: feature.names for name, feature in dataset.features.items() if hasattr(feature, "names")}
    return Table(source, {name: dataset[name][:] for name in dataset.column_names}, classes)


def _require_datasets(source: Path | str) -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            f"{source}: Parquet files and hub repositories need the package datasets: "
            f"`pip install 'lightning-pet[data]'` (CSV, TSV and JSON files need nothing)"
        ) from error


_READERS: Mapping[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
