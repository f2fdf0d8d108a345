"""Batches of token sequences: order, token counts of an optimizer step, padding and packing."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_pet.data.base import order_by_length
from lightning_pet.data.chat.encoding import Tokens
from lightning_pet.model.tokens import IGNORED


def trained_tokens(pack: Sequence[Tokens]) -> int:
    """Tokens that give a loss: the first of a sequence has nothing before it."""
    return sum(sum(tokens.trained[1:]) for tokens in pack)


def packed(examples: Sequence[Tokens], room: int) -> list[list[Tokens]]:
    """Rows of several whole examples each: the longest first, each into the fullest row that has room.

    Args:
        examples: of at most ``room`` tokens each; none is cut.
        room: tokens of a row.

    Example:
        >>> sizes = [3, 5, 2, 4]
        >>> rows = packed([Tokens((0,) * size, (True,) * size) for size in sizes], room=7)
        >>> sorted(sorted(len(tokens.ids) for tokens in row) for row in rows)
        [[2, 5], [3, 4]]
    """
    rows: dict[int, list[list[Tokens]]] = {}  # by room that is left, so that each example costs a bounded search
    for tokens in sorted(examples, key=lambda tokens: len(tokens.ids), reverse=True):
        size = len(tokens.ids)
        left = next((left for left in range(size, room) if rows.get(left)), room)
        row = rows[left].pop() if left < room else []
        row.append(tokens)
        rows.setdefault(left - size, []).append(row)
    return [row for kept in rows.values() for row in kept]


class Packs(Dataset[tuple[Sequence[Tokens], float]]):
    """Rows of a data set; those of training carry how many tokens the whole optimizer step trains.

    Args:
        rows: of one example each, or packed.
    """

    def __init__(self, rows: Sequence[Sequence[Tokens]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, float]) -> tuple[Sequence[Tokens], float]:
        place, per_batch = index if isinstance(index, tuple) else (index, 0.0)
        return self.rows[place], per_batch


class StepSampler(DistributedSampler[Any]):
    """Shuffles rows so that those of a batch have similar lengths, and tells each how many tokens its step trains.

    Every process knows the order of all, so the loss of a batch can be divided by the trained tokens of the whole
    optimizer step: all its batches, in all processes. The mean of means would let short answers weigh more.

    Args:
        rows: of the data set.
        batch_size: rows of a batch.
        trainer: whose accumulation, number of batches and processes count; ``None``: one process, one batch a step.
        seed: of the order, with the epoch.
    """

    def __init__(self, rows: Sequence[Sequence[Tokens]], batch_size: int, trainer: Any, seed: int) -> None:
        replicas, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        super().__init__(Packs(rows), num_replicas=replicas, rank=rank, shuffle=True, seed=seed)
        self.lengths = torch.tensor([sum(len(tokens.ids) for tokens in row) for row in rows])
        self.tokens = [trained_tokens(row) for row in rows]
        self.batch_size, self.trainer = batch_size, trainer

    def order(self) -> list[int]:
        """Rows of this epoch, those of all processes, batch after batch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return order_by_length(self.lengths, self.batch_size * self.num_replicas, generator)

    def batches(self) -> list[list[list[int]]]:
        """Rows by batch, then by process; all processes have as many, by repeating the first ones at the end."""
        order = self.order()
        order += order[: -len(order) % self.num_replicas]
        size = self.batch_size * self.num_replicas
        groups = [order[at : at + size] for at in range(0, len(order), size)]
        return [[group[rank :: self.num_replicas] for rank in range(self.num_replicas)] for group in groups]

    def _window(self) -> int:
        """Batches of a step in this epoch: processes that read ahead ask before a schedule has set it."""
        for callback in getattr(self.trainer, "callbacks", ()):
            if isinstance(callback, GradientAccumulationScheduler):
                return callback.get_accumulate_grad_batches(self.epoch)
        return getattr(self.trainer, "accumulate_grad_batches", 1) or 1

    def _used(self, batches: int) -> int:
        """Batches of an epoch that are trained: the Trainer counts them only after others have read ahead."""
        limit = getattr(self.trainer, "limit_train_batches", None)
        if limit is None:
            return batches
        return min(limit, batches) if isinstance(limit, int) else int(batches * limit)

    def __iter__(self) -> Iterator[Any]:
        batches = self.batches()
        window, used = self._window(), batches[: self._used(len(batches))]
        for begin in range(0, len(batches), window):
            step = used[begin : begin + window] or batches[begin : begin + window]
            trained = sum(self.tokens[row] for batch in step for rows in batch for row in rows)
            per_batch = max(trained, 1) / (window * self.num_replicas)
            for batch in batches[begin : begin + window]:
                yield from ((row, per_batch) for row in batch[self.rank])


class Collator:
    """Pads rows to a batch of ``input_ids``, ``labels`` and ``attention_mask`` or, of packed rows, ``position_ids``.

    Args:
        pad: token that fills up.
        packing: rows hold several examples, which positions that start again keep apart.
        prompts: also give the prompts of so many first examples, padded on the left, to generate from.
    """

    def __init__(self, pad: int, packing: bool = False, prompts: bool = False) -> None:
        self.pad, self.packing, self.prompts = pad, packing, prompts

    def __call__(self, rows: Sequence[tuple[Sequence[Tokens], float]]) -> dict[str, Tensor]:
        """A batch, (rows, tokens)."""
        packs = [pack for pack, _ in rows]
        width = max(sum(len(tokens.ids) for tokens in pack) for pack in packs)
        batch = {
            "input_ids": _filled([[t for tokens in pack for t in tokens.ids] for pack in packs], width, self.pad),
            "labels": _filled([[t for tokens in pack for t in _labels(tokens)] for pack in packs], width, IGNORED),
        }
        if self.packing:
            places = [[place for tokens in pack for place in range(len(tokens.ids))] for pack in packs]
            # What fills up counts on from zero as one more example.
            batch["position_ids"] = _filled([[*row, *range(width - len(row))] for row in places], width, 0)
        else:
            sizes = [sum(len(tokens.ids) for tokens in pack) for pack in packs]
            batch["attention_mask"] = _filled([[1] * size for size in sizes], width, 0)
        if rows[0][1]:
            batch["tokens_per_batch"] = torch.tensor(rows[0][1], dtype=torch.float64)
        if self.prompts:
            batch |= self._to_generate([pack[0] for pack in packs])
        return batch

    def _to_generate(self, examples: Sequence[Tokens]) -> dict[str, Tensor]:
        asked = [list(tokens.ids[: tokens.prompt]) for tokens in examples]
        answers = [[token for token in e.labels[e.prompt :] if token != IGNORED] for e in examples]
        width = max(max(map(len, asked)), 1)
        return {
            "prompt_ids": torch.tensor([[self.pad] * (width - len(ids)) + ids for ids in asked]),
            "prompt_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in asked]),
            "answers": _filled(answers, max(map(len, answers)), IGNORED),
        }


def _labels(tokens: Tokens) -> list[int]:
    """The first token of an example follows the last of another where rows are packed, and is never predicted."""
    return [IGNORED, *tokens.labels[1:]]


def _filled(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)
