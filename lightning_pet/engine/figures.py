"""Figures that a method draws at the end of a fit, if matplotlib is installed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info


@dataclass(frozen=True)
class Curve:
    """One line: its label, and as many positive values as steps."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]


def save_figure(
    trainer: pl.Trainer,
    name: str,
    curves: Sequence[Curve],
    bars: Mapping[str, float],
    labels: tuple[str, str, str],
) -> Path | None:
    """Draw curves over the steps of the run, and bars beside them, into the Trainer's log folder.

    Args:
        trainer: whose ``log_dir`` receives ``name.png``.
        name: of the file, without its ending.
        curves: drawn on a logarithmic scale.
        bars: one horizontal bar per entry.
        labels: of the curves' values, of their steps, and of the bars.

    Returns:
        The file; ``None`` if matplotlib is not installed or there is no folder, which is logged.
    """
    folder = trainer.log_dir
    try:
        from matplotlib.figure import Figure
    except ImportError:
        rank_zero_info(f"{name}: no figure, because matplotlib is not installed (pip install 'lightning-pet[plots]').")
        return None
    if folder is None:
        rank_zero_info(f"{name}: no figure, because the Trainer has no log folder.")
        return None
    figure = Figure(figsize=(10, max(3.0, 0.25 * len(bars) + 1)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for curve in curves:
        left.plot(curve.steps, curve.values, label=curve.label)
    left.set(xlabel=labels[1], ylabel=labels[0], yscale="log")
    left.legend()
    right.barh(list(bars), list(bars.values()))
    right.set(xlabel=labels[2])
    right.invert_yaxis()
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
