"""What the ready data modules share: encode tables once with the model's tokenizer, serve padded batches."""

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Sampler

from lightning_pet.data.tables import Table
from lightning_pet.errors import ArgumentError
from lightning_pet.modules.pretrained import load_tokenizer

# --- batches of texts of similar length -----------------------------------------------------------


CHUNK = 16
"""Batches that are sorted by length together."""


def order_by_length(lengths: torch.Tensor, batch_size: int, generator: torch.Generator) -> list[int]:
    """A random order of examples in which those of one batch have similar lengths.

    Chunks of 16 random batches are sorted by length, cut into batches, and the batches shuffled.

    Args:
        lengths: of each example, (examples,).
        batch_size: size of the batches that are cut from the order.
        generator: source of randomness.
    """
    order = torch.randperm(len(lengths), generator=generator)
    chunks = torch.split(order, CHUNK * batch_size)
    by_length = (chunk[lengths[chunk].argsort(stable=True)] for chunk in chunks)
    batches = [batch for chunk in by_length for batch in torch.split(chunk, batch_size)]
    whole = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]  # at most one; it must come last
    shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
    return [int(example) for batch in (*shuffled, *rest) for example in batch]


class SimilarLengths(Sampler[int]):
    """Shuffle examples so that those of one batch have similar lengths, which spares padding.

    In the order of :func:`order_by_length`, which depends on torch's global random state when the iteration starts, as
    that of torch's own ``RandomSampler`` does, so a run that restores this state repeats it.

    Args:
        lengths: length of each example.
        batch_size: size of the batches that the data loader cuts from the order.

    Example:
        >>> sorted(SimilarLengths([3, 1, 2], batch_size=2))
        [0, 1, 2]
    """

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        yield from order_by_length(self.lengths, self.batch_size, torch.Generator().manual_seed(seed))


# --- the data modules -----------------------------------------------------------------------------


Example = dict[str, Any]


def check_columns(columns: Mapping[str, str] | None, known: Sequence[str]) -> dict[str, str]:
    """Return the mapping of columns, or raise ``ArgumentError`` when it maps a column that nothing reads."""
    unknown = sorted(set(columns or {}) - set(known))
    if unknown:
        raise ArgumentError(f"columns={dict(columns or {})}: {unknown} are not read; map {list(known)} to your columns")
    return dict(columns or {})


def split_off(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """Cut a random share of the rows off a table.

    Args:
        table: all rows.
        share: share of the rows that the second table gets, at least one row.
        seed: decides which.

    Returns:
        The remaining rows and those cut off, each in the order of the table.

    Raises:
        ArgumentError: the share is not in (0, 1), or the table has fewer than two rows.
    """
    if not 0.0 < share < 1.0:
        raise ArgumentError(f"val_fraction={share}: expected a share of the rows, 0 < val_fraction < 1")
    if len(table) < 2:
        raise ArgumentError(f"{table.source} has {len(table)} row, too few to cut a validation split off; pass val")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(round(share * len(table)), 1), len(table) - 1)
    return table.take(sorted(order[count:])), table.take(sorted(order[:count]))


def with_validation(tables: dict[str, Table], share: float, seed: int) -> dict[str, Table]:
    """Cut a validation split off the training split where there is none (:func:`split_off`), and say so."""
    if "val" in tables:
        return tables
    train, val = split_off(tables["train"], share, seed)
    rank_zero_info(f"{train.source}: no validation split, so {len(val)} of its rows (seed {seed}) validate")
    return {**tables, "train": train, "val": val}


