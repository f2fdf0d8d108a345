"""Losses of preference tuning, as functions of log-probabilities.

DPO: Rafailov et al. 2023 (arXiv 2305.18290); IPO: Azar et al. 2023 (arXiv 2310.12036); conservative DPO (label
smoothing): Mitchell 2023; ORPO: Hong et al. 2024 (arXiv 2403.07691); SimPO: Meng et al. 2024 (arXiv 2405.14734).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

PreferenceLoss = Literal["sigmoid", "ipo", "orpo", "simpo"]
NEEDS_REFERENCE: tuple[PreferenceLoss, ...] = ("sigmoid", "ipo")


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of both answers of each pair.

    Attributes:
        chosen: sums over the tokens of the preferred answers, (pairs,).
        rejected: of the others.
        chosen_tokens: numbers of tokens of the preferred answers, (pairs,).
        rejected_tokens: of the others.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def per_token(self) -> "Answers":
        """The same as means per token."""
        chosen, rejected = (
            self.chosen / self.chosen_tokens.clamp(min=1),
            self.rejected / self.rejected_tokens.clamp(min=1),
        )
        return Answers(chosen, rejected, self.chosen_tokens, self.rejected_tokens)


def margins(policy: Answers, reference: Answers) -> Tensor:
    """By how much more than the reference the policy prefers the preferred answers, (pairs,), in nats."""
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, (pairs,): minus log sigmoid of beta times the margin; smoothed: a share of pairs is the wrong way round.

    Example:
        >>> [round(sigmoid_loss(torch.tensor(5.0), 0.1, smoothing).item(), 5) for smoothing in (0.0, 0.1)]
        [0.47408, 0.52408]
    """
    scaled = beta * margin
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """IPO, (pairs,): the margin is drawn to 1 / (2 beta), not to infinity.

    Example:
        >>> round(ipo_loss(torch.tensor(0.0), 0.1).item(), 5)
        25.0
    """
    return (margin - 1 / (2 * beta)) ** 2


def orpo_loss(policy: Answers, beta: float) -> Tensor:
    """The odds-ratio term of ORPO, (pairs,), to which the supervised loss is added; it needs no reference."""
    means = policy.per_token()
    odds = [p - torch.log1p(-torch.exp(p).clamp(max=1 - 1e-6)) for p in (means.chosen, means.rejected)]
    return -beta * F.logsigmoid(odds[0] - odds[1])


def simpo_loss(policy: Answers, beta: float, gamma: float) -> Tensor:
    """SimPO, (pairs,): means per token, apart by at least ``gamma``; it needs no reference."""
    means = policy.per_token()
    return -F.logsigmoid(beta * (means.chosen - means.rejected) - gamma)
