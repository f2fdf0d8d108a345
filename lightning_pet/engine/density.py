"""How sparse a difference is over a fit: logged by layer, kept over a resume, drawn at the end."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl

from lightning_pet.core.structure import Target
from lightning_pet.engine.figures import Curve, save_figure
from lightning_pet.engine.strategy import StrategyAdapter
from lightning_pet.layers.sparse_difference import SparseDifference


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
