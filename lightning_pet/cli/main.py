"""The ``lightning-pet`` command: Trainer verbs by LightningCLI, file verbs without Lightning.

Imports of this package are local to the functions on purpose: ``--help`` and the file verbs must
answer at once.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

_Format = Literal["auto", "chat", "completion", "sharegpt", "alpaca", "text"]
TRAINER_VERBS = ("fit", "validate", "test", "predict")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``lightning-pet --help``."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in TRAINER_VERBS:
        from lightning_pet.cli.lightning_cli import run

        run(argv)
        return
    if argv and argv[0] == "intrinsic-dimension":
        intrinsic_dimension(argv[1:])
        return
    if argv and argv[0] == "plan":
        plan(argv[1:])
        return
    if argv and argv[0] == "sweep":
        sweep(argv[1:])
        return
    if argv and argv[0] == "combine":
        combine(argv[1:])
        return
    import jsonargparse

    verbs: dict[str, Any] = {
        "inspect": inspect,
        "extract": extract,
        "merge": merge,
        "import": import_folder,
        "export": export,
        "list": list_configurations,
        "init": init,
        "data": data,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(verbs))
        return
    if argv[0] not in verbs:
        _refuse_verb(argv[0], [*TRAINER_VERBS, *verbs, "combine", "sweep", "plan", "intrinsic-dimension"])
    try:
        jsonargparse.auto_cli(verbs, args=argv)
    except (ValueError, OSError) as error:
        sys.exit(f"lightning-pet {argv[0]}: {error}")


def _overview(verbs: dict[str, Any]) -> str:
    lines = ["usage: lightning-pet VERB [OPTIONS]", "", "verbs (each with its own --help):"]
    summaries = {
        "fit": "train a delta; without options, the built-in example",
        "validate": "evaluate a checkpoint on validation data",
        "test": "evaluate a checkpoint on test data",
        "predict": "predict with a checkpoint",
    } | {name: (function.__doc__ or "").partition("\n")[0] for name, function in verbs.items()}
    summaries["combine"] = "add, average or join delta files of one base, without the model"
    summaries["sweep"] = "try learning rates, ranks, seeds … side by side, in one run"
    summaries["plan"] = "print the memory that a run would need, and train nothing"
    summaries["intrinsic-dimension"] = "measure how many trained numbers a task needs"
    return "\n".join([*lines, *(f"  {name:<21}{text}" for name, text in summaries.items())])


def _refuse_verb(verb: str, known: list[str]) -> None:
    import difflib

    near = difflib.get_close_matches(verb, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    sys.exit(f"lightning-pet: there is no verb {verb!r}.{hint} Verbs: {', '.join(known)}.")


def inspect(path: str, json_output: bool = False, delta: str | None = None) -> None:
    """Show what a delta file or checkpoint holds, without building the model.

    Args:
        path: delta file (.safetensors), training checkpoint (.ckpt), or folder of HF PEFT.
        json_output: print JSON instead of a table.
        delta: name of the task, of a checkpoint in which several deltas have trained together.
    """
    from lightning_pet.report.delta_summary import print_summary, summarize_delta
    from lightning_pet.store.files import is_delta_file

    if Path(path).is_file() and is_delta_file(path):
        summary = summarize_delta(path)
    else:  # a checkpoint is a file of torch, a folder may be
        from lightning_pet.report.summary import summarize

        summary = summarize(path, delta)
    if json_output:
        print(json.dumps(summary, indent=2, sort_keys=True))
    else:
        print_summary(summary)


def extract(path: str, output: str, delta: str | None = None) -> None:
    """Write the delta of a training checkpoint into a delta file, without building the model.

    Args:
        path: training checkpoint (.ckpt).
        output: delta file to write, usually .pet.safetensors; replaced if it exists.
        delta: name of the task, of a checkpoint in which several deltas have trained together.
    """
    from lightning_pet.store.reader import extract_delta

    size = extract_delta(path, output, delta=delta)
    print(f"delta file: {output} ({size / 1024:,.0f} KiB)")


def import_folder(folder: str, output: str, base: str | None = None) -> None:
    """Write what a folder of HF PEFT, or a file of kohya or LyCORIS, holds into a delta file.

    Args:
        folder: what save_pretrained of HF PEFT wrote, or that file.
        output: delta file to write, usually .pet.safetensors; replaced if it exists.
        base: local folder of the base model; some kinds of delta need it, and with it the file knows its base.
    """
    from lightning_pet.operations.exchanging import import_delta

    size = import_delta(folder, output, base=base)
    print(f"delta file: {output} ({size / 1024:,.0f} KiB)")


def export(
    path: str,
    folder: str,
    to: str = "peft",
    base: str | None = None,
    rank: int | None = None,
    max_error: float = 0.01,
) -> None:
    """Write a delta as another program reads it: HF PEFT, vLLM, llama.cpp, or as a merged model.

    Args:
        path: delta file (.safetensors) or training checkpoint (.ckpt).
        folder: folder to write; must not exist.
        to: peft, adapters, vllm, llama.cpp, lora (an approximation of whatever changes weights), or transformers
            (merged).
        base: local folder of the base model; some kinds of delta need it, and with it outputs are compared.
        rank: of the approximation that lora makes.
        max_error: what that approximation may leave out, as a share of the change.
    """
    from lightning_pet.operations.exchanging import export_delta

    done = export_delta(path, folder, to=to, base=base, rank=rank, max_error=max_error)  # type: ignore[arg-type]
    print(f"{to}: {done.folder}" + (f" (rank {done.rank})" if done.rank else ""))
    if done.error:
        print(f"relative error of the change at this rank: {done.error:.3g}")
    if done.difference is not None:
        print(f"largest difference of outputs between here and {done.reader}: {done.difference:.2g}")


def merge(path: str, base: str, output: str, model_class: str = "auto", base_check: str = "error") -> None:
    """Add a delta into its base model, and save the result as an ordinary transformers folder.

    Args:
        path: delta file (.safetensors) or training checkpoint (.ckpt).
        base: folder of the base model that the delta was trained on.
        output: folder to write; must not exist.
        model_class: class of transformers to load the base with; auto: the first that its config.json names.
        base_check: what to do about another base model: error, warn or off.
    """
    from lightning_pet.operations.delta import merge_into_folder

    written = merge_into_folder(Path(path), Path(base), Path(output), model_class, base_check)
    print(f"merged model: {written}")


def _numbers(text: str) -> list[float]:
    import argparse

    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers; separate them by commas, such as 0.7,0.3") from None


def combine(argv: list[str]) -> None:
    """Combine delta files of one base into one, without the model where that is possible.

    Args:
        argv: files and options.
    """
    import argparse

    from lightning_pet.operations.combining.files import combine_deltas
    from lightning_pet.operations.combining.rules import HOWS

    parser = argparse.ArgumentParser(
        prog="lightning-pet combine",
        description="Add, average, prune or join what several deltas of one base change: on the change itself, not on "
        "its factors. The model is not needed, but for deltas whose change depends on the base (--base).",
        epilog="lightning-pet combine a.pet.safetensors b.pet.safetensors --weights=0.7,0.3 --how=ties "
        "--output=c.pet.safetensors",
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="+", help="delta files (.safetensors) or training checkpoints (.ckpt)")
    parser.add_argument("--output", required=True, help="delta file to write; replaced if it exists")
    parser.add_argument(
        "--weights",
        type=_numbers,
        help="a number for each file, such as 0.7,0.3; negative to unlearn; default: equal ones that sum to one",
    )
    parser.add_argument("--how", choices=HOWS, default="linear", help="what to do; default: linear, exact for LoRA")
    parser.add_argument("--rank", type=int, help="of the result, where it is an approximation")
    parser.add_argument("--density", type=float, help="share of entries to keep (TIES, DARE, magnitude_prune)")
    parser.add_argument("--seed", type=int, default=0, help="of DARE")
    parser.add_argument("--base", type=Path, help="folder of the base (transformers): DoRA, different methods, …")
    parser.add_argument("--model_class", default="auto", help="class of transformers to load the base with")
    options = parser.parse_args(argv)
    wanted = {name: getattr(options, name) for name in ("weights", "how", "rank", "density", "seed")}
    try:
        if options.base is None:
            made = combine_deltas(options.paths, options.output, **wanted)
        else:
            from lightning_pet.operations.combining.on_base import combine_on_base

            made = combine_on_base(
                options.paths, options.output, options.base, model_class=options.model_class, **wanted
            )
    except (ValueError, OSError) as error:
        sys.exit(f"lightning-pet combine: {error}")
    print(f"delta file: {made.path} ({made.size / 1024:,.0f} KiB)")
    if made.error:
        print(f"relative error of the change at this rank: {made.error:.3g}")


def list_configurations() -> None:
    """Name the shipped configurations, for -c of fit and the other verbs.

    They are found from every folder.
    """
    from lightning_pet.recipes import GROUPS, names, summary

    for group, title in GROUPS.items():
        print(f"{title}:")
        for name in names(group):
            print(f"  {name:<28}{summary(name)}")
        print()
    print("lightning-pet fit -c docstring_topics -c method/lora -c trainer/cpu")


def init(
    task: str,
    method: str | None = None,
    data: str | None = None,
    columns: dict[str, str] | None = None,
    output: str = "run.yaml",
) -> None:
    """Write a complete configuration for a task, a method and your data.

    Args:
        task: one of the tasks of lightning-pet list, such as text_classification.
        method: one of the methods, such as lora; default: the task's own.
        data: file with your data (CSV, TSV, JSON, JSON lines, Parquet, text), folder with train.* and validation.*, or
            data set of the hub; relative to the folder in which fit will run.
        columns: what your columns are called, such as --columns.text=review.
        output: file to write; must not exist.
    """
    from lightning_pet.data.tables import read_splits
    from lightning_pet.recipes import compose, mapped_columns

    columns = columns or {}
    text = compose(task, method, data, columns)
    if data is not None and (Path(data).suffix or Path(data).exists()):
        table = read_splits(data)["train"]
        for key, name in {**mapped_columns(task), **columns}.items():
            if name not in table.columns:
                raise ValueError(
                    f"{data} has no column {name!r}; it has {', '.join(table.columns)}. "
                    f"Say which one is the {key} with --columns.{key}=NAME."
                )
    if Path(output).exists():
        raise ValueError(f"{output} exists already: give another --output, or remove it.")
    parts = [task, *([method.removeprefix("method/")] if method else []), *([data] if data else [])]
    head = f"# Made of {', '.join(parts)} by lightning-pet init; every line may be changed.\n"
    Path(output).write_text(f"{head}#   lightning-pet fit -c {output}\n{text}", encoding="utf-8")
    print(f"{output}: {', '.join(parts)}\nlightning-pet fit -c {output}")


def data(
    path: str, model: str | None = None, format: _Format = "auto", max_length: int = 1024, example: int = 1
) -> None:
    """Validate a training file of conversations or texts, count its tokens, and show what is trained.

    Args:
        path: JSON lines in OpenAI's formats (messages; prompt and completion), ShareGPT, Alpaca, or texts.
        model: folder or hub repository of the model to be tuned; its tokenizer and chat template count.
        format: of the lines; auto: by the keys of the first one.
        max_length: longest example in tokens.
        example: which one to show, counted from 1.
    """
    from lightning_pet.cli.data import show_data

    if model is None:
        raise ValueError("say which model is to be tuned, --model=FOLDER: its tokenizer counts, its template writes.")
    show_data(path, model, format, max_length, example)


def intrinsic_dimension(argv: list[str]) -> None:
    """Measure how many trained numbers a task needs.

    Args:
        argv: options of the search, and those of ``fit`` that say what is trained.
    """
    import argparse

    parser = argparse.ArgumentParser(
        prog="lightning-pet intrinsic-dimension",
        description="The smallest dimension of a random subspace in which a model reaches a share of what full "
        "fine-tuning reaches (d90). All other options are those of fit: what is trained, on what data, how long. "
        "Methods in the configuration are left out.",
        epilog="lightning-pet intrinsic-dimension -c configs/dates.yaml --full=--model.optimizer.init_args.lr=0.001 "
        "--runs=d90.json --plot=d90.png",
        allow_abbrev=False,
    )
    parser.add_argument("--runs", type=Path, default=Path("intrinsic_dimension.json"), help="record of finished runs")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0], help="e.g. 0,1,2")
    parser.add_argument("--smallest", type=int, default=100, help="first dimension to try")
    parser.add_argument("--largest", type=int, default=100_000, help="last dimension to try")
    parser.add_argument("--share", type=float, default=0.9, help="of the metric of full fine-tuning")
    parser.add_argument("--resolution", type=float, default=1.25, help="factor that encloses the answer")
    parser.add_argument("--metric", help="logged metric, larger is better; default: the data's, or what is monitored")
    parser.add_argument("--did", action="store_true", help="no factor per tensor (DID instead of SAID)")
    parser.add_argument("--full", action="append", default=[], help="option of fit for full fine-tuning only; repeat")
    parser.add_argument("--plot", type=Path, help="picture to write (needs matplotlib)")
    options, rest = parser.parse_known_args(argv)
    from lightning_pet.cli.lightning_cli import measure_dimension

    measure_dimension(options, rest)


def plan(argv: list[str]) -> None:
    """Print the memory that a run would need.

    Args:
        argv: options of the plan, and those of ``fit``.
    """
    import argparse

    parser = argparse.ArgumentParser(
        prog="lightning-pet plan",
        description="The memory that each process of a run needs, by component, and that of the same run under every "
        "other strategy. All other options are those of fit. One training step runs on tensors that have shapes and "
        "no values, so that neither GPUs nor the memory itself are needed.",
        epilog="lightning-pet plan -c configs/docstring_topics.yaml --trainer.strategy=ddp --trainer.devices=8 "
        "--device_memory=24GiB",
        allow_abbrev=False,
    )
    parser.add_argument("--meta", action="store_true", help="build the model without reading its weights")
    parser.add_argument("--batch_size", type=int, help="rows per process; default: those of the data's first batch")
    parser.add_argument("--tokens", type=int, help="tokens per row; default: those of the data's first batch")
    parser.add_argument("--device_memory", metavar="SIZE", help="of one device, such as 24GiB: marks what fits")
    parser.add_argument("--json_output", action="store_true", help="print JSON instead of tables")
    options, rest = parser.parse_known_args(argv)
    from lightning_pet.cli.plan import plan_run

    plan_run(options, rest)


def sweep(argv: list[str]) -> None:
    """Try options side by side.

    Args:
        argv: options of the sweep, what is to be tried, and options of ``fit``.
    """
    import argparse

    parser = argparse.ArgumentParser(
        prog="lightning-pet sweep",
        usage="lightning-pet sweep [options of fit] --OPTION=VALUE,VALUE… [--OPTION=VALUE,VALUE…] [--output FOLDER]",
        description="Trains all combinations of the values in one Trainer: the base is in memory once, every batch "
        "goes through all runs, and each gets the weights that it would get alone. To be tried are lr, weight_decay, "
        "seed (random start and dropout) and the options of the methods (r, alpha, dropout …). All other options are "
        "those of fit. At the end: a table, best first, one delta file for each run, sweep.json, and a picture if "
        "matplotlib is installed.",
        epilog="lightning-pet sweep -c my.yaml --lr=1e-3,3e-3 --seed=0,1,2 --r=4,8 --output=sweep",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=Path("sweep"), help="folder to write; default: sweep")
    parser.add_argument("--metric", help="logged metric that counts; default: the data's, or what is monitored")
    parser.add_argument("--mode", choices=["min", "max"], help="whether less or more of it is better")
    parser.add_argument("--at_once", type=int, help="so many runs in one Trainer, the others after them; default: all")
    parser.add_argument("--split", action="store_true", help="one after the other in each step, for any loss")
    parser.add_argument("--device_memory", metavar="SIZE", help="that there is, such as 24GiB; default: what is free")
    parser.add_argument("--plot", type=Path, help="picture to write; default: sweep.png in the folder")
    options, rest = parser.parse_known_args(argv)
    from lightning_pet.cli.sweep import sweep as train

    train(options, rest)
