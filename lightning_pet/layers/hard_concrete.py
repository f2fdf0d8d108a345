"""Hard-concrete gates (Louizos et al. 2018): numbers in [0, 1] that are exactly 0 or 1 with positive probability.

A gate with parameter α is drawn as

    s = σ((log u − log(1 − u) + α) / β),  u uniform;   z = min(1, max(0, s (r − l) + l))

with l < 0 < 1 < r, so that both ends are reached. The number of open gates has a closed form, hence a
gradient, though each gate is a step in effect.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pet.errors import ArgumentError
from lightning_pet.layers.delta import MAX_SCALE

EPSILON = 1e-4
"""Uniform numbers are kept this far from 0 and 1."""


@dataclass(frozen=True)
class HardConcrete:
    """The law of a gate, given its α.

    Attributes:
        low: l, below 0.
        high: r, above 1.
        temperature: β, above 0; the smaller, the nearer to a coin.

    Raises:
        ArgumentError: if one is out of range.

    >>> law = HardConcrete()
    >>> law.open(torch.tensor([5.0]))  # P(z > 0)
    tensor([0.9933])
    >>> law.full(torch.tensor([5.0]))  # P(z = 1)
    tensor([0.9674])
    """

    low: float = -1.5
    high: float = 1.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        numbers = (self.low, self.high, self.temperature)
        ordered = -MAX_SCALE <= self.low < 0 and 1 < self.high <= MAX_SCALE and self.temperature >= 1 / MAX_SCALE
        if not ordered or not all(map(math.isfinite, numbers)):
            raise ArgumentError(
                f"stretch=({self.low}, {self.high}), temperature={self.temperature}: the first number must be below 0, "
                f"the second above 1, neither beyond {MAX_SCALE:g}, and the temperature at least 1/{MAX_SCALE:g}, e.g. "
                "stretch=(-1.5, 1.5), temperature=1.0."
            )

    @property
    def width(self) -> float:
        """R − l."""
        return self.high - self.low

    @property
    def shift(self) -> float:
        """β log(−l/r): what α must exceed for a gate that is open more often than not."""
        return self.temperature * math.log(-self.low / self.high)

    def open(self, alpha: Tensor) -> Tensor:
        """P(z > 0) of every gate."""
        return torch.sigmoid(alpha - self.shift)

    def full(self, alpha: Tensor) -> Tensor:
        """P(z = 1) of every gate."""
        return torch.sigmoid(alpha - self.temperature * math.log((1 - self.low) / (self.high - 1)))

    def typical(self, alpha: Tensor) -> Tensor:
        """The gate without noise: min(1, max(0, σ(α) (r − l) + l)), differentiable."""
        return (torch.sigmoid(alpha) * self.width + self.low).clamp(0, 1)

    def concrete(self, alpha: Tensor, u: Tensor) -> Tensor:
        """The number s in (0, 1) for uniform numbers ``u``, before it is stretched and clamped."""
        return self.concrete_(alpha, u.clone())

    def draw(self, alpha: Tensor, generator: torch.Generator) -> Tensor:
        """The number s of every gate for uniform numbers of this generator."""
        if alpha.dtype != torch.float32:
            return self.concrete_(alpha, self.uniform(alpha, generator))
        u = torch.empty(alpha.shape, dtype=torch.float32, device=alpha.device)
        return self.concrete_(alpha, u.uniform_(generator=generator))

    def concrete_(self, alpha: Tensor, u: Tensor) -> Tensor:
        """The same as :meth:`concrete`, in the memory of ``u``."""
        s = u.logit_(EPSILON).add_(alpha)
        return (s if self.temperature == 1 else s.div_(self.temperature)).sigmoid_()

    def stretched(self, s: Tensor) -> Tensor:
        """The gates: min(1, max(0, s (r − l) + l))."""
        return (s * self.width).add_(self.low).clamp_(0, 1)

    def stretched_(self, s: Tensor) -> Tensor:
        """The same, in the memory of ``s``."""
        return s.mul_(self.width).add_(self.low).clamp_(0, 1)

    def one(self, alpha: float, u: float) -> tuple[float, float]:
        """A single gate for a uniform number: s and P(z > 0)."""
        u = min(max(u, EPSILON), 1 - EPSILON)
        logit = (math.log(u) - math.log1p(-u) + alpha) / self.temperature
        return _sigmoid(logit), _sigmoid(alpha - self.shift)

    def uniform(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform numbers of the shape of ``like``; the same for every dtype of it."""
        u = torch.empty(like.shape, dtype=torch.float32, device=like.device).uniform_(generator=generator)
        return u.clamp_(EPSILON, 1 - EPSILON).to(like.dtype)


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))


def mixed(*parts: int | str) -> int:
    """A seed of 63 bits that looks random, from several numbers and names, the same in every process.

    >>> mixed(1, 2) == mixed(1, 2) != mixed(2, 1)
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
