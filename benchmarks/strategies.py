"""Every method under every engine, on two processes: what trains, resumes and travels; the documentation's table.

    python benchmarks/strategies.py --write                                 # all: docs/strategies.{json,md}
    python benchmarks/strategies.py --write --engines fsdp2 --methods LoRA  # these cells anew

A cell holds what :data:`FEATURES` names. The runs are those of ``tests/engine/method_runs.py``: four steps of a small
BERT, the same data in one process and in two.
"""

import argparse
import json
import math
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine")]

import torch  # noqa: E402
from launch import launch  # noqa: E402
from method_runs import AFTER, METHODS, RESUMED, STEPS, Runs, build, observe, outputs, silence, step  # noqa: E402
from torch import Tensor  # noqa: E402

from lightning_pet import load_delta  # noqa: E402

ENGINES = {
    "one": "one process",
    "ddp": "DDP",
    "fsdp": "FSDP1",
    "fsdp2": "FSDP2",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
FEATURES = {
    "trains": "the losses of four steps are those of one process within a relative 10⁻⁵, and so are the values that "
    "trained, within 10⁻⁴ of the largest of each tensor or of 10⁻³ (SGD with momentum, float32, no dropout)",
    "resumes": "a run with dropout and AdamW that is resumed in the middle, with another seed, gives the losses, "
    "values and optimizer states of the uninterrupted run, bit for bit",
    "loads": "`load_delta` puts the checkpoint into a fresh model in plain torch, and its outputs are those of the "
    "model that one process trained",
    "travels": "one process goes on with its checkpoint, and it with that of one process; the losses agree as above",
    "refuses": "the checkpoint of another method is refused in every process",
}
RESULTS = ROOT / "docs" / "strategies.json"
PAGE = ROOT / "docs" / "strategies.md"
BEGIN, END = "<!-- begin of what benchmarks/strategies.py writes -->", "<!-- end of what it writes -->"
Cell = dict[str, Any]


# --- running -------------------------------------------------------------------------------------


def campaign(folder: Path, engines: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Cell]]:
    """Run methods on engines; by method and engine, what was found."""
    ranks = {"one": {name: [observe(folder, "one", name)] for name in methods}}
    ranks |= {engine: in_two_processes(folder, engine, methods) for engine in engines if engine != "one"}
    return {
        name: {engine: cell(folder, engine, name, ranks["one"][name][0], ranks[engine][name]) for engine in ranks}
        for name in methods
    }


def in_two_processes(folder: Path, engine: str, methods: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What both processes of an engine saw, by method."""
    script = str(ROOT / "tests" / "engine" / "method_runs.py")
    codes, printed = launch([script, str(folder), engine, *methods], n=2, timeout=60 + 60 * len(methods))
    if any(codes):
        raise RuntimeError(f"{engine} ended with {codes}\n" + "\n".join(text[-3000:] for text in printed))
    lines = [[json.loads(line[6:]) for line in text.splitlines() if line.startswith("FOUND ")] for text in printed]
    return {first["method"]: [first, second] for first, second in zip(*lines, strict=True)}


def cell(folder: Path, engine: str, method: str, one: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> Cell:
    """Judge one method on one engine."""
    if any("unsupported" in rank for rank in ranks):
        return {"refused": _of_lightning(ranks[0].get("unsupported", "in some processes only"))}
    if errors := [f"{key}: {text}" for rank in ranks for key, text in rank.get("errors", {}).items()]:
        return {"failed": errors[0]}
    runs, here, there = Runs(folder, "one", method), folder / engine / method, folder / "one" / method
    second_half = one["plain"][RESUMED:]
    loss = max(apart(rank["plain"], one["plain"]) for rank in ranks)
    delta = max(
        values_apart(path, step(there / "plain", STEPS))
        for path in (step(here / "plain", STEPS), here / "plain" / AFTER)
    )
    journeys = [rank["taken_over"] for rank in ranks]
    journeys.append(runs.fit("returned", path=step(here / "plain", RESUMED), seed=98).losses)
    return {
        "loss": rounded(loss),
        "delta": rounded(delta),
        "trains": loss <= 1e-5 and delta <= 1e-4,
        "resumes": all(rank["again"] == rank["noisy"][RESUMED:] for rank in ranks)
        and identical(step(here / "noisy", STEPS), step(here / "again", STEPS)),
        "loads": same_outputs(here / "plain" / AFTER, there / "outputs.pt"),
        "travels": all(apart(losses, second_half) <= 1e-5 for losses in journeys),
        "refuses": all(rank["refused"] == "mismatch" for rank in ranks),
    }


def _of_lightning(text: str) -> str:
    """The strategies of these runs are those of Lightning without their checks for CUDA."""
    return re.sub(r"\bCPU(FSDP|DeepSpeed)\b", r"\1Strategy", text)


def apart(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two courses."""
    if len(losses) != len(expected):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def values_apart(path: Path, expected: Path) -> float:
    """Largest difference of two deltas, relative to the largest value of each tensor, or to 10⁻³ where all are smaller.

    A bias before a softmax gets no gradient but rounding, and has no values to be compared with.
    """
    mine, theirs = (torch.load(p, weights_only=True)["state_dict"] for p in (path, expected))
    if mine.keys() != theirs.keys():
        return math.inf
    pairs = [(mine[name].double(), value.double()) for name, value in theirs.items() if value.numel()]
    if any(a.shape != b.shape for a, b in pairs):
        return math.inf
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in pairs)


