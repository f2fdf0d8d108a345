"""Keeping the ingredients of an activation instead of the activation.

The gradient of A needs the layer's input x. Where x is the result of a cheap pointwise operation
whose own backward keeps its inputs (the activation function before a feed-forward block's second
layer), keeping those again costs nothing, and x is recomputed. A frozen layer would not keep its
input, so this takes back most of the memory that a delta on that layer adds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Recipe = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def source_of(x: Tensor) -> Recipe | None:
    """A function and tensors that give ``x``: the cheapest way to have it again in the backward pass.

    Args:
        x: a tensor that is about to be saved for a backward pass.

    Returns:
        The operation that made ``x`` and the inputs that autograd keeps for it anyway; ``None`` if
        there is no such operation, or it is not to be relied upon: while compiling, under
        saved-tensor hooks (checkpointing, offloading), after ``x`` was changed in place.
    """
    # Attributes of a node are documented (autograd mechanics, "saved tensors"); the raw form tells of hooks.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.grad_fn is None or x._version != 0:
        return None
    node: Any = x.grad_fn
    inputs: tuple[Tensor | None, ...]
    function: Callable[..., Tensor]
    match node.name():
        case "GeluBackward0":
            inputs, function = (_kept(node, "self"),), partial(F.gelu, approximate=node._saved_approximate)
        case "SiluBackward0":
            inputs, function = (_kept(node, "self"),), F.silu
        case "MulBackward0":  # the gate of a gated feed-forward block, or a norm
            inputs, function = (_kept(node, "self"), _kept(node, "other")), torch.mul
            if None in inputs or any(t.shape != x.shape for t in inputs if t is not None):
                return _norm(x, node)
        case _:
            return None
    usable = tuple(t for t in inputs if t is not None and t.shape == x.shape and t.dtype == x.dtype)
    return (function, usable) if len(usable) == len(inputs) else None


def _norm(x: Tensor, node: Any) -> Recipe | None:
    """The norm of a Llama, ``weight * (h * rsqrt(…))`` with a frozen weight: only h and the small root are kept."""
    weight, other = _kept(node, "self"), _kept(node, "other")
    inner: Any = node.next_functions[1][0]
    if weight is None or other is not None or inner is None or inner.name() != "MulBackward0":
        return None
    hidden, root = _kept(inner, "self"), _kept(inner, "other")
    if hidden is None or root is None or hidden.shape != x.shape or weight.shape != x.shape[-1:]:
        return None
    if root.shape != (*x.shape[:-1], 1) or not x.dtype == weight.dtype == hidden.dtype == root.dtype:
        return None
    return _normed, (weight, hidden, root)


def _normed(weight: Tensor, hidden: Tensor, root: Tensor) -> Tensor:
    return weight * (hidden * root)


def are_packed() -> bool:
    """Whether hooks see what is saved at present (checkpointing, offloading)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _kept(node: Any, name: str) -> Tensor | None:
    """What a node saved, unless a hook packed it."""
    raw = getattr(node, f"_raw_saved_{name}")
    tensor: Tensor | None = getattr(node, f"_saved_{name}") if raw.unpack_hook is None else None
    return tensor
