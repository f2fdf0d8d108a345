"""The benchmarks run, and what they write on the page of figures is whole, repeatable and marked."""

import importlib
import logging
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from page import Row, Table, facts, run, written  # noqa: E402

TABLE = Table("steps", "step / floor", command="python benchmarks/steps.py --write")
PAGE = "before\n<!-- begin steps -->\n<!-- end steps -->\nafter\n"


# One case of every kind; the figures of tiny models say nothing.
SHORT = {
    "train_step": ["BERT 2×128, 8×16: LoRA", "Llama 6×512, checkpointing: LoRA, all linear", "width 64: AdaLoRA"],
    "method_step": ["prompt 20"],
    "many_deltas": ["q and v, 4 tasks in 4 rows: step", "Houlsby"],
    "growth": ["plan", "attach by role", "last_good"],
}


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.delenv("ADAPTERS_PYTHON", raising=False)
    monkeypatch.setattr(logging, "disable", lambda level: None)


def lines(page: str) -> list[list[str]]:
    return [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("|")]


def test_a_peer_ahead_and_a_bound_not_kept_are_marked() -> None:
    rows = [
        Row("ahead", 1.204, {"PEFT": 1.3}),
        Row("behind", 1.31, {"PEFT": 1.4, "adapters": 1.3}, bound=1.3),
        Row("equal in print", 1.304, {"PEFT": 1.296}, bound=1.3),
    ]
    table = lines(written(PAGE, TABLE, rows))
    assert table[0] == ["step / floor", "lightning_pet", "PEFT", "adapters", "bound", ""]
    assert table[2] == ["ahead", "**1.20**", "1.30", "", "", ""]
    assert table[3][-2:] == ["1.30", "peer ahead, above the bound"]
    assert table[4][-1] == ""


def test_the_place_is_replaced_and_says_how_to_get_it_again() -> None:
    page = written(PAGE, TABLE, [Row("a", 1.0, context={"floor, ms": 2.0, "note": "x"})])
    assert page.startswith("before\n<!-- begin steps -->\n| step / floor | floor, ms | note | lightning_pet |  |\n")
    assert page.endswith("<!-- end steps -->\nafter\n")
    assert f"\n{facts()}. Again: `{TABLE.command}`\n" in page
    assert written(page, TABLE, [Row("a", 1.0, context={"floor, ms": 2.0, "note": "x"})]) == page


def test_single_cases_take_their_row_and_leave_the_others() -> None:
    page = written(PAGE, TABLE, [Row("a", 1.0, context={"floor": 1.0}), Row("b", 3.0, {"PEFT": 2.0})])
    again = written(page, TABLE, [Row("b", 1.5, {"adapters": 2.0}, bound=4), Row("c", 2.0)], whole=False)
    assert lines(again)[0] == ["step / floor", "floor", "lightning_pet", "adapters", "bound", ""]
    assert [line[0] for line in lines(again)[2:]] == ["a", "b", "c"]
    assert lines(again)[3] == ["b", "", "**1.50**", "2.00", "4.00", ""]


def test_figures_of_two_machines_do_not_stand_in_one_table() -> None:
    page = written(PAGE, TABLE, [Row("a", 1.0), Row("b", 3.0)])
    with patch("page.facts", return_value="torch 1.0"), pytest.raises(SystemExit, match="measured with other versions"):
        written(page, TABLE, [Row("b", 1.0)], whole=False)
    with patch("page.facts", return_value="torch 1.0"):
        assert len(lines(written(page, TABLE, [Row("a", 1.0), Row("b", 3.0)]))) == 4


def test_a_page_without_the_place_is_refused() -> None:
    with pytest.raises(SystemExit, match="needs the lines <!-- begin steps -->"):
        written("nothing", TABLE, [])


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"one": lambda options: Row("one", float(options.turns)), "two": lambda options: Row("two", 1.0)}
    run("words", {TABLE: cases}, ["--short", "--only", "one", "--json", str(tmp_path / "rows.json")])
    assert lines(capsys.readouterr().out)[2:] == [["one", "**2.00**", ""]]
    assert '"marks": []' in (tmp_path / "rows.json").read_text()
    for wrong, word in ((["--short", "--write"], "--short measures"), (["--only", "three"], "no case matches")):
        with pytest.raises(SystemExit):
            run("words", {TABLE: cases}, wrong)
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("name", SHORT)
def test_the_short_mode_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables = importlib.import_module(name).TABLES
    run("words", tables, ["--short", *(word for case in SHORT[name] for word in ("--only", case))])
    assert len(lines(capsys.readouterr().out)) >= 3 + len(SHORT[name])


MEMORY = """
import peak_memory as memory
peak, whole = memory.step_peak(memory.MODEL, "LoRA", "lightning_pet", "short")
assert 0 <= peak <= whole + 50
assert memory.in_a_copy(memory.merge_peak, memory.MODEL, "LoRA", "PEFT", "short") >= 0
"""


def test_the_short_mode_of_memory_runs() -> None:
    """In a process of its own, as it is meant: it copies itself, and autograd's threads cannot be copied."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr


def test_the_tables_of_a_gpu_run_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = importlib.import_module("gpu")
    gpu.main(["--short", "--device", "cpu", "--steps", "2", "--only", "generation"])
    found = capsys.readouterr().out
    assert "left out" not in found
    assert "failed" not in found
    assert len(lines(found)) == 2 * (2 + 2)


@pytest.mark.parametrize("name", [*SHORT, "peak_memory"])
def test_every_table_has_its_place_on_the_page(name: str) -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for table in importlib.import_module(name).TABLES:
        assert f"<!-- begin {table.name} -->" in page
        assert f"<!-- end {table.name} -->" in page
