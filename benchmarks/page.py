"""What the benchmarks of ``docs/performance.md`` share: rows, the command line, and the place on the page.

A benchmark measures cases. Each gives one :class:`Row`: the figure of this library, those of its peers in the same run
(the lower, the better), and, where there is one, the bound that ours must keep to. A case in which a peer is ahead
says so in its last cell, and no case is left out. The page has a place for every table::

    <!-- begin train_step -->
    <!-- end train_step -->

With ``--write`` the table stands there, with what the figures depend on and the command that gives them again. Single
cases may be measured again (``--only``); the others stay as they are, which is refused where they were measured with
other versions or on another machine.

    from page import Row, Table, run

    TABLE = Table("inference", "time per token / that of the base", command="python benchmarks/inference.py --write")
    CASES = {"width 64, q and v": functools.partial(measure, 64, "q,v")}

    if __name__ == "__main__":
        run(__doc__, {TABLE: CASES})
"""

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
AHEAD, ABOVE = "peer ahead", "above the bound"
OURS, BOUND, MARK = "lightning_pet", "bound", ""  # columns
PACKAGES = ("torch", "transformers", "lightning", "peft", "adapters")


@dataclass(frozen=True)
class Row:
    """One case.

    Args:
        case: Its name, which stands in the first cell and is accepted by ``--only``.
        ours: Figure of this library.
        peers: Figures of other libraries in the same run, by the name of the column.
        bound: What ``ours`` must not exceed, other than the peers.
        context: What the figures are to be seen beside: the floor, full fine-tuning, absolute times.
    """

    case: str
    ours: float
    peers: Mapping[str, float] = field(default_factory=dict)
    bound: float | None = None
    context: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        name: Of its place on the page.
        what: What the figures are, which heads the first column.
        command: Writes it again.
        digits: After the point. A peer is ahead if it is so in what is printed.
    """

    name: str
    what: str
    command: str
    digits: int = 2


Measure = Callable[["Options"], Row]


@dataclass(frozen=True)
class Options:
    """What a case may be told: tiny models for the test suite, and how many turns to take."""

    short: bool = False
    turns: int = 12


def marks(row: Row, digits: int = 2) -> list[str]:
    """What is to be said of a row, judged by what is printed of it."""
    ours = round(row.ours, digits)
    found = [AHEAD] if any(round(peer, digits) < ours for peer in row.peers.values()) else []
    return [*found, ABOVE] if row.bound is not None and ours > round(row.bound, digits) else found


def cells(table: Table, row: Row) -> dict[str, str]:
    """What is printed of a row, by column."""
    figures = {**row.context, OURS: row.ours, **row.peers} | ({} if row.bound is None else {BOUND: row.bound})
    printed = {column: _figure(figure, table.digits) for column, figure in figures.items()}
    printed[OURS] = f"**{printed[OURS]}**"
    return {table.what: row.case, **printed, MARK: ", ".join(marks(row, table.digits))}


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table with every column that any row has: what ours is seen beside, ours, the peers', the bound, the mark."""
    before = [column for row in rows for column in list(row)[: list(row).index(OURS)]]
    after = [column for row in rows for column in list(row)[list(row).index(OURS) :]]
    bound = [BOUND] if BOUND in after else []
    heads = [*dict.fromkeys(before + [column for column in after if column not in (BOUND, MARK)]), *bound, MARK]
    rule = ["---", *["--:"] * (len(heads) - 2), "---"]
    lines = [heads, rule, *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(value: float | str, digits: int) -> str:
    return value if isinstance(value, str) else f"{value:,.{digits}f}"


def facts() -> str:
    """What the figures depend on."""
    found = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_processor()}, {os.cpu_count()} cores"
    threads = torch.get_num_threads()
    return f"{', '.join(found)}; {device}, {threads} thread{'s' * (threads > 1)}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def written(page: str, table: Table, rows: Sequence[Row], whole: bool = True) -> str:
    """The page with these rows in their place.

    Args:
        page: Text of the page.
        table: Which place.
        rows: What was measured.
        whole: These are all cases; otherwise those that are not among them stay.

    Raises:
        SystemExit: The page has no such place, or what should stay was measured elsewhere.
    """
    _, old, _ = _place(page, table.name, PAGE.name)
    note = f"{facts()}. Again: `{table.command}`"
    kept = {} if whole else _rows_on(old, table, note)
    text = markdown(list((kept | {row.case: cells(table, row) for row in rows}).values()))
    return replaced(page, table.name, f"{text}\n\n{note}", PAGE.name)


