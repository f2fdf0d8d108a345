"""Time and memory of one training step of diff pruning, beside full fine-tuning of the same model.

A BERT of 6 layers and width 384, the same batch, AdamW, float32, one thread. Times are CPU seconds of this
process in each variant's best turn, the variants taking turns. Memory is the peak of a process of its own per
variant, above what it held before the model was built: weights, differences, gates, gradients, optimizer
states, activations and temporaries.

    python benchmarks/diff_pruning.py [--quick] [--json PATH]

With ``--recall`` a task with a known answer instead: a teacher differs from a frozen network of 9,610 weights
(64-128-10) in one percent of them, by 0.2 to 0.4. How many of these places are among the largest differences after
300 steps of Adam, over the learning rate: of full fine-tuning (magnitude pruning), and of diff pruning.

    python benchmarks/diff_pruning.py --recall [--steps 300]
"""

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from train_step import Step, build, resident, take_turns

VARIANTS: dict[str, dict[str, object]] = {
    "full": {},
    "both gates": {},
    "weight gates": {"structured": False},
    "bf16 state": {"state": "bf16"},
    "group gates": {"gates": "group"},
    "after the cut": {},
}
TIME_BOUND, MEMORY_BOUND = 1.6, 2.6  # of full fine-tuning, for the default


@dataclass(frozen=True)
class Row:
    """What was measured of one variant: milliseconds per step and MiB at the peak, and both over full fine-tuning's."""

    variant: str
    milliseconds: float
    of_full: float
    peak_mib: float
    of_full_peak: float
    trained: int


