"""Large products at a fraction of their work, for a forward of which only the graph is read.

A graph tells which weight is applied to what; of the numbers, the readers look at where gradients are zero and at
what is added to scores, and neither depends on which numbers a large weight holds.
"""

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LARGE: Final = 1 << 18  # numbers of a weight from which on its product costs more than reading the graph
_COLUMNS: Final = 16  # side by side in memory: one fetch per row


def thinned(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A stand-in for what ``torch.nn.functional.linear`` of these arguments returns; ``None`` where it is not due."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    data, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    if type(data) is not Tensor or not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return None
    if weight.is_meta:
        return None
    if weight.dim() != 2 or weight.numel() < _LARGE or weight.shape[1] % _COLUMNS or data.shape[-1] != weight.shape[1]:
        return None
    if data.dtype is not weight.dtype or data.device != weight.device or not weight.is_floating_point():
        return None
    if torch.is_autocast_enabled(weight.device.type):
        return None
    return Linear.apply(data, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


class Linear(torch.autograd.Function):
    """One node of the graph with the operands and the shape of the whole product; its name says what it is.

    Each column stands for a part of the features, whose mean it is applied to: no feature is without a gradient. The
    factor makes of it a number of the size that the whole product has.
    """

    @staticmethod
    def forward(ctx: Any, data: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Product of some columns with means of features."""
        ctx.columns, ctx.shape = weight[:, :_COLUMNS], data.shape
        parts = data.reshape(*data.shape[:-1], _COLUMNS, -1)
        ctx.factor = math.sqrt(parts.shape[-1])
        return F.linear(parts.mean(-1).mul_(ctx.factor), ctx.columns, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of that; none of the weight, which nobody asks for."""
        (gradient,) = gradients
        parts = (gradient @ ctx.columns).div_(ctx.factor).unsqueeze(-1)
        return parts.expand(*parts.shape[:-1], ctx.shape[-1] // _COLUMNS).reshape(ctx.shape), None, None
