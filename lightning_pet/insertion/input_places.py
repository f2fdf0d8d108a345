"""Places of deltas that turn the input of a layer: one input for all of its outputs, so no role of a fused weight."""

from typing import Any, NamedTuple, cast

from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.insertion.low_rank_places import is_called
from lightning_pet.layers.delta import options_beside
from lightning_pet.model.layer_kinds import host_kind, matrix_of, transposed, weight_of
from lightning_pet.model.naming import module_at
from lightning_pet.model.structure import Target


class InputPlace(NamedTuple):
    """What a delta on the input of a layer has to know of it.

    Attributes:
        features: inputs of one output; of a convolution, those of one place of its kernel window.
        called: its call gets them; otherwise the weight is what can be turned.
        options: for the delta: ``stack``, ``transposed``, ``kernel``, ``device``, ``dtype``.
    """

    features: int
    called: bool
    options: dict[str, Any]


def turns_inputs(module: nn.Module, parameter: str) -> bool:
    """Whether a layer's input can be turned at all."""
    return host_kind(module, parameter) in ("linear", "conv1d_hf", "conv", "weight")


def input_place(root: nn.Module, target: Target) -> InputPlace:
    """Look at one place.

    Raises:
        TargetError: if the target is a part of a fused projection, a convolution in groups, or a weight of which it
            cannot be told where its inputs are.
    """
    host = module_at(root, target.module)
    weight = weight_of(host, target.parameter)
    assert weight is not None  # resolve_targets returned it
    if target.rows is not None:
        name = target.module.rpartition(".")[2] if target.parameter == "weight" else target.parameter
        raise TargetError(
            f"{target.path}: only {target.role or 'some of its outputs'} is meant, but this projection has one input "
            f"for all of them, and this method turns the input. Name the whole projection: target_modules=[{name!r}]."
        )
    kind, features = host_kind(host, target.parameter), matrix_of(host, target.parameter)[1]
    options: dict[str, Any] = options_beside(weight)
    if kind == "conv":
        conv = cast(nn.Conv2d, host)
        if conv.groups > 1:
            raise TargetError(
                f"{target.path} is a convolution of {conv.groups} groups, each of which reads inputs of its own, and "
                "this method turns one input for all. Exclude it with exclude_modules."
            )
        return InputPlace(features, False, options | {"kernel": True})
    if is_called(root, target):
        return InputPlace(features, True, options | {"transposed": kind == "conv1d_hf"})
    turned = transposed(host, target.parameter)
    if turned is None:
        raise TargetError(
            f"{target.path} is {'×'.join(map(str, weight.shape))} in a {type(host).__name__}, whose forward is no "
            "plain product: whether its rows or its columns are the inputs cannot be told. Exclude it with "
            "exclude_modules."
        )
    return InputPlace(features, False, options | {"stack": tuple(weight.shape[:-2]), "transposed": turned})
