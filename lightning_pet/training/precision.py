"""Keeps what trains in the precision it was made in, whatever the base is cast to."""

from itertools import chain
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.insertion.widening import is_narrow, narrow, trained_in_place, widen
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.sharding import is_sharded
from lightning_pet.model.adaptation import adapted_roots
from lightning_pet.strategies.parameter_groups import shown, trainable_of
from lightning_pet.strategies.strategy import StrategyAdapter


def keep_precision(trainer: pl.Trainer, adapter: StrategyAdapter[Any]) -> None:
    """Make ``precision='bf16-true'`` (or ``'16-true'``) cast what is frozen only.

    Updates are far smaller than values: in bfloat16 most of them round to nothing. The values are put aside during
    the conversion, not cast there and back, because a checkpoint is restored before it.

    Args:
        trainer: the Trainer.
        adapter: of its strategy.
    """
    plugin = trainer.precision_plugin
    if "convert_module" in plugin.__dict__:
        return
    original = plugin.convert_module

    def convert_module(module: nn.Module) -> nn.Module:
        deltas = [part for m in module.modules() if isinstance(m, Delta) for part in m.modules()]
        parameters = [(part, name, p.data) for part in deltas for name, p in part.named_parameters(recurse=False)]
        buffers = [(part, name, b) for part in deltas for name, b in part.named_buffers(recurse=False)]
        roots = list(adapted_roots(module).values()) if adapter.widens else []
        in_place = [{name: p.data for name, p in trained_in_place(root).items()} for root in roots]
        module = original(module)
        for part, name, data in parameters:
            _restore(part, name, data)
        for part, name, buffer in buffers:
            # A conversion makes new buffers, where it fills parameters anew.
            if _narrowed(now := part.get_buffer(name), buffer):
                part._buffers[name] = buffer.to(now.device)
        for root, values in zip(roots, in_place, strict=True):
            wide = {name: data for name, data in values.items() if not is_narrow(data)}
            widen(root, wide, wide if adapter.has_run(root) else None, module)
            _even_out(root)
        if any(is_sharded(data) for data in chain((d for _, _, d in parameters), *(v.values() for v in in_place))):
            module.to(trainer.strategy.root_device)  # FSDP2 looks for new parameters whenever a module moves
        return module

    plugin.convert_module = convert_module  # type: ignore[method-assign]


def _even_out(root: nn.Module) -> None:
    """What trains in parts must have one precision within a unit."""
    left = trained_in_place(root).values()
    if any(is_sharded(p) for p in left) and any(is_narrow(p) for p in left):
        narrow(root)


def warn_of_rounding(module: nn.Module) -> None:
    """Say which parameters train in half precision: parts of the base that could not be kept in float32."""
    narrow = {name: p for name, p in trainable_of(module).items() if p.is_floating_point() and p.dtype.itemsize < 4}
    if narrow:
        dtype = str(next(iter(narrow.values())).dtype).removeprefix("torch.")
        rank_zero_warn(
            f"{sum(p.numel() for p in narrow.values()):,} numbers train in {dtype}, as the base is: "
            f"{shown(list(narrow))}. Updates smaller than a 256th (bfloat16) or a 2048th (float16) of a value round to "
            "nothing. With precision='bf16-mixed' and a float32 base they train in float32, as deltas do in any case."
        )


def _restore(part: nn.Module, name: str, data: Tensor) -> None:
    now = part.get_parameter(name)
    if not _narrowed(now, data):
        return
    if is_sharded(now):
        part._parameters[name] = nn.Parameter(data.to(now.device), requires_grad=now.requires_grad)
    else:
        now.data = data.to(now.device)


def _narrowed(now: Tensor, before: Tensor) -> bool:
    return now.dtype.itemsize < before.dtype.itemsize
