"""Time and memory of one training step: LoRA here, LoRA in HF PEFT, full fine-tuning, and the frozen floor.

The floor is the least that any method can cost whose gradient reaches the first layer: forward and
backward through the frozen base, no parameter gradient, no optimizer. Every variant runs the same
model on the same batch in float32 on one thread; the three frozen ones get their gradient from the
embedding's output on, so they differ by their deltas alone.

Times are CPU seconds of this process in each variant's best turn: the variants take turns, and what
else runs on the machine only ever adds. The quartiles of the ratio within a turn tell how quiet it was.
Memory is the peak of a process of its own per variant, above what it held before the model was built:
weights, delta, optimizer state, activations and temporaries.

    python benchmarks/train_step.py [--quick] [--json PATH]
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

Step = Callable[[], None]
K = TypeVar("K")
RANK, ALPHA = 8, 16


@dataclass(frozen=True)
class Scenario:
    """A model, its batch, its targets, and the bound that LoRA's time must keep to (times the floor)."""

    model: str
    targets: str
    bound: float

    @property
    def name(self) -> str:
        """Short name, also accepted on the command line."""
        return f"{self.model}/{self.targets}"


SCENARIOS = [
    Scenario("bert", "all-linear", 1.15),
    Scenario("llama", "all-linear", 1.10),
    Scenario("bert", "q,v", 1.03),
    Scenario("llama", "q,v", 1.03),
]
VARIANTS = ["floor", "full", "peft", "ours"]
MEMORY_BOUND = 0.85  # of PEFT's peak


@dataclass(frozen=True)
class Row:
    """What was measured of one variant: milliseconds per step, ratio to the floor, MiB at the peak."""

    scenario: str
    variant: str
    milliseconds: float
    of_floor: float
    spread: float
    peak_mib: float
    of_peft_peak: float
    trained: int


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random weights and a batch of token ids for it."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    if name == "bert":
        bert = BertConfig(
            vocab_size=1000,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertModel(bert, add_pooling_layer=False), {"input_ids": torch.randint(1000, (32, 48))}
    llama = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1376,
        use_cache=False,
    )
    return LlamaModel(llama), {"input_ids": torch.randint(1000, (4, 128))}


def names_of(model: nn.Module, targets: str) -> list[str]:
    """Paths of the linear layers that are adapted."""
    ends = ("query", "value", "q_proj", "v_proj") if targets == "q,v" else ("",)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(ends)]


def with_ours(model: nn.Module, targets: list[str]) -> nn.Module:
    """The model with this library's LoRA on the targets."""
    from lightning_pet import LoRACallback, apply

    apply(model, [LoRACallback(r=RANK, alpha=ALPHA, target_modules=targets, modules_to_save=[])])
    return model


def with_peft(model: nn.Module, targets: list[str]) -> nn.Module:
    """The model with HF PEFT's LoRA on the targets."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))


def build_step(model: nn.Module, batch: dict[str, Tensor], variant: str, targets: list[str]) -> tuple[Step, int]:
    """One training step of a variant, and how many parameters it trains."""
    if variant != "full":
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    if variant == "floor":
        model.requires_grad_(False)
    elif variant != "full":
        model = (with_ours if variant == "ours" else with_peft)(model, targets)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def step() -> None:
        model(**batch).last_hidden_state.square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, sum(parameter.numel() for parameter in trained)


def take_turns(steps: dict[K, Step], turns: int) -> dict[K, list[float]]:
    """CPU seconds of each step in every turn."""
    seconds: dict[K, list[float]] = {key: [] for key in steps}
    for turn in range(turns + 1):
        # Forwards and backwards in turn, so that nobody always follows the same neighbour.
        for key in steps if turn % 2 else reversed(steps):
            start = time.process_time()
            steps[key]()
            if turn:  # the first is for warming up
                seconds[key].append(time.process_time() - start)
        gc.collect()
    return seconds


def measure_times(scenario: Scenario, turns: int) -> dict[str, list[float]]:
    """CPU seconds per step of every variant, the variants taking turns."""
    model, batch = build(scenario.model)
    targets = names_of(model, scenario.targets)
    return take_turns({v: build_step(copy.deepcopy(model), batch, v, targets)[0] for v in VARIANTS}, turns)


def resident(field: str) -> float:
    """A field of this process's memory status in MiB: ``VmRSS`` (now) or ``VmHWM`` (highest so far)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure_memory_here(scenario: Scenario, variant: str) -> tuple[float, int]:
    """Peak MiB of this process while training, above what it held before the model was built."""
    warm_up = nn.Linear(64, 64)
    warm_up(torch.randn(64, 64)).sum().backward()
    build("bert"), build("llama")  # imports
    for adapt in (with_peft, with_ours):
        adapt(nn.Sequential(nn.Linear(8, 8)), ["0"])
    gc.collect()
    before = resident("VmRSS")
    model, batch = build(scenario.model)
    step, trained = build_step(model, batch, variant, names_of(model, scenario.targets))
    step()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    for _ in range(2):
        step()
    return resident("VmHWM") - before, trained


