"""Places of changes that are made of small factors (LoKr, LoHa), and what fits where."""

from typing import Any, cast

from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.insertion.low_rank_places import is_called
from lightning_pet.layers.delta import options_beside
from lightning_pet.layers.weight_change import Form
from lightning_pet.model.layer_kinds import host_kind, matrix_of, transposed, weight_of
from lightning_pet.model.naming import module_at
from lightning_pet.model.structure import Target

FACTORED_HOSTS = ("linear", "conv1d_hf", "conv", "weight")


def form_at(root: nn.Module, target: Target) -> tuple[Form, bool]:
    """How the weight of a place reads as matrices, and whether its layer is a linear one that is called.

    Raises:
        TargetError: if which way the weight lies cannot be told.
    """
    host = module_at(root, target.module)
    weight = weight_of(host, target.parameter)
    assert weight is not None  # resolve_targets returned it
    kind = host_kind(host, target.parameter)
    outputs, inputs = matrix_of(host, target.parameter)
    if kind == "conv":
        conv = cast(nn.Conv2d, host)
        return Form(outputs, conv.in_channels // conv.groups, tuple(conv.kernel_size)), False
    if is_called(root, target) and kind in ("linear", "conv1d_hf"):
        return Form(outputs, inputs, transposed=kind == "conv1d_hf", rows=target.rows), True
    turned = transposed(host, target.parameter)
    if turned is None and weight.is_meta and any(True for _ in host.buffers()):
        raise TargetError(
            f"{target.path} is {'×'.join(map(str, weight.shape))} in a {type(host).__name__}, whose forward is no "
            "plain product: whether its rows or its columns are the outputs cannot be told on the meta device. Exclude "
            "it with exclude_modules, or load the weights first."
        )
    experts = tuple(weight.shape[:-2])
    return Form(outputs, inputs, experts=experts, transposed=bool(turned), rows=target.rows), False


def beside(root: nn.Module, target: Target) -> dict[str, Any]:
    """Device and dtype of a delta's parameters at a place."""
    weight = weight_of(module_at(root, target.module), target.parameter)
    assert weight is not None
    return options_beside(weight)
