"""Written dates to ISO 8601, with nothing to download: which of ``3/4/2021`` comes first, the month or the day?"""

from collections.abc import Sequence
from random import Random
from typing import Any, Literal

from lightning.pytorch.utilities import move_data_to_device
from torch.utils.data import DataLoader

from lightning_pet.data.base import Example, TableDataModule
from lightning_pet.data.reference import untouched
from lightning_pet.data.seq2seq import Seq2SeqData
from lightning_pet.data.tables import Table
from lightning_pet.errors import ArgumentError
from lightning_pet.modules.date_model import DateKind, draw_days, write_date


def check_dates(order: str, train_size: int, val_size: int) -> None:
    """Refuse an unknown order, and sizes below 1.

    Raises:
        ArgumentError: saying what is expected.
    """
    if order not in ("us", "eu"):
        raise ArgumentError(f"order={order!r}: expected 'us' (month first) or 'eu' (day first)")
    if train_size < 1 or val_size < 1:
        raise ArgumentError(f"train_size={train_size} and val_size={val_size} must be at least 1")


def kinds_of(order: str) -> tuple[DateKind, ...]:
    """Kinds of dates that are evaluated: first the order that is trained, then the other, then the long forms."""
    return ("us", "eu", "long") if order == "us" else ("eu", "us", "long")


class InThreeKinds(TableDataModule):
    """Mixed in before a data module of dates: it evaluates with one loader for each kind of date."""

    eval_names: tuple[DateKind, ...]

    def encode_splits(self, module: Any, splits: Sequence[str]) -> None:
        """Encode some splits; those of evaluation in all three kinds."""
        evaluated = any(split in ("val", "test") for split in splits)
        super().encode_splits(module, [*splits, *(self.eval_names if evaluated else ())])

    def val_dataloader(self) -> list[DataLoader[Example]]:
        """One loader for each of ``eval_names``."""
        return [self.loader(kind) for kind in self.eval_names]

    def test_dataloader(self) -> list[DataLoader[Example]]:
        """One loader for each of ``eval_names``."""
        return self.val_dataloader()


class Dates(InThreeKinds, Seq2SeqData):
    """Dates with numeric order, month first or day first, for ``Seq2SeqModule(model="builtin:dates")``.

    The base model has met both orders, so about four in ten of these dates are ambiguous to it.
    Validation has three loaders of days that the base never saw: first the order that is trained, then the
    other order and the long forms, which show what tuning costs.

    Args:
        order: ``"us"`` trains month first, ``"eu"`` day first.
        train_size: number of training dates.
        val_size: number of validation dates of each kind.
        batch_size: dates per batch and process.
        seed: decides which dates.
        num_workers: processes that form batches.

    Raises:
        ArgumentError: a number is below 1, or the order is unknown.

    Example:
        >>> data = Dates(train_size=1, val_size=1)
        >>> data.eval_names
        ('us', 'eu', 'long')
    """

    metric = "val/exact_match"

    def __init__(
        self,
        order: Literal["us", "eu"] = "us",
        train_size: int = 512,
        val_size: int = 200,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            "", tokenizer="bytes", max_length=64, max_target_length=16, batch_size=batch_size, num_workers=num_workers
        )
        check_dates(order, train_size, val_size)
        self.eval_names = kinds_of(order)
        self.train_size = train_size
        self.val_size = val_size
        self.seed = seed

    def read(self) -> dict[str, Table]:
        """Write the dates of all splits."""
        tables = {"train": self._write("train", self.eval_names[0], self.train_size, held_out=False)}
        for kind in self.eval_names:
            tables[kind] = self._write("val", kind, self.val_size, held_out=True)
        return tables | {"val": tables[self.eval_names[0]], "test": tables[self.eval_names[0]]}

    def _write(self, split: str, kind: DateKind, size: int, held_out: bool) -> Table:
        random = Random(f"{split} {self.seed}")
        days = draw_days(random, held_out)
        chosen = [next(days) for _ in range(size)]
        sources = [write_date(day, kind, random) for day in chosen]
        return Table(f"dates[{split} {kind}]", {"source": sources, "target": [day.isoformat() for day in chosen]})

    def reference_points(self, module: Any) -> dict[str, float]:
        """Exact match of the model as it is, on the order that will be trained.

        Args:
            module: a :class:`~lightning_pet.modules.seq2seq.Seq2SeqModule` before tuning.

        Returns:
            One point, ``"base model"``.
        """
        order = self.eval_names[0]
        self.encode_splits(module, ["val"])
        with untouched(module):
            texts = [
                text
                for batch in self.loader(order)
                for text in module.generate(move_data_to_device(batch, module.device))
            ]
        right = sum(a == b for a, b in zip(texts, self.tables[order].columns["target"], strict=True))
        return {"base model": right / len(texts)}
