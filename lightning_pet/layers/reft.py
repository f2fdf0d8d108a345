r"""ReFT: edits of the residual stream at a few positions (Wu et al. 2024).

Behind a layer, at the first p and the last q tokens of each row, ``h + Rᵀ(act(W h + b) − R h)`` takes the place of h
(LoReFT: R has orthonormal rows, so that the edit replaces what h is in their span). Without the orthogonality it is
NoReFT, without the subtraction DiReFT. Which positions these are is not known here: :class:`Edit` asks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.errors import TargetError
from lightning_pet.layers.bottleneck import activation
from lightning_pet.layers.delta import Delta, Host, Part
from lightning_pet.layers.low_rank_product import compute_dtype

Form = Literal["loreft", "noreft", "direft"]


class Places(NamedTuple):
    """Positions to edit in each row.

    Attributes:
        where: batch × (p + q), indices of positions; first ones, then last ones.
        edited: the same shape, false for what a short row does not have.
    """

    where: Tensor
    edited: Tensor


def first_and_last(real: Tensor, first: int, last: int) -> Places:
    """The first p and the last q real positions of each row; what is both counts as last.

    Args:
        real: batch × positions, boolean: true for tokens, false for padding, wherever it is.
        first: p.
        last: q.

    >>> first_and_last(torch.tensor([[False, True, True, True, True]]), 2, 1).where
    tensor([[1, 2, 4]])
    """
    size = real.shape[1]
    columns = torch.arange(size, device=real.device)
    count = real.sum(1, keepdim=True)
    # Real positions in order, then padding; each sorts by a number of its own.
    order = torch.where(real, columns, columns + size).argsort(1)
    front = torch.arange(min(first, size), device=real.device)
    back = torch.arange(-min(last, size), 0, device=real.device)
    ranks = torch.cat([front.expand(len(real), -1), count + back], 1)
    edited = (ranks >= 0) & (ranks < count)
    edited[:, : len(front)] &= front < count - last
    return Places(order.gather(1, ranks.clamp(0, size - 1)), edited)


class Unit(Part):
    """One edit: ``h + Rᵀ(act(W h + b) − R h)``.

    Args:
        width: features of h.
        r: rank.
        form: see :class:`Edit`.
        non_linearity: a name in :data:`~lightning_pet.layers.bottleneck.ACTIVATIONS`.
        dropout: probability of zeroing a feature of what comes out; active in training only.
        device: where the parameters live.
        dtype: their dtype; products run in that of h, or autocast's.

    Attributes:
        weight: W, [r, width], trained.
        bias: b, [r], trained.
        projection: [r, width], trained; R itself, or for LoReFT what R is made of by :meth:`rotation`.
    """

    def __init__(
        self,
        width: int,
        r: int,
        form: Form,
        non_linearity: str,
        dropout: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.form, self.non_linearity, self.dropout = form, non_linearity, dropout
        self.weight = nn.Parameter(torch.empty(r, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(r, device=device, dtype=dtype))
        self.projection = nn.Parameter(torch.empty(r, width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W and b as a linear layer; R orthonormal (LoReFT), or as a linear layer, too."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        if self.form != "loreft":
            nn.init.uniform_(self.projection, -bound, bound)
        elif not self.projection.is_meta:
            nn.init.normal_(self.projection)
            self.projection.copy_(self.rotation())

    def rotation(self) -> Tensor:
        """R, [r, width]: for LoReFT with orthonormal rows, those that Gram and Schmidt make of ``projection``."""
        if self.form != "loreft":
            return self.projection
        with torch.autocast(self.projection.device.type, enabled=False):
            raw = self.projection
            lower = torch.linalg.cholesky(raw @ raw.mT)
            rows: Tensor = torch.linalg.solve_triangular(lower, raw, upper=False)
            return rows

    def forward(self, h: Tensor) -> Tensor:
        """What comes instead of h [..., width], in the dtype in which the products ran."""
        dtype = compute_dtype(h)
        h, rotation = h.to(dtype), self.rotation().to(dtype)
        inner = activation(self.non_linearity)(F.linear(h, self.weight.to(dtype), self.bias.to(dtype)))
        if self.form != "direft":
            inner = inner - F.linear(h, rotation)
        return F.dropout(h + inner @ rotation, self.dropout, self.training)


class Edit(Delta):
    """ReFT behind one layer.

    Args:
        width: features of the residual stream.
        r: rank.
        first: p, how many first positions are edited.
        last: q, how many last ones.
        places: answers where these are for an output [batch, positions, width]; ``None``: nothing is edited now.
        form: ``"loreft"``, ``"noreft"`` or ``"direft"``.
        tied: one unit for both; otherwise each has one of its own.
        non_linearity: a name in :data:`~lightning_pet.layers.bottleneck.ACTIVATIONS`.
        dropout: probability of zeroing a feature of an edited position; active in training only.
        device: where the parameters live.
        dtype: their dtype.
    """

    def __init__(
        self,
        width: int,
        r: int,
        first: int,
        last: int,
        places: Callable[[Tensor, int, int], Places | None],
        *,
        form: Form = "loreft",
        tied: bool = False,
        non_linearity: str = "linear",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.__dict__["places"] = places  # of a delta elsewhere: not a child

        def unit() -> Unit:
            return Unit(width, r, form, non_linearity, dropout, device=device, dtype=dtype)

        self.begin = unit() if first or tied else None
        self.end = unit() if last and not tied else None

    def reset_parameters(self) -> None:
        """Initialise the units: they do not start as the identity."""
        for unit in (self.begin, self.end):
            if unit is not None:
                unit.reset_parameters()

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Edit ``output`` [batch, positions, width]; the host's input is not used.

        Raises:
            TargetError: if it has another number of dimensions.
        """
        places = self._places(output)
        return output if places is None else self._edited(output, places)

    def _places(self, output: Tensor) -> Places | None:
        if output.dim() != 3:
            raise TargetError(
                f"ReFT edits positions of [batch, positions, width], and a layer returned {tuple(output.shape)}. "
                "Exclude it with exclude_modules, or use an adapter, which changes all positions alike."
            )
        found: Places | None = self.__dict__["places"](output, self.first, self.last)
        return found

    def _edited(self, output: Tensor, places: Places) -> Tensor:
        index = places.where.unsqueeze(-1).expand(-1, -1, output.shape[2])
        h = output.gather(1, index)
        pieces, split = [], min(self.first, output.shape[1])
        if self.end is None or self.begin is None:
            unit = self.begin if self.begin is not None else self.end
            assert unit is not None
            pieces = [unit(h)]
        else:
            pieces = [self.begin(h[:, :split]), self.end(h[:, split:])]
        change = torch.cat(pieces, 1) - h
        # Added, as a short row may name one place twice: what it does not have adds nothing there.
        change = torch.where(places.edited.unsqueeze(-1), change, 0.0)
        return output.scatter_add(1, index, change.to(output.dtype))

    @staticmethod
    def row_form(deltas: Sequence["Edit | None"], ids: Tensor, x: Tensor, output: Tensor, host: Host) -> Tensor | None:
        """Each group of rows by its own delta; see :attr:`Delta.row_form`."""
        for group, delta in enumerate(deltas):
            if delta is None or (places := delta._places(output)) is None:
                continue
            rows = (ids == group).nonzero().squeeze(-1)
            own: Any = Places(places.where[rows], places.edited[rows])
            output = output.index_copy(0, rows, delta._edited(output[rows], own))
        return output
