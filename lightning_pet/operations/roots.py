"""Which module of what the user hands over is adapted, and how it is fed for a look at its structure."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_pet.errors import ArgumentError, PETError, TargetError
from lightning_pet.exchange.folder import Base
from lightning_pet.model.adaptation import adapted_root
from lightning_pet.model.naming import canonical, named_modules
from lightning_pet.model.undisturbed import undisturbed
from lightning_pet.probe.host_inputs import Batches
from lightning_pet.probe.probe import analyse
from lightning_pet.strategies import private
from lightning_pet.strategies.agreement import from_all
from lightning_pet.strategies.optimizers import collect
from lightning_pet.strategies.strategy import adapter_for, resumed_from
from lightning_pet.targets.targets import suggest

# --- a step of the user's that runs before its fit: it trains nothing, logs nothing, leaves no trace ---


LOGS = ("log", "log_dict")
_SILENT = (*LOGS, "print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients", "lr_scheduler_step")


@contextmanager
def _replaced(module: pl.LightningModule, methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the block these methods of this one module are others."""
    before = {name: module.__dict__[name] for name in methods if name in module.__dict__}
    module.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, whatever is given."""


@contextmanager
def _on_trial(module: pl.LightningModule, configure: Callable[[], Any]) -> Iterator[list[Tensor]]:
    """Within the block ``module`` may run a step of automatic or manual optimization.

    It finds as many optimizers and schedulers as it will have, with their groups, but they do not step; no loss goes
    backward, no optimizer is toggled, and what the step writes into parameters (averages, clipping) and collects in
    lists, dictionaries and sets of the module is undone.

    Args:
        module: the LightningModule.
        configure: its ``configure_optimizers``, called if the step asks for optimizers or schedulers.

    Yields:
        The losses that would have gone backward; filled while the step runs.
    """
    losses: list[Tensor] = []
    made: list[Any] = []

    def configured() -> Any:
        if not made:
            made.append(configure())
        return made[0]

    def optimizers(use_pl_optimizer: bool = True) -> Any:
        idle = [_Idle(own) for own in collect(configured(), "param_groups")]
        return idle[0] if len(idle) == 1 else idle

    def schedulers() -> Any:
        idle = [_Idle(own) for own in collect(configured(), "step", "optimizer")]
        return None if not idle else idle[0] if len(idle) == 1 else idle

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss)

    methods: dict[str, Callable[..., Any]] = dict.fromkeys(_SILENT, _nothing)
    methods |= {"optimizers": optimizers, "lr_schedulers": schedulers, "manual_backward": backward}
    with _replaced(module, methods), _uncollected(module), _unwritten(module), _NoBackward(losses):
        yield losses


class _Idle:
    """In place of an optimizer or scheduler: has what it has, and does nothing."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self.optimizer = self if hasattr(own, "param_groups") else own.optimizer
        self.zero_grad = _nothing
        self.toggle_model = lambda sync_grad=True: nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Run the closure, which computes the loss; a metric is none."""
        return closure() if callable(closure) else None


class _NoBackward(TorchFunctionMode):
    """``loss.backward()`` without a backward pass, which would free the graph that is to be read."""

    def __init__(self, losses: list[Tensor]) -> None:
        super().__init__()
        self.losses = losses

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.backward:
            self.losses.append(args[0])
            return None
        return func(*args, **(kwargs or {}))


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps a copy of what any operation is about to write into, among some tensors; of nothing else."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {_memory(tensor): tensor for tensor in tensors}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        for tensor in private.written_by(func, args, kwargs or {}):
            self._keep(tensor)
        return func(*args, **(kwargs or {}))

    def _keep(self, tensor: Any) -> None:
        memory = _memory(tensor) if isinstance(tensor, Tensor) else 0
        if memory and memory in self.known and memory not in self.kept:
            own = self.known[memory]
            self.kept[memory] = (own, own.clone())


def _memory(tensor: Tensor) -> int:
    """Where the values of a tensor and its views begin; 0 if it has none here, as one that other tensors make up."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # quantised, or of parts
        return 0


@contextmanager
def _unwritten(module: nn.Module) -> Iterator[None]:
    """Undo what the block writes into parameters, by whatever way."""
    before = [(parameter, parameter.data) for parameter in module.parameters()]
    writes = _Writes([data for _, data in before])
    try:
        with writes:
            yield
    finally:
        with torch.no_grad():
            for data, values in writes.kept.values():
                data.copy_(values)
            for parameter, data in before:
                if _memory(parameter.data) != _memory(data):
                    parameter.data = data


@contextmanager
def _uncollected(module: nn.Module) -> Iterator[None]:
    """Put back what is in the lists, dictionaries and sets that modules keep as attributes."""
    torchs_own = set(vars(nn.Module()))
    collections = {
        id(value): (value, copy(value))
        for part in module.modules()
        for name, value in vars(part).items()
        if name not in torchs_own and isinstance(value, list | dict | set | deque)
    }
    try:
        yield
    finally:
        for value, before in collections.values():
            value.clear()
            getattr(value, "update" if isinstance(value, dict | set) else "extend")(before)


# --- the root, and a forward of it ----------------------------------------------------------------


