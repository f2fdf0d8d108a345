"""Layers that a precision plug-in replaces, and layers whose weights are quantised: what a run sees to for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from torch import nn

from lightning_pet.errors import PETError, UnsupportedStrategyError
from lightning_pet.model.adaptation import record_of
from lightning_pet.model.layer_kinds import base_class
from lightning_pet.model.named_roles import named_places
from lightning_pet.model.naming import named_modules
from lightning_pet.model.quantised import format_of, is_quantised, is_repacked, waits_for_its_device
from lightning_pet.operations.roots import root_of


def replaces_layers(plugin: object) -> bool:
    """Whether a precision plug-in may put other modules in the place of layers: Lightning's own only cast, but for two.

    Such a plug-in converts the complete model, and converts it once. So it has its turn before anything is inserted.
    """
    if isinstance(plugin, BitsandbytesPrecision | TransformerEnginePrecision):
        return True
    owner = next(cls for cls in type(plugin).__mro__ if "convert_module" in vars(cls))
    return not owner.__module__.startswith("lightning.")


def convert(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let the precision plug-in replace layers now; its second turn, in the strategy's set-up, changes nothing.

    Layers of bitsandbytes quantise their weight when they move to the device. They do it now too: whoever starts
    from a weight starts from the one that the run computes with, and a resumed run sees the base it was saved with.

    Raises:
        PETError: if deltas are in layers that would be replaced.
    """
    _refuse_early_deltas(trainer, module)
    trainer.precision_plugin.convert_module(module)
    if any(waits_for_its_device(parameter) for parameter in module.parameters()):
        module.to(trainer.strategy.root_device)


def _refuse_early_deltas(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    root = root_of(module)[1]
    record, modules = record_of(root), named_modules(root)
    hosts = record.host_paths() if record else set()
    plain = sorted(path for path in hosts if base_class(modules[path]) is nn.Linear)
    converted = any(is_quantised(p) for p in root.parameters()) or any(_of_engine(m) for m in root.modules())
    if plain and not converted:
        raise PETError(
            f"{plain[0]!r} has a delta already, and {type(trainer.precision_plugin).__name__} would replace the layer. "
            "Pass the callback to the Trainer instead of calling lightning_pet.apply or load_delta before (start_from "
            "loads a delta), or quantise the model before you apply the delta."
        )


def _of_engine(module: nn.Module) -> bool:
    return base_class(module).__module__.startswith("transformer_engine")


@contextmanager
def outside_of_init(dtype: torch.dtype) -> Iterator[None]:
    """Within ``configure_model`` plug-ins exchange ``torch.nn.Linear`` and the default dtype: not for what is inserted.

    Args:
        dtype: the default dtype outside of ``configure_model``.
    """
    inside = torch.get_default_dtype()
    names = {name: getattr(nn, name) for name in ("Linear", "LayerNorm")}
    try:
        torch.set_default_dtype(dtype)
        for name in names:
            setattr(nn, name, getattr(nn.modules, name))
        yield
    finally:
        torch.set_default_dtype(inside)
        for name, cls in names.items():
            setattr(nn, name, cls)


def refuse_without_gradient(root: nn.Module) -> None:
    """No layer may stop the gradient on its way to what trains before it.

    Raises:
        UnsupportedStrategyError: naming the first layer that does.
    """
    if (reason := lack_of_gradient(root)) is not None:
        raise UnsupportedStrategyError(reason)


def lack_of_gradient(root: nn.Module) -> str | None:
    """Why what is before a quantised layer could not train, and what to do; ``None`` if all of them pass a gradient.

    Formats that also quantise activations have no derivative in some libraries: their output does not depend on
    their input as far as autograd can see, and training would go wrong without a word.
    """
    seen: set[tuple[type, str]] = set()
    for path, module in named_places(root).items():
        weight: Any = module._parameters.get("weight")
        if weight is not None and is_repacked(weight):
            return (
                f"{path} is stored as {format_of(weight)}: in that form its product has no gradient, so nothing before "
                "it would train. Load the base again, and evaluate it only with the delta in it."
            )
        flatten = getattr(weight, "__tensor_flatten__", None)
        if flatten is None or not is_quantised(weight) or base_class(module) is not nn.Linear:
            continue
        key = type(weight), str(flatten()[1])
        if key not in seen and not _passes_gradient(module, weight):
            return (
                f"{path} is stored as {format_of(weight)} in a form whose product has no gradient with respect to its "
                "input (activations are quantised too), so nothing before it would train. Use a weight-only format, "
                "such as Int8WeightOnlyConfig or IntxWeightOnlyConfig."
            )
        seen.add(key)
    return None


def _passes_gradient(module: Any, weight: Any) -> bool:
    x = torch.ones(1, module.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        return bool(nn.Linear.forward(module, x).requires_grad)
