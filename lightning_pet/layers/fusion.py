"""AdapterFusion: frozen adapters of several tasks, weighted per token by attention over them."""

from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers.delta import Delta
from lightning_pet.layers.low_rank_product import compute_dtype
from lightning_pet.layers.side_loss import Penalty, with_penalty


@runtime_checkable
class Fusable(Protocol):
    """A bottleneck delta, as fusion sees it: it adds ``scale * update(h)``."""

    scale: float

    def update(self, h: Tensor) -> Tensor:
        """What it adds to h [..., width], before it is scaled."""
        ...


def _distance(value: Tensor) -> Tensor:
    r"""The regulariser :math:`\|I - V\|_F^2`, a number."""
    return _away(value).square().sum()


def _slope(value: Tensor) -> tuple[Tensor]:
    return (2 * _away(value),)


def _away(value: Tensor) -> Tensor:
    return value - torch.eye(len(value), device=value.device, dtype=value.dtype)


class Mixture(Delta):
    r"""Attention over adapters: :math:`o = V \sum_n s_n z_n`, with :math:`s = softmax_n((Q h) \cdot (K z_n) / T)`.

    z_n is what adapter n adds to h. Adapters come frozen and stay so; Q, K (with biases) and V train.
    V is linear and has no bias, and K is linear, so both are applied once and not per adapter.
    Source: Pfeiffer et al. 2021.

    Args:
        width: features of h.
        members: the adapters; they become children.
        off_diagonal: value of V beside its diagonal of ones at the start.
        temperature: T at the start; if it is not 1, it is a buffer that is stored with the delta.
        regularization: factor of the squared distance between V and the identity, in the training loss.
        device: where the parameters live.
        dtype: their dtype.
    """

    temperature: Tensor | None

    def __init__(
        self,
        width: int,
        members: Sequence[Delta],
        *,
        off_diagonal: float = 1e-6,
        temperature: float = 1.0,
        regularization: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.off_diagonal, self.start = off_diagonal, temperature

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.query, self.key, self.value = empty(width, width), empty(width, width), empty(width, width)
        self.query_bias, self.key_bias = empty(width), empty(width)
        self.register_buffer("temperature", None if temperature == 1 else torch.empty((), device=device))
        self.penalty = Penalty(_distance, _slope, regularization) if regularization else None
        self.members = nn.ModuleList(members)
        for parameter in self.members.parameters():
            parameter.requires_grad_(False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Q and K normal with 0.02, their biases zero, V the identity. The adapters stay as they are."""
        for matrix, bias in ((self.query, self.query_bias), (self.key, self.key_bias)):
            nn.init.normal_(matrix, std=0.02)
            nn.init.zeros_(bias)
        self.value.fill_(self.off_diagonal).fill_diagonal_(1.0)
        if self.temperature is not None:
            self.temperature.fill_(self.start)

    def scores(self, h: Tensor, z: Tensor) -> Tensor:
        """Weight of every adapter, [..., members], which sum to one.

        Args:
            h: [..., width].
            z: what the adapters add, [..., members, width].
        """
        query = F.linear(h, self.query.to(h.dtype), self.query_bias.to(h.dtype))
        # (Q h) · (K z + b) = (Kᵀ Q h) · z + (Q h) · b
        folded = query @ self.key.to(h.dtype)
        logits = (z @ folded.unsqueeze(-1)).squeeze(-1) + (query @ self.key_bias.to(h.dtype)).unsqueeze(-1)
        if self.temperature is not None:
            logits = logits / self.temperature.to(logits.dtype)
        return logits.softmax(-1)

    def update(self, h: Tensor) -> Tensor:
        """What the fused adapters add to h [..., width]."""
        dtype = compute_dtype(h)
        members = [cast(Fusable, member) for member in self.members]
        z = torch.stack([(m.scale * m.update(h)).to(dtype) for m in members], dim=-2)
        weights = self.scores(h.to(dtype), z).unsqueeze(-2)
        mixed = (weights.to(dtype) @ z).squeeze(-2)
        value: Tensor = self.value
        if self.penalty is not None:
            value = with_penalty(value, [self.value], self.penalty, self.training)
        return F.linear(mixed, value.to(dtype)).to(h.dtype)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """``output + update(h)``, where h is the output, or the input x that the place reads elsewhere."""
        return output + self.update(output if self.slot is None else x)


class MixtureAround(Mixture):
    """The same on a norm that closes a sub-layer: ``norm(s + update(norm(s)))``."""

    path = "around"

    def forward(self, call: Any, s: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Run the host, and once more on its input plus the update."""
        output: Tensor = call(s + self.update(call(s, *args, **kwargs)), *args, **kwargs)
        return output
