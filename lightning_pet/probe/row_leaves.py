"""Which of the tensors that a module gets and gives belong to rows, and which all rows share.

A first dimension as long as the batch does not tell: a mask of T × T has one, too, where T happens to be the batch.
Two forwards do: with the rows in another order, and with one row more.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

Key = tuple[Any, ...]
Leaves = dict[Key, Tensor]

CLOSE: Final = 1e-4
ROWS, SHARED = "rows", "shared"
_EITHER: Final = frozenset({ROWS, SHARED})


def tensors_in(value: Any, key: Key = ()) -> Leaves:
    """All tensors in nested arguments or outputs, by where they are."""
    if isinstance(value, Tensor):
        return {key: value}
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    return {k: tensor for name, item in items for k, tensor in tensors_in(item, (*key, name)).items()}


class Sides:
    """Of every tensor that modules get and give, whether it belongs to rows or to all of them.

    Attributes:
        possible: what was not ruled out yet, by module, direction and place.
    """

    def __init__(self) -> None:
        self.possible: dict[str, dict[Key, frozenset[str]]] = {}

    def known(self, path: str | None) -> bool:
        """Whether the module was seen at all."""
        return path in self.possible

    def of(self, path: str | None, key: Key) -> str | None:
        """``ROWS`` or ``SHARED``; ``None``: nobody knows.

        Args:
            path: of the module.
            key: ``"gets"`` or ``"gives"``, and where the tensor is in it.
        """
        found = _EITHER if path is None else self.possible.get(path, {}).get(key, _EITHER)
        return next(iter(found)) if len(found) == 1 else None

    def reordered(self, path: str, batch: int, order: Sequence[int], one: Leaves, other: Leaves, one_row: bool) -> None:
        """Compare with the same rows in another order.

        Args:
            path: of the module.
            batch: number of rows.
            order: the other order.
            one: the tensors.
            other: those of the other order.
            one_row: a first dimension of 1 is a batch of one for all, as no other dimension has this length.
        """
        for key, x in one.items():
            if (y := other.get(key)) is None or not _is_plain(x) or not _is_plain(y):
                continue
            if y.shape == x.shape and x.shape[0] == 1:
                self._rule(path, key, frozenset({ROWS}) if one_row else _EITHER)
            elif y.shape == x.shape and not x.numel():
                self._rule(path, key, _EITHER)
            else:
                follows = y.shape == x.shape and x.shape[0] % batch == 0 and close(ordered(x, batch, order), y)
                stays = y.shape == x.shape and close(x, y)
                self._rule(path, key, frozenset([ROWS] * follows + [SHARED] * stays))

    def grown(self, path: str, batch: int, more: int, one: Leaves, other: Leaves) -> None:
        """Compare with a batch of more rows: only lengths, as kernels may round otherwise."""
        for key, x in one.items():
            if (y := other.get(key)) is None or not _is_plain(x) or not _is_plain(y) or x.shape[0] == 1:
                continue
            follows = x.shape[0] % batch == 0 and y.shape[:1] == (x.shape[0] // batch * more,)
            self._rule(path, key, frozenset([ROWS] * follows + [SHARED] * (y.shape == x.shape)))

    def _rule(self, path: str, key: Key, possible: frozenset[str]) -> None:
        own = self.possible.setdefault(path, {})
        own[key] = own.get(key, _EITHER) & possible


def _is_plain(x: Tensor) -> bool:
    """Whether the first dimension can be divided."""
    return x.dim() > 0 and x.layout is torch.strided and not x.is_nested


def ordered(x: Tensor, batch: int, order: Sequence[int]) -> Tensor:
    """These rows of a batch-major tensor."""
    return x.reshape(batch, x.shape[0] // batch, *x.shape[1:])[list(order)].flatten(0, 1)


def close(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape have the same numbers, up to rounding."""
    if not x.is_floating_point():
        return torch.equal(x, y)
    if x.dtype.itemsize == 1:  # there is no arithmetic on 8 bits
        x, y = x.float(), y.float()
    scale = float(x.abs().max()) if x.numel() else 0.0
    return bool(((x == y) | ((x - y).abs() <= CLOSE * (1 + scale))).all())
