"""The steps of a module, for rows that belong to different tasks: in one call, or task by task."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Final

from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_pet.errors import ArgumentError
from lightning_pet.model.adaptation import adapted_root, deltas_in, record_of
from lightning_pet.model.naming import VALUE
from lightning_pet.strategies import private
from lightning_pet.training.runs.every_row import EveryRow
from lightning_pet.training.tasks.figures import Figures
from lightning_pet.training.tasks.routing import check_size, joined, named_rows, part_of, size_of, taken, weighted
from lightning_pet.training.tasks.shards import Shared, refuse_weights
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
        self._inserted = False
        self._sized: list[Any] | None = None
        self._figures = Figures(run.module, tasks.names)
        self._shared: Shared | None = None
        self._every_row: EveryRow | None = None
        if tasks.streams is not None:
            self._every_row = EveryRow(run, tasks.names, tasks.streams, self._figures.task, split=tasks.split)

    def install(self) -> Callable[[], None]:
        """Put it around the steps; returns what takes it off."""
        module, undo = self._run.module, [self._figures.install()]
        undo += self._every_row.install() if self._every_row is not None else []
        self._tasks.begin()
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
        if not self._begun():  # a look at the model on a part of a batch, before there are deltas
            return original(batch if self._tasks.every_row else taken(batch, self._tasks.key)[1], *rest, **kwargs)
        if self._every_row is not None and name == "training_step":
            self._tasks.note(self._tasks.names)
            with self._figures.step(size_of(batch) or 1, fill=False):
                return self._every_row.step(original, batch, rest, kwargs)
        if self._tasks.every_row:
            everything = list(range(size_of(batch) or 1))
            return self._apart(name, original, batch, {task: everything for task in self._tasks.names}, rest, kwargs)
        found, batch = taken(batch, self._tasks.key)
        names = named_rows(found, self._tasks.names)
        if (shared := self._of_engine()) is not None:
            if name in ("training_step", "predict_step"):  # with all tasks in one call, as the other processes
                names = [names] * (size_of(batch) or 1) if isinstance(names, str) else names
            shared.note(name, names)
        rows: dict[str, list[int]] = {}
        if isinstance(names, str):
            rows[names] = list(range(size_of(batch) or 1))
        else:
            check_size(batch, len(names))
            for row, task in enumerate(names):
                rows.setdefault(task, []).append(row)
        training = name == "training_step"
        if training:
            self._tasks.note(rows)
        mixed = isinstance(names, list) and (not self._tasks.split if training else name == "predict_step")
        if not (mixed and self.heads_are_alike()):
            if shared is not None and training:
                shared.refuse_apart()
            return self._apart(name, original, batch, rows, rest, kwargs)
        with self._figures.step(len(names), fill=False), self._choose(names):
            return original(batch, *rest, **kwargs)

    def _choose(self, names: Any) -> AbstractContextManager[None]:
        adapted = self._run.adapted
        if self._of_engine() is not None:
            return adapted._rows(names, self._tasks.names)
        return adapted.using(names[0]) if len(set(names)) == 1 else adapted.rows(names)

    def _of_engine(self) -> Shared | None:
        """What processes agree on that share parameters."""
        if self._shared is None and self._run.adapter.shards:
            refuse_weights(self._run.trainer, self._run.adapted.root)
            self._shared = Shared(self._run.trainer, self._tasks)
        return self._shared

    def _begun(self) -> bool:
        if not self._inserted:
            found = adapted_root(self._run.module)
            record = None if found is None else record_of(found[1])
            self._inserted = record is not None and set(self._tasks.names) <= set(record.names)
        return self._inserted

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
        order = [task for task in self._tasks.names if task in rows]
        if training and not module.automatic_optimization and len(order) > 1:
            raise ArgumentError(
                f"{type(module).__name__} optimizes by itself, and this batch has to be run task by task (heads of "
                "different sizes, or split=True), which would step once for each. Let each batch belong to one task, "
                "or let Lightning optimize."
            )
        every = self._tasks.every_row
        count = len(rows[order[0]]) if every else sum(len(own) for own in rows.values())
        outputs = []
        fill = not training and self._run.trainer.world_size > 1
        with self._figures.step(count, fill=fill):
            for task in order:
                part = batch if every or len(order) == 1 else part_of(batch, rows[task], count)
                with self._run.adapted.using(task), self._figures.task(task, len(rows[task])), self._labels_of(task):
                    outputs.append(original(part, *rest, **kwargs))
        if len(order) == 1:
            return outputs[0]
        if training:
            return _one_loss(outputs, [1] * len(order) if every else [len(rows[task]) for task in order], every)
        if every:
            return dict(zip(order, outputs, strict=True)) if name == "predict_step" else None
        return joined(outputs, [rows[task] for task in order], count)

    @contextmanager
    def _labels_of(self, task: str) -> Iterator[None]:
        """Within the block models say how many labels a task has, where its head has another number than they had.

        A transformers model computes the loss of ``labels=…`` by its own ``num_labels``.
        """
        labels = self._tasks.options[task].get("labels")
        root = self._run.adapted.root
        if labels is None:
            yield
            return
        if self._sized is None:
            self._sized = [module for module in root.modules() if isinstance(vars(module).get("num_labels"), int)]
        before = [module.num_labels for module in self._sized]
        for module in self._sized:
            module.num_labels = labels
        try:
            yield
        finally:
            for module, number in zip(self._sized, before, strict=True):
                module.num_labels = number

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
