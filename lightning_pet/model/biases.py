"""Which bias goes with which weight."""

import re

from torch import nn

from lightning_pet.model.structure import Rows

_BIAS = re.compile(r"(?:^|_)bias(?:_|$)")


def is_bias(parameter: str) -> bool:
    """Whether the name of a parameter says that it is added to a product, whatever its shape.

    >>> is_bias("gate_up_proj_bias"), is_bias("bias_k"), is_bias("weight")
    (True, True, False)
    """
    return _BIAS.search(parameter) is not None


def bias_of(module: nn.Module, parameter: str = "weight", rows: Rows | None = None) -> tuple[str, Rows | None] | None:
    """Name of the bias that is added to a product with this weight, and the rows of it that are meant.

    Args:
        module: the host.
        parameter: the weight inside the host.
        rows: output features of a fused weight; the same ones of the bias are meant.

    Returns:
        ``None`` if the host has no such bias.

    >>> bias_of(nn.Linear(2, 2)), bias_of(nn.Linear(2, 2, bias=False))
    (('bias', None), None)
    >>> bias_of(nn.MultiheadAttention(4, 2, kdim=3), "k_proj_weight")
    ('in_proj_bias', ((4, 8),))
    """
    if isinstance(module, nn.MultiheadAttention) and parameter in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        first = "qkv".index(parameter[0]) * module.embed_dim
        parameter, rows = "in_proj_weight", ((first, first + module.embed_dim),)
    for name in (parameter.replace("weight", "bias"), f"{parameter}_bias"):
        if name != parameter and module._parameters.get(name) is not None:
            return name, rows
    return None
