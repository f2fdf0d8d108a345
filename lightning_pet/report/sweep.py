"""What a sweep has found: runs with their options and the best value of each, as a table, a picture and a record."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lightning_pet.errors import ArgumentError
from lightning_pet.operations.plan import show_table
from lightning_pet.store.files import atomic_write

FORMAT = 1
_SEED = "seed"


@dataclass(frozen=True)
class SweptRun:
    """One run.

    Attributes:
        name: of its delta.
        options: what it has of its own.
        value: the best value of the metric; ``None`` if there is none, or it is no finite number.
        file: name of its delta file in the folder of the sweep; ``None`` if none was written.
    """

    name: str
    options: Mapping[str, Any]
    value: float | None
    file: str | None

    @property
    def label(self) -> str:
        """Its options in words."""
        return ",".join(f"{option}={value}" for option, value in self.options.items())


@dataclass(frozen=True)
class Swept:
    """All runs of a sweep.

    Attributes:
        metric: what they are compared by.
        mode: whether ``"max"`` or ``"min"`` is better.
        runs: in the order in which they were asked for.
    """

    metric: str
    mode: Literal["min", "max"]
    runs: tuple[SweptRun, ...]

    @property
    def ranked(self) -> list[SweptRun]:
        """The runs, best first; those without a value last."""
        return sorted(self.runs, key=lambda run: self._order(run.value))

    @property
    def best(self) -> SweptRun | None:
        """The best run; ``None`` if none has a value."""
        ranked = self.ranked
        return ranked[0] if ranked and ranked[0].value is not None else None

    def _order(self, value: float | None) -> float:
        return math.inf if value is None else -value if self.mode == "max" else value

    def means(self) -> list[tuple[dict[str, Any], list[float]]]:
        """Options without the seed, with the values of all seeds, best mean first; without runs that have no value."""
        found: dict[str, tuple[dict[str, Any], list[float]]] = {}
        for run in self.runs:
            options = {name: value for name, value in run.options.items() if name != _SEED}
            own = found.setdefault(repr(options), (options, []))[1]
            own += [] if run.value is None else [run.value]
        return sorted(found.values(), key=lambda own: self._order(sum(own[1]) / len(own[1]) if own[1] else None))


def show_sweep(found: Swept, console: Console | None = None) -> None:
    """Print the runs, best first, and the means over seeds if there are several."""
    console = console or Console()
    names = list(dict.fromkeys(option for run in found.runs for option in run.options))
    table = Table()
    for name in names:
        table.add_column(name, justify="right")
    table.add_column(found.metric, justify="right")
    table.add_column("file", overflow="fold")
    for run in found.ranked:
        value = "-" if run.value is None else f"{run.value:.4g}"
        cells = [str(run.options.get(name, "")) for name in names]
        table.add_row(*cells, value, run.file or "-", style="bold" if run is found.best else "")
    show_table(f"{len(found.runs)} runs, best first", table, console)
    means = found.means()
    if _SEED in names and 1 < len(means) < len(found.runs):
        _show_means(found, means, [name for name in names if name != _SEED], console)
    if found.best is None:
        console.print(f"no run has a finite {found.metric}", soft_wrap=True)
    else:
        console.print(f"best: {found.best.label} ({found.metric} {found.best.value:.4g})", soft_wrap=True)


def _show_means(
    found: Swept, means: Sequence[tuple[dict[str, Any], list[float]]], names: Sequence[str], console: Console
) -> None:
    table = Table()
    for name in (*names, "mean", "least", "most", "seeds"):
        table.add_column(name, justify="right")
    for options, values in means:
        numbers = (sum(values) / len(values), min(values), max(values)) if values else ()
        cells = [f"{number:.4g}" for number in numbers] or ["-"] * 3
        table.add_row(*(str(options.get(name, "")) for name in names), *cells, str(len(values)))
    show_table(f"{found.metric} over seeds", table, console)


def write_record(found: Swept, path: Path, more: Mapping[str, Any]) -> None:
    """Write what was found as JSON.

    Args:
        found: all runs.
        path: the file; replaced if it exists.
        more: what else is worth keeping; JSON types.
    """
    runs = [
        {"name": run.name, "options": dict(run.options), "value": run.value, "file": run.file} for run in found.ranked
    ]
    best = None if found.best is None else found.best.name
    content = {"format": FORMAT, "metric": found.metric, "mode": found.mode, "best": best, **more, "runs": runs}
    text = json.dumps(content, indent=2)
    atomic_write(path, lambda file: file.write(f"{text}\n".encode()))


def plot_sweep(found: Swept, path: Path) -> None:
    """Draw the metric over the first option that is a number, one line for each choice of the others.

    Seeds are a range around their mean. Without such an option there is a bar for each run.

    Args:
        found: all runs.
        path: picture to write; its ending tells the format.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ArgumentError("plotting needs matplotlib: pip install matplotlib.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    over = _numbers(found)
    if over is None:
        shown = [run for run in found.ranked if run.value is not None]
        axes.barh([run.label for run in shown][::-1], [run.value or 0.0 for run in shown][::-1])
        axes.set(xlabel=found.metric)
    else:
        lines: dict[str, dict[float, list[float]]] = {}
        for options, values in found.means():
            label = ",".join(f"{name}={value}" for name, value in options.items() if name != over)
            if values:
                lines.setdefault(label, {})[float(options[over])] = values
        for label, points in sorted(lines.items()):
            places = sorted(points)
            mean = [sum(points[x]) / len(points[x]) for x in places]
            (line,) = axes.plot(places, mean, marker="o", label=label)
            low, high = [min(points[x]) for x in places], [max(points[x]) for x in places]
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2)
        numbers = [x for points in lines.values() for x in points]
        wide = bool(numbers) and min(numbers) > 0 and max(numbers) > 5 * min(numbers)
        axes.set(xscale="log" if wide else "linear", xlabel=over, ylabel=found.metric)
        if any(lines):
            axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _numbers(found: Swept) -> str | None:
    """The first option besides the seed that is a number in all runs, and not the same in all."""
    for name in dict.fromkeys(option for run in found.runs for option in run.options if option != _SEED):
        values = [run.options.get(name) for run in found.runs]
        if len(set(values)) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            return name
    return None
