"""Several tasks from the command line: options, YAML, resuming, and the text module's own column of tasks."""

import json
from pathlib import Path

import pytest
import torch

from lightning_pet import DeltaFileError, inspect_delta
from lightning_pet.report.summary import summarize
from lightning_pet.store.entry import MARK
from tests.cli.test_commands import QUIET, SCRIPT, TARGETS, ours, run

CODE = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

class Rows(pl.LightningDataModule):
    def _loader(self):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
        rows = [(x[i], int(x[i, i % 2] > 0), ["first", "second"][i % 2]) for i in range(32)]
        return DataLoader(rows, batch_size=8)

    train_dataloader = val_dataloader = _loader
"""
KINDS = [("good", "pos", "mood"), ("bad", "neg", "mood"), ("what", "thing", "ask"), ("who", "man", "ask")]
TASKS = ["--trainer.callbacks+=TasksCallback", "--trainer.callbacks.tasks=[first,second]", "--trainer.callbacks.key=2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task_code.py").write_text(CODE)
    return tmp_path


def files(folder: Path) -> dict[str, Path]:
    return {path.name.partition(".")[0]: path for path in folder.rglob("*.pet.safetensors")}


def test_options_on_the_command_line(folder: Path) -> None:
    pet = ["--pet+=LoRACallback", "--pet.r=4", f"--pet.target_modules={TARGETS}"]
    model = ["--model=user_code.Net", "--data=task_code.Rows", "--trainer.max_epochs=1", *QUIET]
    done = run(ours("fit", *model, *pet, *TASKS), folder)
    assert "lora@first" in done.stdout
    assert "delta of 'first'" in done.stdout + done.stderr
    found = files(folder)
    assert found.keys() == {"first", "second"}
    values = [inspect_delta(path).tensors for path in found.values()]
    assert [record.name for record in values[0]] == [record.name for record in values[1]]
    assert values[0] != values[1]
    (checkpoint,) = folder.rglob("*.ckpt")
    run([SCRIPT, "extract", str(checkpoint), "out.pet.safetensors", "--delta=second"], folder)
    assert [r.digest for r in inspect_delta(folder / "out.pet.safetensors").tensors] == [
        r.digest for r in inspect_delta(found["second"]).tensors
    ]
    with pytest.raises(DeltaFileError, match=r"deltas of 2 tasks: 'first', 'second'.*--delta=first"):
        summarize(checkpoint)
    assert summarize(checkpoint, "first")["methods"]


def test_the_users_own_cli(folder: Path) -> None:
    callbacks = ["--trainer.callbacks+=lightning_pet.LoRACallback", f"--trainer.callbacks.target_modules={TARGETS}"]
    script = folder / "own.py"
    script.write_text(
        "import user_code, task_code\nfrom lightning.pytorch.cli import LightningCLI\n"
        "LightningCLI(user_code.Net, task_code.Rows)\n"
    )
    run([str(script), "fit", "--trainer.max_epochs=1", *QUIET, *callbacks, *TASKS], folder)
    assert files(folder).keys() == {"first", "second"}


def test_yaml_best_values_and_resume(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "model: user_code.Net\ndata: task_code.Rows\nseed_everything: 1\n"
        "pet:\n- class_path: LoRACallback\n  init_args: {target_modules: [net.0, net.2]}\n"
        "trainer:\n  max_epochs: 2\n  logger: false\n  enable_progress_bar: false\n  accelerator: cpu\n"
        "  default_root_dir: .\n"
        "  callbacks:\n  - class_path: TasksCallback\n    init_args:\n"
        "      tasks: {first: {r: 2}, second: {r: 4, lr: 0.02}}\n      key: 2\n"
        "      monitor: val/accuracy\n      mode: max\n      dirpath: tasks\n"
    )
    done = run(ours("fit", "-c", "run.yaml"), folder)
    assert "val/accuracy" in done.stdout + done.stderr
    found = files(folder / "tasks")
    ranks = {task: inspect_delta(path).methods[0].config["r"] for task, path in found.items()}
    assert ranks == {"first": 2, "second": 4}
    (checkpoint,) = folder.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert {name.split("@")[1].split(".")[0] for name in saved["state_dict"] if "@" in name} == {"first", "second"}
    assert MARK in saved["state_dict"]
    assert saved["callbacks"]["TasksCallback"]["best"].keys() == {"first", "second"}
    shown = run(ours("validate", "-c", "run.yaml", f"--ckpt_path={checkpoint}"), folder)
    assert "val/accuracy/first" in shown.stdout


def test_a_wrong_task_is_named(folder: Path) -> None:
    pet = ["--pet+=LoRACallback", f"--pet.target_modules={TARGETS}"]
    model = ["--model=user_code.Net", "--data=task_code.Rows", "--trainer.max_epochs=1", *QUIET]
    wrong = [TASKS[0], "--trainer.callbacks.tasks=[first,secnd]", TASKS[2]]
    done = run(ours("fit", *model, *pet, *wrong), folder, check=False)
    assert done.returncode
    assert "the task 'second', and TasksCallback has 'first', 'secnd'. Did you mean 'secnd'?" in done.stderr


def test_texts_with_a_column_of_tasks(folder: Path) -> None:
    words = ["good", "bad", "what", "who", "the", "is", "film"]
    rows = [
        {"text": f"the film is {w} {i}", "label": lab, "kind": kind}
        for i in range(6)
        for w, lab, kind in (
            ("good", "pos", "mood"),
            ("bad", "neg", "mood"),
            ("what", "thing", "ask"),
            ("who", "man", "ask"),
        )
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "make.py").write_text(
        "from tokenizers import Tokenizer, models, pre_tokenizers\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"words = ['[PAD]', '[UNK]', *{words!r}]\n"
        "raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, '[UNK]'))\n"
        "raw.pre_tokenizer = pre_tokenizers.Whitespace()\n"
        "PreTrainedTokenizerFast(tokenizer_object=raw, pad_token='[PAD]', unk_token='[UNK]').save_pretrained('words')\n"
    )
    run([str(folder / "make.py")], folder)
    bert = {"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "run.yaml").write_text(
        json.dumps(
            {
                "seed_everything": 0,
                "model": {
                    "class_path": "TextClassifier",
                    "init_args": {"model": {**bert, "intermediate_size": 16}, "labels": ["pos", "neg", "thing", "man"]},
                },
                "data": {
                    "class_path": "TextClassificationData",
                    "init_args": {
                        "train": "rows.jsonl",
                        "columns": {"task": "kind"},
                        "tokenizer": "words",
                        "batch_size": 8,
                    },
                },
                "pet": [{"class_path": "LoRACallback", "init_args": {"r": 2}}],
                "trainer": {
                    "max_epochs": 1,
                    "accelerator": "cpu",
                    "logger": False,
                    "enable_progress_bar": False,
                    "callbacks": [{"class_path": "TasksCallback", "init_args": {"tasks": ["mood", "ask"]}}],
                },
            }
        )
    )
    run(ours("fit", "-c", "run.yaml"), folder)
    assert files(folder).keys() == {"mood", "ask"}
