"""Virtual tokens: rows behind the end of an embedding table, which exist in the delta only.

A table of V rows answers ids V, V+1, … with trained vectors. What prepends these ids to a batch is not
known here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers.delta import Delta, the_first_for_all
from lightning_pet.layers.sharding import whole
from lightning_pet.layers.transforms import is_transformed

_MLP = ("hidden", "hidden_bias", "out", "out_bias")


class VirtualTokens(Delta):
    """Ids behind the end of a token table, with rows of their own.

    Args:
        length: number of virtual tokens, P.
        vocabulary: rows of the table, V.
    """

    path = "around"

    def __init__(self, length: int, vocabulary: int) -> None:
        super().__init__()
        self.length, self.vocabulary = length, vocabulary
        self.__dict__["host"] = None  # the table, if several prompts may share it

    @property
    def first(self) -> int:
        """The id of the first row: prompts that share a table take their ids one after the other."""
        return self.vocabulary + _lengths_before(self.__dict__["host"], self, VirtualTokens)

    def rows(self, call: Callable[..., Tensor]) -> Tensor:
        """What the host answers for the virtual ids, P × width; ``call`` looks real ids up."""
        raise NotImplementedError

    @staticmethod
    def row_form(deltas: Sequence["VirtualTokens | None"], ids: Tensor, owner: Any) -> Callable[..., Any]:
        """Look up with the rows of all of them: each has ids of its own; see :attr:`Delta.row_form`."""
        own = [delta for delta in deltas if delta is not None]
        return lambda call, args, kwargs: _looked_up(own, call, *args, **kwargs)

    def forward(self, call: Callable[..., Tensor], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look up; the rows come from here, all other ids from the table."""
        first = self.first
        if _may_look(ids) and int(ids.max()) < first:
            return call(ids, *args, **kwargs)  # generation goes on with real tokens only
        virtual = (ids >= first) & (ids < first + self.length)
        out = call(ids.masked_fill(virtual, 0), *args, **kwargs)
        # One row of zeros for all real tokens: its gradient is never added up.
        own = F.pad(self.rows(call).to(out.dtype), (0, 0, 0, 1))
        rows = F.embedding(torch.where(virtual, ids - first, self.length), own, padding_idx=self.length)
        return torch.where(virtual.unsqueeze(-1), rows, out)


