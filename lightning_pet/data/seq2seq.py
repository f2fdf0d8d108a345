"""Pairs of source and target texts, from files or the hub."""

from typing import Any

from lightning_pet.data.base import Example, TableDataModule, check_columns, with_validation
from lightning_pet.data.choices import ChoiceCollator, choice_lists, right_choices
from lightning_pet.data.tables import Table, read_splits
from lightning_pet.errors import ArgumentError

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
