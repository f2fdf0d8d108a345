"""Losses and ranking of T-Few (Liu et al. 2022) for tasks with a list of possible answers per source.

Shapes: ``logits`` (batch, choices, tokens, vocabulary), ``labels`` (batch, choices, tokens) with -100 where there
is no target; a choice of padding only is absent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pet.model.tokens import IGNORED

FLOOR = 1e-2
"""Added to 1 − p in the unlikelihood loss, as in the authors' code: it bounds the gradient where p is near 1."""


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every target token, (batch, choices, tokens) in float32; 0 where there is none."""
    counted = labels != IGNORED
    chosen = logits.float().log_softmax(-1).gather(-1, labels.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    # A product with a mask would let a gradient of infinity through as NaN.
    return torch.where(counted, chosen, 0.0)


def choice_scores(log_probs: Tensor, labels: Tensor, length_norm: float = 1.0) -> Tensor:
    """Score of every choice: its log-probability over its length in tokens.

    Args:
        log_probs: from :func:`token_log_probs`.
        labels: the choices.
        length_norm: exponent of the length: 1 for the mean per token, 0 for the sum.

    Returns:
        (batch, choices); minus infinity for absent choices.
    """
    lengths = (labels != IGNORED).sum(-1)
    scores = log_probs.sum(-1) / lengths.clamp(min=1).pow(length_norm)
    return scores.masked_fill(lengths == 0, -torch.inf)


def likelihood_loss(log_probs: Tensor, labels: Tensor, right: Tensor) -> Tensor:
    """Mean negative log-probability of the tokens of the right choices; ``right`` is (batch,)."""
    mine = _one_hot(right, labels)
    return -(log_probs * mine).sum() / ((labels != IGNORED) & mine).sum().clamp(min=1)


def unlikelihood_loss(log_probs: Tensor, labels: Tensor, right: Tensor) -> Tensor:
    """Mean of −log(1 − p) over the tokens of the wrong choices; 0 if there is none."""
    wrong = (labels != IGNORED) & ~_one_hot(right, labels)
    penalty = torch.where(wrong, -torch.log(1 - log_probs.exp() + FLOOR), 0.0)
    return penalty.sum() / wrong.sum().clamp(min=1)


def length_normalised_loss(scores: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy of the right choice among all, by the scores of :func:`choice_scores`."""
    return F.cross_entropy(scores, right)


def _one_hot(right: Tensor, labels: Tensor) -> Tensor:
    """(batch, choices, 1), true for the right ones."""
    return (torch.arange(labels.shape[1], device=labels.device) == right.unsqueeze(1)).unsqueeze(-1)
