"""Rows of a token table that train while the others stay: new words of a vocabulary, or old ones with a new meaning."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers.delta import Delta, Path, Tied
from lightning_pet.layers.sharding import whole

Form = Literal["table", "head", "weight"]
"""How a module uses the table: it looks rows up, multiplies by all of them, or does something else with the weight."""


class TokenRows(Delta):
    r"""Rows of a table by their ids: :math:`E'_t = \delta_t` for t in T, :math:`E'_t = E_t` else.

    δ holds the rows themselves and not a difference, so that the base's rows for T do not matter: those of a resized
    table are random, and others each time. No table is made: a look-up gets the rows of T in place of what it found,
    and an output layer the scores of T in place of its own.

    The way of HF PEFT's trainable tokens.

    Args:
        ids: T, without repeats; kept in ascending order.
        width: numbers in a row, d.
        form: how the host uses its table.
        scale: what the host multiplies the rows by that it looks up (Gemma, M2M100): δ is in the units of the table.
        padding_idx: the host's; that row gets no gradient from a look-up.
        device: of the rows.
        dtype: of the rows.

    >>> rows = TokenRows([1, 3], 2)
    >>> table = nn.Embedding(5, 2)
    >>> rows.initialize_from(table.weight)
    >>> ids = torch.tensor([[3, 0, 1]])
    >>> torch.equal(rows(table, ids), table(ids))
    True
    """

    starts_from_weight = True
    factor: Tensor | None
    indices: Tensor

    def __init__(
        self,
        ids: Sequence[int],
        width: int,
        *,
        form: Form = "table",
        scale: float | Tensor = 1.0,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ids = self.replaced = tuple(sorted(ids))
        self.form = form
        self.scale = float(scale)
        self.padding = self.ids.index(padding_idx) if padding_idx in self.ids and form == "table" else None
        self.rows = nn.Parameter(torch.empty(len(self.ids), width, device=device, dtype=dtype))
        self.register_buffer("indices", torch.empty(len(self.ids), dtype=torch.long, device=device))
        # Hosts that hold their factor as a tensor cast it to the dtype of the table first.
        factor = torch.empty_like(scale, device=device) if isinstance(scale, Tensor) else None
        self.register_buffer("factor", factor, persistent=False)
        self.__dict__["host"] = None  # of which the bias is asked, if it has one
        self.reset_parameters()

    @property
    def path(self) -> Path:  # type: ignore[override]
        """Around the call of a module that is known, else on the weight."""
        return "weight" if self.form == "weight" else "around"

    def reset_parameters(self) -> None:
        """Rows of zeros, until they are taken from a table."""
        with torch.no_grad():
            self.rows.zero_()
            if not self.indices.is_meta:
                self.indices.copy_(torch.tensor(self.ids, dtype=torch.long))
            if self.factor is not None:
                self.factor.fill_(self.scale)

    def initialize_from(self, weight: Tensor) -> None:
        """Start from the rows of the table: the model starts as the base, bit for bit."""
        with torch.no_grad():
            self.rows.copy_(whole(weight)[list(self.ids)].to(self.rows.dtype))

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Also that the rows are those of other tokens."""
        found = super().misfits(tensors)
        if not found and tuple(tensors["indices"].tolist()) != self.ids:
            found.append(f"indices holds {_shown(tensors['indices'].tolist())}, expected {_shown(self.ids)}")
        return found

    def forward(self, call: Any, *args: Any, form: Form | None = None, host: Any = None, **kwargs: Any) -> Tensor:
        """Run the host with the rows.

        Args:
            call: of the host; of the form ``"weight"``, the weight [V, d].
            args: ids [...], or features [..., d].
            form: how the host uses the table.
            host: whose bias goes with the scores.
            kwargs: of the call.

        Returns:
            Rows [..., d], scores [..., V], or the weight.
        """
        form = form or self.form
        if form == "weight":
            weight: Tensor = call
            return weight.index_copy(0, self.indices, self.rows.to(weight.dtype))
        out: Tensor = call(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        return self._scored(x, out, host or self.__dict__["host"]) if form == "head" else self._looked_up(x, out)

    def _looked_up(self, ids: Tensor, out: Tensor) -> Tensor:
        ids, count = ids.long(), len(self.ids)
        place = torch.searchsorted(self.indices, ids).clamp(max=count - 1)
        own = self.indices[place] == ids
        values = self.rows.to(out.dtype)
        if self.padding is not None:
            before, row, behind = values.tensor_split((self.padding, self.padding + 1))
            values = torch.cat([before, row.detach(), behind])
        # One row of zeros for all other tokens: its gradient is never added up.
        rows = F.embedding(torch.where(own, place, count), F.pad(values, (0, 0, 0, 1)), padding_idx=count)
        if self.factor is not None:
            rows = rows * self.factor.to(rows.dtype)
        elif self.scale != 1:
            rows = rows * self.scale
        return torch.where(own.unsqueeze(-1), rows, out)

    def _scored(self, x: Tensor, out: Tensor, host: Any) -> Tensor:
        bias = None if host is None or host.bias is None else host.bias[self.indices]
        scores = F.linear(x, self.rows.to(x.dtype), bias)
        return out.index_copy(-1, self.indices, scores.to(out.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        """The table with the rows in it."""
        return weight.detach().index_copy(0, self.indices, self.rows.detach().to(weight.dtype))

    def merge_(self, weight: Tensor) -> None:
        """Put the rows into the table."""
        with torch.no_grad():
            weight.index_copy_(0, self.indices, self.rows.to(weight.dtype))

    def reach(self, largest: float) -> float:
        """The largest size in the table, or in the rows."""
        return max(largest, float(self.rows.detach().abs().max()))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"rows={tuple(self.rows.shape)}, form={self.form!r}"


def _shown(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:4])) + " …" * (len(ids) > 4)


class TiedRows(Tied):
    """The same rows on another module that holds the table: an output layer whose weight is tied, a second stack.

    Args:
        source: the rows, on the first module.
        form: how this module uses the table.
    """

    def __init__(self, source: TokenRows, form: Form) -> None:
        super().__init__(source)
        self.form = form
        self.__dict__["host"] = None

    @property
    def path(self) -> Path:  # type: ignore[override]
        """As of :class:`TokenRows`."""
        return "weight" if self.form == "weight" else "around"

    def forward(self, call: Callable[..., Tensor] | Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Run this host with the rows."""
        source: Any = self.__dict__["source"]
        out: Tensor = source(call, *args, form=self.form, host=self.__dict__["host"], **kwargs)
        return out
