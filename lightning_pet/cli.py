"""The ``lightning-pet`` command: Trainer verbs by LightningCLI, file verbs without Lightning.

Imports of this package are local to the functions on purpose: ``--help`` and the file verbs must
answer at once.
"""

import json
import sys
from pathlib import Path
from typing import Any

TRAINER_VERBS = ("fit", "validate", "test", "predict")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``lightning-pet --help``."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in TRAINER_VERBS:
        from lightning_pet.lightning_cli import run

        run(argv)
        return
    import jsonargparse

    verbs: dict[str, Any] = {"inspect": inspect, "merge": merge}
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(verbs))
        return
    if argv[0] not in verbs:
        _refuse_verb(argv[0], [*TRAINER_VERBS, *verbs])
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
    return "\n".join([*lines, *(f"  {name:<10}{text}" for name, text in summaries.items())])


def _refuse_verb(verb: str, known: list[str]) -> None:
    import difflib

    near = difflib.get_close_matches(verb, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    sys.exit(f"lightning-pet: there is no verb {verb!r}.{hint} Verbs: {', '.join(known)}.")


def inspect(path: str, json_output: bool = False) -> None:
    """Show what a delta file or checkpoint holds, without building the model.

    Args:
        path: delta file (.safetensors) or training checkpoint (.ckpt).
        json_output: print JSON instead of a table.
    """
    from lightning_pet.report.summary import print_summary, summarize

    summary = summarize(path)
    if json_output:
        print(json.dumps(summary, indent=2, sort_keys=True))
    else:
        print_summary(summary)


def merge(path: str, base: str, output: str, model_class: str = "auto", base_check: str = "error") -> None:
    """Add a delta into its base model, and save the result as an ordinary transformers folder.

    Args:
        path: delta file (.safetensors) or training checkpoint (.ckpt).
        base: folder of the base model that the delta was trained on.
        output: folder to write; must not exist.
        model_class: class of transformers to load the base with; auto: the first that its config.json names.
        base_check: what to do about another base model: error, warn or off.
    """
    from lightning_pet.engine.export import merge_into_folder

    written = merge_into_folder(Path(path), Path(base), Path(output), model_class, base_check)
    print(f"merged model: {written}")
