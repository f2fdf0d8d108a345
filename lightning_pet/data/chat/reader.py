"""Files of conversations: every bad line is found and named before anything is trained."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lightning_pet.data.chat.messages import Example, Format, LineError, form_of, read_line
from lightning_pet.data.tables import Table, read_splits, read_table
from lightning_pet.errors import ArgumentError

MAX_SHOWN: Final = 20
MAX_LINE: Final = 64 << 20  # characters: a longer one is no example
_MAX_DEPTH: Final = 64
Row = tuple[int, Mapping[str, Any] | LineError]
"""Number of a line, counted from 1, and its object or what is wrong with it."""


class Problems:
    """What is wrong with a file, of which all is counted and the first twenty lines are shown.

    Args:
        source: the file.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[tuple[int, str]] = []

    def add(self, line: int, problem: str) -> None:
        """Note the problem of a line."""
        self.found.append((line, problem))

    def check(self) -> None:
        """Raise what has been found.

        Raises:
            ArgumentError: if anything has.
        """
        if self.found:
            shown = "\n".join(f"  line {line}: {problem}" for line, problem in sorted(self.found)[:MAX_SHOWN])
            more = len(self.found) - MAX_SHOWN
            rest = f"\n  and {more} more" if more > 0 else ""
            raise ArgumentError(
                f"{self.source}: {len(self.found)} of its lines cannot be read; mend or remove them:\n{shown}{rest}"
            )


def read_conversations(table: Table, form: Format, kinds: tuple[type, ...], answered: bool = True) -> Table:
    """The examples of a table, checked.

    Args:
        table: rows as they were read; its columns are ``line`` and ``object``.
        form: of the lines; ``auto`` goes by the keys of the first one.
        kinds: classes of examples that may be in it.
        answered: whether each line has to hold an answer to learn.

    Returns:
        A table with the columns ``line`` and ``example``.

    Raises:
        ArgumentError: naming every line that is wrong, up to twenty, or lines of another kind.
    """
    problems = Problems(table.source)
    examples: list[Example] = []
    lines: list[int] = []
    for number, row in zip(table.columns["line"], table.columns["object"], strict=True):
        try:
            if isinstance(row, LineError):
                raise row
            form = form_of(row) if form == "auto" else form  # type: ignore[assignment]
            example = read_line(row, form, answered)
        except LineError as error:
            problems.add(number, str(error))
            continue
        if not isinstance(example, kinds):
            wanted = " or ".join(kind.__name__.lower() for kind in kinds)
            raise ArgumentError(
                f"{table.source}: line {number} has the form {form!r}, expected a {wanted}. Preferences are read by "
                "PreferenceData, conversations and texts by ChatData."
            )
        lines.append(number)
        examples.append(example)
    problems.check()
    return Table(table.source, {"line": lines, "example": examples})


def read_files(train: str, **others: str | None) -> dict[str, Table]:
    """The rows of all splits as objects: JSON lines strictly, other files and the hub by their columns.

    Args:
        train: a file, a folder with files named by split, or a hub repository.
        others: files of further splits.

    Raises:
        ArgumentError: a file is missing or holds no objects.
    """
    path = Path(train).expanduser()
    if path.suffix.lower() == ".jsonl":
        found = {"train": read_jsonl(path)}
    else:
        found = {split: _rows(table) for split, table in read_splits(train).items()}
    for split, source in others.items():
        if source is not None:
            other = Path(source).expanduser()
            found[split] = read_jsonl(other) if other.suffix.lower() == ".jsonl" else _rows(read_table(other))
    return found


def _rows(table: Table) -> Table:
    names = list(table.columns)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*table.columns.values(), strict=True)]
    given = [{key: value for key, value in row.items() if value is not None} for row in rows]
    return Table(table.source, {"line": list(range(1, len(rows) + 1)), "object": given})


def read_jsonl(path: Path) -> Table:
    """One JSON object per line, in UTF-8; empty lines are left out, and wrong ones stand as what is wrong with them.

    Raises:
        ArgumentError: there is no such file, or it is empty.
    """
    if not path.is_file():
        raise ArgumentError(f"there is no file {path.absolute()}")
    rows = list(_parsed(_lines(path)))
    if not rows:
        raise ArgumentError(f"{path} is empty: expected one JSON object per line")
    return Table(str(path), {"line": [number for number, _ in rows], "object": [row for _, row in rows]})


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            yield number, line
            if not line.endswith(b"\n") and len(line) == MAX_LINE:
                while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass


def _parsed(lines: Iterable[tuple[int, bytes]]) -> Iterator[Row]:
    for number, raw in lines:
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield number, _object(text)
        except UnicodeDecodeError as error:
            yield number, LineError(f"is no UTF-8 text (byte {error.start}: {error.reason})")
        except LineError as error:
            yield number, error


def _object(text: str) -> Mapping[str, Any]:
    if len(text) >= MAX_LINE - 1:
        raise LineError(f"is longer than {MAX_LINE >> 20} MiB")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise LineError("is nested too deep") from None
    except LineError:
        raise
    except ValueError as error:
        raise LineError(f"is no JSON ({error}; it starts with: {text[:40]!a})") from None
    if not isinstance(value, dict):
        raise LineError(
            "Expected file to have JSONL format, where every line is a JSON dictionary. It is not a dictionary "
            f"(HINT: line starts with: {text[:40]!a})"
        )
    if _depth(value) > _MAX_DEPTH:
        raise LineError(f"is nested deeper than {_MAX_DEPTH} levels")
    return value


def _depth(value: object) -> int:
    """Levels of lists and objects, counted without recursion."""
    depth, level = 0, [value]
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
    return depth


def _inside(value: object) -> Sequence[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise LineError(f"has the key {next(key for key in keys if keys.count(key) > 1)!a} twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise LineError(f"holds {name}, expected a finite number")
