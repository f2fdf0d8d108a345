"""How a model runs while it is looked at or adapted: past none of its parts, and leaving no trace where it must not."""

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_pet.errors import TargetError


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block a module is in evaluation mode; at its end each of its parts is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


# --- no fast path: where torch runs a transformer layer past its parts, or bitsandbytes past autograd ---


# In eval mode the fast path hands a layer's raw weights to one fused operator, past every delta, and the
# encoder packs its input into a nested tensor for it. These flags are conditions of the two, and nothing else.
_FAST_PATH: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)

_KEPT = "_pet_fast_path"


def forbid(module: nn.Module) -> None:
    """Take the slow path, and remember what was set."""
    for cls, flag, off in _FAST_PATH:
        if isinstance(module, cls) and hasattr(module, flag):
            module.__dict__.setdefault(_KEPT, getattr(module, flag))
            setattr(module, flag, off)


def restore(module: nn.Module) -> None:
    """Put back what was set."""
    if _KEPT in module.__dict__:
        for cls, flag, _ in _FAST_PATH:
            if isinstance(module, cls):
                setattr(module, flag, module.__dict__.pop(_KEPT))


def set_aside(module: nn.Module) -> dict[str, Any]:
    """What was set, as attributes."""
    kept = module.__dict__
    return {flag: kept[_KEPT] for cls, flag, _ in _FAST_PATH if isinstance(module, cls) and _KEPT in kept}


# On some CPUs a 4-bit layer of bitsandbytes repacks its weight when it is first evaluated: in place, with its scales
# rounded, and into a form whose product has no gradient. A validation would end the training of all that is before it.
_REPACKS = "support_avx512bf16_for_cpu"


def forbid_repacking(root: nn.Module) -> None:
    """Leave quantised weights as they are when layers are evaluated, and remember what was set."""
    for module in root.modules():
        if vars(module).get(_REPACKS):
            module.__dict__[f"_pet_{_REPACKS}"] = True
            setattr(module, _REPACKS, False)


def restore_repacking(root: nn.Module) -> None:
    """Put back what was set."""
    for module in root.modules():
        if module.__dict__.pop(f"_pet_{_REPACKS}", False):
            setattr(module, _REPACKS, True)


# --- no trace: all state is put back --------------------------------------------------------------


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
