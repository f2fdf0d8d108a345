"""Reentrant gradient checkpointing passes gradients only if an input of the checkpointed layer requires one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.strategies import private


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
