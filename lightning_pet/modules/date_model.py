"""A small encoder-decoder that turns written dates into ISO 8601, trained on the spot in about half a minute.

It meets ``3/4/2021`` in both orders, month first (US) and day first (EU), so it cannot know which one is
meant: a small delta decides. One base, several deltas with different, verifiably right answers.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lightning_pet.modules.cache import cached_folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and its notes below the level of errors."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


DateKind = Literal["us", "eu", "long"]

# Not calendar.month_name, which depends on the locale.
_MONTHS = (
    "January February March April May June July August September October November December".split()  # noqa: SIM905
)
_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905
_FIRST = date(1970, 1, 1)
_DAYS = 365 * 65

_CONFIG: dict[str, Any] = {
    "vocab_size": 259,  # bytes, and three special tokens
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 256,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 64,
    "tie_word_embeddings": True,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
_RECIPE: dict[str, Any] = {"version": 1, "steps": 500, "batch": 64, "lr": 5e-3, "warmup": 0.1, "seed": 0}


def write_date(day: date, kind: DateKind, random: Random) -> str:
    """Write a date as people do.

    Args:
        day: the date.
        kind: ``"us"`` is month/day/year, ``"eu"`` day/month/year, ``"long"`` one of six forms that name the
            month or start with the year.
        random: chooses the long form.

    Example:
        >>> write_date(date(2021, 3, 4), "us", Random(0)), write_date(date(2021, 3, 4), "eu", Random(0))
        ('3/4/2021', '4/3/2021')
    """
    if kind == "us":
        return f"{day.month}/{day.day}/{day.year}"
    if kind == "eu":
        return f"{day.day}/{day.month}/{day.year}"
    month, weekday = _MONTHS[day.month - 1], _WEEKDAYS[day.weekday()]
    forms = (
        f"{day.day} {month} {day.year}",
        f"{month} {day.day}, {day.year}",
        f"{weekday} {day.day} {month[:3]} {day.year}",
        f"{weekday[:3]}, {day.day:02d} {month[:3]} {day.year}",
        f"{day.year}/{day.month}/{day.day}",
        f"{month[:3]} {day.day} '{day.year % 100:02d}",
    )
    return random.choice(forms)


def draw_days(random: Random, held_out: bool) -> Iterator[date]:
    """Draw days of 1970 to 2034 at random, without end.

    Every tenth day is held out: the base never trains on it, so deltas can be evaluated on it.

    Args:
        random: source of randomness.
        held_out: draw from the days held out, or from the others.
    """
    while True:
        day = _FIRST + timedelta(days=random.randrange(_DAYS))
        digest = hashlib.sha256(day.isoformat().encode()).digest()
        if (digest[0] % 10 == 0) == held_out:
            yield day


def date_model_folder() -> Path:
    """Folder of the trained date model and its tokenizer; trains it when the cache does not have it."""
    recipe = json.dumps([_CONFIG, _RECIPE], sort_keys=True)
    with torch.device("cpu"):  # a caller may be building on the meta device, and this trains
        return cached_folder(f"dates-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}", _build)


def _build(folder: Path) -> None:
    from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = ByT5Tokenizer(extra_ids=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RECIPE["seed"])
        model = T5ForConditionalGeneration(T5Config(**_CONFIG))
    save_trained(folder, model, tokenizer, lambda: _pretrain(model, tokenizer))


def save_trained(folder: Path, model: Any, tokenizer: Any, train: Callable[[], None]) -> None:
    """Train a small model, and write it with its tokenizer.

    Args:
        folder: to write into.
        model: of transformers.
        tokenizer: its tokenizer.
        train: trains it.
    """
    threads = torch.get_num_threads()
    # So small a model gains little from more threads, and waits for them for minutes where cores are shared.
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            train()
    finally:
        torch.set_num_threads(threads)
    with quiet_transformers():
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def train_on(
    batches: Iterable[dict[str, Tensor]],
    model: nn.Module,
    loss: Callable[[dict[str, Tensor]], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    title: str,
    steps: int,
) -> None:
    """Take one optimizer step per batch, with gradients of at most length 1, under a progress bar.

    Args:
        batches: as many as ``steps``.
        model: whose gradients are clipped.
        loss: of a batch.
        optimizer: steps.
        schedule: steps with it.
        title: of the progress bar.
        steps: number of batches.
    """
    for batch in track(batches, title, steps, console=Console(stderr=True)):
        torch.autograd.backward(loss(batch))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _batches(tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    random = Random(_RECIPE["seed"])
    days = draw_days(random, held_out=False)
    kinds: list[DateKind] = ["long", "long", "long", "us", "eu"]
    for _ in range(_RECIPE["steps"]):
        chosen = [next(days) for _ in range(_RECIPE["batch"])]
        inputs = tokenizer(
            [write_date(day, random.choice(kinds), random) for day in chosen], padding=True, return_tensors="pt"
        )
        labels = tokenizer([day.isoformat() for day in chosen], return_tensors="pt")["input_ids"]
        yield {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}


def _pretrain(model: nn.Module, tokenizer: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RECIPE["lr"], weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _RECIPE["lr"], total_steps=_RECIPE["steps"] + 5, pct_start=_RECIPE["warmup"]
    )
    title, steps = "Training the date model (once)", _RECIPE["steps"]
    train_on(_batches(tokenizer), model, lambda batch: model(**batch).loss, optimizer, schedule, title, steps)
