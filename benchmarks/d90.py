"""The intrinsic dimension of one small task, on a model that was trained on related data and on one that was not.

The task is to read ``3/4/2021`` month first. The trained model is the date model of the examples, which has met both
orders and six long forms; the other one is the same network with random weights. Both are tuned in random subspaces
(DID) and evaluated by exact match on days that neither has seen.

    python benchmarks/d90.py --plot d90.svg          # about ten minutes on one CPU core; goes on where it was
    python benchmarks/d90.py --seeds 0,1,2 --folder runs
"""

import argparse
import math
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet import IntrinsicDimensionCallback, apply
from lightning_pet.modules.date_model import date_model_folder, draw_days, write_date
from lightning_pet.report.dimension_search import Dimension, Runs, search
from lightning_pet.report.dimension_view import plot_dimension, sentence, show_dimension

FULL_RATE = 5e-3  # what the date model itself was trained with
TYPICAL_TENSOR = 64 * 256


def encode(tokenizer: Any, count: int, seed: str, held_out: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Dates as people in the US write them, and in ISO 8601."""
    random = Random(seed)
    days = draw_days(random, held_out)
    chosen = [next(days) for _ in range(count)]
    inputs = tokenizer([write_date(day, "us", random) for day in chosen], padding=True, return_tensors="pt")
    texts = [day.isoformat() for day in chosen]
    labels = tokenizer(texts, return_tensors="pt")["input_ids"]
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}, texts


class Task:
    """Tunes a copy of one model in a subspace, and counts how many dates it gets right."""

    def __init__(self, folder: Path, trained: bool, steps: int, batch: int) -> None:
        from transformers import ByT5Tokenizer

        self.folder, self.trained, self.steps, self.batch = folder, trained, steps, batch
        self.tokenizer = ByT5Tokenizer(extra_ids=0)
        self.data, _ = encode(self.tokenizer, 4096, "train", held_out=False)
        self.test, self.answers = encode(self.tokenizer, 300, "test", held_out=True)

    def model(self, seed: int) -> nn.Module:
        """A fresh copy: the trained one, or random weights by the seed."""
        from transformers import T5Config, T5ForConditionalGeneration

        if self.trained:
            return T5ForConditionalGeneration.from_pretrained(self.folder)
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(T5Config.from_pretrained(self.folder))

    def __call__(self, d: int | None, seed: int) -> float:
        """Exact match after tuning."""
        model = self.model(seed)
        rate = FULL_RATE
        if d is not None:
            apply(model, [IntrinsicDimensionCallback(d=d, structure_aware=False, seed=seed)])
            # A step moves a weight of a typical tensor as far as in full fine-tuning, but no more than twentyfold in θ.
            rate = min(FULL_RATE * math.sqrt(TYPICAL_TENSOR / d), 20 * FULL_RATE)
        self.train(model, rate, seed)
        score = self.evaluate(model)
        print(f"{'trained' if self.trained else 'random'}, d={d}, seed {seed}: {score:.3f}", flush=True)
        return score

    def train(self, model: nn.Module, rate: float, seed: int) -> None:
        """AdamW with one cycle of the learning rate."""
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=self.steps + 1, pct_start=0.1)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            rows = torch.randint(len(self.data["labels"]), (self.batch,), generator=generator)
            model(**{name: values[rows] for name, values in self.data.items()}).loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Share of dates whose whole answer is right."""
        model.eval()
        inputs = {name: self.test[name] for name in ("input_ids", "attention_mask")}
        generated = model.generate(**inputs, max_new_tokens=11, num_beams=1, do_sample=False)  # type: ignore[operator]
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return sum(a == b for a, b in zip(texts, self.answers, strict=True)) / len(texts)


def main() -> None:
    """Search on both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--smallest", type=int, default=16)
    parser.add_argument("--largest", type=int, default=262_144)
    parser.add_argument("--resolution", type=float, default=1.5)
    parser.add_argument("--folder", type=Path, default=Path(), help="for the records of finished runs")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Dimension] = {}
    for label in ("trained", "random"):
        task = Task(date_model_folder(), label == "trained", options.steps, options.batch)
        runs = Runs(options.folder / f"d90_{label}.json", {"steps": options.steps, "batch": options.batch})
        found[label] = search(
            task,
            runs,
            seeds=options.seeds,
            smallest=options.smallest,
            largest=options.largest,
            resolution=options.resolution,
        )
        show_dimension(found[label], f"exact match, {label} model")
    for label, curve in found.items():
        print(f"{label}: {sentence(curve)}")
    if options.plot:
        plot_dimension(found, "exact match", options.plot)


if __name__ == "__main__":
    main()
