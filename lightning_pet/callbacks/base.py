"""The base of every method: a Lightning callback that is a plain description of what to insert."""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, ClassVar, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lightning_pet.arguments import checked, one_of, share, unknown_option
from lightning_pet.errors import ArgumentError, PETError, TargetError
from lightning_pet.insertion.method import METHODS, Insertion, key_of, suffix_of
from lightning_pet.layers.delta import Delta
from lightning_pet.model.adaptation import deltas_in, record_of
from lightning_pet.model.naming import (
    DEFAULT,
    canonical,
    check_delta_name,
    delta_of,
    delta_prefix,
    join,
    named_modules,
    named_parameters,
    tensors_at,
)
from lightning_pet.model.quantised import numbers_in
from lightning_pet.model.structure import Structure, Target
from lightning_pet.operations.adapted import Adapted
from lightning_pet.strategies.private import logs_this_step
from lightning_pet.targets.heads import HEAD, find_heads, parameters_below
from lightning_pet.targets.patterns import listed_if_given
from lightning_pet.training.controller import Controller
from lightning_pet.training.own_steps import OwnSteps
from lightning_pet.training.run_log import log_figures, norm_of
from lightning_pet.training.tasks.tasks import OfTask, for_tasks

BaseCheck = Literal["error", "exact", "warn", "off"]
Scalar = Literal["norm", "rank", "density"]


