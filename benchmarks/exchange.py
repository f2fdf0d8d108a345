"""How exact the exchange with HF PEFT and the adapters library is: every method and option, layer and architecture.

A folder that PEFT writes with random values is loaded here, and one that is written here by PEFT (and, of layers, by
transformers' ``load_adapter``); each cell is the largest difference of outputs. Where one of them refuses, the cell
says who, and a note below the table what was said. No case is left out.

    python benchmarks/exchange.py --write        # the tables of docs/exchange.md, about two minutes of one core
    python benchmarks/exchange.py --short        # some cells of each method
    python benchmarks/exchange.py --only DoRA --only "(IA)³"
"""

import argparse
import logging
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from page import facts, replaced  # noqa: E402

from tests.exchange.adapters_matrix import adapters_rows  # noqa: E402
from tests.exchange.matrix import NOTHING, Outcome, read, written  # noqa: E402
from tests.exchange.matrix_cases import CASES, Case  # noqa: E402
from tests.exchange.places import Place, in_architectures, of_kinds  # noqa: E402
from tests.exchange.toy_matrix import check, reason  # noqa: E402
from tests.exchange.toy_rows import ELSEWHERE, ROWS  # noqa: E402

PAGE = ROOT / "docs" / "exchange.md"
COMMAND = "python benchmarks/exchange.py --write"
NONE = "–"
Cell = tuple[Outcome, ...]


class Notes:
    """What was said where something is refused, by number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def cell(self, cell: Cell) -> str:
        """What stands in a table."""
        return " / ".join(self._one(outcome) for outcome in cell)

    def _one(self, outcome: Outcome) -> str:
        if outcome == NOTHING:
            return NONE
        if outcome.difference is not None:
            return figure(outcome.difference)
        number = self.numbers.setdefault(f"{outcome.by}: {shortened(outcome.said)}", len(self.numbers) + 1)
        return f"{outcome.by} ({number})"

    def text(self) -> str:
        """All of them, below a table."""
        return "\n".join(f"{number}. {said}" for said, number in self.numbers.items())


def figure(difference: float) -> str:
    """A difference, short."""
    return "0" if difference == 0 else f"{difference:.0e}".replace("e-0", "e-")


def shortened(said: str) -> str:
    """What was said, without the names that differ from model to model."""
    said = re.sub(r"/tmp/\S+?:? |^default: |^this \w+: ", "", " ".join(said.split()))
    said = re.sub(r"\bthis (?=\w+For|\w+LMHead|Plain\b)", "", said)
    said = re.sub(r"Target module .*? is not supported", "Target module … is not supported", said)
    said = re.sub(r"(hits )'[^']+' \(\w+\)", r"\1…", re.sub(r"target pattern '[^']+'", "target pattern …", said))
    said = re.sub(r"^[\w.]*[._][\w.]*(?=[: ])", "…", said, count=1)
    said = re.sub(r"\b\w+For\w+|\b\w+LMHeadModel|\bPlain\b", "the model", said)
    first: str = re.split(r"(?<=[.;]) ", said)[0]
    return textwrap.shorten(first, 150, placeholder=" …").replace("|", "\\|")


def measured(case: Case, place: Place) -> Cell:
    """Read, written, and of layers in transformers what was written."""
    cell = (read(case, place), *written(case, place))
    return cell if case.layers and place.architecture != "plain torch" else cell[:2]


def wrong(case: Case, cell: Cell) -> bool:
    """Whether a difference is larger than numbers of its type explain."""
    return any(outcome.difference is not None and outcome.difference > case.bound for outcome in cell)


def table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_architecture(cases: Sequence[Case], notes: Notes, bad: list[str]) -> str:
    """On the layers that its deltas usually sit on."""
    places = in_architectures()
    rows: dict[str, list[str]] = {}
    for case in cases:
        cells = [measured(case, place) for place in places]
        bad += [f"{case.name} on {p.architecture}" for p, c in zip(places, cells, strict=True) if wrong(case, c)]
        rows[case.name] = [notes.cell(cell) for cell in cells]
    return table(["method", *(place.architecture for place in places)], rows)


def by_kind(cases: Sequence[Case], notes: Notes, bad: list[str]) -> str:
    """On layers of other kinds; of several architectures that have one, the largest difference."""
    kinds = of_kinds()
    rows: dict[str, list[str]] = {}
    for case in cases:
        if not case.layers:
            continue
        rows[case.name] = []
        for kind, places in kinds.items():
            cells = {place.architecture: measured(case, place)[:2] for place in places}
            bad += [f"{case.name}, {kind} of {name}" for name, cell in cells.items() if wrong(case, cell)]
            rows[case.name].append(together(cells, notes))
    columns = [f"{kind} ({', '.join(place.architecture for place in places)})" for kind, places in kinds.items()]
    return table(["method", *columns], rows)


def together(cells: Mapping[str, Cell], notes: Notes) -> str:
    """Of several places the largest differences, but apart from each other where one of them is refused."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, cell in cells.items():
        alike.setdefault(tuple(outcome.by for outcome in cell), []).append(name)
    texts = []
    for names in alike.values():
        columns = zip(*(cells[name] for name in names), strict=True)
        cell = tuple(max(column, key=lambda outcome: outcome.difference or 0.0) for column in columns)
        texts.append(f"{', '.join(names)}: {notes.cell(cell)}" if len(alike) > 1 else notes.cell(cell))
    return "; ".join(texts)