def replaced(page: str, name: str, text: str, file: str) -> str:
    """The page with a text in the place that has this name.

    Raises:
        SystemExit: The page, which is this file, has no such place.
    """
    before, _, after = _place(page, name, file)
    return f"{before}{text}{after}"


def _place(page: str, name: str, file: str) -> tuple[str, str, str]:
    """What stands before the place, in it, and after it; the marks are outside."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in page or end not in page:
        raise SystemExit(f"{file} has no place for this table: it needs the lines {begin} and {end}")
    before, _, rest = page.partition(begin)
    old, _, after = rest.partition(end)
    return f"{before}{begin}\n", old, f"\n{end}{after}"


def _rows_on(old: str, table: Table, note: str) -> dict[str, dict[str, str]]:
    """The rows that stand there, by case."""
    lines = [line[2:-2].split(" | ") for line in old.splitlines() if line.startswith("| ")]
    if lines and (note not in old.splitlines() or lines[0][0] != table.what):
        raise SystemExit(
            f"the table {table.name} was measured with other versions or on another machine, so that its rows "
            f"cannot stand beside these; measure all of it: {table.command}"
        )
    return {line[0]: {head: cell for head, cell in zip(lines[0], line, strict=True) if cell} for line in lines[2:]}


def write(table: Table, rows: Sequence[Row], whole: bool = True) -> None:
    """Put these rows on the page."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table, rows, whole), encoding="utf-8")


def run(doc: str | None, tables: Mapping[Table, Mapping[str, Measure]], argv: Sequence[str] | None = None) -> None:
    """The command line of a benchmark: measure the cases, print their tables and, if asked, write them on the page."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="tiny models and few turns: does the script still run?")
    parser.add_argument("--turns", type=int, default=Options.turns, help="of which the best counts")
    parser.add_argument("--table", choices=[table.name for table in tables], help="one table")
    parser.add_argument("--only", action="append", metavar="WORD", help="cases whose name contains it")
    parser.add_argument("--write", action="store_true", help=f"write the tables into docs/{PAGE.name}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows to this file")
    args = parser.parse_args(argv)
    if args.short and args.write:
        parser.error("--short measures nothing that belongs on a page")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    options = Options(args.short, 2 if args.short else args.turns)
    found: dict[str, list[dict[str, object]]] = {}
    for table, cases in tables.items():
        words = args.only or [""]
        chosen = [case for case in cases if any(word in case for word in words) and args.table in (None, table.name)]
        if not chosen:
            continue
        rows = []
        for case in chosen:
            rows.append(cases[case](options))
            print(f"# {rows[-1]}", file=sys.stderr, flush=True)
            if args.write and len(chosen) < len(cases):  # at once: a run that is cut short leaves what it measured
                write(table, rows[-1:], whole=False)
        found[table.name] = [asdict(row) | {"marks": marks(row, table.digits)} for row in rows]
        print(f"{markdown([cells(table, row) for row in rows])}\n", flush=True)
        if args.write and len(rows) == len(cases):
            write(table, rows)
    if not found:
        parser.error(f"no case matches {args.only}: {[case for cases in tables.values() for case in cases]}")
    print(facts())
    if args.json:
        args.json.write_text(json.dumps({"facts": facts(), "tables": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit("a module for the other benchmarks: python benchmarks/train_step.py --help")
