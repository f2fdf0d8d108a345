"""Pairs of answers, of which one is preferred, for preference tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_pet.data.base import with_validation
from lightning_pet.data.chat.batches import Collator
from lightning_pet.data.chat.data import ChatData
from lightning_pet.data.chat.encoding import ChatEncoder, Tokens
from lightning_pet.data.chat.messages import LineError, Preference
from lightning_pet.data.chat.reader import Problems, read_conversations, read_files
from lightning_pet.data.tables import Table
from lightning_pet.errors import ArgumentError


@dataclass(frozen=True)
class Pair:
    """A conversation with its two answers as tokens.

    Attributes:
        index: place in the data set, by which a module may keep what it knows of the pair.
        chosen: with the answer that is preferred.
        rejected: with the other.
    """

    index: int
    chosen: Tokens
    rejected: Tokens


class PairCollator:
    """Rows of a batch: first all preferred answers, then the others in the same order."""

    def __init__(self, pad: int, prompts: bool) -> None:
        self.pad, self.prompts = pad, prompts

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``attention_mask``, (2 × pairs, tokens), and ``index``, (pairs,)."""
        rows = [([tokens], 0.0) for tokens in (*(p.chosen for p in pairs), *(p.rejected for p in pairs))]
        batch = Collator(self.pad)(rows)
        batch["index"] = torch.tensor([pair.index for pair in pairs])
        if self.prompts:
            asked = Collator(self.pad, prompts=True)(rows[: len(pairs)])
            batch |= {name: asked[name] for name in ("prompt_ids", "prompt_mask", "answers")}
        return batch


class PreferenceData(ChatData):
    """Preferred and other answers in OpenAI's format, for :class:`~lightning_pet.modules.preference.PreferenceModule`.

    A line is ``{"input": {"messages": […]}, "preferred_output": [message], "non_preferred_output": [message]}``. Only
    the answers are compared; a pair that does not fit into ``max_length`` loses earlier turns, or is left out.

    Args:
        train: JSON lines; ``val``, ``test``: further files.
        tokenizer: name of a tokenizer; ``None`` takes the LightningModule's.
        max_length: longest conversation in tokens, with the longer answer.
        batch_size: pairs per batch and process; the model sees twice as many rows.
        generate: number of validation pairs that are also answered, for ``exact_match`` with the preferred answer.
        val_fraction: share of the training pairs for validation when there is no validation split.
        seed: decides which pairs these are.
        num_workers: processes that form batches.

    Raises:
        ArgumentError: a file is missing, or lines are wrong; up to twenty are named with what is expected.

    Example:
        >>> PreferenceData("pairs.jsonl").batch_size
        8
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        generate: int = 100,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            train, val, test, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size, generate=generate,
            val_fraction=val_fraction, seed=seed, num_workers=num_workers,
        )  # fmt: skip

    def read(self) -> dict[str, Table]:
        """Read and check all splits; cut a validation split off if there is none."""
        rows = read_files(self.train, val=self.val, test=self.test)
        tables = {split: read_conversations(table, "preference", (Preference,)) for split, table in rows.items()}
        return with_validation(tables, self.val_fraction, self.seed)

    def encode(self, table: Table, tokenizer: Any, targets: bool) -> list[Any]:
        """Turn pairs into tokens."""
        encoder, problems = ChatEncoder(tokenizer, self.max_length), Problems(table.source)
        pairs: list[Pair] = []
        for line, example in zip(table.columns["line"], table.columns["example"], strict=True):
            try:
                answers = [self._answer(encoder, side) for side in (example.chosen, example.rejected)]
            except LineError as error:
                problems.add(line, str(error))
                continue
            if answers[0] is not None and answers[1] is not None:
                pairs.append(Pair(len(pairs), answers[0], answers[1]))
        problems.check()
        if not pairs:
            raise ArgumentError(
                f"{table.source}: none of its {len(table)} pairs fits into max_length={self.max_length} tokens. "
                "Raise max_length."
            )
        self._report(table, [tokens for pair in pairs for tokens in (pair.chosen, pair.rejected)], encoder)
        return pairs

    def _answer(self, encoder: ChatEncoder, side: Any) -> Tokens | None:
        found = encoder.conversation(side)
        return found[0] if found else None

    def loader(self, split: str) -> DataLoader[Any]:
        """Data loader over an encoded split, shuffled if it is the training split."""
        pairs: Any = self._examples[split]
        return DataLoader(
            pairs,
            batch_size=self.batch_size,
            shuffle=split == "train",
            collate_fn=PairCollator(self._tokenizer.pad_token_id or 0, prompts=split != "train"),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
