"""The tasks of a run: their names, options, and the callbacks that each gets of its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any, Final, cast

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_warn

from lightning_pet.arguments import positive, whole
from lightning_pet.errors import ArgumentError, PETError
from lightning_pet.insertion.choice import gather
from lightning_pet.model.adaptation import record_of
from lightning_pet.model.naming import DEFAULT, check_delta_name, delta_of
from lightning_pet.training.runs.streams import Streams
from lightning_pet.training.tasks.routing import Key

OF_OPTIMIZER: Final = ("lr", "weight_decay")
"""Options of a task that its parameter groups have."""
OF_START: Final = ("seed",)
OF_HEAD: Final = ("labels",)
_OF_ONE_FORM: Final = frozenset((*OF_OPTIMIZER, *OF_START, *OF_HEAD, "r", "alpha"))
"""Options that do not change how much is drawn at random in a step."""
_REFUSED: Final = ("name", "delta", "module", "base_check", "delta_files", "verbose", "scalars")


class Tasks:
    """The tasks of one callback.

    Args:
        names: names, or names with options.
        key: where a batch says which row belongs to which.
        every_row: every row belongs to every task.

    Attributes:
        names: in the order in which they were given; numbers in batches mean this order.
        options: of each.
        split: training batches are run task by task.
        anywhere: tasks with rows in some process since the last step of an optimizer, where processes share parameters.
        stepped: an optimizer has stepped since that began.
    """

    def __init__(self, names: Sequence[str] | Mapping[str, Any], key: Key = "task", *, every_row: bool = False) -> None:
        self.names, self.options = _named(names)
        self.key, self.every_row, self.split = key, every_row, False
        self._in_fit: set[str] = set()
        self._in_epoch: set[str] = set()
        self.anywhere: set[str] | None = None
        self.stepped = True
        self._copies: list[Any] = []
        self.streams: Streams | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copies": [], "streams": None, "_in_fit": set(), "_in_epoch": set()}

    # --- callbacks of each task -------------------------------------------------------------------

    def knows(self, callback: object) -> bool:
        """Whether a callback is one of those that were made for a task."""
        return any(callback is own for own in self._copies)

    def spread(self, trainer: pl.Trainer) -> None:
        """Put one callback per task in the place of each PET callback of a Trainer, in its list.

        The list is changed where it is: Lightning goes through it while it sets callbacks up.

        Raises:
            ArgumentError: if an option is known to none of them.
            PETError: if there is none.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        templates = [callback for callback in callbacks if hasattr(callback, "for_task") and not self.knows(callback)]
        if not templates:
            if not any(self.knows(callback) for callback in callbacks):
                raise PETError(
                    "TasksCallback trains what PET callbacks insert, and this Trainer has none. Give it one beside it: "
                    "Trainer(callbacks=[LoRACallback(r=8), TasksCallback(tasks=[…])])."
                )
            return
        self._check_options(templates)
        made = {id(one): [one.for_task(task, self.options[task]) for task in self.names] for one in templates}
        for template in templates:
            place = next(index for index, callback in enumerate(callbacks) if callback is template)
            callbacks[place : place + 1] = made[id(template)]
        self._copies = [copy for copies in made.values() for copy in copies]
        if self.every_row:
            same = [task for task in self.names if self.options[task].keys() <= _OF_ONE_FORM]
            seeds = {task: self.options[task].get("seed") for task in self.names}
            self.streams = Streams(seeds, leader=next(iter(same), None))
            for copy in self._copies:
                copy.stream = self.streams.own[copy.delta]
            for copy, template in zip(self._copies[:: len(self.names)], templates, strict=True):
                copy.as_alone = partial(self._draw_as_alone, template)

    def first_of(self, trainer: pl.Trainer, template: object) -> Any:
        """The callback that stands first in the place of a PET callback; ``None`` if this is one of those made."""
        if self.knows(template):
            return None
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        place = next(index for index, callback in enumerate(callbacks) if callback is template)
        self.spread(trainer)
        return callbacks[place]

    def _check_options(self, templates: Sequence[Any]) -> None:
        known = {option for template in templates for option in template.options()} - set(_REFUSED)
        known |= {*OF_OPTIMIZER, *OF_START, *OF_HEAD}
        for task, options in self.options.items():
            for option in options:
                if option in known:
                    continue
                near = get_close_matches(option, known, 1, 0.6)
                names = ", ".join(dict.fromkeys(type(template).__name__ for template in templates))
                raise ArgumentError(
                    f"tasks: {task!r} has the option {option!r}, which {names} does not take for one task."
                    + (f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known))}.")
                )

    def _draw_as_alone(self, template: Any, root: Any, targets: Any) -> None:
        """Let torch's own generator stand where one run alone would have left it, which draws its start from there."""
        if self.streams is not None and not any(parameter.is_meta for parameter in root.parameters()):
            self.streams.capture()
            with suppress(PETError):
                template.insertions(root, targets)
            self.streams.look()

    # --- rows -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A fit begins."""
        self._in_fit, self._in_epoch = set(), set()

    def note(self, tasks: Iterable[str]) -> None:
        """These tasks have rows in a training batch."""
        self._in_fit.update(tasks)
        self._in_epoch.update(tasks)

    @property
    def unseen(self) -> frozenset[str]:
        """Tasks that have had no row in this fit."""
        return frozenset(self.names) - self._in_fit if not self.every_row else frozenset()

    def report_unseen(self, trainer: pl.Trainer, when: str) -> None:
        """Name the tasks that no process has seen a row of, and begin anew."""
        own = {task for task in self.names if task not in self._in_epoch}
        each = [own for _ in range(trainer.world_size)]
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(each, own)
        unseen = set.intersection(*each)
        where = "" if callable(self.key) else f" (key={self.key!r})"
        if unseen and not self.every_row:
            rank_zero_warn(
                f"no row {when} belonged to {', '.join(repr(task) for task in self.names if task in unseen)}: the "
                f"delta is as it was before. Look at what the batches name{where}, or leave the task out."
            )
        self._in_epoch.clear()

    # --- the model --------------------------------------------------------------------------------

    def gather(self, root: Any, *, train: bool) -> None:
        """Let the deltas of all tasks train together, as far as they are there."""
        record = record_of(root)
        if record is not None and set(self.names) <= set(record.names):
            gather(root, self.names, train=train)

    def of_optimizer(self, names: Iterable[str]) -> dict[str, tuple[str, dict[str, float]]]:
        """The task of each tensor of a delta, with the options that its parameter groups have, where it has some."""
        own: dict[str, dict[str, float]] = {
            task: {str(key): float(options[key]) for key in OF_OPTIMIZER if key in options}
            for task, options in self.options.items()
        }
        return {name: (task, own[task]) for name in names if own.get(task := delta_of(name) or "")}


