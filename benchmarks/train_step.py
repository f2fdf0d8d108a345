"""Time of a training step of LoRA and its kin: this library and HF PEFT beside the frozen floor, in one process.

The floor is the least that any method can cost whose gradient reaches the first layer: forward and
backward through the frozen base, no parameter gradient, no optimizer. Every variant runs the same
model on the same batch on one thread; all but full fine-tuning get their gradient from the
embeddings' output on, so they differ by their deltas alone.

Times are CPU seconds of this process in each variant's best turn: the variants take turns, and what
else runs on the machine only ever adds. Figures are ratios to the floor; the overhead is what is above it.

    python benchmarks/train_step.py [--short] [--only WORD] [--write]
"""

import copy
import time
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import torch
from libraries import METHODS, OURS, PEFT, attach, training_step
from measuring import best
from page import Options, Row, Table, run
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trained_models import Batch, build, linears, loss_of, with_gradients

import lightning_pet

COMMAND = "python benchmarks/train_step.py --write"
PLAIN = Table("train_step", "step / floor", COMMAND)
TRAINER = Table("trainer_step", "ms of a step under a Trainer", COMMAND)
COMPILED = Table("train_step_compiled", "compiled step / compiled floor", COMMAND)


def measure(
    model: str, method: str, targets: str, bound: float | None, full: bool, compiled: bool, options: Options
) -> Row:
    """One case: ratios to the floor of the same run."""
    base, batch = build(model, options.short)
    variants = ["floor", *(["full"] if full else []), PEFT, OURS]
    compiler = ("aot_eager" if options.short else "inductor") if compiled else None
    steps = {v: training_step(copy.deepcopy(base), batch, v, method, targets, compiler) for v in variants}
    seconds = best(steps, options.turns)
    floor = seconds["floor"]
    ours, peft = seconds[OURS] / floor, seconds[PEFT] / floor
    context: dict[str, float | str] = {"floor, ms": f"{1e3 * floor:,.1f}"}
    if full:
        context["full fine-tuning"] = seconds["full"] / floor
    return Row(name_of(model, method, targets), ours, {PEFT: peft}, bound, context)


def name_of(model: str, method: str, targets: str) -> str:
    """Of a case."""
    return f"{model}: {method}, {'all linear' if targets == 'all' else 'q and v'}"


def cases(rows: list[tuple[str, str, str, float | None]], compiled: bool = False) -> dict[str, partial[Row]]:
    """By their names; full fine-tuning is measured once per model."""
    seen: set[str] = set()
    found = {}
    for model, method, targets, bound in rows:
        full = model not in seen and not compiled
        seen.add(model)
        found[name_of(model, method, targets)] = partial(measure, model, method, targets, bound, full, compiled)
    return found


class Training(pl.LightningModule):
    """A model with nothing around it, which notes when each step begins."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.begins: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss."""
        self.begins.append(time.process_time())
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4, fused=True)


def under_trainer(model: nn.Module, batch: Batch, library: str, method: str, targets: str, steps: int) -> float:
    """CPU seconds of the best step of a run: ours by its callback, a peer's put on by hand."""
    name, arguments = METHODS[method].ours
    callbacks: list[pl.Callback] = []
    with_gradients(model)
    if library == OURS:
        given = {**arguments, "target_modules": [f"model.{path}" for path in linears(model, targets)]}
        callbacks = [getattr(lightning_pet, name)(**given, modules_to_save=[], verbose=False)]
    else:
        model = attach(model, batch, library, method, targets)
    module = Training(model.train())
    off = ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **dict.fromkeys(off, False))
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
    return min(after - before for before, after in pairwise(module.begins[len(module.begins) // 4 :]))


def measure_trainer(model: str, method: str, targets: str, options: Options) -> Row:
    """Milliseconds of a step under a Trainer, the libraries taking turns."""
    base, batch = build(model, options.short)
    steps = 4 if options.short else 60
    found: dict[str, list[float]] = {PEFT: [], OURS: []}
    for turn in range(max(1, options.turns // 3)):
        for library in found if turn % 2 else reversed(found):
            found[library].append(under_trainer(copy.deepcopy(base), batch, library, method, targets, steps))
    return Row(name_of(model, method, targets), 1e3 * min(found[OURS]), {PEFT: 1e3 * min(found[PEFT])})


TRAINED = [("width 64", "LoRA", "all"), ("width 64", "LoRA", "q,v"), ("BERT 2×128, 8×16", "LoRA", "all")]
TABLES = {
    TRAINER: {name_of(*case): partial(measure_trainer, *case) for case in TRAINED},
    PLAIN: cases(
        [
            ("BERT 6×384", "LoRA", "all", 1.12),
            ("BERT 6×384", "LoRA", "q,v", 1.03),
            ("Llama 6×512", "LoRA", "all", 1.08),
            ("Llama 6×512", "LoRA", "q,v", 1.02),
            ("Llama 6×512", "LoRA, dropout 0.1", "all", 1.35),
            ("Llama 6×512", "DoRA", "all", 1.45),
            ("Llama 6×512", "AdaLoRA", "all", None),
            ("Llama 6×512, 1×32", "LoRA", "all", None),
            ("Llama 6×512, checkpointing", "LoRA", "all", None),
            ("Llama 6×512, checkpointing", "LoRA, dropout 0.1", "all", None),
            ("Llama 6×512, bf16", "LoRA", "all", None),
            ("ViT 6×384, 8×197", "LoRA", "all", None),
            ("T5 3+3×384", "LoRA", "all", None),
            ("width 64", "LoRA", "q,v", None),
            ("width 64", "LoRA", "all", None),
            ("width 64", "LoRA, dropout 0.1", "all", None),
            ("width 64", "DoRA", "all", None),
            ("width 64", "AdaLoRA", "all", 2.0),
        ]
    ),
    COMPILED: cases(
        [
            ("Llama 6×512", "LoRA", "all", None),
            ("Llama 6×512", "LoRA, dropout 0.1", "all", None),
            ("Llama 6×512", "DoRA", "all", None),
            ("width 64", "LoRA", "all", None),
        ],
        compiled=True,
    ),
}

if __name__ == "__main__":
    run(__doc__, TABLES)
