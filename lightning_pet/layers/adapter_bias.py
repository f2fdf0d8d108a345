"""A shift in one direction whose size depends on the token."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_pet.layers.delta import Delta, Host, Path
from lightning_pet.layers.low_rank_product import compute_dtype
from lightning_pet.layers.row_forms import Parts, by_rows, gathered, own_tensors, stacks_of


class TokenScore(Delta):
    """One number per token, ``x · weight + bias``; as a delta, it is the one that all layers share.

    Args:
        in_features: features of x.
        bias: whether there is a bias.
        device: where the parameters live.
        dtype: their dtype; the product runs in the input's (or autocast's).
    """

    path: ClassVar[Path] = "shared"

    def __init__(
        self,
        in_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within ±1/√in, as a linear layer with one output."""
        bound = 1 / math.sqrt(self.weight.numel())
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., 1] of x [..., in]."""
        dtype = compute_dtype(x)
        score = x.to(dtype) @ self.weight.to(dtype).unsqueeze(-1)
        return score if self.bias is None else score + self.bias.to(dtype)


class TokenShift(Delta):
    r"""AdapterBias: adds :math:`\alpha(x)\, v` to what its host returns, a rank-1 shift over tokens.

    v starts at zero, so the first output is that of the base. Source: Fu et al. 2022.

    Args:
        in_features: features of x, the input of the host (or of the module that the place reads).
        out_features: features of the host's output.
        bias: whether alpha has a bias.
        alpha: the score that all layers share; ``None`` for one of its own.
        device: where the parameters live.
        dtype: their dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        alpha: TokenScore | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.alpha = TokenScore(in_features, bias=bias, device=device, dtype=dtype) if alpha is None else None
        self.__dict__["shared"] = alpha  # not a child: it has its own place, and is counted once
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set v to zero, and draw an own alpha."""
        nn.init.zeros_(self.v)
        if self.alpha is not None:
            self.alpha.reset_parameters()

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Shift ``output`` [..., out] by the score of x [..., in]."""
        score: Tensor = self._score(x)
        return output + (score * self.v.to(score.dtype)).to(output.dtype)

    @property
    def _score(self) -> TokenScore:
        alpha: TokenScore = self.__dict__["shared"] if self.alpha is None else self.alpha
        return alpha

    @staticmethod
    def row_form(
        deltas: Sequence["TokenShift | None"], ids: Tensor, x: Tensor, output: Tensor, host: Host
    ) -> Tensor | None:
        """Each row by its own score and shift; see :attr:`Delta.row_form`."""
        weight, bias, v = stacks_of(deltas, compute_dtype(x), TokenShift._row_parts, TokenShift._made_of)
        assert weight is not None
        assert v is not None
        score = torch.bmm(by_rows(x.to(weight.dtype), ids), gathered(weight, ids).unsqueeze(-1))
        if bias is not None:
            score = score + gathered(bias, ids).unsqueeze(1)
        shift = gathered(v, ids).unsqueeze(1).to(output.dtype)
        return torch.baddbmm(by_rows(output, ids), score.to(output.dtype), shift).view(output.shape)

    def _made_of(self) -> list[Tensor]:
        return [self.v, *own_tensors(self._score)]

    def _row_parts(self) -> Parts:
        return self._score.weight, self._score.bias, self.v
