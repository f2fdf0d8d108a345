"""How a step computes: in which formats and precision, from inputs that pass gradients, and how its loss is scaled."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import PETError, UnsupportedStrategyError
from lightning_pet.insertion.checks import lack_of_gradient
from lightning_pet.insertion.widening import is_narrow, narrow, trained_in_place, widen
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.sharding import is_sharded
from lightning_pet.layers.side_loss import Penalty, forget_scale, measure
from lightning_pet.model.adaptation import adapted_roots, record_of
from lightning_pet.model.layer_kinds import base_class
from lightning_pet.model.naming import named_modules
from lightning_pet.model.quantised import is_quantised, waits_for_its_device
from lightning_pet.operations.roots import root_of
from lightning_pet.strategies import private
from lightning_pet.strategies.parameter_groups import shown, trainable_of
from lightning_pet.strategies.strategy import StrategyAdapter

# --- what trains keeps the precision it was made in, whatever the base is cast to -----------------


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


# --- reentrant gradient checkpointing -------------------------------------------------------------


def let_inputs_require_grad(root: nn.Module) -> Callable[[], None]:
    """With a frozen input embedding, nothing before the first layer would require a gradient: see to it that it does.

    Only for transformers models with reentrant checkpointing switched on, which tell their input embedding.

    Returns:
        A function that undoes it.
    """
    handles = []
    if any([private.checkpoints_reentrantly(module) for module in root.modules()]):
        for embedding in _input_embeddings(root):
            handles.append(embedding.register_forward_hook(_require_grad))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _input_embeddings(root: nn.Module) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    for module in root.modules():
        getter = getattr(module, "get_input_embeddings", None)
        try:
            embedding = getter() if getter is not None else None
        except NotImplementedError:
            continue
        if isinstance(embedding, nn.Module):
            found[id(embedding)] = embedding
    return list(found.values())


def _require_grad(module: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor) and torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)


# --- the scale of the loss, for penalties that methods add beside it ------------------------------


def measure_losses(module: pl.LightningModule, root: nn.Module) -> Callable[[], None]:
    """Look at what ``training_step`` returns and ``manual_backward`` is given; nothing if no delta has a penalty.

    A loss that is passed to ``torch``'s own ``backward`` is not scaled by anyone, and needs no measuring.

    Args:
        module: the LightningModule.
        root: the adapted root in it.

    Returns:
        A function that undoes it.
    """
    if not any(isinstance(value, Penalty) for part in root.modules() for value in vars(part).values()):
        return lambda: None
    undo = [private.replace_method(module, "manual_backward", _measured_argument)]
    original = module.training_step
    undo.append(private.replace_method(module, "training_step", _measured_result))
    module.training_step.__wrapped__ = original  # type: ignore[attr-defined]  # Lightning reads the signature

    def back() -> None:
        for undone in undo:
            undone()
        forget_scale()

    return back


def _measured_result(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = original(*args, **kwargs)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        measure(loss)
    return output


def _measured_argument(original: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any) -> None:
    measure(loss)
    original(loss, *args, **kwargs)


# --- layers that a precision plug-in replaces, and layers whose weights are quantised -------------


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
