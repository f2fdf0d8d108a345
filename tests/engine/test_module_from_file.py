"""Hyper-parameters in checkpoints, and modules built from them: as Lightning does it, without running a file's code."""

import argparse
import enum
import functools
import pathlib
import sys
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from models import Data, Module, Net, ckpt, digest, every_step, fit, lora, trainer
from torch import nn

from lightning_pet import ArgumentError, last_good, load_delta, load_from_checkpoint, save_delta
from lightning_pet.errors import DeltaFileError
from lightning_pet.store.entry import KEY
from lightning_pet.strategies.plain import NotPlainError, plain


class Kind(enum.Enum):
    FIRST = "first"
    SECOND = "second"


class Width(enum.IntEnum):
    SMALL = 3


class Plain(Module):
    def __init__(self, root=pathlib.Path("/data"), kind: Kind | None = None, lr: float = 0.1, more: object = None):
        super().__init__(Net(), lr=float(lr))
        self.save_hyperparameters()
        self.root, self.kind, self.more = root, kind, more


def saved_by(module, folder, **options):
    """Fit a module for a few steps; returns the path of its checkpoint and the warnings of the run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, lora(), every_step(folder), max_steps=2, **options)
    return ckpt(folder, 2), [str(one.message) for one in caught if "hyper-parameters" in str(one.message)]


def test_exact_plain_forms_come_back(tmp_path):
    module = Plain(pathlib.Path("elsewhere"), Kind.SECOND, np.float64(0.25), {"sizes": np.arange(3), "of": Width.SMALL})
    path, told = saved_by(module, tmp_path)
    assert told == []
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert (stored["root"], stored["kind"], stored["lr"]) == ("elsewhere", "second", 0.25)
    assert type(stored["lr"]) is float
    assert stored["more"]["sizes"].tolist() == [0, 1, 2]
    assert stored["more"]["of"] == 3
    again = load_from_checkpoint(Plain, path)
    assert (again.root, again.kind) == (pathlib.Path("elsewhere"), Kind.SECOND)
    assert digest(again) == digest(module)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (argparse.Namespace(a=pathlib.PurePosixPath("x")), {"a": "x"}),
        ((1, [Kind.FIRST]), (1, ["first"])),
        (frozenset({1}), {1}),
        (range(2), [0, 1]),
        (np.str_("x"), "x"),
        (np.bool_(True), True),
        (torch.float16, torch.float16),
    ],
)
def test_forms(value, form):
    assert plain(value) == form
    assert type(plain(value)) is type(form)


@pytest.mark.parametrize(
    "value",
    [nn.Linear(1, 1), int, print, functools.partial(torch.optim.Adam), object(), np.array([object()]), slice(1)],
)
def test_what_has_no_form(value):
    with pytest.raises(NotPlainError, match=r"it\['a'\]\[0\] is"):
        plain({"a": [value]})
    loop: list = []
    loop.append(loop)
    with pytest.raises(NotPlainError, match="deep"):
        plain(loop)


class Template(Module):
    """As common templates write it: a network, a partial of an optimizer, and all of it hyper-parameters."""

    def __init__(self, net: nn.Module, optimizer=None, compile: bool = False, size: int = 3):
        super().__init__(net)
        self.save_hyperparameters(logger=False)
        self.size = size

    def configure_optimizers(self):
        return self.hparams.optimizer(params=self.parameters())


def test_what_is_not_plain_is_told_at_the_start_and_left_out(tmp_path):
    module = Template(Net(norm=True), functools.partial(torch.optim.AdamW, lr=0.02), size=5)
    path, told = saved_by(module, tmp_path)
    assert len(told) == 1
    assert "net is of models.Net" in told[0]
    assert "optimizer is of functools.partial" in told[0]
    assert "load_from_checkpoint(Template, path, net=…, optimizer=…)" in told[0]
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"] == {"compile": False, "size": 5}
    assert "net.fc1.weight" not in saved["state_dict"]
    with pytest.raises(ArgumentError, match=r"net is of models\.Net.*net=…, optimizer=…"):
        load_from_checkpoint(Template, path)
    again = load_from_checkpoint(
        Template, path, net=Net(norm=True), optimizer=functools.partial(torch.optim.SGD, lr=0.1)
    )
    assert again.size == 5
    assert digest(again) == digest(module)
    assert digest(load_from_checkpoint(Template(Net(norm=True)), path)) == digest(module)
    resumed = Template(Net(norm=True), functools.partial(torch.optim.AdamW, lr=0.02))
    trainer(lora(), max_epochs=1).fit(resumed, datamodule=Data(), ckpt_path=path)
    assert len(resumed.losses) == 3


class Configured(Module):
    def __init__(self, conf):
        super().__init__(Net())
        self.save_hyperparameters(conf)
        self.width = conf["width"] if isinstance(conf, dict) else conf.width


@pytest.mark.parametrize("conf", [{"width": 3, "deep": {"x": 1}}, argparse.Namespace(width=3, deep={"x": 1})])
def test_one_dictionary(conf, tmp_path):
    module = Configured(conf)
    path, _ = saved_by(module, tmp_path)
    assert digest(load_from_checkpoint(Configured, path)) == digest(module)
    assert load_from_checkpoint(Configured, path, width=4).width == 4
    assert load_from_checkpoint(Configured, path, conf={"width": 5}).width == 5
    (tmp_path / "hparams.yaml").write_text("width: 7\n")
    assert load_from_checkpoint(Configured, path, hparams_file=tmp_path / "hparams.yaml").width == 7
    with pytest.raises(ArgumentError, match="is built already"):
        load_from_checkpoint(Configured(conf), path, width=3)


class Part:
    def __init__(self, size: int = 1):
        self.size = size


class Nested(Module):
    def __init__(self, part: Part, call: object = None):
        super().__init__(Net())
        self.save_hyperparameters()
        self.part = part


class NestedMore(Nested):
    pass


@pytest.fixture
def by_command(tmp_path, monkeypatch):
    """A checkpoint of LightningCLI in subclass mode, and what wrote it."""
    here = Nested.__module__
    arguments = [f"--model={here}.NestedMore", f"--model.part={here}.Part", "--model.part.size=4"]
    cli = LightningCLI(
        Nested,
        subclass_mode_model=True,
        run=False,
        save_config_callback=None,
        args=arguments,
        auto_configure_optimizers=False,
        trainer_defaults={"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "max_steps": 2},
    )
    fit(cli.model, lora(), every_step(tmp_path), max_steps=2)
    return ckpt(tmp_path, 2), cli.model


def test_nested_classes_of_the_command_line(by_command):
    path, module = by_command
    assert torch.load(path, weights_only=True)["hyper_parameters"]["part"]["class_path"].endswith("Part")
    again = load_from_checkpoint(Nested, path)
    assert type(again) is NestedMore
    assert again.part.size == 4
    assert digest(again) == digest(module)
    own = load_from_checkpoint(Nested, path, part=Part(9))
    assert own.part.size == 9


@pytest.mark.parametrize(
    "change",
    [
        {"_instantiator": "os.system"},
        {"_class_path": "os.system"},
        {"_class_path": "torch.nn.Linear"},
        {"part": {"class_path": "planted.Part"}},
        {"part": {"class_path": "os.system", "init_args": {"command": "true"}}},
        {"part": {"class_path": 3}},
        {"part": "planted.Part"},
        {"part": {"class_path": f"{Part.__module__}.Part", "init_args": {"size": {"class_path": "planted.Part"}}}},
    ],
)
def test_nothing_is_imported_by_a_name_in_a_file(by_command, tmp_path, monkeypatch, change):
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    saved = torch.load(by_command[0], weights_only=True)
    saved["hyper_parameters"].update(change)
    torch.save(saved, tmp_path / "x.ckpt")
    with pytest.raises(DeltaFileError) as caught:
        load_from_checkpoint(Nested, tmp_path / "x.ckpt")
    assert caught.value.code == "unsafe"
    assert "planted" not in sys.modules


class Measured(Module):
    """A metric beside the network, whose count is part of a checkpoint."""

    def __init__(self, metric: bool = True):
        super().__init__(Net())
        self.save_hyperparameters()
        if metric:
            self.register_module("metric", nn.BatchNorm1d(2, affine=False))

    def on_load_checkpoint(self, checkpoint):
        self.seen = checkpoint["global_step"]


def test_what_lies_beside_the_delta(tmp_path):
    module = Measured()
    module.metric.running_mean.fill_(3)
    path, _ = saved_by(module, tmp_path)
    again = load_from_checkpoint(Measured, path, map_location="cpu")
    assert again.metric.running_mean.tolist() == [3, 3]
    assert again.seen == 2
    with pytest.raises(DeltaFileError, match=r"metric\.running_mean.*strict=False"):
        load_from_checkpoint(Measured, path, metric=False)
    assert digest(load_from_checkpoint(Measured, path, metric=False, strict=False).net) == digest(module.net)


def test_other_loaders_lead_to_the_answer(tmp_path):
    """What knows no deltas says which keys are missing; one of the others says what to do."""
    module = Plain()
    path, _ = saved_by(module, tmp_path)
    for load in (
        lambda: Plain.load_from_checkpoint(path, weights_only=True),
        lambda: trainer(max_epochs=3).fit(Plain(), datamodule=Data(), ckpt_path=path),
    ):
        with pytest.raises(
            RuntimeError, match=r"(?s)Missing key\(s\).*load it with lightning_pet.load_from_checkpoint"
        ):
            load()
    assert KEY in torch.load(path, weights_only=True)
    save_delta(module, tmp_path / "d.pet.safetensors")
    fresh = Plain()
    load_delta(fresh, path)
    save_delta(fresh, tmp_path / "again.pet.safetensors")
    assert (tmp_path / "again.pet.safetensors").read_bytes() == (tmp_path / "d.pet.safetensors").read_bytes()


class Remembering(Callback):
    """A callback whose state is more than plain data."""

    def __init__(self, best=None):
        self.best = best

    def state_dict(self):
        return {"best": self.best, "rate": np.float64(0.5)}

    def load_state_dict(self, state):
        self.best = state["best"]


def test_objects_of_callbacks_keep_nobody_from_the_rest(tmp_path):
    module = Plain()
    fit(module, lora(), Remembering(pathlib.Path("x")), every_step(tmp_path), max_steps=2)
    path = ckpt(tmp_path, 2)
    saved = torch.load(path, weights_only=True)
    assert "Remembering" not in saved["callbacks"]
    assert digest(load_from_checkpoint(Plain, path)) == digest(module)
    assert last_good(tmp_path) == path
    mine = Remembering()
    with pytest.raises(DeltaFileError, match=r"the state of Remembering holds objects.*weights_only=False") as caught:
        trainer(lora(), mine, max_epochs=1).fit(Plain(), datamodule=Data(), ckpt_path=path)
    assert caught.value.code == "unsafe"
    resumed = Plain()
    trainer(lora(), mine, max_epochs=1).fit(resumed, datamodule=Data(), ckpt_path=path, weights_only=False)
    assert mine.best == pathlib.Path("x")
    assert len(resumed.losses) == 3
    fit(Plain(), lora(), Remembering(3), every_step(tmp_path / "plain"), max_steps=1)
    assert torch.load(ckpt(tmp_path / "plain", 1), weights_only=True)["callbacks"]["Remembering"] == {
        "best": 3,
        "rate": 0.5,
    }
