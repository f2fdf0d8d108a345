"""What a search for the intrinsic dimension has found, as a table and a plot."""

from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_pet.errors import ArgumentError
from lightning_pet.operations.plan import show_table
from lightning_pet.report.dimension.search import Dimension, Point


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
