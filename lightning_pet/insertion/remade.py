"""Effective weights that a backward pass makes again, instead of keeping one beside every weight from the forward on.

While a host runs whose deltas know how (:meth:`~lightning_pet.layers.delta.Delta.remaker`), what autograd saves passes
by here: an effective weight is replaced by the way to have it again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_pet.layers.delta import Remaker
from lightning_pet.layers.transforms import is_transformed
from lightning_pet.model.call import CallState


class _Again(NamedTuple):
    """In the place of an effective weight, or of a view of all or some of it."""

    remake: Remaker
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Saved(NamedTuple):
    """Any other tensor: as it is. Hooks are asked instead of autograd, so they see to it that it stays that way."""

    tensor: Tensor
    version: int


class Remade:
    """The effective weights that are read while one host runs."""

    def __init__(self) -> None:
        # Held until the host is done, so that no other tensor gets their memory and is taken for one of them.
        self._known: list[tuple[Tensor, int, Remaker]] = []

    def note(self, effective: Tensor, remake: Remaker) -> None:
        """Backward may have this one by calling ``remake``."""
        self._known.append((effective, effective._version, remake))

    def forget(self) -> None:
        """Let go of the effective weights."""
        self._known.clear()

    def pack(self, tensor: Tensor) -> _Again | _Saved:
        """What is kept of a tensor that autograd saves."""
        for effective, version, remake in self._known:
            alike = tensor.dtype == effective.dtype and tensor.numel() and effective._version == version
            if alike and tensor.untyped_storage().data_ptr() == effective.untyped_storage().data_ptr():
                return _Again(remake, tensor.size(), tensor.stride(), tensor.storage_offset())
        return _Saved(tensor.detach(), tensor._version)


def _unpack(packed: _Again | _Saved) -> Tensor:
    if isinstance(packed, _Again):
        return packed.remake().as_strided(packed.size, packed.stride, packed.offset)
    if packed.tensor._version != packed.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {tuple(packed.tensor.shape)} is at version {packed.tensor._version}; expected version "
            f"{packed.version}."
        )
    return packed.tensor


def may_remake() -> bool:
    """Whether nobody else looks at what is saved here: no compiler, transform, checkpointing or offloading."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or is_transformed():
        return False
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return top is None or isinstance(getattr(top[0], "__self__", None), Remade)


@contextmanager
def remaking(call: CallState) -> Iterator[None]:
    """Within the block effective weights may be noted in ``call.remade``."""
    before, remade = call.remade, Remade()
    call.remade = remade
    try:
        with saved_tensors_hooks(remade.pack, _unpack):
            yield
    finally:
        call.remade = before
        remade.forget()  # autograd holds the hooks as long as what they packed
