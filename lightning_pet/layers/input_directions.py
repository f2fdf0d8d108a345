"""The directions in which a layer's inputs vary most, found batch by batch: what EVA starts A from.

Incremental principal components: what is kept of all earlier batches, k singular vectors times their singular values,
stands for their rows when the next ones come. Sources: Ross et al. 2008; Paischer et al. 2024 for the shares of ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_pet.errors import ArgumentError

_OVERSAMPLED = 2  # directions that are looked for, over those that are kept
_PASSES = 4
_SEED = 42


class Directions:
    """Principal directions of the rows that it has seen.

    Args:
        count: directions to keep, k; at most the features of a row.

    Attributes:
        components: [k, in], orthonormal rows, those of the largest variance first; ``None`` before there are k rows.
        singular: [k], their singular values.
        similarity: [k], cosine between each direction and what it was one batch ago; zero after the first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.components: Tensor | None = None
        self.singular: Tensor | None = None
        self.similarity = torch.zeros(count)
        self._seen = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None  # of each feature: the sum of squares about its mean
        self._waiting: list[Tensor] = []

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take more rows [n, in] in; fewer than k wait for those of the next batch.

        Raises:
            ArgumentError: if they hold NaN or infinity, or fewer features than k.
        """
        if rows.shape[-1] < self.count:
            raise ArgumentError(f"rows of {rows.shape[-1]} features have no {self.count} directions. Lower the rank.")
        self._waiting.append(rows.detach().float())
        if sum(len(part) for part in self._waiting) < self.count:
            return
        new, self._waiting = torch.cat(self._waiting), []
        if not bool(new.isfinite().all()):
            raise ArgumentError("the inputs of a layer hold NaN or infinity. Look at the data and the base.")
        before, total = self.components, self._seen + len(new)
        mean = new.mean(0, dtype=torch.float64)
        centred = new - mean.float()
        scatter = centred.square().sum(0, dtype=torch.float64)
        stacked = centred
        if self._mean is not None and self._scatter is not None and self.singular is not None and before is not None:
            weight = self._seen / total * len(new)
            moved = self._mean - mean
            scatter = self._scatter + scatter + weight * moved.square()
            # In double precision from here on, as the sums are: what is kept is rounded once per batch.
            stacked = torch.cat([self.singular[:, None] * before, centred, weight**0.5 * moved[None]]).double()
            mean = (self._mean * self._seen + mean * len(new)) / total
        self._mean, self._scatter, self._seen = mean, scatter, total
        self.singular, self.components = _leading(stacked, self.count)
        if before is not None:
            self.similarity = torch.cosine_similarity(self.components, before.to(self.components.dtype)).cpu()

    @property
    def shares(self) -> Tensor:
        """[k]: which share of the variance of all inputs lies in each direction."""
        assert self.singular is not None
        assert self._scatter is not None
        total = self._scatter.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return (self.singular.double().square() / total).cpu()


def _leading(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values, and right vectors of them whose largest entry is positive."""
    width = min(_OVERSAMPLED * count, *rows.shape)
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        torch.manual_seed(_SEED)
        _, singular, vectors = torch.svd_lowrank(rows, q=width, niter=_PASSES)
    components = vectors.mT[:count]
    largest = components.abs().argmax(1, keepdim=True)
    return singular[:count], components * components.gather(1, largest).sign()


def share_ranks(shares: Sequence[Tensor], budget: int) -> list[int]:
    """Give each layer those of its directions that are among the ``budget`` largest shares; of equal ones the first.

    >>> share_ranks([torch.tensor([0.6, 0.3]), torch.tensor([0.2, 0.1])], 3)
    [2, 1]
    """
    sizes = [len(share) for share in shares]
    chosen = torch.cat(list(shares)).argsort(descending=True, stable=True)[:budget]
    kept = torch.zeros(sum(sizes), dtype=torch.bool)
    kept[chosen] = True
    return [int(part.sum()) for part in torch.split(kept, sizes)]
