"""The examples run as they are, offline, and reach what they claim."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Standard output of every example; they run at the same time, each in its own empty folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "PYTHONWARNINGS": "ignore"}
    running = {
        path.stem: subprocess.Popen(
            [sys.executable, str(path)],
            cwd=tmp_path_factory.mktemp(path.stem),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in EXAMPLES
    }
    try:
        ended = {name: process.communicate(timeout=300) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    for name, (_, error) in ended.items():
        assert running[name].returncode == 0, f"{name}: {error[-3000:]}"
    return {name: out for name, (out, _) in ended.items()}


def numbers(text: str, label: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.startswith(label))
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_there_are_four() -> None:
    assert [path.stem for path in EXAMPLES] == ["huggingface", "many_users", "plain_torch", "vision"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_tells_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert f"python examples/{path.name}" in text
    assert "def main() -> None:" in text


def test_plain_torch(outputs: dict[str, str]) -> None:
    out = outputs["plain_torch"]
    base, adapted = numbers(out, "base:"), numbers(out, "with LoRA:")
    assert base[0] > 0.9
    assert base[1] < 0.4
    assert adapted[1] > 0.9
    assert numbers(out, "loaded:") == adapted
    assert numbers(out, "disabled:") == base
    assert "removed:" in out


def test_vision(outputs: dict[str, str]) -> None:
    out = outputs["vision"]
    assert numbers(out, "base:")[1] < 0.5
    assert numbers(out, "with LoRA:")[1] > 0.85
    assert numbers(out, "merged:") == numbers(out, "with LoRA:")


def test_huggingface(outputs: dict[str, str]) -> None:
    out = outputs["huggingface"]
    pretrained = numbers(out, "checkpoint:")[1] > 50
    if pretrained:  # with the tiny random model it can only guess
        assert numbers(out, "unseen words")[0] > 0.8
        assert numbers(out, "checkpoint:")[0] < 5
    assert float(re.search(r"differ by at most (\S+)", out)[1]) < 1e-4


def test_many_users(outputs: dict[str, str]) -> None:
    out = outputs["many_users"]
    assert re.search(r"500 users' files, 128 in memory: \d+ were read, \d+ were there", out)
    assert numbers(out, "answers:")[0] > 0.6  # the words of another user are right in an eighth of all cases
    assert numbers(out, "32 users in a batch:")[0] > 1
    assert numbers(out, "one user for all:")[0] > 1
