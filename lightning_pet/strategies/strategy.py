"""The seam between a delta and the Trainer's strategy.

A :class:`StrategyAdapter` replaces methods on the strategy *instance*, once, and reads everything
else from the controller at call time, so that it serves every later run of the same Trainer. These
methods are the last stop before the disk: they also serve ``save_weights_only=True``, where no
callback hook runs. Engines that shard have adapters of their own; :mod:`lightning_pet.strategies.strategy`
knows which is whose.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any, Final, Generic, Protocol, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import PETError, UnsupportedStrategyError
from lightning_pet.insertion.method import METHODS
from lightning_pet.layers.sharding import placed, whole
from lightning_pet.model.adaptation import adapted_root, record_of
from lightning_pet.model.naming import VALUE, named_tensors
from lightning_pet.store.entry import read_checkpoint
from lightning_pet.strategies import optimizers as optim
from lightning_pet.strategies import private
from lightning_pet.strategies.agreement import agreed
from lightning_pet.strategies.parameter_groups import clip_norm, groups_of
from lightning_pet.strategies.plain import unseal

_ATTRIBUTE = "_pet_adapter"
Named = Iterable[tuple[str, Tensor]]
S = TypeVar("S", bound=Strategy)
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class CheckpointRules(Protocol):
    """What a strategy adapter asks of the controller."""

    def parts(self) -> dict[str, Tensor]:
        """The module's own tensors of which a checkpoint holds something, by canonical name."""
        ...

    def stored(self, named: Named) -> Named:
        """What a checkpoint holds of these tensors, which are whole."""
        ...

    def keep(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Only the delta of a full state dict, under canonical names."""
        ...

    def before_save(self, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint that is about to be written; runs on every rank."""
        ...

    def after_load(self, checkpoint: dict[str, Any], path: object) -> None:
        """Check a checkpoint that was just read, before anything of it is used."""
        ...

    def load_model(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy the delta of a checked checkpoint into the model."""
        ...

    def before_optimizers(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """Bring saved optimizer states, and those of schedulers, into the order of the present optimizers."""
        ...


class StrategyAdapter(Generic[S]):
    """A single device; base of all others."""

    shards = False
    """Whether a process holds parts of tensors only."""

    materialized_late = False
    """Whether deltas were on the meta device when the model was complete, so that they got their values since."""

    repacks = False
    """Whether its optimizers hold other tensors than the parameters of the module."""

    passes_over = True
    """Whether its optimizers leave a parameter as it is that has no gradient in a step."""

    widens = True
    """Whether what trains in place may have another precision than the frozen parameters beside it."""

    keeps_masters = False
    """Whether its optimizers step float32 copies of what trains in half precision."""

    replaced: tuple[str, ...] = (
        "lightning_module_state_dict",
        "save_checkpoint",
        "load_checkpoint",
        "load_model_state_dict",
        "load_optimizer_state_dict",
    )
    """Methods of the strategy that the methods of the same name stand in for, while there is a delta."""

    def __init__(self, strategy: S) -> None:
        self.strategy = strategy

    @staticmethod
    def installed(strategy: Strategy) -> "StrategyAdapter[Any] | None":
        """The adapter that was installed in an earlier run."""
        return strategy.__dict__.get(_ATTRIBUTE)

    def install(self, rules: Callable[[], CheckpointRules | None]) -> None:
        """Replace the strategy's methods, once.

        Args:
            rules: gives the rules in force at call time; ``None`` while no delta is in the model.
        """
        if _ATTRIBUTE in self.strategy.__dict__:
            return
        self.strategy.__dict__[_ATTRIBUTE] = self

        def call(own: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            active = rules()
            return original(*args, **kwargs) if active is None else own(active, original, *args, **kwargs)

        for name in self.replaced:
            private.replace_method(self.strategy, name, partial(call, getattr(self, name)))

    # --- in place of the strategy's methods -------------------------------------------------------

    def lightning_module_state_dict(self, rules: CheckpointRules, original: Callable[..., Any]) -> dict[str, Any]:
        """The delta instead of everything."""
        return rules.keep(original())

    def save_checkpoint(
        self,
        rules: CheckpointRules,
        original: Callable[..., Any],
        checkpoint: dict[str, Any],
        filepath: Any,
        storage_options: Any = None,
    ) -> None:
        """Complete the checkpoint, then write it."""
        rules.before_save(checkpoint)
        path, write = self.single_file(filepath, original, "save_checkpoint")
        self.agreed(f"saving {path}", lambda: write(checkpoint, path, storage_options=storage_options))

    def load_checkpoint(
        self, rules: CheckpointRules, original: Callable[..., Any], checkpoint_path: Any, weights_only: Any = None
    ) -> dict[str, Any]:
        """Read a checkpoint and check it."""
        path, load = self.single_file(checkpoint_path, original, "load_checkpoint")
        checkpoint: dict[str, Any] = self.agreed(
            f"reading {path}", lambda: read_checkpoint(path, lambda: load(path, weights_only=weights_only))
        )
        unseal(checkpoint, path, weights_only)
        rules.after_load(checkpoint, path)
        return checkpoint

    def single_file(self, path: Any, original: Callable[..., Any], name: str) -> tuple[Any, Callable[..., Any]]:
        """Where a checkpoint is, and the method of this name that writes or reads it there."""
        return path, original

    def load_model_state_dict(
        self, rules: CheckpointRules, original: Callable[..., Any], checkpoint: dict[str, Any], strict: bool = True
    ) -> None:
        """Copy the delta in."""
        rules.load_model(checkpoint)

    def load_optimizer_state_dict(
        self, rules: CheckpointRules, original: Callable[..., Any], checkpoint: Mapping[str, Any]
    ) -> None:
        """Load optimizer states by name."""
        original(rules.before_optimizers(checkpoint))

    # --- what the controller and the rules ask ----------------------------------------------------

    @property
    def several(self) -> bool:
        """Whether this Trainer has other processes: one for a single device may run beside the group of another."""
        return getattr(self.strategy, "world_size", 1) > 1

    def agreed(self, what: str, action: Callable[[], T]) -> T:
        """Run something that may fail in some processes, and then fails in all; see :mod:`.agreement`."""
        return agreed(what, action) if self.several else action()

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse what this engine cannot do with a delta, before anything is changed.

        Raises:
            UnsupportedStrategyError: naming the option and the alternative.
        """

    def planning(self, root: nn.Module) -> AbstractContextManager[None]:
        """Within this context deltas are planned, built and inserted, and base parameters show their whole shapes."""
        return nullcontext()

    def undisturbed(self) -> AbstractContextManager[None]:
        """Within this context tensors are made as usual, whatever the engine does to those of ``configure_model``."""
        return nullcontext()

    def after_insertion(self, root: nn.Module, *, complete: bool) -> None:
        """Deltas were inserted; the engine has not wrapped the model yet.

        Args:
            root: the adapted root.
            complete: whether the last hook that builds the model has run.
        """

    def check_start(self, root: nn.Module) -> None:
        """Refuse to load files into the deltas, if they would not stay in them.

        Raises:
            UnsupportedStrategyError: in every process.
        """

    def optimizers_made(self, optimizers: list[Any], module: pl.LightningModule) -> None:
        """``configure_optimizers`` returned these; the engine has not put its own in their place yet."""

    def has_run(self, root: nn.Module) -> bool:
        """Whether the engine has noted the precisions of the parameters, at their first forward in its hold."""
        return False

    def is_wrapped(self, root: nn.Module) -> bool:
        """Whether the engine has the deltas in its hold, so that they cannot be taken out any more."""
        return False

    def check_wrapped(self, module: pl.LightningModule) -> None:
        """The engine has wrapped the model and built the optimizers; every process runs this.

        Raises:
            PETError: if training would go wrong.
        """
        optim.check(self.optimizers(), module)

    def optimizers(self) -> list[Any]:
        """The optimizers whose groups hold the module's own parameters."""
        return list(self.strategy.optimizers)

    def whole(self, named: Named) -> Named:
        """Give each tensor whole, one after the other; every process must run through all of them."""
        return ((name, whole(tensor)) for name, tensor in named)

    def fill(self, named: Named, values: Mapping[str, Tensor]) -> None:
        """Copy whole values into tensors of these names; every process has all values."""
        with torch.no_grad():
            for name, tensor in named:
                if name in values:
                    tensor.copy_(placed(values[name], tensor))

    def whole_modules(self, modules: Sequence[M]) -> Iterator[tuple[M, dict[str, Tensor]]]:
        """Give each module with its tensors whole; every process must run through all of them."""
        self.settle()
        return each_whole(modules, self.whole)

    def settle(self) -> None:
        """Let modules have the parameters that train, where an engine may have left others in their places."""

    def watch_gradients(self, named: Named) -> None:
        """Gradients of these parameters will be asked for after each optimizer step of this run."""

    def anywhere(self, names: set[str]) -> set[str]:
        """Names that were found in any process, where each sees its own parts only."""
        return names

    def gradients(self, named: Named) -> Iterable[tuple[str, Tensor | None]]:
        """Give each parameter's whole gradient in the last step, as the optimizer used it.

        Every process must run through all of them. ``None`` where there is none in any process.
        """
        return ((name, None if tensor.grad is None else whole(tensor.grad)) for name, tensor in named)

    def shaped(self, named: Named) -> dict[str, Tensor]:
        """The tensors by name, in full shape; their values do not matter."""
        return dict(named)

    def without_gradient(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> list[str]:
        """Those of the parameters that this optimizer holds and that have no gradient."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name, p in parameters.items() if id(p) in held and p.grad is None]

    def still_silent(self, parameters: Mapping[str, nn.Parameter]) -> set[str]:
        """Names of those that have no gradient, as far as this process sees, before a later step."""
        return {name for name, parameter in parameters.items() if parameter.grad is None}

    def everywhere(self, names: set[str]) -> set[str]:
        """Names that were found in all processes."""
        return names

    def parameter_names(self, module: nn.Module) -> list[list[list[str]]]:
        """Names of the parameters of each group of each optimizer."""
        return optim.parameter_names(self.optimizers(), module)

    def groups_of(self, parameters: Sequence[nn.Parameter], module: nn.Module) -> list[dict[str, Any]]:
        """The groups of the optimizers that hold any of these parameters of the module."""
        return groups_of(self.optimizers(), parameters)

    def clip(self, trainer: pl.Trainer, optimizer: Any, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Clip the gradients of some parameters to a norm, before the optimizer steps."""
        clip_norm(trainer, optimizer, parameters, norm)

    def class_names(self) -> list[str]:
        """Classes of the optimizers."""
        return [type(optimizer).__name__ for optimizer in self.optimizers()]

    def require_passing_over(self, what: str) -> None:
        """An option needs optimizers that leave a parameter without gradient as it is.

        Args:
            what: names the option.

        Raises:
            UnsupportedStrategyError: if this engine's do not.
        """
        if not self.passes_over:
            raise UnsupportedStrategyError(
                f"{what}: parameters without gradient in a step must stay as they are, but the optimizer of "
                f"{type(self.strategy).__name__} steps flat partitions, in which weight decay and momentum move them "
                "as well. Use strategy='ddp' or ModelParallelStrategy (FSDP2), or leave the option out."
            )

    def at_boundary(self) -> bool:
        """Whether the optimizers step now, where the engine accumulates gradients itself."""
        return True

    def expect_gaps(self, trainer: pl.Trainer, what: str) -> None:
        """An option leaves parameters without gradient in some steps, others each time; the model is not wrapped yet.

        Raises:
            UnsupportedStrategyError: if the engine cannot have that.
        """
        self.require_passing_over(what)

    def wrap_again(self) -> None:
        """Other parameters than before train from now on, in the middle of a fit: let the strategy know."""


def each_whole(modules: Sequence[M], whole: Callable[[Named], Named] = iter) -> Iterator[tuple[M, dict[str, Tensor]]]:
    """Give each module with its tensors by name, as ``whole`` gives them: by default those it has."""
    named = [(f"{i}.{name}", tensor) for i, module in enumerate(modules) for name, tensor in named_tensors(module)]
    awaited = Counter(name.partition(".")[0] for name, _ in named)
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in whole(named):
        index, _, name = full.partition(".")
        found.setdefault(index, {})[name] = tensor
        if len(found[index]) == awaited[index]:
            yield modules[int(index)], found.pop(index)


def flat_names(groups: Sequence[Sequence[str]]) -> list[str]:
    """The names of all groups in the order of an optimizer's state dict."""
    return [name for group in groups for name in group]


# --- which adapter serves a strategy; those of engines that shard are imported when one is in use ---


ADAPTERS: list[tuple[type[Strategy], tuple[str, str] | None]] = [
    (SingleDeviceXLAStrategy, None),
    (XLAStrategy, None),
    (DeepSpeedStrategy, ("deepspeed", "DeepSpeedAdapter")),
    (FSDPStrategy, ("fsdp", "FSDPAdapter")),
    (ModelParallelStrategy, ("model_parallel", "ModelParallelAdapter")),
    (SingleDeviceStrategy, ("strategy", "StrategyAdapter")),
    (DDPStrategy, ("ddp", "DDPAdapter")),
]
"""Strategy class → module and class of its adapter; the first match by ``isinstance`` decides."""


def adapter_for(trainer: pl.Trainer) -> StrategyAdapter[Any]:
    """The adapter of the Trainer's strategy.

    Raises:
        UnsupportedStrategyError: if there is none.
    """
    if any(kind.__module__.partition(".")[0] == "pytorch_lightning" for kind in type(trainer).__mro__):
        raise UnsupportedStrategyError(
            "this Trainer is of the package pytorch_lightning, whose classes are others than those of lightning. "
            "Import Trainer, LightningModule and callbacks from lightning: import lightning as L, or import "
            "lightning.pytorch as pl."
        )
    strategy = trainer.strategy
    if (found := StrategyAdapter.installed(strategy)) is not None:
        return found
    adapter = next((adapter for kind, adapter in ADAPTERS if isinstance(strategy, kind)), None)
    if adapter is None:
        supported = ", ".join(kind.__name__ for kind, adapter in ADAPTERS if adapter is not None)
        raise UnsupportedStrategyError(
            f"{type(strategy).__name__} cannot train a delta: its checkpoints would not hold it, or parameters that "
            f"are replaced after set-up are lost to it. Supported: {supported}; for one process or several, "
            "strategy='auto' or 'ddp'."
        )
    module, name = adapter
    made: StrategyAdapter[Any] = getattr(import_module(f"lightning_pet.strategies.{module}"), name)(strategy)
    return made


# --- a Trainer whose module carries a delta, and that was given no callback for it: the record suffices ---

# Without this the Trainer would write checkpoints of the whole model, and schedules of the method would stand still.


_READS: Final = "_pet_reads_checkpoint"  # attribute of a Trainer


def accompany_runs() -> None:
    """A model has a delta from here on: let Trainers find its methods, if they are not given them."""
    private.around_runs(_accompanied)


def reads_checkpoint(trainer: pl.Trainer) -> bool:
    """Whether the present run was given a ``ckpt_path``, as far as it is known."""
    return resumed_from(trainer) is not None


def resumed_from(trainer: pl.Trainer) -> str | None:
    """The ``ckpt_path`` of the present run, as far as it is known: Lightning notes it after ``setup`` only."""
    path = trainer.__dict__.get(_READS)
    return None if path is None else str(path)


@contextmanager
def _accompanied(trainer: pl.Trainer, module: pl.LightningModule, path: object) -> Iterator[None]:
    trainer.__dict__[_READS] = path
    rebuilt = _missing(trainer, module)
    if not rebuilt:
        yield
        return
    callbacks = cast(Any, trainer)
    callbacks.callbacks = [*rebuilt, *callbacks.callbacks]
    try:
        yield
    finally:
        callbacks.callbacks = [callback for callback in callbacks.callbacks if callback not in rebuilt]


def _missing(trainer: pl.Trainer, module: pl.LightningModule) -> list[Any]:
    """The methods of a model whose Trainer has none, as callbacks, where the run reads or writes checkpoints."""
    found = adapted_root(module)
    record = record_of(found[1]) if found is not None else None
    methods = tuple(cast(type, kind) for kind in METHODS.values())
    if record is None or any(isinstance(callback, methods) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return []
    fitting = trainer.state.fn == TrainerFn.FITTING
    if not fitting and not reads_checkpoint(trainer):
        return []
    applied = [a for a in record.applied if a.delta in record.active and a.delta not in record.waiting]
    applied = [a for a in applied if a.method != VALUE]  # these come with their methods
    if not applied:
        return []
    if record.together and fitting:
        raise PETError(
            f"{type(module).__name__} carries the deltas of the tasks {', '.join(map(repr, record.together))}, none of "
            "which acts by itself. Give the Trainer the callbacks that trained them, TasksCallback "
            f"among them; or choose one before: Adapted(module).activate({record.together[0]!r})."
        )
    names = ", ".join(f"{a.method}:{a.name}" for a in applied)
    if not all(a.method in METHODS for a in applied):
        rank_zero_warn(
            f"{type(module).__name__} carries a delta ({names}), and the Trainer was given no callback for it: its "
            "checkpoints will hold the whole model. Pass the callbacks that were applied: Trainer(callbacks=[…])."
        )
        return []
    if fitting:
        rank_zero_warn(
            f"{type(module).__name__} carries a delta ({names}), and the Trainer was given no callback for it: it is "
            "trained with the options it was applied with, and checkpoints are delta checkpoints. Pass the callbacks "
            "to the Trainer to say so yourself; to train the model as a whole, call merge_() or remove() first."
        )
    return [METHODS[a.method](**a.config, delta=a.delta) for a in applied]