class TableDataModule(L.LightningDataModule):
    """Base of the ready data modules.

    Args:
        tokenizer: name of a tokenizer (:func:`lightning_pet.modules.pretrained.load_tokenizer`); ``None``
            takes the one of the LightningModule that is being trained.
        max_length: longest input in tokens; longer texts are cut, and how many is reported.
        batch_size: examples per batch and process.
        similar_lengths: form training batches of texts of similar length
            (:class:`~lightning_pet.data.base.SimilarLengths`); with several processes, Lightning's
            distributed sampler decides instead.
        num_workers: processes that form batches; 0 forms them in the training process.
    """

    def __init__(
        self, tokenizer: str | None, max_length: int, batch_size: int, similar_lengths: bool, num_workers: int
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("max_length", max_length, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ArgumentError(f"{name}={value}: expected at least {least}")
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.similar_lengths = similar_lengths
        self.num_workers = num_workers
        self._tables: dict[str, Table] = {}
        self._tokenizer: Any = None
        self._key: Hashable = ()
        self._examples: dict[str, list[Example]] = {}

    @abstractmethod
    def read(self) -> dict[str, Table]:
        """Read the tables of all splits: ``train``, ``val`` and possibly ``test`` and ``predict``."""

    @abstractmethod
    def encode(self, table: Table, tokenizer: Any, targets: bool) -> list[Example]:
        """Turn rows into token ids; with their labels if ``targets``."""

    @abstractmethod
    def collator(self, tokenizer: Any) -> Any:
        """Make the function that pads a list of examples to a batch."""

    def bind(self, module: Any) -> Hashable:
        """Note what the LightningModule says about its data; return whatever of it the examples depend on."""
        return None

    @property
    def tables(self) -> dict[str, Table]:
        """The tables of all splits, read at the first access."""
        if not self._tables:
            self._tables = self.read()
        return self._tables

    def setup(self, stage: str) -> None:
        """Encode the splits of a stage with the tokenizer of the trainer's LightningModule."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}[stage]
        module = None if self.trainer is None else self.trainer.lightning_module
        self.encode_splits(module, wanted)

    def encode_splits(self, module: Any, splits: Sequence[str]) -> None:
        """Encode some splits for a LightningModule, without a trainer.

        Args:
            module: has a ``tokenizer``, unless this data module names one.
            splits: which; splits that are encoded already are left alone.

        Raises:
            ArgumentError: there is no tokenizer or no such split.
        """
        tokenizer = self._find_tokenizer(module)
        key = (type(tokenizer), tokenizer.name_or_path, len(tokenizer), self.bind(module))
        if key != self._key:  # another module than the last one: its token ids or labels may differ
            self._key, self._tokenizer = key, tokenizer
            self._examples.clear()
        for split in splits:
            if split not in self._examples:
                table = self._table(split)
                self._examples[split] = self.encode(table, self._tokenizer, targets=split != "predict")
                self._report_cuts(split)

    def _table(self, split: str) -> Table:
        names = {"predict": ("predict", "test", "val")}.get(split, (split,))
        found = next((name for name in names if name in self.tables), None)
        if found is None:
            raise ArgumentError(f"there is no {split!r} split, only {sorted(self.tables)}; pass {split}=<file>")
        return self.tables[found]

    def _find_tokenizer(self, module: Any) -> Any:
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name)
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ArgumentError(
                f"{type(module).__name__} has no attribute `tokenizer`; set {type(self).__name__}(tokenizer=<name>)"
            )
        return tokenizer

    def _report_cuts(self, split: str) -> None:
        examples = self._examples[split]
        full = sum(len(example["input_ids"]) >= self.max_length for example in examples)
        if full:
            rank_zero_info(
                f"{split}: {full} of {len(examples)} texts fill or exceed max_length={self.max_length} tokens"
            )

    def loader(self, split: str) -> DataLoader[Example]:
        """Data loader over an encoded split, shuffled if it is the training split."""
        examples: Any = self._examples[split]
        train = split == "train"
        sampler = None
        if train and self.similar_lengths and (self.trainer is None or self.trainer.world_size == 1):
            sampler = SimilarLengths([len(example["input_ids"]) for example in examples], self.batch_size)
        return DataLoader(
            examples,
            batch_size=self.batch_size,
            sampler=sampler,
            shuffle=None if sampler is not None else train,
            collate_fn=self.collator(self._tokenizer),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Example]:
        """Shuffled training batches."""
        return self.loader("train")

    def val_dataloader(self) -> Any:
        """Validation batches."""
        return self.loader("val")

    def test_dataloader(self) -> Any:
        """Test batches."""
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader[Example]:
        """Batches without targets: of the prediction split, else of the test split, else of the validation split."""
        return self.loader("predict")
