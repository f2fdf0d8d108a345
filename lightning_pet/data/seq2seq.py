"""Pairs of source and target texts, from files or the hub."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from lightning_pet.data.base import Example, TableDataModule, check_columns, with_validation
from lightning_pet.data.tables import Table, read_splits
from lightning_pet.errors import ArgumentError
from lightning_pet.model.tokens import IGNORED

# --- possible answers beside each source: read from a table, and padded to a batch ----------------


KEYS = ("choices", "choice")
"""What a batch holds besides: (batch, choices, tokens) labels with -100 as padding, and the index of the right one."""


def choice_lists(table: Table, column: str) -> list[list[str]]:
    """The possible answers of every row: a list of texts, or such a list as a JSON text (in a CSV file).

    Raises:
        ArgumentError: a value is no list of distinct texts.
    """
    return [_parse(value, f"{table.source}: row {row + 1}") for row, value in enumerate(table.columns[column])]


def _parse(value: Any, where: str) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(found) < 2 or len(set(map(str, found))) < len(found) or not all(isinstance(v, str) and v for v in found):
        raise ArgumentError(f"{where} has the choices {value!r}, expected a list of at least two distinct texts")
    return found


def right_choices(choices: Sequence[Sequence[str]], targets: Sequence[str], source: object) -> list[int]:
    """Index of the target among the choices of each row.

    Raises:
        ArgumentError: a target is none of its choices.
    """
    for row, (options, target) in enumerate(zip(choices, targets, strict=True)):
        if target not in options:
            raise ArgumentError(
                f"{source}: row {row + 1} has the target {target!r}, which is none of its choices {list(options)}"
            )
    return [list(options).index(target) for options, target in zip(choices, targets, strict=True)]


class ChoiceCollator:
    """Pads the choices of a list of examples, and leaves the rest to another collator.

    Args:
        rest: pads everything else.
    """

    def __init__(self, rest: Any) -> None:
        self.rest = rest

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        """Make a batch; examples without choices stay without."""
        batch = self.rest([{k: v for k, v in example.items() if k not in KEYS} for example in examples])
        if "choices" in examples[0]:
            batch["choices"] = _padded([example["choices"] for example in examples])
        if "choice" in examples[0]:
            batch["choice"] = torch.tensor([example["choice"] for example in examples])
        return batch


def _padded(rows: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    tokens = max(len(ids) for row in rows for ids in row)
    padded = torch.full((len(rows), max(map(len, rows)), tokens), IGNORED)
    for i, row in enumerate(rows):
        for j, ids in enumerate(row):
            padded[i, j, : len(ids)] = torch.tensor(ids)
    return padded


# --- the data module ------------------------------------------------------------------------------


_ALIASES = {"source": ("source", "input", "document"), "target": ("target", "output", "summary")}


class Seq2SeqData(TableDataModule):
    """Source texts with a target text each, for :class:`~lightning_pet.modules.seq2seq.Seq2SeqModule`.

    Columns are ``source`` (or ``input``, ``document``) and ``target`` (or ``output``, ``summary``). A column
    ``choices`` holds the possible answers of each row, of which the target is one: a list of texts, or in a CSV
    file a JSON list. With them the module can rank answers and train with T-Few's losses.

    Args:
        train: a CSV, TSV, JSON, JSON lines or Parquet file; a folder with files named by split; or a hub
            repository ``owner/name`` or ``owner/name:config``.
        val: file with the validation split; ``None`` takes that of the folder or repository, else cuts
            ``val_fraction`` off the training split.
        test: file with the test split.
        predict: file with source texts to predict.
        columns: which columns hold the texts, such as ``{"source": "article", "target": "title"}``.
        choices: possible answers of every row, where they are the same for all (instead of a column).
        prefix: text put before every source, such as ``"summarize: "``.
        tokenizer: name of a tokenizer; ``None`` takes the LightningModule's.
        max_length: longest source in tokens; longer ones are cut, and how many is reported.
        max_target_length: longest target in tokens; longer ones are cut.
        batch_size: examples per batch and process.
        val_fraction: share of the training rows for validation when there is no validation split.
        seed: decides which rows these are.
        similar_lengths: form training batches of sources of similar length (less padding).
        num_workers: processes that form batches.

    Raises:
        ArgumentError: a file or column is missing or wrong; the message says which and what to do.

    Example:
        >>> Seq2SeqData("pairs.jsonl", columns={"target": "title"}, prefix="summarize: ").max_target_length
        128
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        columns: dict[str, str] | None = None,
        choices: list[str] | None = None,
        prefix: str = "",
        tokenizer: str | None = None,
        max_length: int = 512,
        max_target_length: int = 128,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        seed: int = 0,
        similar_lengths: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, similar_lengths, num_workers)
        if max_target_length < 1:
            raise ArgumentError(f"max_target_length={max_target_length}: expected at least 1")
        if choices is not None and len(set(choices)) < max(2, len(choices)):
            raise ArgumentError(f"choices={choices}: expected at least two distinct answers")
        self.columns = check_columns(columns, (*_ALIASES, "choices"))
        self.choices = choices
        self.train, self.val, self.test, self.predict = train, val, test, predict
        self.prefix = prefix
        self.max_target_length = max_target_length
        self.val_fraction = val_fraction
        self.seed = seed

    def read(self) -> dict[str, Table]:
        """Read all splits; cut a validation split off if there is none."""
        tables = read_splits(self.train, self.val, self.test, self.predict)
        return with_validation(tables, self.val_fraction, self.seed)

    def _texts(self, table: Table, name: str) -> list[str]:
        names = [self.columns[name]] if name in self.columns else _ALIASES[name]
        return table.texts(table.find(names))

    def encode(self, table: Table, tokenizer: Any, targets: bool) -> list[Example]:
        """Turn rows into token ids of the source, and of the target as labels."""
        sources = [self.prefix + text for text in self._texts(table, "source")]
        encoded = tokenizer(sources, truncation=True, max_length=self.max_length)
        examples = [{name: values[row] for name, values in encoded.items()} for row in range(len(sources))]
        if targets:
            labels = tokenizer(
                text_target=self._texts(table, "target"), truncation=True, max_length=self.max_target_length
            )
            for example, ids in zip(examples, labels["input_ids"], strict=True):
                example["labels"] = ids
        self._add_choices(examples, table, tokenizer, targets)
        return examples

    def _add_choices(self, examples: list[Example], table: Table, tokenizer: Any, targets: bool) -> None:
        column = self.columns.get("choices", "choices")
        if column in table.columns or "choices" in self.columns:
            choices = choice_lists(table, table.find([column]))
        elif self.choices is not None:
            choices = [self.choices] * len(examples)
        else:
            return
        known: dict[str, list[int]] = {}  # most tasks have few answers and many rows
        for text in dict.fromkeys(text for row in choices for text in row):
            known[text] = tokenizer(text_target=text, truncation=True, max_length=self.max_target_length)["input_ids"]
        for example, row in zip(examples, choices, strict=True):
            example["choices"] = [known[text] for text in row]
        if targets:
            right = right_choices(choices, self._texts(table, "target"), table.source)
            for example, index in zip(examples, right, strict=True):
                example["choice"] = index

    def collator(self, tokenizer: Any) -> Any:
        """Pad sources to the longest of the batch, and targets with -100."""
        from transformers import DataCollatorForSeq2Seq

        return ChoiceCollator(DataCollatorForSeq2Seq(tokenizer))
