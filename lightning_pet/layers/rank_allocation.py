"""Which triplets of which matrix are worth their place (AdaLoRA)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Importance(NamedTuple):
    """Smoothed importance of every number of one tensor.

    Attributes:
        sensitivity: running mean of ``|w · dL/dw|``.
        uncertainty: running mean of how far that moves from its mean.
    """

    sensitivity: Tensor
    uncertainty: Tensor

    def updated(self, value: Tensor, gradient: Tensor, beta1: float, beta2: float) -> "Importance":
        """After one more step.

        Args:
            value: the tensor.
            gradient: its gradient in this step.
            beta1: share of the past in the sensitivity.
            beta2: share of the past in the uncertainty.
        """
        return updated([self], [value], [gradient], beta1, beta2)[0]

    def score(self) -> Tensor:
        """Their product."""
        return self.sensitivity * self.uncertainty


def updated(
    before: Sequence[Importance], values: Sequence[Tensor], gradients: Sequence[Tensor], beta1: float, beta2: float
) -> list[Importance]:
    """:meth:`Importance.updated` of many tensors, which need not have one shape; nothing is changed in place."""
    now = torch._foreach_mul(list(values), list(gradients))
    torch._foreach_abs_(now)
    sensitivity = torch._foreach_mul([importance.sensitivity for importance in before], beta1)
    torch._foreach_add_(sensitivity, now, alpha=1 - beta1)
    torch._foreach_sub_(now, sensitivity)
    torch._foreach_abs_(now)
    uncertainty = torch._foreach_mul([importance.uncertainty for importance in before], beta2)
    torch._foreach_add_(uncertainty, now, alpha=1 - beta2)
    return [Importance(*pair) for pair in zip(sensitivity, uncertainty, strict=True)]


def triplet_scores(a: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """Importance of triplets from that of their numbers.

    Args:
        a: scores of A, [..., r, in].
        b: scores of B, [..., out, r].
        e: scores of e, [..., r].

    Returns:
        [..., r]: that of the number, and the means of both vectors.
    """
    return e + a.mean(-1) + b.mean(-2)


def rank_budget(step: int, first: int, last: int, initial: int, final: int) -> int:
    """Triplets that may stay after a step: ``initial`` until ``first``, ``final`` from ``last``, a cubic between.

    >>> [rank_budget(step, 2, 6, 100, 20) for step in range(8)]
    [100, 100, 100, 53, 30, 21, 20, 20]
    """
    if step <= first:
        return initial
    if step >= last:
        return final
    return int((initial - final) * (1 - (step - first) / (last - first)) ** 3 + final)


def allocate(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Keep the ``budget`` best triplets of all matrices together; of equal ones the first.

    Args:
        scores: [..., r] of each matrix.
        budget: how many.

    Returns:
        Which ones, in the shapes of ``scores``.
    """
    flat = torch.cat([score.flatten() for score in scores])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[:budget]] = True
    pieces = torch.split(kept, [score.numel() for score in scores])
    return [piece.view(score.shape) for piece, score in zip(pieces, scores, strict=True)]
