"""Labelled texts, or pairs of texts, from files or the hub."""

from collections.abc import Hashable, Sequence
from typing import Any

from lightning_pet.data.base import Example, TableDataModule, check_columns, with_validation
from lightning_pet.data.tables import Table, read_splits
from lightning_pet.errors import ArgumentError


def label_names(table: Table, column: str) -> list[str]:
    """Names of the classes in a column, in an order that does not depend on the order of the rows.

    Args:
        table: the training table.
        column: its column of labels, integers or texts.

    Returns:
        The names stored in the file, if any; else the different labels, sorted (integers by value).

    Raises:
        ArgumentError: a label is missing, or is neither text nor integer.

    Example:
        >>> label_names(Table("data.csv", {"label": ["10", "9", "10"]}), "label")
        ['9', '10']
    """
    if column in table.class_names:
        return list(table.class_names[column])
    names = {_label(value, table, column, row) for row, value in enumerate(table.columns[column])}
    return sorted(names, key=lambda name: (0, int(name), name) if _is_integer(name) else (1, 0, name))


def label_ids(table: Table, column: str, names: Sequence[str]) -> list[int]:
    """Positions of the labels of a column in a list of names.

    Integers that are no names themselves are taken as positions, so ``0`` and ``1`` fit
    ``["negative", "positive"]``.

    Args:
        table: any table.
        column: its column of labels.
        names: names of the classes.

    Raises:
        ArgumentError: a label is missing or unknown.
    """
    position = {name: i for i, name in enumerate(names)}
    stored = table.class_names.get(column, [])
    by_position = not any(_is_integer(name) for name in names)
    ids = []
    for row, value in enumerate(table.columns[column]):
        label = _label(value, table, column, row)
        if stored and _is_integer(label) and 0 <= int(label) < len(stored):
            label = stored[int(label)]
        if label in position:
            ids.append(position[label])
        elif by_position and _is_integer(label) and 0 <= int(label) < len(names):
            ids.append(int(label))
        else:
            raise ArgumentError(
                f"{table.source}: row {row + 1} has the label {label!r} in column {column!r}; "
                f"the known labels are {list(names)}. Correct the row, or list all labels in labels=[…]"
            )
    return ids


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _label(value: Any, table: Table, column: str, row: int) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ArgumentError(
            f"{table.source}: row {row + 1} of column {column!r} is {value!r}, expected a label (text or integer)"
        )
    return str(value).strip()


class TextClassificationData(TableDataModule):
    """Texts with a class each, for :class:`~lightning_pet.modules.text_classification.TextClassifier`.

    Columns are ``text``, ``label`` and, for pairs of texts, ``text_pair`` if it exists. Labels are texts or
    integers; all their names come from the training split, and an unknown one elsewhere is an error.

    Args:
        train: a CSV, TSV, JSON, JSON lines or Parquet file; a folder with files named by split; or a hub
            repository ``owner/name`` or ``owner/name:config``.
        val: file with the validation split; ``None`` takes that of the folder or repository, else cuts
            ``val_fraction`` off the training split.
        test: file with the test split.
        predict: file with texts to predict, without labels.
        columns: which columns hold the text, its pair and the label, such as ``{"text": "sentence"}``; and ``task``, if
            each row belongs to one (:class:`~lightning_pet.TasksCallback`): batches name the tasks of their rows.
        labels: names of the classes in order; ``None`` takes the LightningModule's, else those found.
        tokenizer: name of a tokenizer; ``None`` takes the LightningModule's.
        max_length: longest input in tokens; longer texts are cut, and how many is reported.
        batch_size: examples per batch and process.
        val_fraction: share of the training rows for validation when there is no validation split.
        seed: decides which rows these are.
        similar_lengths: form training batches of texts of similar length (less padding).
        num_workers: processes that form batches.

    Attributes:
        labels: names of the classes, known after ``setup``.

    Raises:
        ArgumentError: a file, column or label is missing or wrong; the message says which and what to do.

    Example:
        >>> data = TextClassificationData("reviews.csv", columns={"text": "review", "label": "stars"})
        >>> data.batch_size
        32
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        columns: dict[str, str] | None = None,
        labels: list[str] | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        seed: int = 0,
        similar_lengths: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, similar_lengths, num_workers)
        self.columns = check_columns(columns, ("text", "text_pair", "label", "task"))
        self.train, self.val, self.test, self.predict = train, val, test, predict
        self.labels = self.given_labels = labels
        self.val_fraction = val_fraction
        self.seed = seed

    def read(self) -> dict[str, Table]:
        """Read all splits; cut a validation split off if there is none."""
        tables = read_splits(self.train, self.val, self.test, self.predict)
        return with_validation(tables, self.val_fraction, self.seed)

    def bind(self, module: Any) -> Hashable:
        """Settle the labels: those given, else the LightningModule's, else those of the training split."""
        self.labels = self.given_labels or getattr(module, "labels", None)
        if self.labels is None:
            train = self.tables["train"]
            self.labels = label_names(train, train.find([self.columns.get("label", "label")]))
        return tuple(self.labels)

    def encode(self, table: Table, tokenizer: Any, targets: bool) -> list[Example]:
        """Turn rows into token ids and labels."""
        text = table.texts(table.find([self.columns.get("text", "text")]))
        pair_column = self.columns.get("text_pair", "text_pair")
        mapped = "text_pair" in self.columns
        pair = table.texts(table.find([pair_column])) if mapped or pair_column in table.columns else None
        encoded = tokenizer(text, pair, truncation=True, max_length=self.max_length)
        examples = [{name: values[row] for name, values in encoded.items()} for row in range(len(text))]
        if "task" in self.columns:
            for example, task in zip(examples, table.texts(table.find([self.columns["task"]])), strict=True):
                example["task"] = task
        if targets:
            ids = label_ids(table, table.find([self.columns.get("label", "label")]), self.labels or [])
            for example, label in zip(examples, ids, strict=True):
                example["labels"] = label
        return examples

    def collator(self, tokenizer: Any) -> Any:
        """Pad to the longest text of the batch."""
        from transformers import DataCollatorWithPadding

        return WithTasks(DataCollatorWithPadding(tokenizer))


class WithTasks:
    """Batches as another makes them, with the names of the tasks beside, if the examples have any.

    Args:
        collate: makes a batch of examples without names.
    """

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, examples: Sequence[Example]) -> Any:
        """One batch."""
        tasks = [example["task"] for example in examples if "task" in example]
        batch = self._collate([{n: value for n, value in example.items() if n != "task"} for example in examples])
        if tasks:
            batch["task"] = tasks
        return batch
