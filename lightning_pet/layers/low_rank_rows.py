"""The low-rank deltas of a batch each of whose rows has its own: gathered into one stack, two products for all."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers.low_rank_product import compute_dtype

Stack = tuple[Tensor, Tensor]


class _Known(NamedTuple):
    """A stack, and what it was made of.

    Attributes:
        tensors: themselves, as another may come to lie where one of them did.
        stamps: where each lies, and how often it was changed.
        stack: of them.
    """

    tensors: list["ReferenceType[Tensor]"]
    stamps: list[tuple[Any, ...]]
    stack: Stack

    def holds(self, tensors: Sequence[Tensor], stamps: list[tuple[Any, ...]]) -> bool:
        """Whether it is still the stack of these."""
        return self.stamps == stamps and all(own() is t for own, t in zip(self.tensors, tensors, strict=True))


_KNOWN: Final[WeakKeyDictionary[nn.Module, dict[Any, _Known]]] = WeakKeyDictionary()
_REMEMBERED: Final = 8  # stacks of a place


def low_rank_rows(deltas: Sequence[Any], ids: Tensor, x: Tensor, output: Tensor) -> Tensor:
    """``output + s (x Aᵀ) Bᵀ`` with A, B and s of each row's own delta.

    Lower ranks are filled with zeros, and s is a part of B.

    Args:
        deltas: have ``a`` [r, in], ``b`` [out, r] and ``scale``; ``None``: zero.
        ids: of every row, its place among the deltas.
        x: [rows · k, ..., in], batch-major.
        output: [rows · k, ..., out].

    Returns:
        As ``output``.
    """
    dtype, batch = compute_dtype(x), len(ids)
    a, b = _stack(deltas, dtype)
    inner = torch.bmm(x.to(dtype).reshape(batch, -1, x.shape[-1]), a.index_select(0, ids).mT)
    flat = output.reshape(batch, -1, output.shape[-1])
    return torch.baddbmm(flat, inner.to(output.dtype), b.index_select(0, ids).mT.to(output.dtype)).view(output.shape)


def _stack(deltas: Sequence[Any], dtype: torch.dtype) -> Stack:
    """A and s · B of all; kept while nobody wants gradients, until one of them changes."""
    own = [delta for delta in deltas if delta is not None]
    tensors = [tensor for delta in own for tensor in (delta.a, delta.b)]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
        return _stacked(deltas, own, dtype)
    key = (tuple(None if delta is None else id(delta) for delta in deltas), dtype)
    stamps = [(tensor.data_ptr(), tensor._version, tensor.device) for tensor in tensors]
    known = _KNOWN.setdefault(own[0], {})
    found = known.get(key)
    if found is None or not found.holds(tensors, stamps):
        with torch.inference_mode(False), torch.no_grad():
            found = _Known([ref(tensor) for tensor in tensors], stamps, _stacked(deltas, own, dtype))
        if len(known) >= _REMEMBERED:
            known.clear()
        known[key] = found
    return found.stack


def _stacked(deltas: Sequence[Any], own: Sequence[Any], dtype: torch.dtype) -> Stack:
    rank, like = max(delta.r for delta in own), own[0]
    zeros = like.a.new_zeros(rank, like.a.shape[1]), like.b.new_zeros(like.b.shape[0], rank)
    first, second = [], []
    for delta in deltas:
        if delta is None:
            first.append(zeros[0].to(dtype))
            second.append(zeros[1].to(dtype))
        else:
            more = rank - delta.r
            first.append(F.pad(delta.a, (0, 0, 0, more)).to(dtype))
            second.append((F.pad(delta.b, (0, more)) * delta.scale).to(dtype))
    return torch.stack(first), torch.stack(second)
