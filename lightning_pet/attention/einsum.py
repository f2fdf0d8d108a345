"""Products of attention that are written as Einstein sums, brought into the order of a matrix product."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_SPARE = "0123"  # names for the dimensions behind an ellipsis


@dataclass(frozen=True)
class Contraction:
    """``einsum(...) == (left @ right.mT).permute(order)``.

    Attributes:
        left: batch × rows × features.
        right: batch × columns × features.
        order: where the dimensions of the product are in the result.
    """

    left: Tensor
    right: Tensor
    order: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        """The result is the product as it stands."""
        return self.order == tuple(range(len(self.order)))


def scores(args: tuple[Any, ...]) -> Contraction | None:
    """A sum whose result ends in rows and columns, the rows from ``left``; ``None`` if it is none."""
    parsed = _parse(args)
    if parsed is None:
        return None
    names, operands, result = parsed
    if len(result) < 2:
        return None
    left = 0 if result[-2] in names[0] else 1
    found = _contraction(names, operands, result, left, result[:-2])
    return found if found is not None and found.in_order else None


def values(args: tuple[Any, ...], shares: int) -> Contraction | None:
    """A sum of which one operand (0 or 1) is batch × rows × columns as it stands; ``None`` if it is none."""
    parsed = _parse(args)
    if parsed is None:
        return None
    names, operands, result = parsed
    own = names[shares]
    found = _contraction(names, operands, result, shares, own[:-2])
    return found if found is not None and own[-2] in result and own[-1] not in result else None


def _parse(args: tuple[Any, ...]) -> tuple[tuple[str, str], tuple[Tensor, Tensor], str] | None:
    """Names of the dimensions of two operands and of the result."""
    if len(args) == 2 and isinstance(args[1], list | tuple):
        args = (args[0], *args[1])
    if len(args) != 3 or not isinstance(args[0], str) or "->" not in args[0]:
        return None
    inputs, _, result = args[0].replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    left, right = args[1], args[2]
    if "..." in args[0]:
        hidden = left.dim() - len(first.replace("...", ""))
        if not first.count("...") == second.count("...") == result.count("...") == 1:
            return None
        if hidden != right.dim() - len(second.replace("...", "")) or hidden > len(_SPARE):
            return None
        first, second, result = (names.replace("...", _SPARE[:hidden]) for names in (first, second, result))
    return (first, second), (left, right), result


def _contraction(
    names: tuple[str, str], operands: tuple[Tensor, Tensor], result: str, left: int, batch: str
) -> Contraction | None:
    mine, theirs = names[left], names[1 - left]
    rows = [name for name in mine if name not in theirs]
    columns = [name for name in theirs if name not in mine]
    summed = [name for name in mine if name in theirs and name not in result]
    shared = {name for name in mine if name in theirs and name in result}
    if len(rows) != 1 or len(columns) != 1 or len(summed) != 1 or shared != set(batch):
        return None
    product = [*batch, rows[0], columns[0]]
    if sorted(product) != sorted(result):
        return None
    return Contraction(
        operands[left].permute([mine.index(name) for name in (*batch, rows[0], summed[0])]),
        operands[1 - left].permute([theirs.index(name) for name in (*batch, columns[0], summed[0])]),
        tuple(product.index(name) for name in result),
    )