def identical(path: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same values and optimizer states, bit for bit."""
    first, second = (torch.load(p, weights_only=True) for p in (path, other))
    return all(same(first[key], second[key]) for key in ("state_dict", "optimizer_states"))


def same(a: Any, b: Any) -> bool:
    """Bit for bit, through all levels."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def same_outputs(path: Path, expected: Path) -> bool:
    """Whether a fresh model with this delta gives the outputs of the model of one process."""
    net = build()
    load_delta(net, path)
    return torch.allclose(outputs(net), torch.load(expected, weights_only=True), rtol=1e-4, atol=1e-5)


def rounded(number: float) -> float:
    """One digit, so that a repetition changes few lines of the record."""
    return float(f"{number:.0e}")


# --- the record and the table --------------------------------------------------------------------


def record(found: Mapping[str, Mapping[str, Cell]], old: Mapping[str, Any]) -> dict[str, Any]:
    """Put new cells into the record of earlier ones."""
    cells = {name: {**old.get("methods", {}).get(name, {}), **found.get(name, {})} for name in METHODS}
    packages = ("torch", "lightning", "transformers", "deepspeed")
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "processes": 2,
        "methods": {name: {engine: row[engine] for engine in ENGINES if engine in row} for name, row in cells.items()},
    }


def holds(cell: Cell) -> bool:
    """Whether all features hold."""
    return all(cell.get(feature) for feature in FEATURES)


def table(results: Mapping[str, Any]) -> str:
    """The part of the page that is written from the record."""
    notes: list[str] = []
    lines = [
        f"Two CPU processes (gloo), Python {results['python']}, torch {results['torch']}, Lightning "
        f"{results['lightning']}, transformers {results['transformers']}, DeepSpeed {results['deepspeed']}; "
        f"{results['date']}.",
        "",
        "| method | " + " | ".join(ENGINES.values()) + " |",
        "|---|" + ":-:|" * len(ENGINES),
    ]
    for name, row in results["methods"].items():
        lines.append(f"| {name} | " + " | ".join(mark(row.get(engine), notes) for engine in ENGINES) + " |")
    lines += ["", "✓: everything holds, which is", "", *(f"* *{name}*: {text};" for name, text in FEATURES.items())]
    lines[-1] = lines[-1][:-1] + "."
    if notes:
        lines += ["", "–: refused by name. ✗: does not hold. The reasons by number:", ""]
        lines += [f"{number}. {text}" for number, text in enumerate(notes, 1)]
    worst = {key: max(c[key] for row in results["methods"].values() for c in row.values() if key in c) for key in MOST}
    lines += ["", "Largest differences from one process: " + ", ".join(MOST[k].format(worst[k]) for k in MOST) + "."]
    return "\n".join(lines)


MOST = {"loss": "a loss by {:.0e} of its value", "delta": "what trained by {:.0e} of the largest of its tensor"}


def mark(cell: Cell | None, notes: list[str]) -> str:
    """The sign of a cell, with the number of its note."""
    if cell is None:
        return ""
    if holds(cell):
        return "✓"
    if "refused" in cell:
        sign, note = "–", re.sub(r"\b(DDP|FSDP|ModelParallel|DeepSpeed)Strategy\b", "…Strategy", cell["refused"])
    else:
        sign, note = "✗", cell.get("failed") or "not: " + ", ".join(f for f in FEATURES if not cell[f])
    note = " ".join(re.sub(r"[`*]", "", note).split())
    if note not in notes:
        notes.append(note)
    return f"{sign} {notes.index(note) + 1}"


def written(page: str, results: Mapping[str, Any]) -> str:
    """The page with the table of this record."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--write", action="store_true", help="write the record and the table of the page")
    parser.add_argument("--table-only", action="store_true", help="write the table from the record; run nothing")
    options = parser.parse_args()
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results = old
    if not options.table_only:
        silence()
        with tempfile.TemporaryDirectory() as folder:
            results = record(campaign(Path(folder), options.engines, options.methods), old)
    print(table(results))
    if options.write or options.table_only:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
