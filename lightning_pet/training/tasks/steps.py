"""The steps of a module, for rows that belong to different tasks: in one call, or task by task."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_pet.errors import ArgumentError
from lightning_pet.insertion.tasks.own_values import VALUE
from lightning_pet.model.adaptation import deltas_in
from lightning_pet.strategies import private
from lightning_pet.training.runs.every_row import EveryRow
from lightning_pet.training.tasks.routing import check_size, joined, named_rows, part_of, size_of, taken, weighted
from lightning_pet.training.tasks.tasks import Tasks
from lightning_pet.training.watch import Run

_STEPS: Final = ("training_step", "validation_step", "test_step", "predict_step")


class Steps:
    """Gives each row of a batch to the delta of its task, around the module's own steps.

    Args:
        run: the Trainer and its module.
        tasks: of the run.
    """

    def __init__(self, run: Run, tasks: Tasks) -> None:
        self._run, self._tasks = run, tasks
        self._alike: bool | None = None
        self._every_row: EveryRow | None = None
        if tasks.streams is not None:
            self._every_row = EveryRow(run, tasks.names, tasks.streams, split=tasks.split)

    def install(self) -> Callable[[], None]:
        """Put it around the steps; returns what takes it off."""
        module, undo = self._run.module, []
        undo += self._every_row.install() if self._every_row is not None else []
        for name in _STEPS:
            if name != "predict_step" and not is_overridden(name, module):
                continue
            original = getattr(module, name)
            undo.append(private.replace_method(module, name, partial(self._step, name)))
            getattr(module, name).__wrapped__ = original  # Lightning reads the signature

        def back() -> None:
            for undone in reversed(undo):
                undone()

        return back

    def _step(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch, rest = (args[0], args[1:]) if args else (kwargs.pop("batch"), ())
        if self._every_row is not None and name == "training_step":
            self._tasks.seen.update(self._tasks.names)
            return self._every_row.step(original, batch, rest, kwargs)
        if self._tasks.every_row:
            everything = list(range(size_of(batch) or 1))
            return self._apart(name, original, batch, {task: everything for task in self._tasks.names}, rest, kwargs)
        found, batch = taken(batch, self._tasks.key)
        names = named_rows(found, self._tasks.names)
        rows: dict[str, list[int]] = {}
        if isinstance(names, str):
            rows[names] = list(range(size_of(batch) or 1))
        else:
            check_size(batch, len(names))
            for row, task in enumerate(names):
                rows.setdefault(task, []).append(row)
        if name == "training_step":
            self._tasks.seen.update(rows)
        adapted = self._run.adapted
        if len(rows) == 1:
            with adapted.using(*rows):
                return original(batch, *rest, **kwargs)
        in_one_call = not self._tasks.split if name == "training_step" else name == "predict_step"
        if in_one_call and self.heads_are_alike():
            with adapted.rows(names):
                return original(batch, *rest, **kwargs)
        return self._apart(name, original, batch, rows, rest, kwargs)

    def _apart(
        self,
        name: str,
        original: Callable[..., Any],
        batch: Any,
        rows: Mapping[str, list[int]],
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the step once for each task, on its rows."""
        training, module = name == "training_step", self._run.module
        if training and not module.automatic_optimization:
            raise ArgumentError(
                f"{type(module).__name__} optimizes by itself, and this batch has to be run task by task (heads of "
                "different sizes, or split=True), which would step once for each. Let each batch belong to one task, "
                "or let Lightning optimize."
            )
        every, count = self._tasks.every_row, len(next(iter(rows.values())))
        count = count if every else sum(len(own) for own in rows.values())
        order = [task for task in self._tasks.names if task in rows]
        outputs = []
        for task in order:
            part = batch if every else part_of(batch, rows[task], count)
            with self._run.adapted.using(task):
                outputs.append(original(part, *rest, **kwargs))
        if training:
            return _one_loss(outputs, [1] * len(order) if every else [len(rows[task]) for task in order], every)
        if every:
            return dict(zip(order, outputs, strict=True)) if name == "predict_step" else None
        return joined(outputs, [rows[task] for task in order], count)

    def heads_are_alike(self) -> bool:
        """Whether all tasks have values of one shape in the place of each tensor of the base."""
        if self._alike is None:
            shapes: dict[str, set[Any]] = {}
            for inserted in deltas_in(self._run.adapted.root):
                if inserted.method.method == VALUE and (own := getattr(inserted.delta, VALUE, None)) is not None:
                    shapes.setdefault(inserted.target.path, set()).add(tuple(own.shape))
            self._alike = all(len(found) == 1 for found in shapes.values())
        return self._alike


def _one_loss(outputs: list[Any], counts: list[int], every: bool) -> Any:
    """What ``training_step`` returns for the whole batch: its losses, weighted by rows; all of them, for every row."""
    kept = [(output, count) for output, count in zip(outputs, counts, strict=True) if output is not None]
    if not kept:
        return None
    losses: list[Tensor] = [output["loss"] if isinstance(output, Mapping) else output for output, _ in kept]
    loss = sum(losses[1:], losses[0]) if every else weighted(losses, [count for _, count in kept])
    first = kept[0][0]
    return {**first, "loss": loss} if isinstance(first, Mapping) else loss