class PETCallback(OfTask, Callback):
    """Base of all parameter-efficient tuning methods.

    In ``setup`` the callback rewrites the model (or as soon as the model exists, if the
    LightningModule builds it in its own ``setup`` or ``configure_model``), freezes the base, sees to
    it that the optimizer holds the delta, and makes every checkpoint of the run a delta checkpoint.
    Several of them work together in one Trainer, in the order of the list.

    Args:
        name: tells two instances of one method apart.
        delta: name of the delta that it is a part of, in this model: what one file holds. A model may have others,
            loaded before; they stay as they are, and act or not as they did. No file knows of it.
        module: submodule of the LightningModule to adapt and freeze (default: the pretrained models inside it,
            else all of it). What lies beside it trains as it does without us.
        modules_to_save: modules, or single parameters, that train as they are and are saved with the delta.
            ``None``: the output layers that a target feeds and that you did not freeze, as far as they can be
            told; ``[]``: none.
        start_from: delta file or checkpoint whose tensors this method starts from.
        base_check: what to do when a delta meets another base model than it was trained on: ``"error"``
            compares names, shapes and samples of all values, ``"exact"`` every byte (about a second per
            gigabyte, once), both raise; ``"warn"`` goes on.
        budget: share of the base's parameters to spend, e.g. 0.005: picks the largest width of the method
            that spends at most that, in place of the width argument, and says which. Heads are not counted.
        delta_files: write a delta file (``x.pet.safetensors``) beside each checkpoint (``x.ckpt``), and remove it
            together with it.
        verbose: print the table of trained parameters once at the start of a fit.
        scalars: figures to log as often as the Trainer logs, as ``pet/METHOD_NAME/FIGURE``: ``"norm"`` (Euclidean
            norm of what trains; of tensors of the base, that of their change), ``"rank"`` (average rank, of low-rank
            methods), ``"density"`` (share of entries that are not zero, of diff pruning).

    Raises:
        ArgumentError: if an argument is out of range.
    """

    method: ClassVar[str]
    width: ClassVar[str | None] = None
    """The argument that sizes the method (a positive integer), for ``budget``; ``None`` if it has no size."""
    figures: ClassVar[tuple[Scalar, ...]] = ("norm",)
    """What ``scalars`` may ask of the method."""
    may_change: ClassVar[frozenset[str]] = frozenset({"module", "modules_to_save", "budget"})
    """Options that may differ between a checkpoint and the run that resumes it; its tensors are compared anyway."""

    gives_meaning: ClassVar[frozenset[str]] = frozenset()
    """Options without which the same tensors compute something else: ``start_from`` says where they differ."""

    of_the_run: ClassVar[frozenset[str]] = frozenset(
        {"delta", "start_from", "base_check", "delta_files", "verbose", "scalars"}
    )
    """Options that are no part of the delta: no file holds them, or has a say in them."""

    in_place: ClassVar[bool] = False
    """What it trains are parameters of the base as they are; those that the user froze stay frozen."""
    thaws: ClassVar[bool] = True
    """Such a method trains a base that is frozen as a whole: that was made ready for it."""

    mirrors: ClassVar[bool] = True
    """Its deltas can be had twice: a copy of the model that the user keeps (for averages) gets the same, untrained."""

    shards: bool = False
    """Tests show that it trains under strategies that shard parameters over processes."""

    @checked
    def __init__(
        self,
        *,
        name: str = "default",
        delta: str = DEFAULT,
        module: str | None = None,
        modules_to_save: list[str] | str | None = None,
        start_from: str | None = None,
        base_check: BaseCheck = "error",
        budget: float | None = None,
        delta_files: bool = False,
        verbose: bool = True,
        scalars: list[Scalar] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ArgumentError(unknown_option(type(self).__name__, next(iter(unknown)), self.options()))
        if not isinstance(name, str) or not name.isidentifier() or len(name) > 64:
            raise ArgumentError(
                f"name={name!r}: it becomes part of parameter names, so use at most 64 letters, digits and underscores."
            )
        check_delta_name(delta, "delta")
        one_of("base_check", base_check, BaseCheck, "use 'error', 'exact', 'warn' or 'off'.")
        if budget is not None and self.width is None:
            raise ArgumentError(f"budget={budget}: {type(self).__name__} has no width to choose; leave it out.")
        if budget is not None:
            share("budget", budget, "a share of the base's parameters in (0, 1], e.g. 0.005.", kind=int | float)
        figures = listed_if_given(scalars)
        for figure in figures or ():
            if figure not in self.figures:
                known = ", ".join(map(repr, self.figures))
                raise ArgumentError(f"scalars: {figure!r} is not a figure of {type(self).__name__}, which has {known}.")
        self.name = name
        self.delta = delta
        self.module = module
        self.modules_to_save = listed_if_given(modules_to_save)
        if "" in (self.modules_to_save or ()):  # every name ends with it
            raise ArgumentError("modules_to_save: '' names nothing; [] means none, FullFineTuningCallback trains all.")
        self.start_from = start_from
        self.base_check = base_check
        self.budget = budget
        self.delta_files = delta_files
        self.verbose = verbose
        self.scalars = cast(list[Scalar] | None, figures)
        self._of_run: pl.LightningModule | None = None  # of the run that it is, or was last, part of
        self._steps = OwnSteps()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in cls.__dict__:
            METHODS[cls.method] = cls
        if "__init__" in cls.__dict__:
            cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]
        if "setup" in cls.__dict__:
            cls.setup = for_tasks(cls.setup)  # type: ignore[method-assign]

    # --- what a method answers ------------------------------------------------------------------

    @abstractmethod
    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the places in this model; see :class:`lightning_pet.insertion.method.Method`."""

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the delta for one place; methods that override :meth:`insertions`, or insert none, do not need it."""
        raise NotImplementedError(f"{type(self).__name__} builds its deltas in insertions().")

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build all deltas, without touching the model."""
        return [Insertion(target, self.build(root, target), suffix_of(target)) for target in targets]

    def head_parameters(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of the parameters of task heads: ``modules_to_save``, or those among the targets."""
        if self.modules_to_save is not None:
            return parameters_below(root, self.modules_to_save, "modules_to_save")
        modules = named_modules(root)
        heads = [(target.module, modules[target.module]) for target in targets if target.role == HEAD]
        names = dict.fromkeys(join(p, n) for p, m in heads for n, _ in named_parameters(m))
        return tuple(name for name in names if delta_of(name) is None)  # a delta may lie in the head

    def heads_within(self, scope: nn.Module) -> tuple[str, ...]:
        """Names of the parameters of heads in a part of the model; of heads elsewhere nothing is asked."""
        if self.modules_to_save is None:
            return parameters_below(scope, find_heads(scope, ()), "modules_to_save")
        paths = [*named_modules(scope), *(name for name, _ in named_parameters(scope))]
        there = [head for head in self.modules_to_save if any(f".{path}".endswith(f".{head}") for path in paths)]
        return parameters_below(scope, there, "modules_to_save")

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of base parameters that train as they are: the heads."""
        return self.head_parameters(root, targets)

    def deltas(self, root: nn.Module) -> list[tuple[Target, Delta]]:
        """This method's deltas in an adapted root, with their places; empty if it was not applied."""
        return [(target, delta) for applied, target, _, delta, _ in deltas_in(root) if applied.key == key_of(self)]

    def training_deltas(self, root: nn.Module) -> list[tuple[Target, Delta]]:
        """Those of them that train: not the copies in twins, nor those in a part that is in no optimizer."""
        record = record_of(root)
        trains = {delta_prefix(name) for name in record.trainable_names} if record else set()
        ids = {id(inserted.delta) for inserted in deltas_in(root) if inserted.path in trains}
        return [(target, delta) for target, delta in self.deltas(root) if id(delta) in ids]

    def lr_ratios(self, delta_names: Sequence[str]) -> dict[str, float]:
        """Learning-rate factor of those of its own parameters that do not train at their group's rate."""
        return {}

    def group_options(self, delta_names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Optimizer options (``lr``, ``weight_decay`` …) of its own parameters that do not train with their group's."""
        return {}

    @property
    def adapted(self) -> Adapted:
        """The handle on the adapted model, as soon as the model is adapted in a run, and after it.

        Raises:
            PETError: if this callback was in no run yet, or the delta was merged or removed since.
        """
        if self._of_run is None:
            raise PETError(
                f"{type(self).__name__} was in no run of this process yet. Pass it to Trainer(callbacks=[…]) and call "
                "fit; for a model that was adapted elsewhere, lightning_pet.Adapted(model) is the handle."
            )
        return Adapted(self._of_run)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and other processes get the description, not the model of the last run."""
        return self.__dict__ | {"_of_run": None}

    def __repr__(self) -> str:
        defaults = self._defaults()
        given = [
            f"{name}={value!r}" for name, value in self.arguments().items() if _many(value) != _many(defaults[name])
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        """Constructor arguments with their defaults: those of the method, then those that all methods have."""
        found: dict[str, Any] = {}
        for c in cls.__mro__:
            if issubclass(c, PETCallback):
                for name, parameter in inspect.signature(c.__init__).parameters.items():
                    if parameter.kind is not parameter.VAR_KEYWORD:
                        found.setdefault(name, parameter.default)
        return {name: default for name, default in found.items() if name != "self"}

    @classmethod
    def options(cls) -> list[str]:
        """Names of all arguments of the constructor."""
        return list(cls._defaults())

    def arguments(self) -> dict[str, Any]:
        """All constructor arguments, as this instance has them."""
        return {name: getattr(self, name) for name in self._defaults()}

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this instance; JSON types only."""
        return {name: value for name, value in self.arguments().items() if name not in self.of_the_run}

    def config_at(self, targets: Sequence[Target]) -> dict[str, Any]:
        """The same, where options by pattern are in a form that files can hold; see :func:`patterns.settled`."""
        return self.config()

    # --- sizing by a budget ---------------------------------------------------------------------

    def set_width(self, width: int) -> None:
        """Size the method: ``width`` units of its :attr:`width` argument."""
        setattr(self, str(self.width), width)

    def numbers(self, root: nn.Module, targets: Sequence[Target]) -> int:
        """Numbers that the method would train in this model at its present width, heads apart."""
        bare = set(self.trained(root, targets)) - set(self.head_parameters(root, targets))
        beside = sum(p.numel() for name, p in root.named_parameters() if canonical(name) in bare)
        return beside + delta_numbers(root, lambda: self.insertions(root, targets))

    def spend_budget(self, root: nn.Module, targets: Sequence[Target]) -> None:
        """Pick the largest width that spends at most ``budget`` of the base's parameters, and say so.

        Raises:
            ArgumentError: if the smallest width costs more; the message names the smallest budget that works.
        """
        if self.budget is None:
            return
        base = base_numbers(root)

        def numbers(width: int) -> int | None:
            trial = copy(self)
            trial.set_width(width)
            try:
                return trial.numbers(root, targets)
            except (ArgumentError, TargetError):
                if width == 1:
                    raise
                return None  # wider than a host allows

        smallest = copy(self)
        smallest.set_width(1)
        check_affordable(numbers(1) or 0, base, self.budget, f"{self.width}={getattr(smallest, str(self.width))}")
        self.set_width(widest(numbers, affordable(self.budget, base)))
        spent = self.numbers(root, targets)
        rank_zero_info(
            f"{type(self).__name__}(budget={self.budget}) picks {self.width}={getattr(self, str(self.width))}: "
            f"{spent:,} numbers, {spent / base:.3%} of the base."
        )

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take over the width that an equal budget has picked before, for a model that is adapted already."""
        if self.budget is not None and self.budget == config.get("budget"):
            setattr(self, str(self.width), config[str(self.width)])

    # --- Lightning hooks ------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this callback in a checkpoint: the class and the user's names, never a hyper-parameter."""
        of = "" if self.delta == DEFAULT else f", 'delta': {self.delta!r}"
        return f"{type(self).__qualname__}{{'name': {self.name!r}{of}}}"

    @for_tasks
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Rewrite the model, or arrange for it to be rewritten as soon as it exists."""
        methods = [callback for callback in trainer.callbacks if isinstance(callback, PETCallback)]  # type: ignore[attr-defined]
        controller = Controller.of(trainer, pl_module, methods)
        self._of_run = pl_module
        if controller.leads(self):
            controller.setup(stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the optimizer holds the delta, and show the table of trained parameters."""
        if (controller := Controller.get(trainer)).leads(self):
            controller.on_fit_start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the random state of an interrupted run back, before anything draws from it."""
        if (controller := Controller.get(trainer)).leads(self):
            controller.resume.on_train_epoch_start(trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Before a backward pass: the loss depends on something that trains."""
        if not loss.requires_grad and (controller := Controller.get(trainer)).leads(self):
            controller.refuse_dead()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Before an optimizer's first step: its deltas must have received a gradient."""
        self._steps.count(trainer, optimizer)
        if (controller := Controller.get(trainer)).leads(self):
            controller.before_step(optimizer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the base before the first batch."""
        if (controller := Controller.get(trainer)).leads(self):
            controller.before_batch()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the base with what it was, and name deltas that never fired."""
        if (controller := Controller.get(trainer)).leads(self):
            controller.on_train_epoch_end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the base once more, after all hooks of the last epoch."""
        if (controller := Controller.get(trainer)).leads(self):
            controller.watch.check("at the end of the fit")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures that were asked for, in steps that are logged."""
        if self.scalars and logs_this_step(trainer):
            log_figures(pl_module, self, {name: self.figure(name, trainer) for name in self.scalars})

    def figure(self, name: Scalar, trainer: pl.Trainer) -> float:
        """One of :attr:`figures`, now; every process calls this."""
        controller = Controller.get(trainer)
        return norm_of(controller.adapted, self, controller.adapter)

    def _begin_steps(self, trainer: pl.Trainer) -> None:
        """Count the steps of those optimizers that hold what this method trains."""
        record = Controller.get(trainer).adapted.record
        trained = next((applied.trained for applied in record.applied if applied.key == key_of(self)), ())
        root = Controller.get(trainer).adapted.root
        own = {id(p) for _, delta in self.deltas(root) for p in delta.parameters()}
        self._steps.begin(trainer, own or {id(p) for p in tensors_at(root, trained).values()})

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no wrapper behind."""
        if (controller := Controller.find(trainer)) is not None and controller.leads(self):
            controller.teardown()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no wrapper behind."""
        if (controller := Controller.get(trainer)).leads(self):
            controller.teardown()


def _many(value: Any) -> Any:
    """One name is a list of one, and pairs are lists: in these forms arguments are kept."""
    return [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else value


# --- the largest width that spends no more than a share of the base -------------------------------


def base_numbers(root: nn.Module) -> int:
    """Numbers in the base model without deltas; a tied tensor counts once."""
    record = record_of(root)
    own = set(record.delta_names) if record else set()
    return sum(numbers_in(p) for name, p in root.named_parameters() if canonical(name) not in own)


def delta_numbers(root: nn.Module, build: Callable[[], Sequence[Insertion]]) -> int:
    """Trained numbers of the deltas that ``build`` returns; a shared parameter counts once.

    Shapes only: nothing is allocated, computed or drawn, so asking for many widths is cheap on a large model.
    """
    if any(parameter.is_meta for parameter in root.parameters()):
        insertions = build()  # there is no memory to save, and fake tensors cannot stand for meta tensors
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            insertions = build()
    trained = {id(p): p for i in insertions for p in i.delta.parameters() if p.requires_grad}
    return sum(parameter.numel() for parameter in trained.values())


def widest(numbers: Callable[[int], int | None], limit: int) -> int:
    """The largest width, from 1, whose numbers are within a limit.

    Args:
        numbers: trained numbers at a width, not falling with it; ``None`` where the width is impossible.
        limit: numbers that may be spent; those at width 1 are within it.

    >>> widest(lambda width: 10 * width + 3, 95)
    9
    """
    smallest = numbers(1) or 0
    low, high, probe = 1, 0, 2
    while high == 0 or high - low > 1:
        found = numbers(probe)
        if found is None or found > limit:
            high = probe
        elif found <= smallest:
            break  # nothing at all depends on the width
        else:
            low = probe
        if high:
            probe = (low + high) // 2
        elif found is not None:
            # Most methods grow in proportion, so that the first jump lands on the answer.
            probe = low + max(1, (limit - found) * (low - 1) // (found - smallest))
    return low


def affordable(budget: float, base: int) -> int:
    """Numbers that a share of the base pays for."""
    return int(budget * base * (1 + 1e-12))  # a share such as 0.07 of 100 must not fall to 6 by rounding


def check_affordable(smallest: int, base: int, budget: float, width: str) -> None:
    """Refuse a budget that does not pay for the smallest width.

    Raises:
        ArgumentError: naming the smallest budget that does.
    """
    if smallest > affordable(budget, base):
        raise ArgumentError(
            f"budget={budget}: {width} costs {smallest:,} numbers, which is more than that share of the base's "
            f"{base:,}. The smallest budget that works is {smallest_share(smallest, base)}; or leave targets out."
        )


def smallest_share(numbers: int, base: int) -> float:
    """A short decimal, rounded up, that is enough for so many numbers.

    >>> smallest_share(1, 3)
    0.334
    """
    scale = 1000
    while numbers * scale < 100 * base:  # three significant digits
        scale *= 10
    return -(-numbers * scale // base) / scale
