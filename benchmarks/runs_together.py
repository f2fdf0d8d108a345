"""Four runs in one Trainer, each with the weights of its solo run, beside one run alone: CPU time of a training step.

Both are whole steps of Lightning with AdamW, in one process, in turns; a section of ``many_deltas.py``.
"""

import gc
import logging
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from page import Measure, Options, Row, Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trained_models import llama

from lightning_pet import LoRACallback, TasksCallback

TABLE = Table(
    "many_runs",
    "LoRA r=8, a training step: 4 runs in one Trainer / one alone",
    "python benchmarks/many_deltas.py --write",
)
RUNS = {f"run{number}": {"lr": 1e-3 * (number + 1), "seed": number} for number in range(4)}
STEPS, FIRST = 14, 4


@dataclass(frozen=True)
class Small:
    """A model and a batch.

    Attributes:
        width: of the layers.
        layers: how many.
        rows: of the batch.
        tokens: of a row.
        dropout: of the attention and of LoRA.
    """

    width: int
    layers: int
    rows: int
    tokens: int
    dropout: float = 0.0


class Trained(pl.LightningModule):
    """Notes the CPU time of every step."""

    def __init__(self, case: Small) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, batch = llama(case.width, case.layers, case.rows, case.tokens)
        self.batch = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        self.net.config._attn_implementation = "eager"
        self.net.config.attention_dropout = case.dropout
        for module in self.net.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = case.dropout
        self.seconds: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """A loss over the last hidden state, as over that many words."""
        hidden = self.net(**batch).last_hidden_state
        return nn.functional.cross_entropy(hidden.flatten(0, 1), batch["input_ids"].flatten() % hidden.shape[-1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The step begins."""
        self.begin = time.process_time()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is over."""
        self.seconds.append(time.process_time() - self.begin)

    def train_dataloader(self) -> DataLoader[Any]:
        """The same batch again and again."""
        return DataLoader([self.batch] * STEPS, batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As one would train."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fitted(case: Small, several: bool) -> Trained:
    """A fit of a few steps."""
    module = Trained(case)
    callbacks: list[pl.Callback] = [LoRACallback(r=8, dropout=case.dropout, verbose=False)]
    if several:
        callbacks.append(TasksCallback(tasks=RUNS, every_row=True))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(accelerator="cpu", max_steps=STEPS, enable_checkpointing=False, callbacks=callbacks, **quiet).fit(
            module
        )
    return module


def frozen(module: nn.Module) -> int:
    """Numbers of the base."""
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)


def measure(name: str, case: Small, bound: float | None, options: Options) -> Row:
    """One case."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.short:
        case = Small(32, 1, 2, 4, case.dropout)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    held: dict[bool, int] = {}
    for _ in range(1 if options.short else max(2, options.turns // 2)):
        for several in (False, True):
            module = fitted(case, several)
            seconds[several] += module.seconds[FIRST:]
            held[several] = frozen(module)
            gc.collect()
    one, four = min(seconds[False]), min(seconds[True])
    context: dict[str, float | str] = {
        "one alone, ms": f"{1e3 * one:,.1f}",
        "base in memory": f"{held[True] / held[False]:.0f}×",
    }
    return Row(name, four / one, {}, bound, context)


CASES = {
    "Llama 2×64, 4×16 tokens": (Small(64, 2, 4, 16), 2.5),
    "Llama 4×256, 1×16 tokens": (Small(256, 4, 1, 16), 2.5),
    "Llama 4×256, 4×16 tokens": (Small(256, 4, 4, 16), None),
    "Llama 4×256, 4×16 tokens, dropout 0.1": (Small(256, 4, 4, 16, 0.1), None),
}
MEASURES: dict[str, Measure] = {name: partial(measure, name, case, bound) for name, (case, bound) in CASES.items()}
