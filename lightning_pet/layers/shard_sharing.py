"""Matrices whose blocks of columns all change alike (MiSS): ``ΔW[:, c] = D[c mod r, :]``.

That is a LoRA of rank r whose A is a fixed pattern of zeros and ones. x Aᵀ is a sum over blocks of the input, which
costs no product, and of which the backward pass needs nothing: the input is not kept for it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers import rows as ranges
from lightning_pet.layers.combining import Factors
from lightning_pet.layers.delta import Delta, Host, Path
from lightning_pet.layers.low_rank_product import compute_dtype
from lightning_pet.layers.row_forms import Parts, low_rank_rows, stacks_of


class ShardSharing(Delta):
    """MiSS on a linear layer: ``y = x Wᵀ + bias + (Σ blocks of dropout(x)) D``.

    Args:
        in_features: input features of the host.
        out_features: output features of the host.
        r: size of a block of inputs, at most ``in_features``. Where it does not divide them, the last block is short.
        mini_r: D has so many columns, which repeat over the outputs; ``None``: one for each output.
        dropout: probability of zeroing an input on the way; active in training only.
        stack: leading dimensions of the weight: of experts.
        transposed: the host's weight is [..., in, out].
        rows: half-open ranges of output features of a fused projection, as in
            :class:`~lightning_pet.layers.low_rank.LowRankLinear`.
        device: where D lives.
        dtype: of D; products run in the input's (or autocast's).

    Attributes:
        block: D [..., r, out] or [..., r, mini_r], trained, starts at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        mini_r: int | None = None,
        dropout: float = 0.0,
        stack: Sequence[int] = (),
        transposed: bool = False,
        rows: Sequence[Sequence[int]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.dropout = dropout
        self.transposed = transposed
        self.rows = ranges.whole(rows, out_features)
        self.block = nn.Parameter(
            torch.empty((*stack, r, mini_r or ranges.size(self.rows)), device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No change."""
        nn.init.zeros_(self.block)

    def _own(self) -> Tensor:
        """D for each of the own outputs."""
        outputs = ranges.size(self.rows)
        repeats = outputs // self.block.shape[-1]
        return self.block if repeats == 1 else self.block.repeat(*(1,) * (self.block.dim() - 1), repeats)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the branch.

        Args:
            x: input of the host, [..., in].
            output: output of the host, [..., out].
        """
        dtype = compute_dtype(x)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if rest := -self.in_features % self.r:
            x = F.pad(x, (0, rest))
        summed = x.reshape(*x.shape[:-1], -1, self.r).sum(-2).to(dtype)  # torch adds half precision up in single
        own = ranges.spread(self._own().to(dtype), self.rows, self.out_features)
        return output + F.linear(summed, own.t()).to(output.dtype)

    @staticmethod
    def row_form(
        deltas: Sequence["ShardSharing | None"], ids: Tensor, x: Tensor, output: Tensor, host: Host
    ) -> Tensor | None:
        """All rows at once, if none drops inputs; see :attr:`Delta.row_form`."""
        if any(delta is not None and delta.training and delta.dropout for delta in deltas):
            return None
        return low_rank_rows(x, output, ids, *stacks_of(deltas, compute_dtype(x), ShardSharing._row_parts))

    def _row_parts(self) -> Parts:
        a, b = self.low_rank_factors()
        return a, ranges.spread(b, self.rows, self.out_features, dim=-2)

    def low_rank_factors(self) -> Factors:
        """The pattern A [..., r, in], and D turned, [..., out, r]; see :meth:`Delta.low_rank_factors`."""
        own = self._own()
        pattern = torch.eye(self.r, device=own.device, dtype=own.dtype)
        pattern = pattern.repeat(1, -(-self.in_features // self.r))[:, : self.in_features]
        return pattern.expand(*own.shape[:-2], *pattern.shape), own.mT

    def _effective(self, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            matrix = (weight.mT if self.transposed else weight).to(dtype)
            change = self._own().to(dtype).mT
            change = change.repeat(*(1,) * (change.dim() - 1), -(-self.in_features // self.r))
            change = ranges.spread(change[..., : self.in_features], self.rows, self.out_features, dim=-2)
            effective = (matrix + change).to(weight.dtype)
        return effective.mT if self.transposed else effective

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The effective weight; see :meth:`Delta.merged`."""
        return self._effective(weight).contiguous()

    @torch.no_grad()
    def reach(self, largest: float) -> float:
        """Every number of D meets one of the weight; see :meth:`Delta.reach`."""
        return largest + float(self.block.abs().max())

    def extra_repr(self) -> str:
        """Shape of D."""
        return f"block={tuple(self.block.shape)}"


class ShardSharingWeight(ShardSharing):
    """MiSS on a weight that is read without a call; arguments as in :class:`ShardSharing`, but no ``dropout``."""

    path: ClassVar[Path] = "weight"
    row_form: ClassVar[Any] = None

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """The effective weight, in the shape and dtype of ``weight``."""
        return self._effective(weight)
