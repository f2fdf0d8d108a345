"""Run a model and leave no trace of it: all state is put back."""

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_pet.errors import TargetError
from lightning_pet.model.fast_paths import forbid_repacking


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on every floating parameter; all state is put back on leaving.

    Put back are training flags, ``requires_grad``, ``.grad``, buffers (values and identity), plain
    attributes that the forward set on its modules, and the random states of torch, Python and NumPy.

    Raises:
        TargetError: a parameter is not initialised yet (lazy modules).
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise TargetError(
                f"parameter {name!r} is not initialised yet (a lazy module). Run one batch through the model before "
                "adapting it, so that its shapes are known."
            )
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    attributes = [dict(vars(module)) for module in modules]
    buffers = [
        {name: (value, None if value is None else value.detach().clone()) for name, value in module._buffers.items()}
        for module in modules
    ]
    with _random_state(), torch.inference_mode(False), torch.enable_grad():
        try:
            forbid_repacking(model)
            for module in modules:
                module.training = False
            for parameter, _, _ in parameters:
                parameter.grad = None
                if parameter.is_floating_point() or parameter.is_complex():
                    parameter.requires_grad_(True)
            yield
        finally:
            for parameter, flag, grad in parameters:
                parameter.requires_grad_(flag)
                parameter.grad = grad
            for module, before, values in zip(modules, attributes, buffers, strict=True):
                _restore(module, before, values)


def _restore(
    module: nn.Module, before: Mapping[str, Any], buffers: Mapping[str, tuple[Tensor | None, Tensor | None]]
) -> None:
    state = vars(module)
    for name in [name for name in state if name not in before]:
        del state[name]
    state.update(before)
    module._buffers.clear()
    for name, (buffer, copy) in buffers.items():
        if buffer is not None and copy is not None and not buffer.is_meta and not torch.equal(buffer, copy):
            with torch.no_grad():
                buffer.copy_(copy)
        module._buffers[name] = buffer


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
