"""How many trained numbers a task needs: a search over the dimension of a random subspace, run by run.

Every finished run is written to a file at once, so that a search that was interrupted goes on where it was.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table

from lightning_pet.errors import ArgumentError
from lightning_pet.operations.plan import show_table
from lightning_pet.store.files import atomic_write

Measure = Callable[[int | None, int], float]
"""``(dimension, seed) -> metric``, larger is better; ``None`` is full fine-tuning, 0 the model as it is."""

_FORMAT = 1
_GROWTH = 4  # of the dimension, until it is large enough


@dataclass(frozen=True)
class Point:
    """All runs with one dimension.

    Attributes:
        d: trained numbers; ``None`` for full fine-tuning.
        metrics: one per seed.
    """

    d: int | None
    metrics: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the seeds; minus infinity if a run diverged."""
        mean = sum(self.metrics) / len(self.metrics)
        return mean if math.isfinite(mean) else -math.inf


@dataclass(frozen=True)
class Dimension:
    """What a search has found.

    Attributes:
        full: full fine-tuning.
        share: of its metric that had to be reached.
        points: every dimension that was tried, ascending.
        d: the smallest one from which the share is reached; ``None`` if it was not reached.
        below: the largest one that misses it, just below; ``None`` if the smallest one that was tried reaches it.
    """

    full: Point
    share: float
    points: tuple[Point, ...]
    d: int | None
    below: int | None

    @property
    def target(self) -> float:
        """The metric that had to be reached."""
        return self.share * self.full.mean


