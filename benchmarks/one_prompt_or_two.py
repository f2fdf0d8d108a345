"""One prompt for each task, or one prompt for both? Prompt tuning of the date model, measured.

The base turns written dates into ISO 8601, and has met both orders, so that ``3/4/2021`` means nothing certain to it.
Three pairs of tasks:

* conflicting: month first, and day first: the same text has another answer in each;
* told apart: month first, and dates with names of months: the text tells which task it is of;
* alike: month first in both, the dates dealt out at random.

Each pair is trained twice, on the same batches for the same number of steps: with ``TasksCallback``, each row through
the prompt of its task, and with one prompt for all rows. Printed is the share of dates that are right in all ten
characters, over days that no training has seen.

    python benchmarks/one_prompt_or_two.py
    python benchmarks/one_prompt_or_two.py --steps=400 --seeds=5 --sizes=8,64,512
"""

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from random import Random
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_pet import Adapted, PromptTuningCallback, TasksCallback
from lightning_pet.modules.date_model import draw_days, write_date
from lightning_pet.modules.pretrained import load_model, load_tokenizer

PAIRS: dict[str, tuple[Any, Any]] = {"conflicting": ("us", "eu"), "told apart": ("us", "long"), "alike": ("us", "us")}
TASKS = ("first", "second")


def texts(kind: Any, size: int, seed: str, held_out: bool) -> list[tuple[str, str]]:
    """Written dates and what they mean."""
    random = Random(seed)
    days = draw_days(random, held_out)
    return [(write_date(day := next(days), kind, random), day.isoformat()) for _ in range(size)]


class Mixed(IterableDataset[dict[str, Any]]):
    """Batches with as many rows of each task."""

    def __init__(self, pools: dict[str, list[tuple[str, str]]], steps: int, rows: int, seed: int, shared: bool) -> None:
        self.pools, self.steps, self.rows, self.seed, self.shared = pools, steps, rows, seed, shared
        self.tokenizer = load_tokenizer("builtin:dates")

    def batch(self, pairs: list[tuple[str, str]], tasks: list[str]) -> dict[str, Any]:
        """Token ids, and the task of each row, if rows have tasks of their own."""
        inputs = self.tokenizer([text for text, _ in pairs], padding=True, return_tensors="pt")
        labels = self.tokenizer([target for _, target in pairs], return_tensors="pt")["input_ids"]
        return {**inputs, "labels": labels} | ({"task": tasks} if tasks and not self.shared else {})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        random = Random(self.seed)
        for _ in range(self.steps):
            chosen = [(pair, task) for task, pool in self.pools.items() for pair in random.choices(pool, k=self.rows)]
            yield self.batch([pair for pair, _ in chosen], [task for _, task in chosen])


class Dates(L.LightningModule):
    """The date model; knows nothing of tasks."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.model = load_model("AutoModelForSeq2SeqLM", "builtin:dates", None)
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss of all characters."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        """A rate that falls to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps + 1, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def right(module: Dates, kinds: tuple[Any, Any], options: argparse.Namespace, handle: Any = None) -> list[float]:
    """The share of right dates of both tasks, on days that no training has seen; with the task's own prompt, if any."""
    module.eval()
    found = []
    for task, kind in zip(TASKS, kinds, strict=True):
        batch = Mixed({}, 0, 0, 0, True).batch(texts(kind, options.test, f"test {task}", True), [])
        with torch.no_grad(), nullcontext() if handle is None else handle.using(task):
            # Each character told from the true ones before it: all right is what greedy decoding gets right, too.
            same = module.model(**batch).logits.argmax(-1) == batch["labels"]
        found.append(float(same.all(-1).float().mean()))
    return found


def measure(kinds: tuple[Any, Any], shared: bool, size: int, seed: int, options: argparse.Namespace) -> list[float]:
    """Train one prompt for each task, or one for both; the share of right dates of both tasks."""
    L.seed_everything(seed, verbose=False)
    pools = {task: texts(kind, size, f"{task} {seed}", False) for task, kind in zip(TASKS, kinds, strict=True)}
    train = Mixed(pools, options.steps, options.rows, seed, shared)
    module = Dates(options.lr)
    trainer = L.Trainer(
        callbacks=[
            PromptTuningCallback(length=options.length, verbose=False),
            *([] if shared else [TasksCallback(tasks=list(TASKS), dirpath=options.folder)]),
        ],
        accelerator="cpu",
        max_steps=options.steps,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, batch_size=None))
    return right(module, kinds, options, None if shared else Adapted(module))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16, help="of each task in a batch")
    parser.add_argument("--length", type=int, default=8, help="of a prompt")
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--test", type=int, default=400, help="dates of each task to test on")
    parser.add_argument("--sizes", default="8,512", help="training dates of each task")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pairs", default=",".join(PAIRS))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(f"{'pair':<12} {'dates':>6}  {'base':>15}  {'one prompt each':>15}  {'one for both':>15}")
    with TemporaryDirectory() as options.folder:
        for pair in options.pairs.split(","):
            base = " / ".join(f"{share:.3f}" for share in right(Dates(options.lr), PAIRS[pair], options))
            for size in map(int, options.sizes.split(",")):
                cells = []
                for shared in (False, True):
                    runs = [measure(PAIRS[pair], shared, size, seed, options) for seed in range(options.seeds)]
                    cells.append(" / ".join(f"{mean(task):.3f}" for task in zip(*runs, strict=True)))
                print(f"{pair:<12} {size:>6}  {base:>15}  {cells[0]:>15}  {cells[1]:>15}", flush=True)


if __name__ == "__main__":
    main()
