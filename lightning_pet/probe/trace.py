"""Run a model once, write down what every module saw, and leave no trace of it."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_pet.model.named_roles import named_places
from lightning_pet.probe.graph import sequence_number, tensors

_IDS = ("input_ids", "decoder_input_ids", "input", "x", "ids", "tokens")


@dataclass
class Call:
    """One call of one module.

    Attributes:
        path: first name of the module.
        depth: number of recorded calls around this one.
        start: sequence number before the call; nodes made inside carry ``start <= n < end``.
        end: sequence number after the call.
        input: ``grad_fn`` of the first tensor argument that has one.
        output: ``grad_fn`` of the first output tensor that has one.
        output_shape: shape of that output.
        takes_ids: the module was given integers, and its forward has an ``attention_mask``.
    """

    path: str
    depth: int
    start: int
    end: int = -1
    input: Node | None = None
    output: Node | None = None
    output_shape: tuple[int, ...] = ()
    takes_ids: bool = False


@dataclass
class Trace:
    """What one forward did.

    Attributes:
        calls: every call of a module, in order of entry.
        embedding: first ``nn.Embedding`` that was given integers.
        consumer: innermost module above that embedding that takes token ids and an attention mask.
        outputs: ``grad_fn`` of every differentiable tensor that the forward returned.
    """

    calls: list[Call] = field(default_factory=list)
    embedding: str | None = None
    consumer: str | None = None
    outputs: list[Node] = field(default_factory=list)


class Tracer:
    """Hooks on every module of ``model`` that fill a :class:`Trace`."""

    def __init__(self, model: nn.Module) -> None:
        self.trace = Trace()
        self._stack: list[Call] = []
        self._paths = {module: path for path, module in named_places(model).items()}

    def running(self) -> list[Call]:
        """Calls that have not returned yet, outermost first."""
        return list(self._stack)

    def path_of(self, module: nn.Module) -> str | None:
        """First name of a module, ``None`` if it is none of the model's."""
        return self._paths.get(module)

    @contextlib.contextmanager
    def attached(self) -> Iterator[Trace]:
        """Record every call until the block is left; the hooks are gone afterwards, whatever happens."""
        handles = []
        try:
            for module in self._paths:
                if not isinstance(module, torch.jit.ScriptModule):
                    handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leave))
            yield self.trace
        finally:
            for handle in handles:
                handle.remove()

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        changed = None
        if not self._stack:
            args, kwargs = changed = _differentiable(args, kwargs)
        call = Call(self._paths[module], len(self._stack), sequence_number())
        call.input = next((node for x in tensors((args, kwargs)) if (node := x.grad_fn) is not None), None)
        given = [x.dtype for x in (*args, *map(kwargs.get, _IDS)) if isinstance(x, Tensor)]
        ids = any([not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool) for dtype in given])
        if ids and self.trace.embedding is None and isinstance(module, nn.Embedding):
            self.trace.embedding = call.path
            self.trace.consumer = next((outer.path for outer in reversed(self._stack) if outer.takes_ids), None)
        call.takes_ids = ids and accepts_mask(module)
        self._stack.append(call)
        self.trace.calls.append(call)
        return changed

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self._paths[module]
        # A model may catch an exception of one of its parts; then calls above ours never came back.
        while self._stack:
            call = self._stack.pop()
            if call.path == path:
                break
        else:
            return
        call.end = sequence_number()
        for result in tensors(output):
            if (node := result.grad_fn) is not None:
                call.output, call.output_shape = node, tuple(result.shape)
                break


def accepts_mask(module: nn.Module) -> bool:
    """The module's forward has an argument ``attention_mask``."""
    try:
        return "attention_mask" in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False


def _differentiable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with float tensors inside the autograd graph, so that the first residual is seen.

    Masks stay as they are (a mask that requires gradient changes the attention kernel); one tensor
    given twice stays one tensor.
    """
    memo: dict[int, Tensor] = {}

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad or value.is_nested:
            return value
        if id(value) not in memo:
            memo[id(value)] = value.detach().clone().requires_grad_().clone()
        return memo[id(value)]

    named = {name: value if "mask" in name else convert(value) for name, value in kwargs.items()}
    return tuple(convert(value) for value in args), named
