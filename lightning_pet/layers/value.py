"""A value of a delta's own in the place of a parameter of the base."""

import math

import torch
from torch import Tensor, nn

from lightning_pet.layers.delta import Delta, options_beside


class Value(Delta):
    """What a delta trains in the place of one parameter, where several deltas want the same one.

    A delta that trains alone changes the parameter itself. Of several, each needs a parameter of its own: an optimizer
    keeps its state by parameter.

    Args:
        weight: the parameter; training starts from its value.
        outputs: another size of its first dimension, for a head with a number of labels of its own; such a head
            starts at random, as widely spread as the present one, and its bias at zero.
    """

    path = "weight"
    optional_gradient = True

    def __init__(self, weight: Tensor, outputs: int | None = None) -> None:
        super().__init__()
        shape = weight.shape if outputs is None else (outputs, *weight.shape[1:])
        self.value = nn.Parameter(torch.empty(shape, **options_beside(weight)))
        if not weight.is_meta:
            self.initialize_from(weight.detach())

    def reset_parameters(self) -> None:
        """Start at random, where the weight is not known: matrices as projections do, all else at zero."""
        with torch.no_grad():
            if self.value.dim() > 1:
                self.value.normal_(std=1 / math.sqrt(3 * self.value[0].numel()))
            else:
                self.value.zero_()

    def initialize_from(self, weight: Tensor) -> None:
        """Start from the value of the base, if that has this size."""
        with torch.no_grad():
            if weight.shape == self.value.shape:
                self.value.copy_(weight)
            elif weight.dim() > 1:
                self.value.normal_(std=float(weight.float().std()))
            else:
                self.value.zero_()

    def forward(self, weight: Tensor) -> Tensor:
        """The value, in the precision of the parameter."""
        return self.value.to(weight.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """The value: it takes the parameter's place."""
        return self.value.detach().to(weight.dtype, copy=True)

    def reach(self, largest: float) -> float:
        """The largest size in it."""
        return float(self.value.detach().abs().max()) if self.value.numel() else 0.0
