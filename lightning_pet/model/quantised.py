"""Weights that are stored in fewer bits than the values they stand for.

They are recognised by what they are, and no quantising library is imported: a tensor subclass that says how to
dequantise itself (torchao), a parameter that carries its scales (bitsandbytes), or a dtype of one byte. A method
never needs to know which it is. A delta beside the product runs on any of them; whoever needs values gets
dequantised ones; and nobody changes such a weight, because a sum would have to be rounded to its few values.
"""

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.errors import NotMergeableError, TargetError
from lightning_pet.layers.delta import Delta, is_filled_later
from lightning_pet.layers.sharding import gathered, is_partition, is_sharded

DENSE = (Tensor, nn.Parameter)
"""Exact types of ordinary tensors: a quick look before :func:`is_quantised`."""


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight is quantised, or will be as soon as it moves to its device.

    >>> import torch
    >>> is_quantised(torch.ones(2)), is_quantised(torch.ones(2, dtype=torch.int8))
    (False, True)
    """
    if tensor.dtype.itemsize == 1 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return type(tensor) not in DENSE and (_is_bitsandbytes(tensor) or _dequantises_itself(tensor))


def can_train(tensor: Tensor) -> bool:
    """Whether a parameter is of a form that can train."""
    return (tensor.is_floating_point() or tensor.is_complex()) and not is_quantised(tensor)


def _is_bitsandbytes(tensor: Tensor) -> bool:
    return hasattr(tensor, "quant_state") or hasattr(tensor, "has_fp16_weights")


def _dequantises_itself(tensor: Tensor) -> bool:
    local = tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return type(local).dequantize is not Tensor.dequantize


def waits_for_its_device(tensor: Tensor) -> bool:
    """Whether a weight will be quantised when it moves to its device (bitsandbytes)."""
    quantises = _is_bitsandbytes(tensor) and not getattr(tensor, "has_fp16_weights", False)
    return quantises and tensor.dtype.itemsize > 1


def is_repacked(tensor: Tensor) -> bool:
    """Whether an evaluation on a CPU has repacked a weight of bitsandbytes for inference only."""
    return bool(getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False))


def format_of(tensor: Tensor) -> str:
    """What a quantised weight is called in messages and tables, such as ``torchao Int8Tensor``."""
    if _is_bitsandbytes(tensor):
        kind = getattr(tensor, "quant_type", "int8")
        return f"bitsandbytes {kind}" + (", repacked by an evaluation on the CPU" if is_repacked(tensor) else "")
    if type(tensor) not in DENSE and _dequantises_itself(tensor):
        return f"{type(tensor).__module__.partition('.')[0]} {type(tensor).__name__}"
    return str(tensor.dtype)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Shape of what a weight stands for: several values may be packed into one number."""
    state = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if state is None else state.shape)


def numbers_in(tensor: Tensor) -> int:
    """Numbers that a weight stands for."""
    return prod(shape_of(tensor))


def dense_values(host: nn.Module, parameter: str) -> Tensor:
    """The values that a weight stands for, as an ordinary tensor; the weight itself if it is one.

    Args:
        host: the module that holds it: some formats keep a part of it there.
        parameter: its name in the host.

    Raises:
        TargetError: if this is no format whose values can be read.
    """
    weight: Any = host._parameters[parameter]
    if not is_quantised(weight):
        return weight.detach()  # type: ignore[no-any-return]
    values = _bitsandbytes_values(host, weight) if _is_bitsandbytes(weight) else _own_values(weight)
    if values is None:
        raise TargetError(
            f"{type(host).__name__}.{parameter} is stored as {format_of(weight)}, whose values cannot be read, and "
            "this method computes with them. Use a method that only needs the layer's output (LoRA without DoRA and "
            "with init='kaiming', an adapter, a prefix), or load the base in floating point."
        )
    return values.detach()


def _own_values(weight: Any) -> Tensor | None:
    if type(weight) in DENSE:
        return None
    values: Tensor = weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()
    return values


def _bitsandbytes_values(host: nn.Module, weight: Any) -> Tensor | None:
    data: Tensor = weight.data
    if data.dtype.itemsize > 1:
        return data  # not quantised yet
    functional = sys.modules["bitsandbytes"].functional
    if is_repacked(weight):
        return None
    if hasattr(weight, "quant_state"):
        values: Tensor = functional.dequantize_4bit(data, weight.quant_state)
        return values
    scales = scales_beside(host, weight)
    return functional.int8_vectorwise_dequant(data, scales[0].to(data.device)) if scales else None


