"""What a run of the command shows: nothing without meaning, one total, titles and metrics on one line."""

import io
import logging
import warnings

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table

from lightning_pet import LoRACallback
from lightning_pet.operations.plan import show_table
from lightning_pet.report.console import Progress, quiet, with_defaults
from lightning_pet.report.memory.view import short, sized


def test_lines_that_say_nothing_are_dropped_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.setLevel(logging.INFO)
    lines = ["💡 Tip: buy something", "TPU available: False, using: 0 TPU cores", "GPU available: True", "mine"]
    with quiet(), caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as warned:
        for line in lines:
            logger.info(line)
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use something", stacklevel=1)
        warnings.warn("a warning of yours", stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == lines[2:]
    assert [str(one.message) for one in warned] == ["a warning of yours"]
    logger.info(lines[0])  # after the command all is as before
    assert caplog.records[-1].getMessage() == lines[0]
    assert not logger.filters


def test_what_the_user_left_open_is_filled_in(tmp_path) -> None:
    settings = {"callbacks": [LoRACallback()], "logger": None, "default_root_dir": str(tmp_path)}
    with_defaults(settings)
    assert settings["enable_model_summary"] is False
    assert isinstance(settings["callbacks"][1], Progress)
    assert settings["logger"] is None or isinstance(settings["logger"], CSVLogger)


@pytest.mark.parametrize(
    "given",
    [
        {"barebones": True, "callbacks": [LoRACallback()]},
        {
            "callbacks": [LoRACallback(), TQDMProgressBar()],
            "logger": False,
            "enable_model_summary": True,
            "enable_progress_bar": True,
        },
        {"callbacks": [LoRACallback(verbose=False)], "logger": False, "enable_progress_bar": False},
    ],
)
def test_what_the_user_said_stays(given: dict) -> None:
    settings = given | {"callbacks": list(given["callbacks"])}
    with_defaults(settings)
    assert settings == given


@pytest.mark.parametrize("width", [80, 100, 120, 123, 124, 200])
def test_two_metrics_are_on_the_line_of_the_bar(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    columns = Progress().configure_columns(trainer=None)
    texts = sum(map(len, ("Epoch 0/2  ", "30/30 ", "0:10:18 • 0:00:00 ", "val/accuracy: 0.575 val/f1: 0.561")))
    bar, speed = columns[1].bar_width or 40, len("100.00it/s ") * (len(columns) == 5)
    assert texts + bar + speed <= width
    assert (len(columns) == 5) == (width >= 124)


@pytest.mark.parametrize("width", [10, 40, 120])
def test_a_title_is_not_broken_to_the_width_of_its_table(width: int) -> None:
    table = Table(show_header=False)
    table.add_row("run", "0.5")
    console = Console(file=io.StringIO(), width=width)
    show_table("val/accuracy (best epoch)", table, console)
    assert console.file.getvalue().splitlines()[0] == "val/accuracy (best epoch)"


def test_sizes_are_in_the_unit_that_fits() -> None:
    assert [sized(n) for n in (0, 512, 2**10, 2**20 - 1, 102 * 2**20, 2**30, 1500 * 2**30)] == [
        *("0 B", "512 B", "1.00 KiB", "1,024.00 KiB", "102.00 MiB", "1.00 GiB", "1,500.00 GiB")
    ]
    sizes = [short(n) for n in (0, 1, 1023, 2**10, 15 * 2**10, 102 * 2**20, 2**30, 1023 * 2**30)]
    assert sizes == ["0", "1", "1023", "1.00K", "15.0K", "102M", "1.00G", "1023G"]
    assert max(map(len, sizes)) <= 6
