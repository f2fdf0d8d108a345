"""Plain texts for language-model adaptation: the first part of a text in, the rest out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_pet.data.base import Example, TableDataModule, check_columns, with_validation
from lightning_pet.data.tables import Table, read_splits
from lightning_pet.errors import ArgumentError

_NAMES = ("text", "content", "document")


@dataclass(frozen=True)
class PrefixSplit:
    """Makes a batch of pieces of text: cuts each at one place into a source and a target, and pads.

    Attributes:
        pad: pads examples with ``input_ids`` and ``labels`` to a batch.
        head: special tokens before a source and before a target.
        tail: special tokens behind a source, and behind a target that ends its text.
        random: draw the cut from torch's generator; else cut in the middle.
    """

    pad: Any
    head: tuple[int, ...]
    tail: tuple[int, ...]
    random: bool

    def __call__(self, examples: Sequence[Example]) -> Any:
        """A padded batch."""
        return self.pad([self.cut(example) for example in examples])

    def cut(self, example: Example) -> Example:
        """One source and its target; each has at least one token."""
        ids = example["input_ids"]
        place = int(torch.randint(1, len(ids), ())) if self.random else len(ids) // 2
        source = [*self.head, *ids[:place], *self.tail]
        target = [*self.head, *ids[place:], *(self.tail if example["ends"] else ())]
        return {"input_ids": source, "attention_mask": [1] * len(source), "labels": target}


class LMAdaptationData(TableDataModule):
    """Unlabelled texts with the prefix-LM objective, for :class:`~lightning_pet.modules.seq2seq.Seq2SeqModule`.

    An encoder-decoder that was trained to fill gaps (T5) has never written a text from its beginning to its
    end, and a prompt alone cannot teach it to. Lester et al. 2021 therefore train the whole model for a while:
    a piece of text is cut at a random place, the first part is the source and the rest the target. In training
    the cut is drawn anew every time, in evaluation it is in the middle.

    Args:
        train: a text file (``.txt``, a text per line); a CSV, TSV, JSON, JSON lines or Parquet file with a
            column ``text``; a folder with files named by split; or a hub repository ``owner/name`` or
            ``owner/name:config``.
        val: file with the validation split; ``None`` takes that of the folder or repository, else cuts
            ``val_fraction`` off the training split.
        test: file with the test split.
        column: the column with the texts; ``None``: ``text``, ``content`` or ``document``.
        tokenizer: name of a tokenizer; ``None`` takes the LightningModule's.
        max_length: longest piece in tokens, source and target together; longer texts become several pieces.
        batch_size: pieces per batch and process.
        val_fraction: share of the training texts for validation when there is no validation split.
        seed: decides which texts these are.
        num_workers: processes that form batches.

    Raises:
        ArgumentError: a file or column is missing or wrong, or no text has two tokens.

    Example:
        >>> LMAdaptationData("texts.txt", max_length=64).batch_size
        32
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        column: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 512,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, similar_lengths=False, num_workers=num_workers)
        if max_length < 2:
            raise ArgumentError(f"max_length={max_length}: a piece needs two tokens, one on each side of the cut")
        self.columns = check_columns({} if column is None else {"text": column}, ("text",))
        self.train, self.val, self.test = train, val, test
        self.val_fraction = val_fraction
        self.seed = seed
        self._random = True

    def read(self) -> dict[str, Table]:
        """Read all splits; cut a validation split off if there is none."""
        tables = read_splits(self.train, self.val, self.test)
        return with_validation(tables, self.val_fraction, self.seed)

    def encode(self, table: Table, tokenizer: Any, targets: bool) -> list[Example]:
        """Turn texts into pieces of token ids, of equal size within a text as far as possible."""
        name = table.find([self.columns["text"]] if self.columns else _NAMES)
        encoded = tokenizer(table.texts(name), add_special_tokens=False)["input_ids"]
        examples: list[Example] = []
        for ids in encoded:
            count = -(-len(ids) // self.max_length)
            bounds = [len(ids) * index // max(count, 1) for index in range(count + 1)]
            examples += [
                {"input_ids": ids[begin:end], "ends": end == len(ids)}
                for begin, end in pairwise(bounds)
                if end - begin > 1
            ]
        if not examples:
            raise ArgumentError(f"{table.source}: no text in column {name!r} has two tokens, so none can be cut")
        return examples

    def _report_cuts(self, split: str) -> None:
        """Nothing is cut off."""

    def loader(self, split: str) -> DataLoader[Example]:
        """Data loader over an encoded split; shuffled and with random cuts if it is the training split."""
        self._random = split == "train"
        return super().loader(split)

    def collator(self, tokenizer: Any) -> PrefixSplit:
        """Cut pieces and pad them, targets with -100."""
        from transformers import DataCollatorForSeq2Seq

        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        begin = next(index for index in range(len(full)) if full[index : index + len(bare)] == bare)
        return PrefixSplit(
            DataCollatorForSeq2Seq(tokenizer), tuple(full[:begin]), tuple(full[begin + len(bare) :]), self._random
        )
