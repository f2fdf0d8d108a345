"""Low-rank deltas that multiply (HiRA): the effective weight is ``W ⊙ (1 + s · B A)``.

A product of two numbers for every entry: where W is zero it stays zero, and the change is of a rank as high as that of
W allows.
"""

import torch
from torch import Tensor

from lightning_pet.layers.combining import Factors
from lightning_pet.layers.delta import REMADE, Remaker, unchanged_since
from lightning_pet.layers.low_rank import LowRankParameter
from lightning_pet.layers.low_rank_base import LowRank
from lightning_pet.layers.low_rank_hosts import ConvWeight, EmbeddingWeight


class HadamardLowRank(LowRank):
    """What makes a low-rank delta on a weight one that multiplies; mixed in before its class.

    The product is formed in at least float32 and added once, so that a base in half precision loses nothing of it.
    """

    def _moved(self, matrix: Tensor, change: Tensor) -> Tensor:
        return torch.addcmul(matrix, matrix, change)

    def _adds_in_place(self, weight: Tensor) -> bool:
        return False

    def low_rank_factors(self) -> Factors | None:
        """None: the change has the rank of the weight."""
        return None

    @torch.no_grad()
    def reach(self, largest: float) -> float:
        """Each number by the largest factor; see :meth:`Delta.reach`."""
        return largest * (1.0 + super().reach(0.0))

    @property
    def remakes(self) -> bool:  # type: ignore[override]
        """A large weight, unless something of it is drawn."""
        a, b = self._flat_a(), self._flat_b()
        size = a.shape[:-2].numel() * self.out_features * a.shape[-1]
        return size >= REMADE and not (self.training and self.dropout) and not b.is_meta

    def remaker(self, weight: Tensor) -> Remaker | None:
        """See :meth:`Delta.remaker`."""
        if not self.remakes or (check := unchanged_since(weight, self.a, self.b)) is None:
            return None

        @torch.no_grad()
        def remake() -> Tensor:
            check()
            return self._effective(weight)

        return remake


class HadamardParameter(HadamardLowRank, LowRankParameter):
    """HiRA on a matrix, or a stack of them; arguments of :class:`~lightning_pet.layers.low_rank.LowRankParameter`."""


class HadamardEmbedding(HadamardLowRank, EmbeddingWeight):
    """HiRA on a table; arguments of :class:`~lightning_pet.layers.low_rank_hosts.EmbeddingWeight`."""


class HadamardConv(HadamardLowRank, ConvWeight):
    """HiRA on a kernel; arguments of :class:`~lightning_pet.layers.low_rank_hosts.ConvWeight`."""