def _looked_up(
    deltas: Sequence[VirtualTokens], call: Callable[..., Tensor], ids: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """What the host answers with the rows of several deltas."""
    firsts = [delta.first for delta in deltas]
    lowest = min(firsts)
    if _may_look(ids) and int(ids.max()) < lowest:
        return call(ids, *args, **kwargs)
    virtual = ids >= deltas[0].vocabulary
    out = call(ids.masked_fill(virtual, 0), *args, **kwargs)
    own = F.pad(torch.cat([delta.rows(call).to(out.dtype) for delta in deltas]), (0, 0, 0, 1))
    places = [len(own) - 1] * (max(f + delta.length for f, delta in zip(firsts, deltas, strict=True)) - lowest)
    place = 0
    for first, delta in zip(firsts, deltas, strict=True):
        places[first - lowest : first - lowest + delta.length] = range(place, place + delta.length)
        place += delta.length
    found = torch.tensor(places, device=ids.device)[(ids - lowest).clamp(0, len(places) - 1)]
    rows = F.embedding(torch.where(virtual, found, place), own, padding_idx=place)
    return torch.where(virtual.unsqueeze(-1), rows, out)


def _may_look(ids: Tensor) -> bool:
    """Whether the values of ids may decide what runs: nobody traces, wants gradients of all rows, or has to wait."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
        return False
    return ids.device.type == "cpu" and type(ids) is Tensor and ids.numel() > 0


class VirtualRows(VirtualTokens):
    r"""Trained rows of a token table: :math:`e(V + i) = P_i`, or :math:`W_2\,relu(W_1 P_i + b_1) + b_2`.

    Lester et al. 2021 (prompt tuning) train P itself; Liu et al. 2021 (P-tuning) train it through an MLP,
    which is no longer needed afterwards: a delta file also holds the rows that came out of it (``folded``).

    Args:
        length: number of rows, P.
        width: numbers in a row of the table.
        vocabulary: rows of the table, V.
        hidden: width of the MLP; 0: none.
        sources: for every row the token ids whose mean it starts from; ``None``: U(−0.5, 0.5).
        scale: factor that the host applies to what it looks up.
        device: of the parameters.
        dtype: of the parameters.

    >>> rows = VirtualRows(2, 3, vocabulary=5)
    >>> table = nn.Embedding(5, 3)
    >>> out = rows(table, torch.tensor([[5, 6, 1]]))
    >>> torch.equal(out[0, :2], rows.prompt), torch.equal(out[0, 2], table.weight[1])
    (True, True)
    """

    hidden: nn.Parameter | None
    hidden_bias: nn.Parameter | None
    out: nn.Parameter
    out_bias: nn.Parameter

    def __init__(
        self,
        length: int,
        width: int,
        vocabulary: int,
        hidden: int = 0,
        sources: Sequence[Sequence[int]] | None = None,
        scale: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(length, vocabulary)
        self.scale = scale
        self.sources = None if sources is None else [list(ids) for ids in sources]
        self.prompt = nn.Parameter(torch.empty(length, width, device=device, dtype=dtype))
        shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
        for name, shape in zip(_MLP, shapes, strict=True):
            value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if hidden else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """P from U(−0.5, 0.5); the MLP like a linear layer."""
        nn.init.uniform_(self.prompt, -0.5, 0.5)
        if self.hidden is not None:
            for first, second in ((self.hidden, self.hidden_bias), (self.out, self.out_bias)):
                for value in (first, second):
                    nn.init.uniform_(cast(Tensor, value), -(first.shape[1] ** -0.5), first.shape[1] ** -0.5)

    @property
    def starts_from_weight(self) -> bool:  # type: ignore[override]
        """Rows of the table may be where they start."""
        return self.sources is not None

    def initialize_from(self, weight: Tensor) -> None:
        """Start every row from the mean of its source rows of the table."""
        if self.sources is None:
            return
        weight = whole(weight)
        with torch.no_grad():
            for row, ids in zip(self.prompt, self.sources, strict=True):
                row.copy_(weight[ids].to(row.dtype).mean(0) * self.scale)

    def vectors(self) -> Tensor:
        """The rows, P × width, as the host's output shows them."""
        if self.hidden is None:
            return self.prompt
        return F.linear(F.relu(F.linear(self.prompt, self.hidden, self.hidden_bias)), self.out, self.out_bias)

    def rows(self, call: Callable[..., Tensor]) -> Tensor:
        """The trained rows."""
        return self.vectors()

    def packed(self) -> dict[str, Tensor]:
        """Parameters, and the folded rows where an MLP makes them."""
        folded = {} if self.hidden is None else {"folded": self.vectors().detach()}
        return super().packed() | folded

    def misfits(self, tensors: Any) -> list[str]:
        """The folded rows follow from the rest."""
        return super().misfits({name: tensor for name, tensor in tensors.items() if name != "folded"})

    def unpack(self, tensors: Any) -> None:
        """Take over everything but the folded rows, which follow from the rest."""
        super().unpack({name: tensor for name, tensor in tensors.items() if name != "folded"})


class IdGuard(Delta):
    """Keeps virtual ids away from a table that is indexed by token ids but is not the token embedding.

    Args:
        vocabulary: rows of the table; larger ids read row 0.
    """

    path = "around"

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    row_form = staticmethod(the_first_for_all)

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    def forward(self, call: Callable[..., Tensor], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look up with every virtual id replaced by 0."""
        return call(ids.masked_fill(ids >= self.vocabulary, 0), *args, **kwargs)


def _lengths_before(host: nn.Module | None, delta: Delta, kind: type[Delta]) -> int:
    """Virtual tokens of the prompts that come before this one on the same host."""
    before = 0
    for other in () if host is None else cast(nn.ModuleDict, host.pet).values():
        inner = other._modules.get("_fsdp_wrapped_module") or other
        if inner is delta:
            break
        if isinstance(inner, kind):
            before += cast(int, inner.length)
    return before


# --- discrete virtual tokens: real rows of the token table, and how to choose better ones ----------


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
