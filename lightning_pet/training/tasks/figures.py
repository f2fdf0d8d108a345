"""What a module logs in a step, for each task: ``val_acc`` becomes ``val_acc/sst2`` as well.

A number is known for each task where its rows ran alone; what is logged under the plain name is the mean by rows, as
one call would have given. A metric that accumulates (of torchmetrics) is fed with the rows of all tasks, as it was
without us; a copy of it for each task is fed with the rows of that task alone.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_pet.strategies import private
from lightning_pet.training.tasks.routing import weighted

_LOG: Final = inspect.signature(pl.LightningModule.log)
_CALLS: Final = ("forward", "update", "compute")


class Entry(NamedTuple):
    """One call of ``log`` in the step of a task.

    Attributes:
        task: whose rows ran.
        value: what was logged.
        options: of the call.
        rows: how many the value is of.
    """

    task: str
    value: Any
    options: dict[str, Any]
    rows: int


class Figures:
    """Listens to ``log`` while the rows of a task run.

    Args:
        module: the LightningModule.
        tasks: all names.
    """

    def __init__(self, module: pl.LightningModule, tasks: tuple[str, ...]) -> None:
        self._module, self._tasks = module, tasks
        self._log: Callable[..., None] = module.log
        self._task: str | None = None
        self._rows: int | None = None
        self._entries: dict[str, list[Entry]] = {}
        self._copies: dict[int, tuple[Any, dict[str, Any]]] = {}  # of each metric: itself, and one for each task
        self._inside = False

    def install(self) -> Callable[[], None]:
        """Listen from now on; returns what ends it."""
        self._log = self._module.log
        return private.replace_method(self._module, "log", self._heard)

    @contextmanager
    def step(self, rows: int, *, fill: bool) -> Iterator[None]:
        """One batch; at its end the figures of its tasks are logged.

        Args:
            rows: of the batch.
            fill: tasks without rows in it are logged with the weight 0, so that all processes log the same names.
        """
        self._rows, self._entries = rows, {}
        try:
            yield
            for name, entries in self._entries.items():
                self._write(name, entries, fill)
        finally:
            self._rows, self._entries = None, {}

    @contextmanager
    def task(self, task: str, rows: int) -> Iterator[None]:
        """Within the block rows of a task run, and no others."""
        whole = self._rows
        with ExitStack() as stack:
            for metric, copies in self._metrics():
                for call in _CALLS:
                    original = getattr(metric, call)
                    before = vars(metric).get(call)
                    vars(metric)[call] = partial(self._call, original, getattr(copies[task], call), call)
                    stack.callback(_put_back, metric, call, before)
            self._task, self._rows = task, rows
            try:
                yield
            finally:
                self._task, self._rows = None, whole

    # --- log ------------------------------------------------------------------------------------------

    def _heard(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        options = dict(_LOG.bind(self._module, *args, **kwargs).arguments)
        options.pop("self")
        if self._rows is None:
            original(**options)
            return
        if options.get("batch_size") is None:
            options["batch_size"] = self._rows  # what a batch says of its tasks would be counted as rows
        if self._task is None:
            original(**options)
            return
        name, value = options.pop("name"), options.pop("value")
        if isinstance(value, Tensor):
            value = value if options.get("enable_graph") else value.detach()
        own = Entry(self._task, value, options, options["batch_size"])
        self._entries.setdefault(name, []).append(own)

    def _write(self, name: str, entries: list[Entry], fill: bool) -> None:
        first = entries[0]
        options = {**first.options, "batch_size": sum(entry.rows for entry in entries)}
        if isinstance(first.value, Mapping):  # a group of values under one name: as it is
            for entry in entries:
                self._log(name=f"{name}/{entry.task}", value=entry.value, **entry.options)
            return
        self._log(name=name, value=self._together(entries), **options)
        by_task = {entry.task: entry for entry in entries}
        for task in self._tasks:
            there = task in by_task
            if not there and not fill:
                continue
            options = {**by_task.get(task, first).options, "prog_bar": False}
            value = by_task[task].value if there else self._nothing(first)
            if isinstance(first.value, Metric):
                value = self._copy_of(first.value, task)
                options["metric_attribute"] = f"{name}/{task}"
            if not there:
                options["batch_size"] = 0
            elif not fill:
                options["sync_dist"] = False  # other processes may have no rows of this task
            self._log(name=f"{name}/{task}", value=value, **options)

    @staticmethod
    def _nothing(first: Entry) -> Any:
        """A value that changes nothing of what other processes have."""
        reduce: Any = first.options.get("reduce_fx", "mean")
        word = reduce if isinstance(reduce, str) else getattr(reduce, "__name__", "mean")
        return {"max": -torch.inf, "amax": -torch.inf, "min": torch.inf, "amin": torch.inf}.get(word, 0.0)

    @staticmethod
    def _together(entries: list[Entry]) -> Any:
        """What one call for all rows would have given."""
        values: list[Any] = [entry.value for entry in entries]
        if isinstance(values[0], Metric) or len(values) == 1:
            return values[0]
        reduce = entries[0].options.get("reduce_fx", "mean")
        word = reduce if isinstance(reduce, str) else getattr(reduce, "__name__", "mean")
        if word in ("sum", "max", "min", "amax", "amin"):
            together: Callable[[list[Any]], Any] = sum if word == "sum" else max if word in ("max", "amax") else min
            return together(values)
        return weighted(values, [entry.rows for entry in entries])

    # --- metrics that accumulate ----------------------------------------------------------------------

    def _metrics(self) -> list[tuple[Any, dict[str, Any]]]:
        """Every metric of the module that no collection holds, with its copies."""
        inner: set[int] = set()
        for metric in self._module.modules():
            if not isinstance(metric, Metric | MetricCollection) or id(metric) in inner:
                continue
            inner |= {id(part) for part in metric.modules()} - {id(metric)}
            if id(metric) not in self._copies:
                copies = {task: metric.clone() for task in self._tasks}
                for copy in copies.values():
                    copy.reset()
                self._copies[id(metric)] = metric, copies
        return [found for number, found in self._copies.items() if number not in inner]

    def _call(self, original: Any, own: Any, call: str, *args: Any, **kwargs: Any) -> Any:
        if self._inside:  # one of these calls another
            return original(*args, **kwargs)
        self._inside = True
        try:
            if call == "compute":  # in the step of a task a metric shows what it has seen of that task
                return own(*args, **kwargs)
            result = original(*args, **kwargs)
            own(*args, **kwargs)
            return result
        finally:
            self._inside = False

    def _copy_of(self, metric: nn.Module, task: str) -> Any:
        for whole, copies in self._copies.values():
            for path, part in whole.named_modules():
                if part is metric:
                    copy = copies[task]
                    if isinstance(copy, MetricCollection):
                        list(copy.items(keep_base=True, copy_state=False))  # those of one group share their state
                    return copy.get_submodule(path)
        return metric


def _put_back(metric: Any, call: str, before: Any) -> None:
    if before is None:
        vars(metric).pop(call, None)
    else:
        vars(metric)[call] = before