def scales_beside(host: nn.Module, weight: Any) -> list[Tensor]:
    """Tensors without which a weight of bitsandbytes is only numbers; they are no parameters of their host."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        found = [*vars(state).values(), *vars(getattr(state, "state2", None) or state).values()]
    else:
        state = getattr(host, "state", None)
        found = [getattr(weight, "SCB", None), getattr(state, "SCB", None)]
    return list({id(value): value for value in found if isinstance(value, Tensor)}.values())


def initialize(delta: Delta, host: nn.Module, parameter: str) -> None:
    """Let a delta initialise itself from its base weight, of whatever format."""
    weight = host._parameters.get(parameter)
    if weight is None or weight.is_meta or is_partition(weight) or is_filled_later():
        return
    if not delta.starts_from_weight:
        delta.initialize_from(weight.detach())
        return
    with gathered(delta):
        delta.initialize_from(dense_values(host, parameter))


def check_hosts(delta: Delta, host: nn.Module, path: str, parameter: str) -> None:
    """Refuse a delta that would have to act on a quantised weight itself.

    Raises:
        TargetError: naming the weight, its format, and what to do.
    """
    weight = host._parameters.get(parameter)
    if delta.path == "weight" and weight is not None and is_quantised(weight):
        raise TargetError(
            f"{path} is stored as {format_of(weight)}, and this method adds to the weight itself there: because the "
            "weight is read without a call of its layer, or because that is how the method works. Load this layer in "
            "floating point, exclude it (exclude_modules), or choose a method that acts on outputs."
        )


def check_trains(name: str, parameter: Tensor) -> None:
    """Refuse to train a quantised weight as it is.

    Raises:
        TargetError: naming the weight, its format, and what to do.
    """
    if is_quantised(parameter):
        raise TargetError(
            f"{name} is stored as {format_of(parameter)} and cannot train as it is. Keep this layer in floating point "
            "(ignore_modules of the precision plug-in, filter_fn of torchao, llm_int8_skip_modules of transformers), "
            "or use a method that adds a delta, such as LoRACallback; modules_to_save=[] leaves a head as it is."
        )


def check_replaceable(host: nn.Module, path: str, weight: Tensor, dequantize: bool) -> None:
    """Refuse to merge into a quantised weight, unless its layer may become an ordinary one.

    Raises:
        NotMergeableError: naming the weight, its format, and what to do.
    """
    if not dequantize:
        raise NotMergeableError(
            f"{path} is stored as {format_of(weight)}, which cannot hold the sum of the weight and a delta: rounding "
            "it to the format again would change the outputs. Keep the delta attached; or load it onto the base in "
            "floating point and merge there; or pass merge_(dequantize=True), which makes ordinary linear layers of "
            "the quantised layers that have a delta."
        )
    if not hasattr(host, "in_features") or len(shape_of(weight)) != 2:
        raise NotMergeableError(
            f"{path} is stored as {format_of(weight)} in a {type(host).__name__}, which is no linear layer that could "
            "be replaced by an ordinary one. Keep the delta attached."
        )


def replace_by_dense(root: nn.Module, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Make ordinary linear layers of the layers that hold a quantised weight.

    Args:
        root: the model; deltas are out of it.
        values: quantised weights, and what to hold in the place of each.
    """
    if not values:
        return
    dense = {id(weight): value for weight, value in values}
    dtype = next((p.dtype for p in root.parameters() if not is_quantised(p)), None)
    for module in list(root.modules()):
        for name, child in list(module._modules.items()):
            weight = None if child is None else child._parameters.get("weight")
            if child is not None and id(weight) in dense:
                value = dense[id(weight)]
                module._modules[name] = _dense(child, value, dtype or value.dtype)


def _dense(layer: Any, values: Tensor, dtype: torch.dtype) -> nn.Module:
    if type(layer) is nn.Linear:  # torchao changes the weight only
        layer.weight = nn.Parameter(values, requires_grad=False)
        return layer
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)
    return dense.train(layer.training)