class Runs:
    """The finished runs of a search, in a JSON file.

    Args:
        path: the file; made if it is not there.
        settings: what all runs have in common; JSON types.

    Raises:
        ArgumentError: if the file is none of this kind, or belongs to a search with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = dict(settings)
        self._metrics: dict[str, float] = self._read() if path.exists() else {}

    def _read(self) -> dict[str, float]:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            found, settings = dict(stored["runs"]), dict(stored["settings"])
            if stored["format"] != _FORMAT or not all(isinstance(value, float) for value in found.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"{self._path} is not the record of a search. Give another path, or move it away."
            ) from error
        differing = [key for key in {**settings, **self._settings} if settings.get(key) != self._settings.get(key)]
        if differing:
            key = differing[0]
            raise ArgumentError(
                f"{self._path} is the record of a search with {key}={settings.get(key)!r}, not "
                f"{self._settings.get(key)!r}. Give another path, or the settings that it was started with."
            )
        return found

    def metric(self, d: int | None, seed: int, measure: Measure) -> float:
        """The metric of one run, measured if it is not known."""
        key = f"{'full' if d is None else d}/{seed}"
        if key not in self._metrics:
            self._metrics[key] = float(measure(d, seed))
            content = {"format": _FORMAT, "settings": self._settings, "runs": self._metrics}
            text = json.dumps(content, indent=2, sort_keys=True)
            atomic_write(self._path, lambda file: file.write(text.encode()))
        return self._metrics[key]


def search(
    measure: Measure,
    runs: Runs,
    *,
    seeds: Sequence[int],
    smallest: int,
    largest: int,
    share: float = 0.9,
    resolution: float = 1.25,
) -> Dimension:
    """Find the smallest dimension that reaches a share of full fine-tuning.

    What it finds is an upper bound: the optimizer, its rate and its steps are those of ``measure``, and others may do
    with fewer numbers.

    The dimension grows fourfold until it is large enough; then the last gap is halved (on a logarithmic scale)
    until its ends differ by no more than ``resolution``. The metric is taken to grow with the dimension.

    Args:
        measure: trains and evaluates.
        runs: what was measured before; every new run is added.
        seeds: one run each; their mean counts.
        smallest: first dimension to try.
        largest: last one.
        share: of the metric of full fine-tuning.
        resolution: factor between the two dimensions that enclose the answer.

    Raises:
        ArgumentError: if a number is out of range, or full fine-tuning gives no positive metric.
    """
    _check(seeds, smallest, largest, share, resolution)

    def point(d: int | None) -> Point:
        return Point(d, tuple(runs.metric(d, seed, measure) for seed in seeds))

    first = point(smallest)  # before the long run: an impossible dimension shows at once
    full = point(None)
    if full.mean <= 0:
        raise ArgumentError(
            f"full fine-tuning gives {full.mean:g}: a share of it needs a metric that is positive and better when "
            "larger, such as an accuracy. Choose another one, or train longer."
        )
    untrained = runs.metric(0, seeds[0], measure)
    if share * full.mean <= untrained:
        rank_zero_warn(
            f"full fine-tuning reaches {full.mean:.3f}, of which {share:.0%} is no more than the untrained model has "
            f"({untrained:.3f}): it has hardly learned, and any dimension will do. Train longer, or with another "
            "learning rate (--full)."
        )
    tried = {smallest: first}

    def reached(d: int) -> bool:
        tried.setdefault(d, point(d))
        return tried[d].mean >= share * full.mean

    below: int | None = None
    d: int | None = smallest
    while d is not None and not reached(d):
        below, d = d, min(_GROWTH * d, largest) if d < largest else None
    while d is not None and below is not None and d / below > resolution:
        middle = round(math.sqrt(d * below))
        if middle in (d, below):
            break
        below, d = (below, middle) if reached(middle) else (middle, d)
    return Dimension(full, share, tuple(tried[key] for key in sorted(tried)), d, below)


def _check(seeds: Sequence[int], smallest: int, largest: int, share: float, resolution: float) -> None:
    if not seeds or len(set(seeds)) != len(seeds):
        raise ArgumentError(f"seeds={list(seeds)}: give at least one, each once.")
    if not 1 <= smallest <= largest:
        raise ArgumentError(f"smallest={smallest}, largest={largest}: need 1 <= smallest <= largest.")
    if not 0 < share <= 1:
        raise ArgumentError(f"share={share}: of full fine-tuning's metric, in (0, 1], e.g. 0.9.")
    if not resolution > 1:
        raise ArgumentError(f"resolution={resolution}: a factor above 1, e.g. 1.25.")


# --- what it has found, as a table and a plot -----------------------------------------------------


def show_dimension(found: Dimension, metric: str, console: Console | None = None) -> None:
    """Print every dimension that was tried, and the answer under them."""
    console = console or Console()
    table = Table()
    for head in ("d", "mean", "least", "most", "of full"):
        table.add_column(head, justify="right")
    for point in (*found.points, found.full):
        table.add_row(*_row(point, found), style="bold" if point.d == found.d else "")
    show_table(f"{metric} in random subspaces", table, console)
    console.print(sentence(found), soft_wrap=True)


def _row(point: Point, found: Dimension) -> list[str]:
    label = "full" if point.d is None else f"{point.d:,}"
    numbers = (point.mean, min(point.metrics), max(point.metrics))
    return [label, *(f"{number:.3f}" for number in numbers), f"{point.mean / found.full.mean:.1%}"]


def sentence(found: Dimension) -> str:
    """The answer in words."""
    goal = f"{found.share:.0%} of full fine-tuning ({found.target:.3f})"
    if found.d is None:
        last = found.points[-1]
        return f"{goal} is not reached with d={last.d:,} ({last.mean:.3f}); search further with a larger --largest."
    if found.below is None:
        return f"{goal} is reached with d={found.d:,} already, the smallest that was tried: an upper bound."
    return (
        f"{goal} is reached with d={found.d:,}, and not with d={found.below:,}: an upper bound for this optimizer and "
        f"number of steps. To check it, train d={found.below:,} longer or at another rate (--smallest={found.below})."
    )


def plot_dimension(found: Dimension | dict[str, Dimension], metric: str, path: Path) -> None:
    """Draw the metric over the dimension, with the range of the seeds.

    Args:
        found: one search, or several by their labels.
        metric: name for the axis.
        path: picture to write; its ending tells the format.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ArgumentError("plotting needs matplotlib: pip install matplotlib.")
    from matplotlib.figure import Figure

    curves = {"": found} if isinstance(found, Dimension) else found
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        d = [float(point.d or 0) for point in curve.points]
        mean = [point.mean for point in curve.points]
        (line,) = axes.plot(d, mean, marker="o", label=label or "subspace")
        low, high = [min(p.metrics) for p in curve.points], [max(p.metrics) for p in curve.points]
        axes.fill_between(d, low, high, color=line.get_color(), alpha=0.2)
        axes.axhline(curve.target, color=line.get_color(), linestyle=":", linewidth=1)
        if curve.d is not None:
            axes.axvline(curve.d, color=line.get_color(), linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="trained numbers d", ylabel=metric)
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