def by_toys(bad: list[str]) -> str:
    """How many rows of PEFT's matrix of toy models pass."""
    passed: dict[str, int] = {}
    failed: dict[tuple[str, str], int] = {}
    for row in ROWS:
        if why := reason(row):
            failed[row.method, why] = failed.get((row.method, why), 0) + 1
            continue
        try:
            check(row)
            passed[row.method] = passed.get(row.method, 0) + 1
        except Exception as error:
            bad.append(f"{row.name}: {error}")
    rows = {method: [str(count), str(count), ""] for method, count in passed.items()}
    for (method, why), count in failed.items():
        whole, own, told = rows.get(method, ["0", "0", ""])
        rows[method] = [str(int(whole) + count), own, "; ".join(filter(None, [told, f"{count}: {why}"]))]
    rows |= {method: [str(count), "0", why] for method, (count, why) in ELSEWHERE.items()}
    total = [sum(int(cells[column]) for cells in rows.values()) for column in (0, 1)]
    return table(["type", "rows", "pass", "the others"], rows | {"all": [str(total[0]), f"**{total[1]}**", ""]})


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Measure, print, and if asked write; what is wrong is returned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="WORD", help="methods whose name contains it")
    parser.add_argument("--write", action="store_true", help=f"write the tables into docs/{PAGE.name}")
    parser.add_argument("--short", action="store_true", help="on architectures only: does the script still run?")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    cases = [case for case in CASES if any(word in case.name for word in args.only or [""])]
    if not cases:
        parser.error(f"no method matches {args.only}: {[case.name for case in CASES]}")
    if args.write and (args.only or args.short):
        parser.error("the page holds all of it: --write goes alone")
    bad: list[str] = []
    texts = {}
    for name, part in (("exchange_architectures", by_architecture), ("exchange_kinds", by_kind)):
        if args.short and part is by_kind:
            continue
        notes = Notes()
        texts[name] = f"{part(cases, notes, bad)}\n\n{notes.text()}"
    if not args.only:
        texts["exchange_adapters"] = table(*adapters_rows(bad))
        texts["exchange_toys"] = by_toys(bad)
    page = PAGE.read_text(encoding="utf-8")
    for name, text in texts.items():
        print(f"{text}\n")
        page = replaced(page, name, f"{text}\n\n{facts()}. Again: `{COMMAND}`", PAGE.name) if args.write else page
    if args.write:
        PAGE.write_text(page, encoding="utf-8")
    return bad


if __name__ == "__main__":
    if found := main():
        sys.exit(f"not equal: {', '.join(found)}")
