"""``lightning-pet sweep``: options of a run are tried side by side, in one Trainer with one base."""

import math
import re
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from lightning_pet.callbacks.base import PETCallback
from lightning_pet.callbacks.tasks import TasksCallback
from lightning_pet.cli.lightning_cli import PetCLI, as_list, command, or_default
from lightning_pet.cli.plan import PlannedRun
from lightning_pet.data.reference import ReferencePoints
from lightning_pet.errors import ArgumentError
from lightning_pet.report.console import with_defaults
from lightning_pet.report.memory.planner import plan_memory
from lightning_pet.report.memory.setup import bytes_of, engine_of, precision_of, without_weights
from lightning_pet.report.sweep import Swept, SweptRun, plot_sweep, show_sweep, write_record

RECORD: Final = "sweep.json"
"""What was found, in the folder of a sweep."""

_OF_FIT: Final = frozenset(
    ("config", "help", "model", "data", "pet", "trainer", "seed_everything", "optimizer", "lr_scheduler", "ckpt_path")
)
_OF_RUN: Final = ("lr", "weight_decay", "seed")
_REFUSED: Final = ("name", "delta", "module", "start_from", "base_check", "delta_files", "verbose", "scalars", "budget")
_GIB: Final = 2**30

Options = dict[str, Any]


