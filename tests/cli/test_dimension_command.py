"""``lightning-pet intrinsic-dimension`` on the user's module, in this process."""

import json
import sys
import warnings
from pathlib import Path

import pytest

from lightning_pet.cli.main import main

HERE = Path(__file__).parent
TASK = [
    "--model=user_code.Net",
    "--data=user_code.Data",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def own_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-pet"])
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def search(*arguments: str) -> dict[str, float]:
    """Run the command in the current folder, and read its record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["intrinsic-dimension", *TASK, "--metric=val/accuracy", "--runs=d90.json", *arguments])
    return json.loads(Path("d90.json").read_text(encoding="utf-8"))["runs"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        search(*arguments)
    return str(end.value.code)


def test_a_search_and_its_continuation(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--smallest=10", "--largest=20", "--seeds=0,1", "--trainer.max_epochs=1"]
    runs = search(*options, "--plot=d90.svg")
    printed = capsys.readouterr().out
    assert {"full/0", "full/1", "10/0", "10/1"} <= runs.keys()
    assert "val/accuracy in random subspaces" in printed
    assert "% of full fine-tuning" in printed
    assert Path("d90.svg").stat().st_size > 1000
    assert sorted(path.name for path in Path().iterdir()) == ["d90.json", "d90.svg"]  # no checkpoints, no logs
    before = Path("d90.json").read_bytes()
    assert search(*options) == runs
    assert Path("d90.json").read_bytes() == before
    message = refused(capsys, *options, "--model.width=8")
    assert "is the record of a search with configuration=" in message


def test_options_of_the_baseline_and_methods_in_the_configuration() -> None:
    """A method of the configuration is left out: with r=99 LoRA could not even be inserted."""
    method = ["--pet+=LoRACallback", "--pet.r=99", "--pet.target_modules=[net.0]"]
    options = ["--smallest=10", "--largest=10", "--did", *method]
    longer = search(*options, "--full=--trainer.max_epochs=4")
    Path("d90.json").unlink()
    shorter = search(*options)
    assert longer["10/0"] == shorter["10/0"]
    assert longer["full/0"] != shorter["full/0"]


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "better when larger" in refused(capsys, "--metric=val/loss")
    assert "Logged are: train/loss, val/accuracy, val/loss" in refused(capsys, "--metric=val/f1", "--smallest=10")
    assert "4 tensors" in refused(capsys, "--smallest=3")
    assert "which metric counts? Give --metric" in refused(capsys, "--metric=")
