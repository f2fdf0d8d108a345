"""Keeps a delta in the precision it was made in, whatever the base is cast to."""

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_pet.layers.delta import Delta


def keep_delta_precision(trainer: pl.Trainer) -> None:
    """Make ``precision='bf16-true'`` (or ``'16-true'``) cast the base only.

    A delta's updates are far smaller than its values: in bfloat16 most of them round to nothing. The
    values are put aside during the conversion, not cast there and back, because a checkpoint is
    restored before it.
    """
    plugin = trainer.precision_plugin
    if "convert_module" in plugin.__dict__:
        return
    original = plugin.convert_module

    def convert_module(module: nn.Module) -> nn.Module:
        kept = [(p, p.data) for m in module.modules() if isinstance(m, Delta) for p in _tensors(m)]
        module = original(module)
        for parameter, data in kept:
            if parameter.dtype.itemsize < data.dtype.itemsize:
                parameter.data = data.to(parameter.device)
        return module

    plugin.convert_module = convert_module  # type: ignore[method-assign]


def _tensors(module: nn.Module) -> list[Any]:
    return [*module.parameters(), *module.buffers()]
