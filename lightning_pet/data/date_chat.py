"""Dates as a chat, with nothing to download: the user writes a date, the assistant answers in ISO 8601."""

from datetime import date
from random import Random
from typing import Literal

from lightning_pet.data.chat.data import ChatData
from lightning_pet.data.chat.messages import Conversation, Preference
from lightning_pet.data.chat.preferences import PreferenceData
from lightning_pet.data.dates import InThreeKinds, check_dates, kinds_of
from lightning_pet.data.tables import Table
from lightning_pet.modules.date_model import DateKind, draw_days, write_date


class DateChat(InThreeKinds, ChatData):
    """Dates of one numeric order and long forms, for ``CausalLMModule(model="builtin:date_chat")``.

    The base model has met both orders, so it cannot know which one ``3/4/2021`` is written in. Long forms are among
    the training examples so that they are not forgotten. Validation has three loaders of days that the base never
    saw: the order that is trained, the other order, and the long forms.

    Args:
        order: ``"us"`` trains month first, ``"eu"`` day first.
        train_size: number of training dates, three in ten of which are long forms.
        val_size: number of validation dates of each kind.
        batch_size: dates per batch and process.
        packing: put several dates into one row.
        seed: decides which dates.
        num_workers: processes that form batches.

    Raises:
        ArgumentError: a number is below 1, or the order is unknown.

    Example:
        >>> DateChat(train_size=1, val_size=1).eval_names
        ('us', 'eu', 'long')
    """

    metric = "val/exact_match"

    def __init__(
        self,
        order: Literal["us", "eu"] = "us",
        train_size: int = 512,
        val_size: int = 150,
        batch_size: int = 32,
        packing: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            "",
            max_length=128,
            batch_size=batch_size,
            packing=packing,
            generate=val_size,
            seed=seed,
            num_workers=num_workers,
        )
        check_dates(order, train_size, val_size)
        self.eval_names = kinds_of(order)
        self.train_size, self.val_size = train_size, val_size

    def read(self) -> dict[str, Table]:
        """Write the dates of all splits."""
        order, long = self.eval_names[0], round(0.3 * self.train_size)
        kinds: list[DateKind] = [order] * (self.train_size - long) + ["long"] * long
        tables = {"train": self._write("train", kinds, held_out=False)}
        for kind in self.eval_names:
            tables[kind] = self._write("val", [kind] * self.val_size, held_out=True)
        return tables | {"val": tables[order], "test": tables[order], "predict": tables[order]}

    def _write(self, split: str, kinds: list[DateKind], held_out: bool) -> Table:
        random = Random(f"{split} {self.seed}")
        days = draw_days(random, held_out)
        examples = []
        for kind in kinds:
            day = next(days)
            examples.append(_said(write_date(day, kind, random), day))
        return Table(f"dates[{split} {kinds[0]}]", {"line": list(range(1, len(kinds) + 1)), "example": examples})


def _said(asked: str, answer: date) -> Conversation:
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answer.isoformat()})
    return Conversation(messages, (False, True))


class DatePairs(PreferenceData):
    """Dates that can be read in two orders, of which one is preferred.

    For ``PreferenceModule(model="builtin:date_chat")``.

    Args:
        order: ``"us"`` prefers month first, ``"eu"`` day first.
        train_size: number of training pairs.
        val_size: number of validation pairs, of days that the base never saw.
        batch_size: pairs per batch and process.
        seed: decides which dates.
        num_workers: processes that form batches.

    Raises:
        ArgumentError: a number is below 1, or the order is unknown.

    Example:
        >>> DatePairs(train_size=1, val_size=1).order
        'us'
    """

    metric = "val/exact_match"

    def __init__(
        self,
        order: Literal["us", "eu"] = "us",
        train_size: int = 256,
        val_size: int = 150,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            "", max_length=128, batch_size=batch_size, generate=val_size, seed=seed, num_workers=num_workers
        )
        check_dates(order, train_size, val_size)
        self.order, self.train_size, self.val_size = order, train_size, val_size

    def read(self) -> dict[str, Table]:
        """Write the pairs of both splits."""
        val = self._write("val", self.val_size, held_out=True)
        return {"train": self._write("train", self.train_size, held_out=False), "val": val, "test": val}

    def _write(self, split: str, size: int, held_out: bool) -> Table:
        random = Random(f"pairs {split} {self.seed}")
        pairs: list[Preference] = []
        for day in draw_days(random, held_out):
            if len(pairs) == size:
                break
            if day.day <= 12 and day.day != day.month:
                asked = write_date(day, "us" if self.order == "us" else "eu", random)
                swapped = day.replace(month=day.day, day=day.month)
                pairs.append(Preference(_said(asked, day), _said(asked, swapped)))
        return Table(f"dates[{split} pairs]", {"line": list(range(1, size + 1)), "example": pairs})
