"""Accuracy against trained parameters: every method on real tasks with a real pretrained encoder (MiniLM).

Two tasks: docstring topics (from the standard library, nothing to download) and, where a folder with train.csv and
validation.csv is given, a text classification of your own such as SST-2. Each run is the command line's: the shipped
configuration of the task, then that of the method, at the learning rate below, which was chosen on one seed of the
docstring task. Runs that the JSON file holds already are not repeated.

    python benchmarks/tasks.py --json tasks.json --plot docs/tasks.svg --markdown -
    python benchmarks/tasks.py --json tasks.json --folder sst2 --seeds 0
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Entry:
    """A method as it is run: its configuration, learning rate and further options."""

    label: str
    config: str
    lr: float
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """Command-line arguments after those of the task."""
        own = [f"--pet.{name}={json.dumps(value)}" for name, value in self.options.items()]
        return ["-c", str(CONFIGS / "method" / f"{self.config}.yaml"), *own, f"--model.optimizer.lr={self.lr}"]


ENTRIES = [
    Entry("full fine-tuning", "full_fine_tuning", 1.5e-4),
    Entry("last 2 layers", "layer_freezing", 5e-4),
    Entry("BitFit", "bitfit", 3e-3),
    Entry("LoRA q,v", "lora", 3e-3),
    Entry("LoRA all-linear", "lora", 2e-3, {"target_modules": ["all-linear"]}),
    Entry("AdaLoRA", "adalora", 3e-3),
    Entry("Houlsby", "adapter", 2e-3, {"placement": "houlsby"}),
    Entry("Pfeiffer", "adapter", 2e-3, {"placement": "pfeiffer"}),
    Entry("parallel", "adapter", 2e-3, {"placement": "parallel"}),
    Entry("Compacter", "compacter", 5e-3),
    Entry("Compacter++", "compacter", 5e-3, {"placement": "ffn"}),
    Entry("AdapterBias", "adapter_bias", 3e-3),
    Entry("prefix", "prefix_tuning", 2e-3),
    Entry("prompt", "prompt_tuning", 3e-2),
    Entry("(IA)³", "ia3", 1e-2),
    Entry("MAM", "mam", 2e-3),
    Entry("diff pruning", "diff_pruning", 5e-4),
    Entry("SAID", "intrinsic_dimension", 1e-2, {"d": 5000}),
]


@dataclass(frozen=True)
class Run:
    """What one run reached.

    Attributes:
        trained: numbers that train, without the task head.
        share: of the base's numbers.
        accuracy: on the validation data, best epoch.
    """

    task: str
    method: str
    lr: float
    seed: int
    trained: int
    share: float
    accuracy: float


def task_arguments(folder: str | None) -> list[str]:
    """The task's part of the command line."""
    if folder is None:
        return ["-c", str(CONFIGS / "docstring_topics.yaml")]
    return [
        "-c", str(CONFIGS / "text_classification.yaml"), f"--data.train={folder}/train.csv",
        f"--data.val={folder}/validation.csv", "--data.max_length=64", "--trainer.max_epochs=2",
    ]  # fmt: skip


def run_here(entry: Entry, folder: str | None, seed: int) -> Run:
    """One run of the command line in this process."""
    from lightning_pet.core.applied import adapted_root
    from lightning_pet.core.plan import plan_of
    from lightning_pet.lightning_cli import PetCLI

    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    given = ["fit", *task_arguments(folder), *entry.arguments(), f"--seed_everything={seed}", *quiet]
    cli = PetCLI(args=given, save_config_callback=None, parser_kwargs={"default_env": False})
    found = adapted_root(cli.model)
    assert found is not None
    record = found[1].__dict__["_pet"]
    plan = plan_of(found[1], record)
    head = sum(row.parameters for row in plan.rows if row.method == "trained" and "classifier" in row.place)
    trained = plan.trainable - head
    task = "docstring topics" if folder is None else Path(folder).name
    best = float(cli.trainer.checkpoint_callback.best_model_score)
    return Run(task, entry.label, entry.lr, seed, trained, trained / plan.base, best)


def run_apart(entry: Entry, folder: str | None, seed: int, scratch: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    arguments = ["--one", entry.label, "--seeds", str(seed), *(["--folder", os.path.abspath(folder)] if folder else [])]
    scratch.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), *arguments], cwd=scratch, capture_output=True, text=True
    )
    if done.returncode:
        return {"task": folder or "docstring topics", "method": entry.label, "seed": seed, "error": done.stderr[-400:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="results so far, and where new ones go")
    parser.add_argument("--folder", help="a task of your own: folder with train.csv and validation.csv")
    parser.add_argument("--methods", help="comma-separated labels; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, help="another learning rate, to choose one")
    parser.add_argument("--scratch", type=Path, default=Path("tasks_scratch"), help="checkpoints of the runs")
    parser.add_argument("--plot", type=Path, help="draw accuracy against the share of trained parameters")
    parser.add_argument("--markdown", help="write the table there; - for the screen")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [e for e in ENTRIES if options.methods is None or e.label in options.methods.split(",")]
    if options.lr:
        chosen = [Entry(e.label, e.config, options.lr, e.options) for e in chosen]
    if options.one:
        entry = next(e for e in ENTRIES if e.label == options.one)
        print(json.dumps(asdict(run_here(entry, options.folder, options.seeds[0]))))
        return
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    task = "docstring topics" if options.folder is None else Path(options.folder).name
    for seed in options.seeds:
        for entry in chosen:
            if any((r["task"], r["method"], r["seed"]) == (task, entry.label, seed) for r in results):
                continue
            results.append(run_apart(entry, options.folder, seed, options.scratch))
            print(results[-1], flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    good = [r for r in results if "error" not in r]
    if options.markdown:
        text = table(good)
        print(text) if options.markdown == "-" else Path(options.markdown).write_text(text)
    if options.plot:
        plot(good, options.plot)


def grouped(results: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results by task and method."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        groups[result["task"]][result["method"]].append(result)
    return groups


def table(results: list[dict[str, Any]]) -> str:
    """One Markdown table per task, most parameters first."""
    lines = []
    for task, methods in grouped(results).items():
        lines += [
            f"**{task}**",
            "",
            "| method | trained, head apart | share | lr | seeds | accuracy |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for method, runs in sorted(methods.items(), key=lambda item: -item[1][0]["trained"]):
            values = [100 * run["accuracy"] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            first = runs[0]
            lines.append(
                f"| {method} | {first['trained']:,} | {first['share']:.3%} | {first['lr']:g} | {len(runs)} "
                f"| {statistics.mean(values):.1f}{spread} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy (mean, and range over seeds) against the share of trained parameters."""
    from matplotlib.figure import Figure

    groups = grouped(results)
    figure = Figure(figsize=(7 * len(groups), 4.5), layout="constrained")
    for axes, (task, methods) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for method, runs in methods.items():
            share, values = 100 * runs[0]["share"], [100 * run["accuracy"] for run in runs]
            mean = statistics.mean(values)
            axes.errorbar(share, mean, [[mean - min(values)], [max(values) - mean]], marker="o", capsize=2)
            axes.annotate(method, (share, mean), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set(xscale="log", xlabel="trained parameters, % of the base", ylabel="validation accuracy, %", title=task)
    figure.savefig(path)


if __name__ == "__main__":
    main()
