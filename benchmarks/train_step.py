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
from functools import partial

from libraries import OURS, PEFT, training_step
from measuring import best
from models import build
from page import Options, Row, Table, run

COMMAND = "python benchmarks/train_step.py --write"
PLAIN = Table("train_step", "step / floor", COMMAND)
COMPILED = Table("train_step_compiled", "compiled step / compiled floor", COMMAND)


def measure(
    model: str, method: str, targets: str, bound: float | None, full: bool, compiled: bool, options: Options
) -> Row:
    """One case: ratios to the floor of the same run."""
    base, batch = build(model, options.short)
    variants = ["floor", *(["full"] if full else []), PEFT, OURS]
    steps = {v: training_step(copy.deepcopy(base), batch, v, method, targets, compiled) for v in variants}
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


TABLES = {
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