def split_arguments(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take what is to be tried out of the options of ``fit``.

    Args:
        arguments: of the command line.

    Returns:
        Words to be tried by the name of the option, and the other arguments.

    Raises:
        ArgumentError: if an option has no values, or is given twice.

    >>> split_arguments(["-c", "my.yaml", "--lr", "1e-3,3e-3", "--seed=0,1", "--trainer.max_epochs=3"])
    ({'lr': ['1e-3', '3e-3'], 'seed': ['0', '1']}, ['-c', 'my.yaml', '--trainer.max_epochs=3'])
    """
    swept: dict[str, list[str]] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        found = re.fullmatch(r"--([A-Za-z_]\w*)(?:=(.*))?", word, re.DOTALL)
        if found is None or found[1] in _OF_FIT or found[1].startswith("print_"):
            rest.append(word)
            if word in ("-c", "--config", "--model", "--data", "--ckpt_path", "--seed_everything"):
                rest += [value for value in (next(words, None),) if value is not None]
            continue
        name, text = found[1], found[2] if found[2] is not None else next(words, "--")
        if not text or text.startswith("--"):
            raise ArgumentError(f"--{name} has no values: give those to be tried, such as --{name}=1,2,3.")
        if name in swept:
            raise ArgumentError(f"--{name} is given twice: give all values at once, separated by commas.")
        swept[name] = text.split(",")
        if len(set(swept[name])) < len(swept[name]):
            twice = next(word for word in swept[name] if swept[name].count(word) > 1)
            raise ArgumentError(f"--{name}: {twice} is given twice, which would be the same run twice.")
    return swept, rest


def product_of(swept: Mapping[str, Sequence[str]], methods: Sequence[PETCallback]) -> dict[str, Options]:
    """All combinations, by the names of their runs.

    Raises:
        ArgumentError: naming an option that nothing here has, or a value that is none of it.
    """
    if not swept:
        raise ArgumentError(
            "nothing to try: give options with values, separated by commas, such as --lr=1e-3,3e-3 --seed=0,1,2. They "
            f"are {', '.join(_OF_RUN)} and those of the methods."
        )
    values = {name: [(word, _value(name, word, methods)) for word in words] for name, words in swept.items()}
    runs: dict[str, Options] = {}
    for chosen in product(*values.values()):
        words = [f"{name}-{_in_name(word)}" for name, (word, _) in zip(values, chosen, strict=True)]
        name = "_".join(words)
        if len(name) > 64 or name in runs:
            name = f"run-{len(runs)}"
        runs[name] = {option: value for option, (_, value) in zip(values, chosen, strict=True)}
    return runs


def _in_name(word: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", word)


def _value(name: str, word: str, methods: Sequence[PETCallback]) -> Any:
    own = [method for method in methods if name in method.options() and name not in _REFUSED]
    if name not in _OF_RUN and not own:
        known = {option for method in methods for option in method.options()} - set(_REFUSED) | set(_OF_RUN)
        near = get_close_matches(name, known, 1, 0.6)
        names = ", ".join(dict.fromkeys(type(method).__name__ for method in methods))
        raise ArgumentError(
            f"--{name}: {names} has no option {name!r} to be tried."
            + (f" Did you mean --{near[0]}?" if near else f" There are {', '.join(sorted(known))}.")
            + " Options of fit have a dot (--trainer.max_epochs=3)."
        )
    present = [getattr(method, name, None) for method in own]
    numeric = name in _OF_RUN or any(isinstance(v, int | float) and not isinstance(v, bool) for v in present)
    value = _read(word)
    if numeric and (isinstance(value, bool | str) or value is None or not math.isfinite(value)):
        raise ArgumentError(
            f"--{name}: {word!r} is no number. Give numbers, separated by commas, such as --{name}=1,2."
        )
    if name == "seed" and not isinstance(value, int):
        raise ArgumentError(f"--seed: {word!r} is no whole number.")
    return value


def _read(word: str) -> Any:
    constants = {"true": True, "false": False, "null": None, "none": None}
    if word.lower() in constants:
        return constants[word.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


class _Sweep(PetCLI):
    """Builds a run of ``fit`` in which every row goes to several deltas, or to some of them at a time."""

    def __init__(self, arguments: list[str], options: Namespace, swept: Mapping[str, Sequence[str]], part: int) -> None:
        self._options, self._swept, self._part = options, swept, part
        self.runs: dict[str, Options] = {}
        self.metric: str = options.metric or ""
        self.mode: Any = options.mode
        self.tasks: TasksCallback
        super().__init__(args=arguments, run=False, save_config_callback=None, parser_kwargs={"default_env": False})

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The methods, with those callbacks of the configuration that do not belong to a run alone."""
        settings = self._get(self.config_init, "trainer")
        given = [*(self._get(self.config_init, "pet") or []), *as_list(settings.get("callbacks"))]
        if any(isinstance(callback, TasksCallback) for callback in given):
            raise ArgumentError("the configuration has a TasksCallback; a sweep makes its own. Take it out.")
        self.runs = product_of(self._swept, methods_among(given))
        self._choose_metric(given)
        for method in methods_among(given):
            method.verbose = False  # a table of all runs says as often what each trains
        size = self._options.at_once or len(self.runs)
        names = list(self.runs)[self._part * size : (self._part + 1) * size]
        self.tasks = TasksCallback(
            tasks={name: self.runs[name] for name in names},
            every_row=True,
            monitor=self.metric,
            mode=self.mode,
            split=self._options.split,
            dirpath=str(self._options.output),
        )
        if any(isinstance(callback, EarlyStopping) for callback in given):
            rank_zero_info("EarlyStopping is left out: all runs go on to the end, and the best values of each are kept")
        kept = [callback for callback in given if not isinstance(callback, Checkpoint | EarlyStopping)]
        last = ModelCheckpoint(self._options.output, filename=f"last-{self._part}", enable_version_counter=False)
        settings["callbacks"] = [*kept, self.tasks, last]
        settings["default_root_dir"] = settings.get("default_root_dir") or str(self._options.output)
        with_defaults(settings)
        return LightningCLI.instantiate_trainer(self, **kwargs)

    def _choose_metric(self, given: Sequence[Any]) -> None:
        monitored = [(c.monitor, c.mode) for c in given if isinstance(c, ModelCheckpoint) and c.monitor]
        if not self.metric and isinstance(self.datamodule, ReferencePoints):
            self.metric, self.mode = self.datamodule.metric, self.mode or "max"
        if not self.metric and monitored:
            self.metric = str(monitored[0][0])
        if not self.metric:
            raise ArgumentError(
                "which metric counts? Give --metric: one that is logged in validation, and --mode=max if larger is "
                "better; or a ModelCheckpoint with monitor= in the configuration."
            )
        known = {name: mode for name, mode in reversed(monitored)}
        self.mode = self.mode or known.get(self.metric) or ("min" if "loss" in self.metric else "max")


def methods_among(callbacks: Sequence[Any]) -> list[PETCallback]:
    """The methods of a configuration.

    Raises:
        ArgumentError: if there is none.
    """
    methods = [callback for callback in callbacks if isinstance(callback, PETCallback)]
    if not methods:
        raise ArgumentError(
            "the configuration has no method, and a sweep tries options of deltas. Add one, such as -c method/lora."
        )
    return methods


# --- memory ---------------------------------------------------------------------------------------------


def check_memory(arguments: list[str], options: Namespace, swept: Mapping[str, Sequence[str]]) -> None:
    """Refuse more runs at once than there seems to be memory for; where nothing can be told, nothing is said.

    Raises:
        ArgumentError: saying how many fit.
    """
    count = math.prod(map(len, swept.values()))
    found = _needed(arguments, swept) if count > 1 else None
    if found is None:
        return
    common, each, gpu = found
    free = bytes_of(options.device_memory) if options.device_memory else _free(gpu)
    wanted = min(options.at_once or count, count)
    if free is None or common + wanted * each <= free:
        return
    fit = max(0, int((free - common) // each))
    where, total = "the device" if gpu else "this machine", common + wanted * each
    raise ArgumentError(
        f"{wanted} runs at once need about {total / _GIB:.1f} GiB ({common / _GIB:.1f} for the base, "
        f"{each / _GIB:.2f} for each run), and {where} has {free / _GIB:.1f} GiB free. "
        + (f"Give --at_once={fit}: so many at a time, with the same results. " if fit else "")
        + "Smaller batches need less; --device_memory=SIZE says how much there is, if this is wrong."
    )


def _needed(arguments: list[str], swept: Mapping[str, Sequence[str]]) -> tuple[int, int, bool] | None:
    """Bytes that all runs share, bytes of one, and whether they are a GPU's."""
    try:
        with without_weights():
            run = PlannedRun(list(arguments))
    except ArgumentError:
        raise
    except Exception:  # a model that cannot be built without its weights
        return None
    product_of(swept, methods_among(run.methods))
    with suppress(Exception):
        engine = engine_of("auto", 1, 1)
        run.assembled(engine)
        gpu = run.asked["accelerator"] != "cpu" and torch.cuda.is_available()
        batch = run.batch(None, None)
        precision = precision_of(run.asked["precision"])
        plan = plan_memory(run.model, run.methods, batch, strategy=engine, precision=precision, gpu=gpu)
        common = plan.bytes.base + plan.bytes.buffers
        return common, max(plan.total - common, 1), gpu
    return None


def _free(gpu: bool) -> int | None:
    if gpu:
        return int(torch.cuda.mem_get_info()[0])
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return None


# --- the command ----------------------------------------------------------------------------------------


def sweep(options: Namespace, arguments: Sequence[str]) -> None:
    """Train all combinations side by side; see ``lightning-pet sweep --help``.

    Args:
        options: those of the sweep.
        arguments: what is to be tried, and options of ``fit``.
    """
    with command("sweep"):
        swept, rest = split_arguments(arguments)
        given = or_default(rest)
        _check(options)
        check_memory(given, options, swept)
        _check_output(options.output / RECORD)
        started, runs, part, found = time.monotonic(), dict[str, Options](), 0, list[SweptRun]()
        while part == 0 or len(found) < len(runs):
            one = _Sweep(list(given), options, swept, part)
            runs, part = one.runs, part + 1
            _save_configuration(one, options.output)
            one.trainer.fit(one.model, datamodule=one.datamodule)
            found += _found(one)
        seconds = time.monotonic() - started
        if one.trainer.is_global_zero:
            more = {"tried": {name: list(words) for name, words in swept.items()}, "seconds": round(seconds, 1)}
            _report(Swept(one.metric, one.mode, tuple(found)), options, more)


def _check(options: Namespace) -> None:
    if options.at_once is not None and options.at_once < 1:
        raise ArgumentError(f"--at_once={options.at_once}: at least one run at a time.")
    if options.plot is not None and find_spec("matplotlib") is None:
        raise ArgumentError("--plot needs matplotlib: pip install matplotlib.")


def _check_output(record: Path) -> None:
    """After the options: whoever gave wrong ones may not need another folder."""
    if record.exists():
        raise ArgumentError(f"{record} exists already: give another --output, or remove it.")


def _save_configuration(one: _Sweep, folder: Path) -> None:
    if one.trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        one.parser.save(one.config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


def _found(one: _Sweep) -> list[SweptRun]:
    """What a part of the runs has reached."""
    values = {name: one.tasks.best.get(name) for name in one.tasks.tasks}
    files = {name: path.name for name, path in one.tasks.files.items()}
    return [
        SweptRun(name, one.runs[name], value if value is not None and math.isfinite(value) else None, files.get(name))
        for name, value in values.items()
    ]


def _report(found: Swept, options: Namespace, more: Mapping[str, Any]) -> None:
    write_record(found, options.output / RECORD, more)
    show_sweep(found)
    picture = options.plot or (options.output / "sweep.png" if find_spec("matplotlib") else None)
    if picture is not None:
        plot_sweep(found, picture)
        print(f"picture: {picture}")
    print(f"record: {options.output / RECORD}")
