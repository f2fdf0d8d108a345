"""``lightning-pet sweep``: options tried side by side, by the installed script on the user's module."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_pet import ArgumentError, BitFitCallback, LoRACallback
from lightning_pet.cli.main import main
from lightning_pet.cli.sweep import product_of, split_arguments
from lightning_pet.report.sweep import Swept, SweptRun, plot_sweep, show_sweep

HERE = Path(__file__).parent
SCRIPT = Path(sys.executable).with_name("lightning-pet")
TASK = [
    *("--model=user_code.Net", "--data=user_code.Data", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"),
    *("--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=4", "--seed_everything=3"),
]
LORA = ["--pet+=LoRACallback", "--pet.r=2", "--pet.target_modules=[net.0,net.2]", "--pet.dropout=0.1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sweep")
    shutil.copy(HERE / "user_code.py", found)
    return found


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(
        [SCRIPT, "sweep", *TASK, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In this process: to begin another one takes as long as the sweep."""
    monkeypatch.setattr(sys, "argv", ["lightning-pet"])
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)


def swept(*arguments: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["sweep", *TASK, *arguments])
    folder = next(word.removeprefix("--output=") for word in arguments if word.startswith("--output="))
    return json.loads(Path(folder, "sweep.json").read_text(encoding="utf-8"))


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        swept("--output=none", *arguments)
    return str(end.value.code)


def test_a_sweep_by_the_installed_script(folder: Path) -> None:
    tried = ["--lr", "1e-2,3e-2", "--r=2,4", "--metric=val/accuracy"]
    done = command(folder, *LORA, *tried, "--output", "all", "--plot", "all.svg")
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "all" / "sweep.json").read_text(encoding="utf-8"))
    assert (record["metric"], record["mode"], record["tried"]) == (
        "val/accuracy",
        "max",
        {"lr": ["1e-2", "3e-2"], "r": ["2", "4"]},
    )
    assert [run["value"] for run in record["runs"]] == sorted((run["value"] for run in record["runs"]), reverse=True)
    assert record["best"] == record["runs"][0]["name"]
    names = {f"lr-{lr}_r-{r}" for lr in ("1e-2", "3e-2") for r in (2, 4)}
    assert {run["name"] for run in record["runs"]} == names
    assert {(run["options"]["lr"], run["options"]["r"]) for run in record["runs"]} == {
        (lr, r) for lr in (0.01, 0.03) for r in (2, 4)
    }
    assert "4 runs, best first" in done.stdout
    assert "best: lr=" in done.stdout
    assert (folder / "all.svg").stat().st_size > 1000
    files = {name: load_file(folder / "all" / f"{name}.pet.safetensors") for name in names}
    ranks = {tuple(tensor.shape) for tensor in files["lr-1e-2_r-4"].values()}
    assert (4, 8) in ranks
    figures = (folder / "all").rglob("metrics.csv")
    assert all("val/accuracy/lr-1e-2_r-4" in path.read_text(encoding="utf-8") for path in figures)


@pytest.mark.usefixtures("_here")
def test_the_same_comes_out_in_parts_and_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    tried = ["--lr=1e-2,3e-2", "--seed=0,1", "--metric=val/accuracy", "--trainer.logger=false"]
    whole = swept(*LORA, *tried, "--output=whole")
    assert "val/accuracy over seeds" in capsys.readouterr().out
    for name, more in (("parts", "--at_once=3"), ("split", "--split")):
        again = swept(*LORA, *tried, f"--output={name}", more)
        assert [run["value"] for run in again["runs"]] == pytest.approx([run["value"] for run in whole["runs"]])
        for run in whole["runs"]:
            one, other = (load_file(Path(folder, run["file"])) for folder in ("whole", name))
            assert all(torch.allclose(other[key], own, rtol=1e-4, atol=1e-6) for key, own in one.items())
    with pytest.raises(SystemExit, match=r"sweep\.json exists already"):
        swept(*LORA, *tried, "--output=parts")


@pytest.mark.usefixtures("_here")
def test_refused() -> None:
    metric = "--metric=val/accuracy"
    assert "Did you mean --weight_decay?" in refused(*LORA, metric, "--weight_deacy=0,1")
    assert "--lr: 'fast' is no number" in refused(*LORA, metric, "--lr=1e-3,fast")
    bitfit = ["--pet+=BitFitCallback"]
    assert "--r: BitFitCallback has no option 'r' to be tried" in refused(*bitfit, metric, "--r=2,4")
    message = refused(*LORA, metric, "--lr=1e-3,1e-2", "--device_memory=1K")
    assert "2 runs at once need about" in message
    assert "--device_memory=SIZE says how much there is" in message
    assert "which metric counts? Give --metric" in refused(*LORA, "--lr=1e-3,1e-2")
    assert "the configuration has no method" in refused(metric, "--lr=1e-3,1e-2")
    message = refused(*LORA, "--metric=val/f1", "--lr=1e-3,1e-2")
    assert "'val/f1': nothing of this name was logged" in message
    assert "has a TasksCallback; a sweep makes its own" in refused(
        *LORA, metric, "--lr=1,2", "--trainer.callbacks+=TasksCallback", "--trainer.callbacks.tasks=[a]"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr"], "--lr has no values"),
        (["--lr=1", "--lr=2"], "--lr is given twice"),
        (["--lr=1,2,1"], "--lr: 1 is given twice"),
    ],
)
def test_what_is_to_be_tried_is_given_once(words: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        split_arguments(words)


def test_values_are_what_they_look_like() -> None:
    methods: list[Any] = [LoRACallback(r=8)]
    found = product_of({"init": ["kaiming", "pissa"], "use_dora": ["true", "false"], "alpha": ["4", "8.5"]}, methods)
    assert len(found) == 8
    assert found["init-pissa_use_dora-true_alpha-8_5"] == {"init": "pissa", "use_dora": True, "alpha": 8.5}
    long = product_of({"init": [f"{'x' * 40}{n}" for n in range(2)], "use_dora": ["true"]}, methods)
    assert list(long) == ["run-0", "run-1"] or all(len(name) <= 64 for name in long)
    for name, words, message in (
        ("lr", ["inf"], "'inf' is no number"),
        ("seed", ["1.5"], "'1.5' is no whole number"),
        ("r", ["true"], "'true' is no number"),
        ("delta", ["a", "b"], "has no option 'delta' to be tried"),
    ):
        with pytest.raises(ArgumentError, match=message):
            product_of({name: words}, methods)
    with pytest.raises(ArgumentError, match="nothing to try"):
        product_of({}, [BitFitCallback()])


def test_runs_without_a_value_come_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [SweptRun(f"r{i}", {"init": f"i{i}", "seed": 0}, value, None) for i, value in enumerate((2.0, None, 1.0))]
    found = Swept("val_loss", "min", tuple(runs))
    assert [run.name for run in found.ranked] == ["r2", "r0", "r1"]
    plot_sweep(found, tmp_path / "x.svg")
    nothing = Swept("val_loss", "min", (runs[1],))
    show_sweep(nothing)
    assert "no run has a finite val_loss" in capsys.readouterr().out
    assert nothing.best is None
