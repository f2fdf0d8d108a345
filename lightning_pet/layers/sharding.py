"""Tensors that several processes hold a part of each (``DTensor``), or that are made of several others.

They are read and written as if they were whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part of a tensor."""
    return hasattr(tensor, "full_tensor")  # importing DTensor costs more than all of this package


def is_partition(tensor: Tensor) -> bool:
    """Whether ZeRO-3 keeps this tensor elsewhere, so that it is empty here."""
    return hasattr(tensor, "ds_shape")


def is_flattened(tensor: Tensor) -> bool:
    """Whether FSDP1 keeps this parameter as a part of a flat one, of which each process holds a piece."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def has_master(tensor: Tensor) -> bool:
    """Whether ZeRO trains a copy of this parameter, and writes it back into a flat memory that this is a part of."""
    return hasattr(tensor, "_hp_mapping")


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of all of a tensor."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def without_values(tensor: Tensor) -> Tensor:
    """A tensor of the same dtype on the meta device, in whole shape."""
    return torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. For a sharded one, every process must call this at the same time."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole value, in parts if ``like`` is: each process takes its own, and nothing is sent."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A module's own parameters are whole inside, and each process takes its part of what they have become.

    Every process must enter at the same time, and set the same values.
    """
    parts = {name: p for name, p in module._parameters.items() if p is not None and is_sharded(p)}
    for name, part in parts.items():
        module._parameters[name] = nn.Parameter(whole(part.detach()), requires_grad=part.requires_grad)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(placed(module.get_parameter(name), part))
                module._parameters[name] = part


def holds_parts(module: nn.Module, *, without: str | None = None) -> bool:
    """Whether an engine left this process parts of a model only: units of FSDP1, ``DTensor``, partitions of ZeRO-3.

    Args:
        module: the model.
        without: children of this name are passed over.
    """
    todo = [module]
    while todo:
        part = todo.pop()
        if type(part).__name__ == "FullyShardedDataParallel":
            return True
        if any(p is not None and (is_sharded(p) or is_partition(p)) for p in part._parameters.values()):
            return True
        todo += [child for name, child in part._modules.items() if child is not None and name != without]
    return False


def settled(module: nn.Module) -> None:
    """Let modules hold the parts that their processes keep, where FSDP2 has left whole parameters after a forward.

    What is written into those would be gone with them.
    """
    for part in module.modules():
        # Of its class: an instance would look among its parameters and children for what it does not have.
        if callable(getattr(type(part), "unshard", None)) and callable(getattr(type(part), "reshard", None)):
            part.reshard()  # type: ignore[operator]


def ordinary_parts(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that hold a tensor's values: itself, those of a subclass, or none that can be read."""
    if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
        return []
    if type(tensor.data) is Tensor:
        return [tensor]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    inner = [getattr(tensor, name) for name in flatten()[0]] if flatten is not None else []
    return [part for item in inner for part in ordinary_parts(item)]