def measure_memory(scenario: Scenario, variant: str) -> tuple[float, int]:
    """:func:`measure_memory_here` in a process of its own, whose freed tensors go back to the system at once."""
    command = [sys.executable, __file__, "--memory-of", scenario.name, variant]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    peak, trained = json.loads(done.stdout.splitlines()[-1])
    return peak, trained


def rows_of(scenario: Scenario, turns: int) -> list[Row]:
    """All variants of a scenario."""
    seconds = measure_times(scenario, turns)
    memory = {v: measure_memory(scenario, v) for v in VARIANTS}
    rows = []
    for variant in VARIANTS:
        ratios = [own / floor for own, floor in zip(seconds[variant], seconds["floor"], strict=True)]
        low, _, high = statistics.quantiles(ratios)
        peak, trained = memory[variant]
        best = min(seconds[variant])
        ratio = best / min(seconds["floor"])
        row = Row(scenario.name, variant, best * 1e3, ratio, high - low, peak, peak / memory["peft"][0], trained)
        rows.append(row)
    return rows


def show(rows: list[Row]) -> None:
    """Print one table and, below it, the bounds that are not kept."""
    print(
        f"{'scenario':<18}{'variant':<8}{'ms':>8}{'/ floor':>9}{'± iqr':>8}{'peak MiB':>10}{'/ PEFT':>8}{'trained':>12}"
    )
    for row in rows:
        print(
            f"{row.scenario:<18}{row.variant:<8}{row.milliseconds:>8.1f}{row.of_floor:>9.3f}{row.spread:>8.3f}"
            f"{row.peak_mib:>10.1f}{row.of_peft_peak:>8.3f}{row.trained:>12,}"
        )
    bounds = {scenario.name: scenario.bound for scenario in SCENARIOS}
    for row in rows:
        if row.variant == "ours" and row.of_floor > bounds[row.scenario]:
            print(f"{row.scenario}: {row.of_floor:.3f} of the floor's time, bound {bounds[row.scenario]}")
        if row.variant == "ours" and row.of_peft_peak > MEMORY_BOUND:
            print(f"{row.scenario}: {row.of_peft_peak:.3f} of PEFT's peak memory, bound {MEMORY_BOUND}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 turns instead of 25")
    parser.add_argument("--only", metavar="SCENARIO", choices=[s.name for s in SCENARIOS], help="one scenario")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows to this file")
    parser.add_argument("--memory-of", nargs=2, metavar=("SCENARIO", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        scenario = next(s for s in SCENARIOS if s.name == args.memory_of[0])
        print(json.dumps(measure_memory_here(scenario, args.memory_of[1])))
        return
    chosen = [s for s in SCENARIOS if args.only in (None, s.name)]
    rows = [row for scenario in chosen for row in rows_of(scenario, 5 if args.quick else 25)]
    show(rows)
    if args.json:
        facts = {"torch": torch.__version__, "threads": 1, "dtype": "float32", "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
