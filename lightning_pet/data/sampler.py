"""Batches of texts of similar length."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class SimilarLengths(Sampler[int]):
    """Shuffle examples so that those of one batch have similar lengths, which spares padding.

    Chunks of 16 random batches are sorted by length, cut into batches, and the batches shuffled. The order
    depends on torch's global random state when the iteration starts, as that of torch's own
    ``RandomSampler`` does, so a run that restores this state repeats the order.

    Args:
        lengths: length of each example.
        batch_size: size of the batches that the data loader cuts from the order.

    Example:
        >>> sorted(SimilarLengths([3, 1, 2], batch_size=2))
        [0, 1, 2]
    """

    CHUNK = 16

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        chunks = torch.split(order, self.CHUNK * self.batch_size)
        by_length = (chunk[self.lengths[chunk].argsort(stable=True)] for chunk in chunks)
        batches = [batch for chunk in by_length for batch in torch.split(chunk, self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]  # at most one; it must come last
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        for batch in (*shuffled, *rest):
            yield from batch.tolist()
