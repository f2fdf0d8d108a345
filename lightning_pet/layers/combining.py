"""Arithmetic on changes of weights, of several deltas of one base.

A change of a low-rank delta is ``B A``, with its scale in B. Sums of such changes, and their best approximation of a
given rank, are had from the factors alone; what looks at single entries (trimming, dropping, electing signs) is done on
the change itself, [..., out, in]. Done on A and B apart, as HF PEFT does, it is another operation, whose result is far
from that of the changes: :func:`peft_linear` and :func:`peft_ties` are here to repeat it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""(A [..., r, in], B [..., out, r]), whose product B A is the change."""


def concatenated(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The factors of ``Σ w B A``, exactly: ranks add up."""
    a = torch.cat([a for a, _ in factors], dim=-2)
    b = torch.cat([b * weight for (_, b), weight in zip(factors, weights, strict=True)], dim=-1)
    return a, b


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Factors, Tensor]:
    """The best approximation of ``B A`` of a rank, by the singular values of a matrix of the factors' rank.

    Args:
        a: [..., r, in].
        b: [..., out, r].
        rank: of the approximation.

    Returns:
        Its factors, of rank at most ``rank``, and ‖B A − its product‖² (Frobenius), summed over leading dimensions.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[..., :rank].sqrt()
    left = (q_b @ u[..., :rank]) * root.unsqueeze(-2)
    right = root.unsqueeze(-1) * (vh[..., :rank, :] @ q_a.mT)
    return (right, left), s[..., rank:].square().sum()


def factored(change: Tensor, rank: int) -> tuple[Factors, Tensor]:
    """The same of a change that is given as it is, [..., out, in]."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    root = s[..., :rank].sqrt()
    return (root.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)), s[..., rank:].square().sum()


def weighted_sum(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``Σ w τ``."""
    total = changes[0] * weights[0]
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        total = torch.add(total, change, alpha=weight)
    return total


def trimmed(change: Tensor, density: float) -> Tensor:
    """The share ``density`` of the entries that are largest in size, zero elsewhere.

    >>> trimmed(torch.tensor([1.0, -4.0, 2.0, 0.5]), 0.5)
    tensor([ 0., -4.,  2.,  0.])
    """
    keep = int(density * change.numel())
    flat = change.reshape(-1)
    places = flat.abs().topk(keep).indices
    return torch.zeros_like(flat).index_copy(0, places, flat[places]).view(change.shape)


def dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Every entry kept with the probability ``density`` and divided by it, else zero (DARE): the same on average."""
    kept = torch.rand(change.shape, generator=generator, dtype=torch.float32) < density
    return change * kept.to(change) / density


def elected(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of those entries that have the sign of the weighted sum, times ``Σ w`` (the second half of TIES).

    Where all changes agree it is their weighted sum. Source: Yadav et al. 2023.

    Args:
        changes: trimmed ones; an entry of zero has no opinion.
        weights: at least zero, not all zero.
    """
    total = weighted_sum(changes, weights)
    agreeing, share = torch.zeros_like(total), torch.zeros_like(total)
    for change, weight in zip(changes, weights, strict=True):
        agrees = (change * total > 0).to(total)
        agreeing += weight * change * agrees
        share += weight * agrees
    return sum(weights) * agreeing / torch.where(share > 0, share, torch.ones_like(share))


def peft_linear(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """What HF PEFT calls linear: the same sum of A and of B apart, which has cross terms. Ranks must be equal."""
    halves = [_halved(weight) for weight in weights]
    return (
        weighted_sum([a for a, _ in factors], [of_a for of_a, _ in halves]),
        weighted_sum([b for _, b in factors], [of_b for _, of_b in halves]),
    )


def peft_ties(factors: Sequence[Factors], weights: Sequence[float], density: float) -> Factors:
    """What HF PEFT calls TIES: of A and of B apart, with weights after the election. Ranks must be equal."""
    halves = [_halved(weight) for weight in weights]
    return (
        _peft_elected([trimmed(a, density) for a, _ in factors], [of_a for of_a, _ in halves]),
        _peft_elected([trimmed(b, density) for _, b in factors], [of_b for _, of_b in halves]),
    )


def _halved(weight: float) -> tuple[float, float]:
    """A weight's part for A and for B: a sign goes to A."""
    return math.copysign(math.sqrt(abs(weight)), weight), math.sqrt(abs(weight))


def _peft_elected(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    stacked = torch.stack(list(tensors))
    majority = torch.where(stacked.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == majority
    factors = stacked.new_tensor(weights).view(-1, *(1,) * tensors[0].dim())
    return (stacked * factors * agrees).sum(0) / agrees.sum(0).clamp(min=1)
