"""Every method under every engine: the record, the page that is written from it, and some of its cells anew."""

import json
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_operator import require_deepspeed

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import strategies  # noqa: E402
from strategies import ENGINES, FEATURES, METHODS  # noqa: E402

from lightning_pet.insertion.method import METHODS as CLASSES  # noqa: E402

RECORD = json.loads(strategies.RESULTS.read_text(encoding="utf-8"))
SHARDING = [engine for engine in ENGINES if engine not in ("one", "ddp")]
SHORT = {
    "fsdp": ["Compacter", "Diff pruning", "AutoPrompt"],  # state that is shared, places in the base, a refusal
    "zero3": ["Adapter", "Prefix tuning"],  # a unit of its own, a place without weight
}


def test_the_page_shows_the_record():
    page = strategies.PAGE.read_text(encoding="utf-8")
    assert strategies.written(page, RECORD) == page, "run: python benchmarks/strategies.py --table-only"


def test_the_record_is_complete(tmp_path):
    """Every class, every engine; what is not refused holds in all."""
    assert list(RECORD["methods"]) == list(METHODS)
    shipped = {cls for cls in CLASSES.values() if cls.__module__.startswith("lightning_pet.")}  # tests have some, too
    assert {type(method) for build in METHODS.values() for method in build(tmp_path)} == shipped
    for name, row in RECORD["methods"].items():
        assert list(row) == list(ENGINES), name
        assert strategies.holds(row["one"]), name
        for engine, cell in row.items():
            assert strategies.holds(cell) or len(cell["refused"].split()) > 8, (name, engine, cell)


def test_the_classes_say_what_was_found(tmp_path):
    said = {name: all(method.shards for method in build(tmp_path)) for name, build in METHODS.items()}
    for name, row in RECORD["methods"].items():
        assert any(strategies.holds(row[engine]) for engine in SHARDING) == said[name], name  # ZeRO refuses options


def test_a_cell_that_does_not_hold_shows(tmp_path):
    """The table has no sign for what was not found."""
    good = dict.fromkeys(FEATURES, True)
    cells = [good, good | {"resumes": False}, {"refused": "why: `x`"}, {"failed": "plain: error"}, None]
    notes = []
    assert [strategies.mark(cell, "ddp", notes) for cell in cells] == ["✓", "✗ 1", "– 2", "✗ 3", ""]
    assert notes == ["not: resumes", "why: x", "plain: error"]


def test_the_judge_sees_differences():
    assert strategies.apart([1.0, 2.0], [1.0, 2.1]) == pytest.approx(0.1 / 2.1)
    assert strategies.apart([1.0], [1.0, 2.0]) == float("inf")
    state = {"step": 1, "values": [torch.ones(2)]}
    assert strategies.same(state, {"step": 1, "values": [torch.ones(2)]})
    assert not strategies.same(state, {"step": 1, "values": [torch.tensor([1, 1 + 2**-23])]})
    assert not strategies.same(state, {"step": 2, "values": [torch.ones(2)]})


def run_again(engine, methods, folder):
    if engine.startswith("zero"):
        require_deepspeed()
    found = strategies.campaign(folder, [engine], methods)
    for name, row in found.items():
        for where, cell in row.items():
            assert marks(cell) == marks(RECORD["methods"][name][where]), (name, where)


def marks(cell):
    """Without the figures, which differ from run to run."""
    return {key: value for key, value in cell.items() if key not in strategies.MOST}


@pytest.mark.parametrize("engine", SHORT)
def test_some_cells(engine, tmp_path):
    run_again(engine, SHORT[engine], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "one"])
def test_all_cells(engine, tmp_path):
    run_again(engine, list(METHODS), tmp_path)