def tasks_of(trainer: pl.Trainer) -> Tasks | None:
    """The tasks of a Trainer, if it has a callback that names some.

    Raises:
        ArgumentError: if there are two.
    """
    found = [t for callback in trainer.callbacks if isinstance(t := getattr(callback, "_tasks", None), Tasks)]  # type: ignore[attr-defined]
    if len(found) > 1:
        raise ArgumentError(f"this Trainer has {len(found)} TasksCallback; give one, which names all tasks.")
    return found[0] if found else None


def _named(given: Any) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list | tuple | Mapping) or not given:
        raise ArgumentError(
            f"tasks={given!r}: name the tasks, ['sst2', 'trec'], or give each its options, {{'sst2': {{'r': 4}}, …}}."
        )
    names = tuple(given)
    for name in names:
        check_delta_name(name, "tasks: name")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArgumentError(f"tasks: {twice[0]!r} is named twice; each task is one delta, and has one name.")
    options = {name: dict(cast(Any, given)[name] or {}) if isinstance(given, Mapping) else {} for name in names}
    for name, own in options.items():
        if "labels" in own:
            whole("labels", own["labels"], wanted=f"of the task {name!r} must be a positive integer.")
        if "seed" in own:
            whole("seed", own["seed"], 0, f"of the task {name!r} must be a whole number of at least 0.")
        if "lr" in own:
            positive("lr", own["lr"], f"of the task {name!r} must be a positive number.")
    return names, options


# --- what every method does to be one of several in a run: a callback of its own for each task ----


class OfTask:
    """Mixed into every method."""

    own_values: bool = False
    """It is one of several that train side by side: what it trains of the base is a parameter of its own."""
    outputs: int | None = None
    """Number of labels of its own head."""
    start_seed: int | None = None
    """Seed of its random start."""
    stream: Any = None
    """The random numbers of the run that it is a part of, if it is one of several beside each other on all rows."""
    as_alone: Any = None
    """Called with the root and the places after it was built, if it is the first of several that are built there."""

    @property
    def shares_tasks(self) -> bool:
        """Whether several of it train on engines that share parameters: on no rows it calls what it calls on some."""
        return False

    @property
    def not_for_tasks(self) -> str | None:
        """Why this method, with these options, cannot train several deltas in one run; ``None`` if it can."""
        return None

    def for_task(self, task: str, options: Mapping[str, Any]) -> Any:
        """The same for the delta of one task.

        Args:
            task: its name.
            options: arguments of the task's own; those that this method does not take are passed over.

        Raises:
            ArgumentError: if this method cannot be one of several.
        """
        template: Any = self
        name = type(self).__name__
        if template.delta != DEFAULT:
            raise ArgumentError(
                f"{name}(delta={template.delta!r}) beside TasksCallback: each task is a delta under its own name. "
                "Leave delta out."
            )
        if (reason := self.not_for_tasks) is not None:
            raise ArgumentError(f"{name} beside TasksCallback: {reason}")
        arguments: dict[str, Any] = template.arguments()
        own = {option: value for option, value in options.items() if option in arguments}
        mine = type(self)(**{**arguments, **own, "delta": task})
        mine.own_values, mine.outputs, mine.start_seed = True, options.get("labels"), options.get("seed")
        return mine


def for_tasks(setup: Callable[..., None]) -> Callable[..., None]:
    """Let a method's ``setup`` run for the callbacks of single tasks, where there are such, and not for this one."""

    @wraps(setup)
    def run(self: Any, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        first = None
        if (tasks := tasks_of(trainer)) is not None:
            self._of_run = pl_module
            first = tasks.first_of(trainer, self)
        (partial(setup, self) if first is None else first.setup)(trainer, pl_module, stage)

    return run
