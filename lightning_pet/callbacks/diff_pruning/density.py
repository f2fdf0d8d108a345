"""How sparse a difference is over a fit: logged by layer, kept over a resume, drawn at the end."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_pet.layers.sparse_difference import SparseDifference
from lightning_pet.model.structure import Target
from lightning_pet.strategies.strategy import StrategyAdapter


class Counted(NamedTuple):
    """Entries of a difference.

    Attributes:
        size: how many there are.
        nonzero: how many are not zero in evaluation.
        expected: how many are not zero in training, on average.
    """

    size: int
    nonzero: int
    expected: float


def counted(
    parts: Sequence[tuple[Target, SparseDifference]], adapter: StrategyAdapter[Any]
) -> tuple[list[tuple[str, Counted]], float]:
    """Count the entries of differences, and add up their penalties; every process calls this.

    Args:
        parts: the differences, with their places.
        adapter: gathers them, one after the other.
    """
    modules = {id(difference): target.module for target, difference in parts}
    found, penalty = [], 0.0
    for difference, own in adapter.whole_modules([difference for _, difference in parts]):
        count = Counted(difference.size, difference.count_nonzero(own), difference.expected_nonzero(own))
        found.append((modules[id(difference)], count))
        penalty += difference.weighted_penalty(own)
    return found, penalty


class DensityCurve:
    """Density (share of non-zero entries) in evaluation and expected in training, step by step.

    Attributes:
        history: rows of step, density, expected density; plain, for checkpoints.
    """

    def __init__(self) -> None:
        self.history: list[list[float]] = []

    def note(self, step: int, parts: Sequence[tuple[str, Counted]]) -> dict[str, float]:
        """Measure now, and keep the result.

        Args:
            step: optimizer steps so far.
            parts: the differences, with the module that each belongs to.

        Returns:
            ``density``, ``expected_density`` and ``density/LAYER`` for every layer.
        """
        layers = _by_layer(parts)
        size = sum(of for _, of in layers.values())
        density = sum(found for found, _ in layers.values()) / size
        expected = sum(part.expected for _, part in parts) / size
        if not self.history or self.history[-1][0] != step:  # several batches may accumulate for one step
            self.history.append([float(step), density, expected])
        shares = {f"density/{layer}": found / of for layer, (found, of) in layers.items()}
        return {"density": density, "expected_density": expected, **shares}

    def draw(self, trainer: pl.Trainer, name: str, parts: Sequence[tuple[str, Counted]]) -> None:
        """Save the curves, and the densities of the layers beside them, as ``name.png`` in the log folder."""
        if not self.history:
            return
        steps, density, expected = (list(column) for column in zip(*self.history, strict=True))
        bars = {layer: found / size for layer, (found, size) in _by_layer(parts).items()}
        curves = [Curve("density", steps, density), Curve("expected density", steps, expected)]
        save_figure(trainer, name, curves, bars, ("density", "step", "density of a layer"))


def _by_layer(parts: Sequence[tuple[str, Counted]]) -> dict[str, tuple[int, int]]:
    """Non-zero entries and entries of every layer."""
    layers: dict[str, tuple[int, int]] = {}
    for module, part in parts:
        found, size = layers.get(layer := layer_of(module), (0, 0))
        layers[layer] = found + part.nonzero, size + part.size
    return layers


def layer_of(module: str) -> str:
    """A module's name up to its first number, else without its last part.

    >>> layer_of("encoder.layer.3.output.dense"), layer_of("embeddings.words"), layer_of("head")
    ('encoder.layer.3', 'embeddings', 'head')
    """
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.|$)", module)
    return numbered.group() if numbered else module.rpartition(".")[0] or module or "root"


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
