r"""VeRA: low-rank deltas that share two frozen random matrices and train two vectors each (Kopiczko et al. 2024).

The effective weight is ``W + diag(λ_b) B diag(λ_d) A``. A [r, in] and B [out, r] are corners of two matrices that all
layers share, as large as the widest of them. They are drawn from a key, and stored nevertheless: which numbers a
generator gives is a promise of no version of torch, and how they fall into rows depends on the widest layer.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_pet.layers import rows as ranges
from lightning_pet.layers.delta import Delta, Path
from lightning_pet.layers.low_rank import LowRankLinear, LowRankParameter
from lightning_pet.layers.low_rank_base import LowRank
from lightning_pet.layers.row_forms import own_tensors


class Projections(Delta):
    """The two frozen matrices that all layers share.

    They are those that HF PEFT draws from the same key, to the bit: uniform within ±√(6 / columns), by a generator on
    the CPU, A first, in single precision.

    Args:
        r: rank.
        in_features: of the widest layer.
        out_features: of the widest layer.
        key: seed of the generator.
        device: where they live.
        dtype: their dtype.

    Attributes:
        a: [r, in_features], a buffer.
        b: [out_features, r], a buffer.
    """

    path: ClassVar[Path] = "shared"
    a: Tensor
    b: Tensor

    def __init__(
        self,
        r: int,
        in_features: int,
        out_features: int,
        *,
        key: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.key = key
        self.register_buffer("a", torch.empty(r, in_features, device=device, dtype=dtype))
        self.register_buffer("b", torch.empty(out_features, r, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both from the key."""
        if self.a.is_meta:
            return
        generator = torch.Generator().manual_seed(self.key)
        for matrix in (self.a, self.b):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))
            drawn = torch.empty(matrix.shape, dtype=torch.float32, device="cpu")
            matrix.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def forward(self) -> tuple[Tensor, Tensor]:
        """A and B, whole."""
        return self.a, self.b


class Vera(LowRank):
    """What makes a low-rank delta one of two vectors; mixed in before its class.

    Args:
        projections: what all of them share.
        d_initial: value of λ_d at the start.

    Attributes:
        lambda_d: [..., r], trained.
        lambda_b: [..., out], trained; starts at zero, so that the delta does nothing, and λ_d learns from the second
            step on.
    """

    lambda_d: nn.Parameter
    lambda_b: nn.Parameter

    def __init__(self, *args: Any, projections: Projections, d_initial: float = 0.1, **kwargs: Any) -> None:
        self.__dict__["projections"] = projections  # not a child: it has its own place, and is stored once
        self.__dict__["d_initial"] = d_initial
        super().__init__(*args, **kwargs)
        self._direct = False  # A and B are no parameters

    def _make(self, a_shape: tuple[int, ...], b_shape: tuple[int, ...], **options: Any) -> None:
        self.in_features = a_shape[-1]
        self.lambda_d = nn.Parameter(torch.empty(a_shape[:-1], **options))
        self.lambda_b = nn.Parameter(torch.empty(b_shape[:-1], **options))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """λ_b zero, λ_d constant; the shared matrices draw themselves."""
        nn.init.constant_(self.lambda_d, self.__dict__["d_initial"])
        nn.init.zeros_(self.lambda_b)

    @property
    def a(self) -> Tensor:  # type: ignore[override]
        """``diag(λ_d) A``, [..., r, in]."""
        projections: Projections = self.__dict__["projections"]
        return self.lambda_d.unsqueeze(-1) * projections.a[:, : self.in_features].to(self.lambda_d.device)

    @property
    def b(self) -> Tensor:  # type: ignore[override]
        """``diag(λ_b) B``, [..., out, r]: the rows of B have the places of the output features."""
        projections: Projections = self.__dict__["projections"]
        b = projections.b[: self.out_features].to(self.lambda_b.device)
        return self.lambda_b.unsqueeze(-1) * (b if self.rows is None else ranges.take(b, self.rows, -2))

    def _made_of(self, weight: Tensor | None) -> list[Tensor]:
        return own_tensors(self) + own_tensors(self.__dict__["projections"])


class VeraLinear(Vera, LowRankLinear):
    """VeRA on a linear layer; arguments of :class:`~lightning_pet.layers.low_rank.LowRankLinear`, with those above."""


class VeraParameter(Vera, LowRankParameter):
    """VeRA on a bare parameter; arguments of :class:`~lightning_pet.layers.low_rank.LowRankParameter`, likewise."""
