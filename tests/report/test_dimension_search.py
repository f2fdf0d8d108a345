"""The search for the intrinsic dimension: what it finds, what it runs, and that it goes on where it was."""

import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lightning_pet.errors import ArgumentError
from lightning_pet.report.dimension import Dimension, Runs, plot_dimension, search, sentence, show_dimension


class Task:
    """Reaches 0.9 of what full fine-tuning does with exactly ``needed`` numbers."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        self.ran: list[tuple[int | None, int]] = []

    def __call__(self, d: int | None, seed: int) -> float:
        self.ran.append((d, seed))
        if d == 0:
            return 0.1
        return 0.8 if d is None else 0.8 * min(1.0, 0.9 * (d / self.needed) ** 0.2)


def found(task: Callable[[int | None, int], float], path: Path, **options: object) -> Dimension:
    defaults = {"seeds": [0], "smallest": 10, "largest": 10_000}
    return search(task, Runs(path, {"task": "a"}), **{**defaults, **options})


@pytest.mark.parametrize("needed", [11, 300, 999, 9_999])
def test_the_answer_is_enclosed(needed: int, tmp_path: Path) -> None:
    result = found(Task(needed), tmp_path / "runs.json", resolution=1.1)
    assert result.below < needed <= result.d <= 1.1 * result.below
    assert result.target == pytest.approx(0.72)
    assert [point.d for point in result.points] == sorted(point.d for point in result.points)


def test_every_run_is_made_once(tmp_path: Path) -> None:
    task = Task(300)
    found(task, tmp_path / "runs.json", seeds=[0, 1, 2])
    assert len(task.ran) == len(set(task.ran))
    assert {seed for _, seed in task.ran} == {0, 1, 2}
    again = Task(300)
    found(again, tmp_path / "runs.json", seeds=[0, 1, 2])
    assert again.ran == []


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    class Interrupted(Task):
        def __call__(self, d: int | None, seed: int) -> float:
            if len(self.ran) == 4:
                raise KeyboardInterrupt
            return super().__call__(d, seed)

    first, second, whole = Interrupted(300), Task(300), Task(300)
    with pytest.raises(KeyboardInterrupt):
        found(first, tmp_path / "runs.json")
    result = found(second, tmp_path / "runs.json")
    assert result == found(whole, tmp_path / "other.json")
    assert first.ran + second.ran == whole.ran


def test_the_ends_of_the_range(tmp_path: Path) -> None:
    small = found(Task(5), tmp_path / "a.json")
    assert (small.d, small.below) == (10, None)
    assert "the smallest that was tried" in sentence(small)
    large = found(Task(10**6), tmp_path / "b.json")
    assert (large.d, large.below) == (None, 10_000)
    assert "not reached with d=10,000" in sentence(large)


def test_the_mean_of_the_seeds_counts_and_a_diverged_run_never_does(tmp_path: Path) -> None:
    def task(d: int | None, seed: int) -> float:
        if d is None:
            return 1.0
        if d == 0:
            return 0.1
        return math.nan if d == 10 and seed else 0.86 + 0.1 * seed

    result = found(task, tmp_path / "runs.json", seeds=[0, 1], resolution=1.1)
    assert result.points[0].mean == -math.inf
    assert result.below == 10
    assert result.d == 11


def test_the_record_belongs_to_one_search(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    found(Task(300), path)
    with pytest.raises(ArgumentError, match="task='a', not 'b'"):
        Runs(path, {"task": "b"})
    for text in ("{", "[]", json.dumps({"format": 2, "settings": {}, "runs": {}}), '{"runs": {"1/0": "x"}}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ArgumentError, match="not the record of a search"):
            Runs(path, {"task": "a"})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"smallest": 0}, "smallest=0"),
        ({"largest": 5}, "largest=5"),
        ({"share": 1.5}, r"share=1\.5"),
        ({"resolution": 1.0}, r"resolution=1\.0"),
    ],
)
def test_bad_input(options: dict[str, object], text: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=text):
        found(Task(300), tmp_path / "runs.json", **options)


def test_a_metric_that_is_no_accuracy(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="positive and better when"):
        found(lambda d, seed: -1.0, tmp_path / "runs.json")


def test_full_fine_tuning_at_chance_is_named(tmp_path: Path) -> None:
    metrics = {0: 0.17, None: 0.18}
    with pytest.warns(UserWarning, match=r"reaches 0\.180.*untrained model has \(0\.170\).*Train longer"):
        found(lambda d, seed: metrics.get(d, 0.175), tmp_path / "runs.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = found(Task(300), tmp_path / "other.json")
    assert "an upper bound for this optimizer" in sentence(result)
    assert f"--smallest={result.below}" in sentence(result)


def test_table_and_plot(tmp_path: Path) -> None:
    result = found(Task(300), tmp_path / "runs.json", seeds=[0, 1])
    out = io.StringIO()
    show_dimension(result, "val/accuracy", Console(file=out, width=100))
    text = out.getvalue()
    assert "val/accuracy in random subspaces" in text
    assert f"is reached with d={result.d:,}, and not with d={result.below:,}" in text
    assert all(f"{point.d:,}" in text for point in result.points)
    pytest.importorskip("matplotlib")
    plot_dimension({"one": result, "two": result}, "val/accuracy", tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")
