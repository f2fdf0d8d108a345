"""The command line as users call it: the installed script, as a subprocess."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import launch
import pytest
import torch

from lightning_pet.report.summary import summarize
from lightning_pet.store.entry import MARK

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TARGETS = "[net.0,net.2]"
SCRIPT = str(Path(sysconfig.get_path("scripts")) / "lightning-pet")  # what an installation has put there
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(
    arguments: list[str], folder: Path, check: bool = True, forked: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run Python, or our script, with the user's code importable, in a folder of its own.

    ``forked``: in a process that has imported Lightning already, for what is not about starting. What it prints as an
    error is part of its output then.
    """
    if forked:
        codes, outputs = launch.run(arguments, [ENVIRONMENT], 240, folder)
        done = subprocess.CompletedProcess(arguments, codes[0], outputs[0], outputs[0])
    else:
        command = arguments if arguments[0] == SCRIPT else [sys.executable, *arguments]
        env = {**os.environ, **ENVIRONMENT}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def ours(verb: str, *arguments: str) -> list[str]:
    """Our own command."""
    return [SCRIPT, verb, *arguments]


def fit_arguments(*more: str) -> list[str]:
    """A short fit of the user's module with our command."""
    model = ["--model=user_code.Net", "--data=user_code.Data", "--trainer.max_epochs=1", *QUIET]
    pet = ["--pet+=LoRACallback", "--pet.r=4", f"--pet.target_modules={TARGETS}"]
    return ours("fit", *model, *pet, *more)


def delta_keys(path: Path) -> set[str]:
    return set(torch.load(path, weights_only=True)["state_dict"]) - {MARK}


EXPECTED = {f"net.{i}.pet.lora_default.{p}" for i in (0, 2) for p in "ab"} | {"head.weight", "head.bias"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of our command: its checkpoint and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    done = run(fit_arguments(), folder)
    (checkpoint,) = folder.rglob("*.ckpt")
    return checkpoint, done.stdout


def test_fit_with_the_short_option(trained: tuple[Path, str]) -> None:
    checkpoint, printed = trained
    assert delta_keys(checkpoint) == EXPECTED
    assert "Trained parameters" in printed
    assert "delta checkpoint: " in printed
    assert checkpoint.name in printed


@pytest.mark.parametrize("name", ["LoRACallback", "lightning_pet.LoRACallback"])
def test_fit_with_the_users_own_cli(name: str, tmp_path: Path) -> None:
    callback = [
        f"--trainer.callbacks+={name}",
        "--trainer.callbacks.r=4",
        f"--trainer.callbacks.target_modules={TARGETS}",
    ]
    eager = ["--optimizer=AdamW", "--optimizer.lr=0.01"] if "." in name else []
    run([str(HERE / "user_code.py"), "fit", "--trainer.max_epochs=1", *QUIET, *callback, *eager], tmp_path, forked=True)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert set(saved["state_dict"]) - {MARK} == EXPECTED
    assert len(saved["optimizer_states"][0]["state"]) == len(EXPECTED)
    assert saved["state_dict"]["net.0.pet.lora_default.b"].abs().max() > 0


def test_dotted_name_needs_no_import(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "from lightning.pytorch.cli import LightningCLI\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel, BoringDataModule\n"
        "LightningCLI(BoringModel, BoringDataModule)\n"
    )
    options = ["--trainer.callbacks+=lightning_pet.LoRACallback", "--trainer.callbacks.r=1"]
    options += ["--trainer.callbacks.target_modules=layer", "--trainer.fast_dev_run=true", *QUIET]
    assert "lora" in run([str(script), "fit", *options], tmp_path, forked=True).stdout


def test_yaml_validate_test_predict_and_resume(trained: tuple[Path, str], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: user_code.Net\ndata: user_code.Data\n"
        "trainer: {max_epochs: 2, logger: false, enable_progress_bar: false, accelerator: cpu}\n"
        "pet:\n- class_path: LoRACallback\n  init_args: {r: 4, target_modules: [net.0, net.2]}\n"
    )
    script = tmp_path / "verbs.py"
    script.write_text(
        "import sys\nfrom lightning_pet.cli.lightning_cli import run\n"
        "for verb in ('validate', 'test', 'predict', 'fit'):\n"
        "    print('verb', verb, flush=True)\n    run([verb, '-c', sys.argv[1], '--ckpt_path', sys.argv[2]])\n"
        "for epochs in '12':\n"
        "    run(['fit', '-c', sys.argv[1], '--ckpt_path=last-good', '--trainer.default_root_dir=again',\n"
        "         f'--trainer.max_epochs={epochs}'])\n"
    )
    done = run([str(script), str(config), str(trained[0])], tmp_path, forked=True)
    predicted = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert len(predicted) > 1
    assert all(json.loads(line) is not None for line in predicted)
    for text in (
        "val/loss",
        "test/loss",
        "predictions.jsonl",
        "verb fit",
        "`Trainer.fit` stopped: `max_epochs=2` reached",
    ):
        assert text in done.stdout + done.stderr
    assert "no checkpoint below" in done.stderr
    (first,) = [line for line in done.stderr.splitlines() if "going on from" in line]
    assert "again" in first
    assert torch.load(next((tmp_path / "again").rglob("*epoch=1*.ckpt")), weights_only=True)["global_step"] == 16


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["validate", "--ckpt_path={}"], "val/loss"),
        (["test", "--ckpt_path={}"], "test/loss"),
        (["predict", "--ckpt_path={}"], ""),
        (["plan"], "optimizer"),
        (["intrinsic-dimension", "--metric=val/accuracy", "--smallest=10", "--largest=10"], "full fine-tuning"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_installed_script_knows_every_verb(
    arguments: list[str], text: str, trained: tuple[Path, str], tmp_path: Path
) -> None:
    """Each verb in a process of its own: what one of them imports, another may be missing."""
    given = fit_arguments(*(argument.format(trained[0]) for argument in arguments[1:]))
    done = run([SCRIPT, arguments[0], *given[2:]], tmp_path)
    assert text in done.stdout


def test_the_installed_script_names_and_writes_configurations(tmp_path: Path) -> None:
    assert "  method/lora " in run(ours("list"), tmp_path).stdout
    (tmp_path / "reviews.csv").write_text("text,label\ngood,pos\nbad,neg\n")
    written = run(ours("init", "text_classification", "--method=bitfit", "--data=reviews.csv"), tmp_path)
    assert written.stdout.endswith("lightning-pet fit -c run.yaml\n")
    printed = run(ours("fit", "-c", "run.yaml", "-c", "trainer/cpu", "--print_config"), tmp_path, forked=True).stdout
    assert "class_path: lightning_pet.BitFitCallback" in printed
    assert "accelerator: cpu" in printed


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--pet+=LoRACalback"], ["LoRACalback", "Did you mean the callback LoRACallback?"]),
        (
            ["--pet+=LoRACallback", "--pet.rank=4"],
            ["'rank' is not accepted", "Did you mean the option 'r' of LoRACallback?"],
        ),
        (["--pet+=LoRACallback", "--pet.drop_out=0.1"], ["Did you mean the option 'dropout' of LoRACallback?"]),
        (["--pet+=LoRACallback", "--pet.r=0"], ["r=0", "positive integer"]),
        (["--pet+=LoRACallback", "--pet.init=zero"], ["pissa"]),
        (["--pet+=LoRACallback", "--pet.target_modules=[net.0,net.9]"], ["TargetError", "net.9"]),
    ],
    ids=["callback", "alias", "option", "value", "choice", "target"],
)
def test_mistakes_get_a_message_and_no_traceback(arguments: list[str], texts: list[str], tmp_path: Path) -> None:
    model = ["--model=user_code.Net", "--data=user_code.Data", "--trainer.max_epochs=1", *QUIET]
    done = run(ours("fit", *model, *arguments), tmp_path, check=False, forked=True)
    assert done.returncode != 0
    for text in texts:
        assert text in done.stderr
    if "Did you mean" in texts[-1]:
        assert done.stderr.splitlines()[-1] == texts[-1]
        assert "usage" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


