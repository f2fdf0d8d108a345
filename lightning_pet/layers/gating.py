"""Gates of UniPELT: how much of a delta acts, one number per example, read off what its layer is called with."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.layers import rows as ranges
from lightning_pet.layers.delta import Delta, Path, check_scale
from lightning_pet.layers.low_rank_base import Rows, check_rank
from lightning_pet.layers.low_rank_product import compute_dtype

_STD = 0.02


def new_gate(width: int, **made: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight [1, width] and bias [1] of a gate, not initialised."""
    return nn.Parameter(torch.empty(1, width, **made)), nn.Parameter(torch.empty(1, **made))


def reset_gate(weight: Tensor, bias: Tensor) -> None:
    """Nearly one half for every input: the weight normal with a standard deviation of 0.02, the bias zero."""
    nn.init.normal_(weight, std=_STD)
    nn.init.zeros_(bias)


def opened(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """How far a gate is open: the mean of ``sigmoid(x Wᵀ + b)`` over all positions of an example, padding among them.

    Args:
        x: [batch, …, in]; of [rows, in] each row is an example.
        weight: [1, in].
        bias: [1].

    Returns:
        [batch, 1, …, 1], in the dtype in which products with x run.
    """
    dtype = compute_dtype(x)
    shares = torch.sigmoid(F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)))
    return shares if shares.dim() < 3 else shares.mean(tuple(range(1, shares.dim() - 1)), keepdim=True)


class GatedLowRank(Delta):
    """LoRA behind a gate: ``y + g(x) · s · dropout(x) Aᵀ Bᵀ`` on what a linear layer returns.

    No weight gives the same outputs, so it never merges. Source: Mao et al. 2022 (UniPELT).

    Args:
        in_features: input features of the host.
        out_features: output features of the host.
        r: rank, at least 1.
        scale: factor s of the delta.
        dropout: probability of zeroing an input feature on the way to A; active in training only.
        init: ``"kaiming"`` or ``"gaussian"``, of A; B is zero, so the delta starts without effect.
        rows: half-open ranges of output features of a fused projection, each role with a gate of its own.
        device: where the parameters live.
        dtype: dtype of the parameters; products run in the input's (or autocast's).

    Raises:
        ArgumentError: if an argument is out of range.
    """

    path: ClassVar[Path] = "activation"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        scale: float,
        dropout: float = 0.0,
        init: str = "kaiming",
        rows: Rows | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(r)
        check_scale(scale, "the scale (alpha / r)")
        if init not in ("kaiming", "gaussian"):
            raise ArgumentError(f"init must be 'kaiming' or 'gaussian' behind a gate, not {init!r}.")
        self.out_features, self.scale, self.dropout, self.init = out_features, float(scale), float(dropout), init
        self.rows = None if rows is None else tuple((int(start), int(stop)) for start, stop in rows)
        own = out_features if self.rows is None else ranges.size(self.rows)
        self.a = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(own, r, device=device, dtype=dtype))
        self.gate_weight, self.gate_bias = new_gate(in_features, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A and the gate, set B to zero."""
        if self.init == "gaussian":
            nn.init.normal_(self.a, std=1 / len(self.a))
        else:
            bound = 1 / math.sqrt(self.a.shape[1])
            nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)
        reset_gate(self.gate_weight, self.gate_bias)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the gated change to ``output`` [..., out] of the host for x [..., in]."""
        dtype = compute_dtype(x)
        gate = opened(x, self.gate_weight, self.gate_bias) * self.scale
        inner = F.linear(F.dropout(x, self.dropout, self.training) if self.dropout else x, self.a.to(dtype))
        change = F.linear(inner * gate, self.b.to(dtype))
        if self.rows is not None:
            change = ranges.spread(change, self.rows, self.out_features, dim=-1)
        return output + change.to(output.dtype)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"a={tuple(self.a.shape)}, b={tuple(self.b.shape)}, scale={self.scale:g}"
