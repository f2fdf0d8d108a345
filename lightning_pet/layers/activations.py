"""Element-wise functions by the names that configurations use."""

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pet.errors import ArgumentError

Activation = Callable[[Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Final[dict[str, Activation]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "linear": _identity,
}


def activation(name: str) -> Activation:
    """The function of that name.

    Raises:
        ArgumentError: if there is none.
    """
    if name not in ACTIVATIONS:
        raise ArgumentError(f"non_linearity={name!r}: use one of {', '.join(map(repr, ACTIVATIONS))}.")
    return ACTIVATIONS[name]
