"""Discrete virtual tokens: rows that are real rows of the token table, and how to choose better ones."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_pet.layers.prompt import VirtualTokens


class TriggerRows(VirtualTokens):
    """Virtual tokens that read rows of the table: :math:`e(V + i) = E[t_i]`, with token ids t as a buffer.

    Nothing here trains. While ``watching``, the loss has a gradient with respect to the rows
    (:meth:`take_gradient`).

    Args:
        ids: the trigger, t; or its length, for one that a file brings.
        vocabulary: rows of the table, V.
        device: of the buffer.

    >>> rows = TriggerRows([3, 1], vocabulary=5)
    >>> table = torch.nn.Embedding(5, 4)
    >>> torch.equal(rows(table, torch.tensor([[5, 6, 2]])), table(torch.tensor([[3, 1, 2]])))
    True
    """

    ids: Tensor
    watching: bool = False

    def __init__(self, ids: Sequence[int] | int, vocabulary: int, device: torch.device | None = None) -> None:
        super().__init__(ids if isinstance(ids, int) else len(ids), vocabulary)
        self.start = None if isinstance(ids, int) else list(ids)
        self.register_buffer("ids", torch.zeros(self.length, dtype=torch.long, device=device))
        self.__dict__["leaves"] = []
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The trigger that the search starts from."""
        self.ids.zero_() if self.start is None else self.ids.copy_(torch.tensor(self.start))

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """As for every delta; and ids are those of rows of the table."""
        problems, ids = super().misfits(tensors), tensors.get("ids")
        if not problems and ids is not None and not ids.is_meta and not ((ids >= 0) & (ids < self.vocabulary)).all():
            problems.append(f"ids are not those of a table of {self.vocabulary} rows")
        return problems

    def rows(self, call: Callable[..., Tensor]) -> Tensor:
        """Rows of the table; while watching, they keep their gradient."""
        rows = call(self.ids)
        if self.watching and torch.is_grad_enabled():
            if not rows.requires_grad:  # nothing below the table trains: start the graph here
                rows = rows.detach().requires_grad_()
            rows.retain_grad()
            self.__dict__["leaves"].append(rows)
        return rows

    def take_gradient(self) -> Tensor | None:
        """Gradient of what went backward since the last call, P × width, at least float32; ``None`` if nothing did."""
        leaves, self.__dict__["leaves"] = self.__dict__["leaves"], []
        found = [_full(leaf.grad) for leaf in leaves if leaf.grad is not None]
        return torch.stack(found).sum(0) if found else None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "leaves": []}  # a graph cannot be copied


def _full(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def first_order_scores(table: Tensor, gradient: Tensor) -> Tensor:
    r"""How much the loss falls, to first order, when a row of the table takes the place of a trigger token.

    Args:
        table: V × width.
        gradient: of the loss with respect to this position's row, (width,).

    Returns:
        :math:`-E\,\nabla`, (V,), up to the same constant for all rows.
    """
    return -(table.to(gradient.dtype) @ gradient)


def best_tokens(scores: Tensor, count: int, excluded: Sequence[int] = ()) -> list[int]:
    """The tokens of the ``count`` largest scores, best first; all that may be used if there are fewer."""
    scores = scores.clone()
    scores[list(excluded)] = -torch.inf
    usable = int(torch.isfinite(scores).sum())
    return [int(token) for token in scores.topk(min(count, usable)).indices]
