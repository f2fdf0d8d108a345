"""A step of the user's that runs before its fit has begun: it trains nothing, logs nothing and leaves no trace."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_pet.strategies import private
from lightning_pet.strategies.optimizers import collect

LOGS = ("log", "log_dict")
_SILENT = (*LOGS, "print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients", "lr_scheduler_step")


@contextmanager
def replaced(module: pl.LightningModule, methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the block these methods of this one module are others."""
    before = {name: module.__dict__[name] for name in methods if name in module.__dict__}
    module.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, whatever is given."""


@contextmanager
def on_trial(module: pl.LightningModule, configure: Callable[[], Any]) -> Iterator[list[Tensor]]:
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

    methods: dict[str, Callable[..., Any]] = dict.fromkeys(_SILENT, nothing)
    methods |= {"optimizers": optimizers, "lr_schedulers": schedulers, "manual_backward": backward}
    with replaced(module, methods), _uncollected(module), _unwritten(module), _NoBackward(losses):
        yield losses


class _Idle:
    """In place of an optimizer or scheduler: has what it has, and does nothing."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self.optimizer = self if hasattr(own, "param_groups") else own.optimizer
        self.zero_grad = nothing
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
    """Where the values of a tensor and its views begin; 0 if it has none here."""
    return tensor.untyped_storage().data_ptr()


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