def default_root(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the adapted root.

    A LightningModule that holds its parameters in one child is a shell around that child, and the
    child is the root; so a delta trained in one LightningModule loads into another, or into the
    bare model. Everything else is its own root.
    """
    if not isinstance(model, pl.LightningModule) or any(True for _ in model.parameters(recurse=False)):
        return "", _unwrapped(model)
    children = [(n, c) for n, c in model.named_children() if any(True for _ in c.parameters())]
    if len(children) != 1 or not any(True for _ in children[0][1].children()):
        return "", model  # a single layer is no model of its own
    return canonical(children[0][0]), _unwrapped(children[0][1])


def root_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the root that is adapted already, else of the one that would be.

    Raises:
        ArgumentError: if this is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"expected a model, a torch.nn.Module, and got {model!r} of type {type(model).__name__}; build it first."
        )
    return adapted_root(model) or default_root(model)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper."""
    inner = module._modules.get("_orig_mod")
    return inner if inner is not None else module


def scope_in(model: nn.Module, prefix: str, module: str | None) -> str | None:
    """Path from the root of a submodule that the user named from the LightningModule; ``None`` if none was named.

    Raises:
        TargetError: if there is no such submodule, or it is outside of the root.
    """
    if module is None:
        return None
    paths = named_modules(model)
    if module not in paths:
        raise TargetError(f"module={module!r}: there is no such submodule.{suggest(module, paths)}")
    if not prefix:
        return module
    if module == prefix:
        return ""
    return module.removeprefix(f"{prefix}.")


def example_forward(model: nn.Module) -> Callable[[], Any] | None:
    """A forward on the LightningModule's ``example_input_array``, if it has one."""
    example = getattr(model, "example_input_array", None)
    if not isinstance(model, pl.LightningModule) or example is None:
        return None
    if isinstance(example, dict):
        return lambda: model(**example)
    if isinstance(example, tuple):
        return lambda: model(*example)
    return lambda: model(example)


def batch_forward(trainer: pl.Trainer, module: pl.LightningModule, configure: Callable[[], Any]) -> Callable[[], Any]:
    """A silent ``training_step`` (or ``predict_step``) on a few rows of the run's first batch.

    The last resort, for models that have neither dummy inputs nor familiar names: it calls user code.

    Args:
        trainer: the Trainer of the run.
        module: its LightningModule.
        configure: the user's own ``configure_optimizers``, for a step that asks for optimizers.
    """

    def forward() -> Any:
        batch = _first_batch(private.loader_of_run(trainer))
        step = module.predict_step if trainer.state.fn == TrainerFn.PREDICTING else module.training_step
        with _on_trial(module, configure) as losses:
            return step(_first_rows(batch, 2), 0), losses

    return forward


def batches_of_run(trainer: pl.Trainer, module: pl.LightningModule, configure: Callable[[], Any]) -> Batches:
    """The training data of a run, for methods that start from them: a silent ``training_step`` on each batch.

    Args:
        trainer: the Trainer of the run.
        module: its LightningModule.
        configure: the user's own ``configure_optimizers``, for a step that asks for optimizers.
    """
    adapter = adapter_for(trainer)

    @contextmanager
    def around() -> Iterator[None]:
        if not adapter.shards:
            module.to(trainer.strategy.root_device)  # where it goes anyway
        with undisturbed(module), torch.compiler.set_stance("force_eager"), _on_trial(module, configure):
            yield

    def passes() -> Iterator[Callable[[], Any]]:
        if trainer.state.fn != TrainerFn.FITTING:
            raise PETError(
                f"a method starts from training data, and this run has none ({trainer.state.fn}). Call fit first, or "
                "give the checkpoint of a run by ckpt_path."
            )
        device = next(module.parameters()).device
        for batch, index in _batches(private.loader_of_run(trainer)):
            yield partial(step, trainer.strategy.batch_to_device(batch, device), index)

    def step(batch: Any, index: int) -> Any:
        with trainer.precision_plugin.train_step_context():
            return module.training_step(batch, index)

    what = "reading training data"
    return Batches(
        passes, resumed_from(trainer), around, lambda action: from_all(what, action) if adapter.several else [action()]
    )


def _batches(loader: Any) -> Iterator[tuple[Any, int]]:
    """All batches of what a ``train_dataloader`` returned, as the run will see them, and their numbers."""
    if loader is None or isinstance(loader, Iterator):
        raise PETError(
            "a method starts from training data, and the run has "
            + ("none" if loader is None else "an iterator, which would be at its end when the run begins")
            + ". Give it a DataLoader."
        )
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
    for batch, index, _ in iter(combined):
        yield batch, index


def silenced(module: pl.LightningModule) -> AbstractContextManager[None]:
    """Within the block ``module.log`` does nothing."""
    return _replaced(module, dict.fromkeys(LOGS, _nothing))


def _first_batch(loader: Any) -> Any:
    iterator = iter(loader)
    if iterator is loader:
        raise TypeError("the data is an iterator, which cannot give its first batch twice")
    return next(iterator)


def _first_rows(batch: Any, rows: int) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[:rows]
    if isinstance(batch, dict):
        return {key: _first_rows(value, rows) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        values = [_first_rows(value, rows) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def base_of(model: nn.Module) -> Base:
    """The part of a model that a folder of another library is read for; a forward is run only if it is asked for."""
    prefix, root = root_of(model)
    return Base(root, lambda: replace(analyse(root, example_forward(model)), prefix=prefix))
