"""What deltas of one kind do to a batch each of whose rows has its own: gathered from one stack, for all rows at once.

A delta of every group of rows, or ``None`` where nothing acts; ``ids`` says of each row which group it belongs to.
Groups are numbered in the order of their first rows, so where there are as many groups as rows each row is its own.
What acts on nothing is filled with numbers that change nothing, to the bit: zeros that are added, ones that multiply.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers.transforms import is_transformed

Parts = Sequence[Tensor | None]
"""The tensors of one delta that go into stacks: ``None`` is what changes nothing."""

Stacks = tuple[Tensor | None, ...]
"""For each of them one tensor, groups first; ``None``: it changes nothing in any group."""


class _Known(NamedTuple):
    """Something that was made of tensors.

    Attributes:
        tensors: themselves, as another may come to lie where one of them did.
        stamps: where each lies, and how often it was changed.
        made: of them.
    """

    tensors: list["ReferenceType[Tensor]"]
    stamps: list[tuple[Any, ...]]
    made: Any

    def holds(self, tensors: Sequence[Tensor], stamps: list[tuple[Any, ...]]) -> bool:
        """Whether it is still made of these."""
        return self.stamps == stamps and all(own() is t for own, t in zip(self.tensors, tensors, strict=True))


_KNOWN: Final[WeakKeyDictionary[nn.Module, dict[Any, _Known]]] = WeakKeyDictionary()
_REMEMBERED: Final = 16  # things of a place


def kept(owner: nn.Module, key: Any, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """What is made of some tensors: kept while nobody wants their gradients, until one of them changes.

    Args:
        owner: with whom it goes.
        key: tells it from what else the owner has.
        tensors: all that it is made of.
        make: makes it.
    """
    followed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if followed or torch.compiler.is_compiling() or is_transformed() or any(t.is_inference() for t in tensors):
        return make()
    stamps = [(tensor.data_ptr(), tensor._version, tensor.device) for tensor in tensors]
    known = _KNOWN.setdefault(owner, {})
    found = known.get(key)
    if found is None or not found.holds(tensors, stamps):
        with torch.inference_mode(False), torch.no_grad():
            found = _Known([ref(tensor) for tensor in tensors], stamps, make())
        if len(known) >= _REMEMBERED:
            known.clear()
        known[key] = found
    return found.made


def stacks_of(
    deltas: Sequence[Any],
    dtype: torch.dtype,
    parts: Callable[[Any], Parts],
    tensors: Callable[[Any], Iterable[Tensor]] | None = None,
    fill: float = 0.0,
) -> Stacks:
    """The stacks of all deltas' parts.

    Args:
        deltas: one per group, at least one of them is not ``None``.
        dtype: of the stacks.
        parts: of a delta.
        tensors: what its parts are made of; its own parameters and buffers unless given.
        fill: what changes nothing.
    """
    own = [delta for delta in deltas if delta is not None]
    made_of = [tensor for delta in own for tensor in (tensors or own_tensors)(delta)]

    def make() -> Stacks:
        each = [None if delta is None else parts(delta) for delta in deltas]
        count = len(next(each_parts for each_parts in each if each_parts is not None))
        columns = [[None if one is None else one[place] for one in each] for place in range(count)]
        return tuple([_stack(column, dtype, fill) for column in columns])

    key = (tuple(None if delta is None else id(delta) for delta in deltas), dtype)
    found: Stacks = kept(own[0], key, made_of, make)
    return found


def own_tensors(delta: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a delta that has no modules inside."""
    held = (*delta._parameters.values(), *delta._buffers.values())
    return [tensor for tensor in held if tensor is not None]


def _stack(column: Sequence[Tensor | None], dtype: torch.dtype, fill: float) -> Tensor | None:
    """One tensor; smaller ones are filled up at the end of every dimension."""
    given = [part for part in column if part is not None]
    if not given:
        return None
    shapes = {part.shape for part in given}
    if len(given) == len(column) and len(shapes) == 1:
        return torch.stack(given).to(dtype)
    size = [max(shape[dim] for shape in shapes) for dim in range(given[0].dim())]
    nothing = given[0].new_full(size, fill)
    return torch.stack([nothing if part is None else _filled(part, size, fill) for part in column]).to(dtype)


