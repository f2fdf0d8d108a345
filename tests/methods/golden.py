"""One small layer and numbers for its deltas, on which formulas are computed by hand."""

import torch
from torch import Tensor

WEIGHT = torch.tensor([[0.5, -1, 0.25, 2], [1, 0.5, -0.5, 0], [-0.25, 0.75, 1, -1.5]], dtype=torch.float64)
BIAS = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
X = torch.tensor([1, 2, -1, 0.5], dtype=torch.float64)


def fill(k: int, *shape: int) -> Tensor:
    """The k-th tensor of a delta: entry n is ``((7 n + 3 + 2 k) mod 11 − 5) / 10``."""
    count = torch.Size(shape).numel()
    return ((7 * torch.arange(count) + 3 + 2 * k) % 11 - 5).double().view(shape) / 10
