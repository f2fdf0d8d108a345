"""The base of every method: a Lightning callback that is a plain description of what to insert."""

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast, get_args

import lightning.pytorch as pl
from lightning.pytorch import Callback
from torch import nn
from torch.optim import Optimizer

from lightning_pet.core.applied import record_of
from lightning_pet.core.heads import find_heads, parameters_below
from lightning_pet.core.insertion import CHILD
from lightning_pet.core.method import METHODS, Insertion, key_of
from lightning_pet.core.naming import join, named_modules
from lightning_pet.core.structure import Structure, Target
from lightning_pet.engine.controller import Controller
from lightning_pet.errors import ArgumentError
from lightning_pet.layers.delta import Delta

BaseCheck = Literal["error", "exact", "warn", "off"]


class PETCallback(Callback):
    """Base of all parameter-efficient tuning methods.

    In ``setup`` the callback rewrites the model (or as soon as the model exists, if the
    LightningModule builds it in its own ``setup`` or ``configure_model``), freezes the base, sees to
    it that the optimizer holds the delta, and makes every checkpoint of the run a delta checkpoint.
    Several of them work together in one Trainer, in the order of the list.

    Args:
        name: tells two instances of one method apart.
        module: submodule of the LightningModule to adapt and freeze (default: all of it).
        modules_to_save: modules that train as they are and are saved with the delta. ``None``: the
            task head of a classification model is found by itself; ``[]``: none.
        start_from: delta file or checkpoint whose tensors this method starts from.
        base_check: what to do when a delta meets another base model than it was trained on: ``"error"``
            compares names, shapes and samples of all values, ``"exact"`` every byte (about a second per
            gigabyte, once), both raise; ``"warn"`` goes on.
        verbose: print the table of trained parameters once at the start of a fit.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    method: ClassVar[str]
    may_change: ClassVar[frozenset[str]] = frozenset({"module", "modules_to_save"})
    """Options that may differ between a checkpoint and the run that resumes it; its tensors are compared anyway."""

    def __init__(
        self,
        *,
        name: str = "default",
        module: str | None = None,
        modules_to_save: list[str] | None = None,
        start_from: str | None = None,
        base_check: BaseCheck = "error",
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if not name or not name.isidentifier() or len(name) > 64:
            raise ArgumentError(
                f"name={name!r}: it becomes part of parameter names, so use at most 64 letters, digits and underscores."
            )
        if base_check not in get_args(BaseCheck):
            raise ArgumentError(f"base_check={base_check!r}: use 'error', 'exact', 'warn' or 'off'.")
        self.name = name
        self.module = module
        self.modules_to_save = modules_to_save
        self.start_from = start_from
        self.base_check = base_check
        self.verbose = verbose

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in cls.__dict__:
            METHODS[cls.method] = cls

    # --- what a method answers ------------------------------------------------------------------

    @abstractmethod
    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the places in this model; see :class:`lightning_pet.core.method.Method`."""

    @abstractmethod
    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the delta for one place."""

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build all deltas, without touching the model."""
        return [Insertion(target, self.build(root, target), _suffix(target)) for target in targets]

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of base parameters that train as they are: the heads."""
        heads = find_heads(root, targets) if self.modules_to_save is None else self.modules_to_save
        return parameters_below(root, heads, "modules_to_save")

    def deltas(self, root: nn.Module) -> list[tuple[Target, Delta]]:
        """This method's deltas in an adapted root, with their places; empty if it was not applied."""
        record, modules = record_of(root), named_modules(root)
        return [
            (target, cast(Delta, modules[join(path, CHILD, key)]))
            for applied, target, path, key in (record.hosts() if record else ())
            if applied.key == key_of(self)
        ]

    def lr_ratios(self, delta_names: Sequence[str]) -> dict[str, float]:
        """Learning-rate factor of those of its own parameters that do not train at their group's rate."""
        return {}

    def group_options(self, delta_names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Optimizer options (``lr``, ``weight_decay`` …) of its own parameters that do not train with their group's."""
        return {}

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this instance; JSON types only."""
        names = [
            p
            for c in type(self).__mro__
            if issubclass(c, PETCallback)
            for p in inspect.signature(c.__init__).parameters
        ]
        kept = {name: getattr(self, name) for name in dict.fromkeys(names) if name not in ("self", "kwargs")}
        return {name: value for name, value in kept.items() if name not in ("start_from", "base_check", "verbose")}

    # --- Lightning hooks ------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this callback in a checkpoint: the class and the user's name, never a hyper-parameter."""
        return f"{type(self).__qualname__}{{'name': {self.name!r}}}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Rewrite the model, or arrange for it to be rewritten as soon as it exists."""
        methods = [callback for callback in trainer.callbacks if isinstance(callback, PETCallback)]  # type: ignore[attr-defined]
        controller = Controller.of(trainer, pl_module, methods)
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

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Before an optimizer's first step: every delta that it holds must have received a gradient."""
        if (controller := Controller.get(trainer)).leads(self):
            controller.check_gradients(optimizer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no wrapper behind."""
        if (controller := Controller.find(trainer)) is not None and controller.leads(self):
            controller.teardown()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no wrapper behind."""
        if (controller := Controller.get(trainer)).leads(self):
            controller.teardown()


def _suffix(target: Target) -> str:
    """Tells the deltas of one method on one host apart: several parameters, several roles of one parameter."""
    role = target.role.rpartition(".")[2] if target.role and target.rows else ""
    parameter = "" if target.parameter == "weight" else target.parameter
    return "_".join(part for part in (parameter, role) if part)