def _filled(part: Tensor, size: Sequence[int], fill: float) -> Tensor:
    more = [(0, wanted - present) for wanted, present in zip(size, part.shape, strict=True)]
    if not any(after for _, after in more):
        return part
    return F.pad(part, [edge for pair in reversed(more) for edge in pair], value=fill)


def gathered(stack: Tensor, ids: Tensor) -> Tensor:
    """Of each row its own, rows first."""
    if len(stack) == len(ids):
        return stack
    return stack.expand(len(ids), *stack.shape[1:]) if len(stack) == 1 else stack.index_select(0, ids)


def beside(stack: Tensor, ids: Tensor, x: Tensor, behind: int = 0) -> Tensor:
    """A vector of each row in a shape that goes with a batch-major tensor.

    Args:
        stack: [groups, features].
        ids: of every row, its place in the stack.
        x: [rows · k, ..., features, *behind].
        behind: dimensions of x behind that of the features.
    """
    own = gathered(stack, ids)
    own = own if x.shape[0] == len(ids) else own.repeat_interleave(x.shape[0] // len(ids), 0)
    return own.view(len(own), *(1,) * (x.dim() - 2 - behind), -1, *(1,) * behind)


def by_rows(x: Tensor, ids: Tensor) -> Tensor:
    """A batch-major tensor as rows × whatever belongs to a row × features."""
    return x.reshape(len(ids), -1, x.shape[-1])


# --- kinds --------------------------------------------------------------------------------------------------


def low_rank_rows(
    x: Tensor,
    output: Tensor,
    ids: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    added: Tensor | None = None,
    excess: Tensor | None = None,
) -> Tensor:
    """``(1 + excess) output + (x Aᵀ) Bᵀ + added``.

    Args:
        x: [rows · k, ..., in], batch-major.
        output: [rows · k, ..., out].
        ids: of every row, its place in the stacks.
        a: [groups, r, in].
        b: [groups, out, r], with all factors of the delta.
        added: [groups, out].
        excess: [groups, out].
    """
    assert a is not None
    assert b is not None
    inner = torch.bmm(by_rows(x.to(a.dtype), ids), gathered(a, ids).mT)
    flat = by_rows(output, ids)
    vectors = [None if s is None else gathered(s, ids).unsqueeze(1).to(flat.dtype) for s in (added, excess)]
    if vectors[1] is not None:
        flat = flat * (1 + vectors[1]) if vectors[0] is None else torch.addcmul(vectors[0], flat, 1 + vectors[1])
    elif vectors[0] is not None:
        flat = flat + vectors[0]
    return torch.baddbmm(flat, inner.to(flat.dtype), gathered(b, ids).mT.to(flat.dtype)).view(output.shape)


def bottleneck_rows(
    h: Tensor, seen: Tensor, ids: Tensor, non_linearity: Callable[[Tensor], Tensor], stacks: Stacks
) -> Tensor:
    """``h + up(act(down(norm(seen))))``.

    Args:
        h: [rows · k, ..., width], batch-major.
        seen: of the same shape.
        ids: of every row, its place in the stacks.
        non_linearity: between the layers.
        stacks: weight and bias of the norm [groups, width], down [groups, k, width], its bias, up [groups, width, k],
            its bias; the last two with the factor of the delta.
    """
    norm, shift, down, down_bias, up, up_bias = (None if s is None else gathered(s, ids) for s in stacks)
    assert down is not None
    assert up is not None
    x = by_rows(seen.to(down.dtype), ids)
    if norm is not None and shift is not None:
        x = torch.addcmul(shift.unsqueeze(1), F.layer_norm(x, x.shape[-1:]), norm.unsqueeze(1))
    hidden = _product(x, down, down_bias)
    hidden = non_linearity(hidden)
    if up_bias is None and h.dtype == up.dtype:
        return torch.baddbmm(by_rows(h, ids), hidden, up.mT).view(h.shape)
    return h + _product(hidden, up, up_bias).view(h.shape).to(h.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