def build_step(model: nn.Module, batch: dict[str, Tensor], variant: str) -> tuple[Step, int]:
    """One training step of a variant, and how many numbers it trains."""
    from lightning_pet import DiffPruningCallback, apply

    model.train()
    gates: list[nn.Parameter] = []
    if variant != "full":
        callback = DiffPruningCallback(modules_to_save=[], **VARIANTS[variant])
        root = apply(model, [callback]).root
        differences = [delta for _, delta in callback.differences(root)]
        for delta in differences:
            delta.train()
            nn.init.normal_(delta.w, std=1e-3)
        if variant == "after the cut":
            callback.cut(root)
        gates = [parameter for delta in differences for parameter in delta.gate_parameters]
    own = {id(parameter) for parameter in gates}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [{"params": rest, "lr": 1e-5}, *([{"params": gates, "lr": 0.1}] if gates else [])]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def step() -> None:
        model(**batch).last_hidden_state.square().mean().backward()
        if gates:
            torch.nn.utils.clip_grad_norm_(gates, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(parameter.numel() for parameter in (*rest, *gates))


def measure_times(turns: int) -> dict[str, list[float]]:
    """CPU seconds per step of every variant, the variants taking turns."""
    steps = {}
    for variant in VARIANTS:
        model, batch = build("bert")
        steps[variant] = build_step(model, batch, variant)[0]
    return take_turns(steps, turns)


def measure_memory_here(variant: str) -> tuple[float, int]:
    """Peak MiB of this process while training, above what it held before the model was built."""
    small = nn.Sequential(nn.Linear(64, 64))
    build_step(small, {}, "both gates")  # imports
    small(torch.randn(64, 64)).sum().backward()
    build("bert")
    gc.collect()
    before = resident("VmRSS")
    model, batch = build("bert")
    step, trained = build_step(model, batch, variant)
    gc.collect()
    step()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    for _ in range(2):
        step()
    return resident("VmHWM") - before, trained


def measure_memory(variant: str) -> tuple[float, int]:
    """:func:`measure_memory_here` in a process of its own, whose freed tensors go back to the system at once."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--memory-of", variant]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    peak, trained = json.loads(done.stdout.splitlines()[-1])
    return peak, trained


def rows_of(turns: int) -> list[Row]:
    """All variants."""
    seconds = {variant: min(found) for variant, found in measure_times(turns).items()}
    memory = {variant: measure_memory(variant) for variant in VARIANTS}
    full, (peak, _) = seconds["full"], memory["full"]
    return [
        Row(v, seconds[v] * 1e3, seconds[v] / full, memory[v][0], memory[v][0] / peak, memory[v][1]) for v in VARIANTS
    ]


# --- a task with a known answer -----------------------------------------------------------------------

RATES = (1e-4, 1e-3, 3e-3, 1e-2)
SHARE, LEAST, EXAMPLES, BATCH = 0.01, 0.2, 512, 64
SEARCHES: dict[str, dict[str, object] | None] = {
    "magnitude": None,
    "defaults": {},
    "weight gates": {"structured": False},
}


def known_support(tensor: int | None) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """A network, its teacher, and where they differ: anywhere, or in one tensor only."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    teacher, sizes = copy.deepcopy(net), [p.numel() for p in net.parameters()]
    count = int(SHARE * sum(sizes))
    start, room = (0, sum(sizes)) if tensor is None else (sum(sizes[:tensor]), sizes[tensor])
    places = start + torch.randperm(room, generator=generator)[:count]
    difference = torch.zeros(sum(sizes))
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    difference[places] = LEAST * (1 + torch.rand(count, generator=generator)) * signs
    with torch.no_grad():
        for parameter, part in zip(teacher.parameters(), difference.split(sizes), strict=True):
            parameter.add_(part.view_as(parameter))
    return net, teacher, places


def recall(options: dict[str, object] | None, rate: float, steps: int, tensor: int | None) -> float:
    """Share of the places that are among as many largest differences."""
    from lightning_pet import DiffPruningCallback, apply

    net, teacher, places = known_support(tensor)
    start = [parameter.detach().clone() for parameter in net.parameters()]
    deltas, gates = [], []
    if options is not None:
        callback = DiffPruningCallback(density=SHARE, heads=True, modules_to_save=[], verbose=False, **options)
        root = apply(net.train(), [callback]).root
        deltas = [delta for _, delta in callback.differences(root)]
        gates = [parameter for delta in deltas for parameter in delta.gate_parameters]
    own = {id(parameter) for parameter in gates}
    rest = [p for p in net.parameters() if p.requires_grad and id(p) not in own]
    groups = [{"params": rest, "lr": rate}, *([{"params": gates, "lr": 0.1}] if gates else [])]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    generator = torch.Generator().manual_seed(100)
    x = torch.randn(EXAMPLES, 64, generator=generator)
    with torch.no_grad():
        y = teacher(x)
    for step in range(steps):
        rows = torch.randint(0, EXAMPLES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        (net(x[rows]) - y[rows]).square().mean().backward()
        if gates:
            torch.nn.utils.clip_grad_norm_(gates, 1.0)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    net.eval()
    with torch.no_grad():
        moved = [d.difference() for d in deltas] or [a - b for a, b in zip(net.parameters(), start, strict=True)]
    found = torch.cat([part.flatten() for part in moved]).abs().topk(len(places)).indices
    return float(torch.isin(found, places).float().mean())


def show_recall(steps: int) -> None:
    """Print one line per rate: recall of every search, on both tasks."""
    tasks = {"anywhere": None, "one tensor": 0}
    print(f"{'rate':<8}{'rate*steps':>11}" + "".join(f"{f'{t}: {s}':>26}" for t in tasks for s in SEARCHES))
    for rate in RATES:
        found = [recall(options, rate, steps, tensor) for tensor in tasks.values() for options in SEARCHES.values()]
        print(f"{rate:<8g}{rate * steps:>11.2f}" + "".join(f"{value:>26.2f}" for value in found), flush=True)


def show(rows: list[Row]) -> None:
    """Print one table and, below it, the bounds that are not kept."""
    print(f"{'variant':<16}{'ms':>9}{'/ full':>8}{'peak MiB':>10}{'/ full':>8}{'trained':>14}")
    for row in rows:
        print(
            f"{row.variant:<16}{row.milliseconds:>9.1f}{row.of_full:>8.2f}{row.peak_mib:>10.1f}"
            f"{row.of_full_peak:>8.2f}{row.trained:>14,}"
        )
    default = next(row for row in rows if row.variant == "both gates")
    if default.of_full > TIME_BOUND:
        print(f"{default.of_full:.2f} of full fine-tuning's time, bound {TIME_BOUND}")
    if default.of_full_peak > MEMORY_BOUND:
        print(f"{default.of_full_peak:.2f} of full fine-tuning's peak memory, bound {MEMORY_BOUND}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 15")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows to this file")
    parser.add_argument("--recall", action="store_true", help="the task with a known answer, over learning rates")
    parser.add_argument("--steps", type=int, default=300, help="of --recall")
    parser.add_argument("--memory-of", metavar="VARIANT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(json.dumps(measure_memory_here(args.memory_of)))
        return
    if args.recall:
        show_recall(args.steps)
        return
    rows = rows_of(3 if args.quick else 15)
    show(rows)
    if args.json:
        facts = {"torch": torch.__version__, "threads": 1, "dtype": "float32", "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
