"""The weights of a combination, chosen by what a metric says of it on validation data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import nn

from lightning_pet.arguments import one_of, positive, whole
from lightning_pet.errors import ArgumentError
from lightning_pet.insertion.choice import remove
from lightning_pet.model.naming import check_delta_name
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.combining.in_model import combined, insert_combined, options_of, refuse_taken
from lightning_pet.operations.combining.rules import ELECTING, How, Options
from lightning_pet.operations.file_terms import for_model
from lightning_pet.operations.loading import write_values

Mode = Literal["min", "max"]
Validate = Callable[[nn.Module], Any]

_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_DIGITS = 9  # weights that differ beyond are one trial


@dataclass(frozen=True)
class ChosenWeights:
    """What was found.

    Attributes:
        weights: of each delta.
        value: of the metric with them.
        even: of the metric with equal weights that sum to one, for comparison.
        trials: every trial with its value, in their order.
    """

    weights: dict[str, float]
    value: float
    even: float
    trials: tuple[tuple[dict[str, float], float], ...] = field(repr=False, default=())


def choose_weights(
    adapted: Adapted,
    names: Sequence[str],
    validate: Validate,
    *,
    mode: Mode,
    method: How = "linear",
    grid: Sequence[float] = _GRID,
    step: float = 0.4,
    rounds: int = 4,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    name: str | None = None,
) -> ChosenWeights:
    """Choose the weights of :meth:`Adapted.combine` by a metric on validation data.

    First one number for all of them (``grid``), then each on its own, up and down by a step that is halved in every
    round. A trial writes numbers into a delta that stays in the model, and calls ``validate``; nothing is loaded or
    inserted anew. Where only an average means something (adapters), weights go on summing to one.

    Choose on data that no delta was trained on, and report what a test set says: the value here is the best of many,
    and so is better than the truth.

    Args:
        adapted: the model with its deltas.
        names: which to combine.
        validate: gets the adapted root, which computes with the combination in the calling thread, and returns a
            number: any metric. Put the model into evaluation mode.
        mode: whether the metric is to be as small (``"min"``) or as large (``"max"``) as possible.
        method: how to combine; see :func:`lightning_pet.combine_deltas`.
        grid: weights to try for all of the deltas together.
        step: first step of one weight alone.
        rounds: how often the step is halved, and all weights are tried again; 0: the grid only.
        rank: see :meth:`Adapted.combine`.
        density: see :meth:`Adapted.combine`.
        seed: see :meth:`Adapted.combine`.
        name: keep the result in the model as a delta of this name; default: it is taken out again.

    Raises:
        ArgumentError: if an argument is out of range, or the metric is no number. The model is as it was.
    """
    _check(validate, mode, grid, step, rounds)
    record = adapted.record
    kept = name if name is not None else _free(record.names)
    check_delta_name(kept)
    refuse_taken(record, kept)
    meant, options = options_of(record, list(names), method, rank, density, seed)
    search = _Search(adapted, meant, options, kept, validate, 1 if mode == "min" else -1)
    try:
        search.run([float(number) for number in grid], float(step), rounds)
        found = search.result()
        if name is not None:
            search.write(tuple(found.weights.values()))
    except BaseException:
        search.take_out()
        raise
    if name is None:
        search.take_out()
    return found


def _check(validate: Any, mode: Any, grid: Any, step: Any, rounds: Any) -> None:
    if not callable(validate):
        raise ArgumentError(f"validate={validate!r}: expected a function that gets the model and returns a number.")
    one_of("mode", mode, Mode, f"say whether the metric is better when it is {' or '.join(get_args(Mode))}.")
    if isinstance(grid, str) or not isinstance(grid, Sequence) or not all(_is_number(number) for number in grid):
        raise ArgumentError(f"grid={grid!r}: expected a list of finite numbers, such as [0.25, 0.5, 1.0].")
    positive("step", step, "must be a positive number, e.g. step=0.4.")
    whole("rounds", rounds, 0, "a number of rounds, 0 or more.")


def _is_number(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)


def _free(names: Sequence[str]) -> str:
    return next(own for own in ("trial", *(f"trial-{i}" for i in range(len(names) + 1))) if own not in names)


class _Search:
    def __init__(
        self, adapted: Adapted, names: tuple[str, ...], options: Options, kept: str, validate: Validate, sign: int
    ) -> None:
        self.adapted, self.names, self.options = adapted, names, options
        self.kept, self.validate, self.sign = kept, validate, sign
        self.values: dict[tuple[float, ...], float] = {}
        self.inserted = False
        self.averages = False

    def run(self, grid: list[float], step: float, rounds: int) -> None:
        """Try equal weights, the grid, and each weight on its own."""
        even = (1 / len(self.names),) * len(self.names)
        self.value(even)
        self.averages = not self._takes(tuple(2 * weight for weight in even))
        best = even
        for number in () if self.averages else grid:
            if number > 0 or self.options.how not in ELECTING:
                best = self._better(best, (number,) * len(even))
        for turn in range(rounds):
            before = None
            while before != best:  # a step that helped may be worth another one
                before = best
                for index in range(len(even)):
                    for change in (step / 2**turn, -step / 2**turn):
                        moved = self._moved(best, index, change)
                        best = best if moved is None else self._better(best, moved)

    def result(self) -> ChosenWeights:
        """The best of all trials."""
        finite = {weights: value for weights, value in self.values.items() if math.isfinite(value)}
        if not finite:
            raise ArgumentError("validate returned no finite number for any weights: look at the metric or the deltas.")
        best = min(finite, key=lambda weights: self.sign * finite[weights])
        even = next(iter(self.values.values()))
        trials = tuple((dict(zip(self.names, weights, strict=True)), value) for weights, value in self.values.items())
        return ChosenWeights(dict(zip(self.names, best, strict=True)), finite[best], even, trials)

    def value(self, weights: tuple[float, ...]) -> float:
        """What the metric says of these weights."""
        if weights not in self.values:
            self.write(weights)
            with self.adapted.using(self.kept):
                found = self.validate(self.adapted.root)
            try:
                self.values[weights] = float(found)
            except (TypeError, ValueError):
                raise ArgumentError(f"validate returned {found!r}: expected a number.") from None
        return self.values[weights]

    def write(self, weights: tuple[float, ...]) -> None:
        """Let the delta of the trials have these weights."""
        root = self.adapted.root
        stored, _ = combined(root, self.names, self._asked(weights))
        if self.inserted:
            write_values(root, self.kept, for_model(stored, self.kept))
        else:
            insert_combined(root, self.kept, self.names, stored)
            self.inserted = True

    def take_out(self) -> None:
        """Take the delta of the trials out."""
        if self.inserted and self.kept in self.adapted:
            remove(self.adapted.root, self.kept)

    def _asked(self, weights: tuple[float, ...]) -> Options:
        return replace(self.options, weights=weights, given=True)

    def _takes(self, weights: tuple[float, ...]) -> bool:
        """Whether weights may sum to another number than one."""
        try:
            combined(self.adapted.root, self.names, self._asked(weights))
        except ArgumentError:
            return False
        return True

    def _better(self, best: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
        first, second = self.sign * self.value(best), self.sign * self.value(other)
        return other if second < first or (math.isnan(first) and not math.isnan(second)) else best

    def _moved(self, weights: tuple[float, ...], index: int, change: float) -> tuple[float, ...] | None:
        """One weight moved; ``None`` where it has no place to go."""
        moved = [*weights]
        moved[index] += change
        if self.averages:
            moved[index] = min(max(moved[index], 0.0), 1.0)
            rest = sum(weights) - weights[index]
            share = (1 - moved[index]) / rest if rest > 0 else 0.0
            others = (1 - moved[index]) / (len(weights) - 1) if len(weights) > 1 else 0.0
            moved = [w if i == index else (weights[i] * share if rest > 0 else others) for i, w in enumerate(moved)]
        elif self.options.how in ELECTING:
            moved[index] = max(moved[index], 0.0)
        found = tuple(round(weight, _DIGITS) for weight in moved)
        none = self.options.how in ELECTING and not any(found)
        return None if none or found == weights else found