def test_wrong_checkpoint_is_refused(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    base = tmp_path / "base.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": pl.__version__, "epoch": 0, "global_step": 0}, base)
    done = run(fit_arguments(f"--ckpt_path={base}"), tmp_path, check=False, forked=True)
    assert done.returncode != 0
    assert "not a delta checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect(trained: tuple[Path, str], tmp_path: Path) -> None:
    table = run(ours("inspect", str(trained[0])), tmp_path).stdout
    assert "lora:default" in table
    assert "head.weight" in table
    summary = json.loads(run(ours("inspect", str(trained[0]), "--json_output=true"), tmp_path).stdout)
    assert summary["methods"][0]["config"]["r"] == 4
    assert set(summary["tensors"]) == EXPECTED


def test_extract_needs_no_lightning(trained: tuple[Path, str], tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['lightning-pet', *sys.argv[1:]]; from lightning_pet.cli.main import main; main();"
        "print([name for name in ('lightning', 'transformers') if name in sys.modules])"
    )
    done = run(["-c", code, "extract", str(trained[0]), "topics.pet.safetensors"], tmp_path)
    first, second = done.stdout.splitlines()
    assert first.startswith("delta file: topics.pet.safetensors (")
    assert second == "[]"
    checkpoint, extracted = summarize(trained[0]), summarize(tmp_path / "topics.pet.safetensors")
    assert all(checkpoint[part] == extracted[part] for part in ("methods", "tensors", "base"))


def test_inspect_refuses_damage(trained: tuple[Path, str], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(trained[0].read_bytes()[:-2000])
    done = run(ours("inspect", str(damaged)), tmp_path, check=False)
    assert done.returncode != 0
    assert "damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_merge_writes_an_ordinary_transformers_folder(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    from lightning_pet import LoRACallback, apply, save_delta
    from tests.methods import zoo
    from tests.methods.battery import perturb

    model, forward = zoo.bert()
    model.save_pretrained(tmp_path / "base")
    perturb(apply(model, [LoRACallback(r=2)]))
    save_delta(model, tmp_path / "d.pet.safetensors")
    command = ours("merge", str(tmp_path / "d.pet.safetensors"), str(tmp_path / "base"), str(tmp_path / "merged"))
    run(command, tmp_path)
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(forward(merged), forward(model), atol=1e-5)
    again = run(command, tmp_path, check=False)
    assert again.returncode != 0
    assert "exists already" in again.stderr


def test_help_of_file_verbs_does_not_import_lightning(tmp_path: Path) -> None:
    probe = (
        "import sys; sys.argv = ['lightning-pet', *sys.argv[1:]]\n"
        "import contextlib\nfrom lightning_pet.cli.main import main\n"
        "with contextlib.suppress(SystemExit):\n    main()\n"
        "assert 'lightning' not in sys.modules and 'torch' not in sys.modules, 'imported too much'\n"
    )
    for arguments in (["inspect", "--help"], ["merge", "--help"], ["--help"]):
        assert "usage" in run(["-c", probe, *arguments], tmp_path).stdout


def test_unknown_verb(tmp_path: Path) -> None:
    done = run(ours("inspekt"), tmp_path, check=False)
    assert done.returncode != 0
    assert "'inspect'" in done.stderr
