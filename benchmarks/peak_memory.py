"""Peak memory of a training step and of merging: this library, HF PEFT and full fine-tuning, a process each.

The peak of the resident memory during a step, above what the process holds before it: weights, delta and optimizer
state are there already, so the figure is activations, gradients and temporaries. The whole, above what the process
held before the model was built, stands beside it. Freed tensors go back to the system at once.

Merging: above the model with its delta. It needs one layer's product at a time.

    python benchmarks/peak_memory.py [--short] [--only WORD] [--write]
"""

import gc
from functools import cache, partial

import peft  # noqa: F401  # before the processes part
import torch
from libraries import ADAPTERS, OURS, PEFT, attach, libraries, training_step
from measuring import gives_back, in_a_copy, peak_above, resident
from page import Options, Row, Table, run
from torch import nn
from trained_models import build
from transformers import BertModel, LlamaModel  # noqa: F401  # before the processes part

import lightning_pet

COMMAND = "python benchmarks/peak_memory.py --write"
STEP = Table("peak_memory", "Llama 6×512, 2×128 tokens: MiB above the start of a step", COMMAND, digits=1)
MERGE = Table("merge_memory", "MiB above the model while merging", COMMAND, digits=1)
MODEL = "Llama 6×512, 2×128"


def warm_up(method: str, library: str) -> None:
    """Imports, and what a first step makes once."""
    step = training_step(*build("BERT 6×384", short=True), library, method)
    for _ in range(2):
        step()
    nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()


def step_peak(model: str, method: str, library: str, short: str) -> tuple[float, float]:
    """MiB above the start of a step, and above the process before the model was built."""
    warm_up(method, library)
    build(model, bool(short))
    gc.collect()
    empty = resident("VmRSS")
    step = training_step(*build(model, bool(short)), library, method)
    for _ in range(2):
        step()
    gc.collect()
    start = resident("VmRSS")
    peak = peak_above(start, lambda: [step() for _ in range(2)])
    return peak, peak + start - empty


def merge_peak(model: str, method: str, library: str, short: str) -> float:
    """MiB above the model with its delta."""
    warm_up(method, library)
    with torch.no_grad():
        base, batch = build(model, bool(short))
        adapted = attach(base, batch, library, method)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        gc.collect()
        start = resident("VmRSS")
        if library == PEFT:
            return peak_above(start, lambda: adapted.merge_and_unload())
        return peak_above(start, lambda: lightning_pet.Adapted(adapted).merge_())


@cache
def one_step(method: str, library: str, short: bool) -> tuple[float, float]:
    """:func:`step_peak` in a process of its own."""
    peak, whole = in_a_copy(step_peak, MODEL, method, library, "short" * short)
    return peak, whole


def measure_step(method: str, share: float | None, options: Options) -> Row:
    """One method, its peers, and full fine-tuning; the bound is a share of HF PEFT's."""
    found = {name: one_step(method, name, options.short) for name in libraries(method) if name != ADAPTERS}
    found["full"] = one_step("LoRA", "full", options.short)
    peak = {name: steps[0] for name, steps in found.items()}
    whole = {name: steps[1] for name, steps in found.items()}
    context: dict[str, float | str] = {"full fine-tuning": peak["full"], "whole, lightning_pet": whole[OURS]}
    peers = {name: peak[name] for name in peak if name not in (OURS, "full")}
    context |= {f"whole, {name}": whole[name] for name in peers}
    return Row(method, peak[OURS], peers, share and share * peers[PEFT], context)


def measure_merge(method: str, options: Options) -> Row:
    """One method beside its peer."""
    names = [name for name in libraries(method) if name != ADAPTERS]
    peak = {name: in_a_copy(merge_peak, MODEL, method, name, "short" * options.short) for name in names}
    return Row(f"Llama 6×512: {method}", peak.pop(OURS), peak, 2.7)  # one layer's weight: 512 × 1376 in float32


SHARES: dict[str, float | None] = {
    "LoRA": 0.85,
    "LoRA, dropout 0.1": 0.69,
    "DoRA": 0.49,
    "PiSSA": 0.85,
    "OLoRA": 0.85,
    "AdaLoRA": None,
    "(IA)³": 0.78,
    **dict.fromkeys(["Houlsby", "Pfeiffer", "parallel", "Compacter", "BitFit", "prefix 30", "prompt 20"]),
    **dict.fromkeys(["SAID", "diff pruning"]),
}
TABLES = {
    STEP: {method: partial(measure_step, method, share) for method, share in SHARES.items()},
    MERGE: {f"Llama 6×512: {method}": partial(measure_merge, method) for method in ("LoRA", "DoRA", "(IA)³")},
}

if __name__ == "__main__":
    gives_back()
    run(__doc__, TABLES)
