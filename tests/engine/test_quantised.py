"""Quantised bases through the Trainer: torchao and bitsandbytes for real, on the CPU, in one process and in two."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from models import Data, Module, Net, adamw, ckpt, every_step, fit, is_pristine, lora, trainer
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))
from launch import launch
from quantised_models import FORMATS, int8_activations

from lightning_pet import BitFitCallback, PETError, TargetError, UnsupportedStrategyError, apply, load_from_checkpoint
from lightning_pet.model.layer_kinds import base_class
from lightning_pet.model.quantised import dense_values, format_of, is_quantised
from lightning_pet.operations.adapted import Adapted
from lightning_pet.store.entry import MARK
from lightning_pet.training.step import replaces_layers

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
DOCS = Path(__file__).parents[2] / "docs" / "quantisation.md"
SCRIPT = str(Path(__file__).with_name("quantised_runs.py"))


class Built(Module):
    """Builds and quantises its model in one of the three places."""

    def __init__(self, where, quantise, optimizers=adamw):
        super().__init__(None, optimizers)
        self.where, self.quantise = where, quantise
        self._build("__init__")

    def _build(self, here):
        if here == self.where and not hasattr(self, "net"):
            self.net = self.quantise(Net())

    def setup(self, stage):
        self._build("setup")

    def configure_model(self):
        self._build("configure_model")


class QuantisesLater(Module):
    """The model is there from the start, but quantised in ``setup``: after the delta came."""

    def setup(self, stage):
        if not any(map(is_quantised, self.net.parameters())):
            FORMATS["torchao int8"](self.net)


def deltas(module):
    return {n: p for n, p in module.named_parameters() if ".pet." in n}


def equal(a, b):
    a, b = deltas(a), deltas(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resumed(make, folder, recwarn, *callbacks, **options):
    """Fit, resume in the middle with a new module, and compare; returns the first module."""
    module = make()
    fit(module, *callbacks, every_step(folder), **options)
    saved = torch.load(ckpt(folder, 4), weights_only=True)["state_dict"]
    del saved[MARK]
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert set(saved) == trained | {n for n in module.state_dict() if ".pet." in n}
    assert all(t.dtype is torch.float32 for n, t in saved.items() if ".pet." in n)
    again = make()
    torch.manual_seed(987)
    trainer(*callbacks, **options).fit(again, datamodule=Data(), ckpt_path=ckpt(folder, 4))
    assert again.losses == module.losses[4:]
    assert equal(again, module)
    assert module.net.fc1.pet["lora_default"].b.abs().max() > 0  # gradient came through the layers behind it
    assert not [w for w in recwarn if "could not be compared" in str(w.message)]
    return module


@pytest.mark.parametrize("where", ["__init__", "setup", "configure_model"])
@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"])
def test_trains_and_resumes_exactly(name, where, tmp_path, recwarn):
    module = resumed(lambda: Built(where, FORMATS[name]), tmp_path, recwarn, lora())
    assert is_quantised(module.net.fc1.weight)
    loaded = load_from_checkpoint(Built(where, FORMATS[name]), ckpt(tmp_path, 10))
    assert equal(loaded, module)
    x = torch.randn(3, 6)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    found = {}
    exec(example[1], found)
    module = found["trainer"].lightning_module
    assert is_quantised(module.net[0].weight)
    assert module.net[0].pet["lora_default"].b.abs().max() > 0


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "pissa"}], ids=str)
def test_starts_from_the_weight_that_it_trains_on(options, tmp_path, recwarn):
    module = resumed(lambda: QuantisesLater(Net()), tmp_path, recwarn, lora(**options))
    assert format_of(module.net.fc1.weight) == "torchao Int8Tensor"
    fresh = QuantisesLater(Net())
    trainer(lora(**options), limit_val_batches=1).validate(fresh, datamodule=Data(), verbose=False)
    delta, x = fresh.net.fc1.pet["lora_default"], torch.randn(4, 6)
    if delta.magnitude is not None:
        assert torch.equal(delta.magnitude, dense_values(fresh.net.fc1, "weight").norm(dim=1))
    assert torch.equal(fresh.net.eval()(x), FORMATS["torchao int8"](Net()).eval()(x))


def test_a_cast_leaves_the_delta_in_full_precision(tmp_path, recwarn):
    module = resumed(
        lambda: Built("__init__", FORMATS["torchao int8"]), tmp_path, recwarn, lora(), precision="bf16-true"
    )
    assert {p.dtype for p in deltas(module).values()} == {torch.float32}
    assert module.net.fc1.bias.dtype is torch.bfloat16


# --- a precision plug-in that replaces layers ------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    """Lightning lets bitsandbytes run on CUDA only; the library itself runs here."""
    monkeypatch.setattr(_AcceleratorConnector, "_validate_precision_choice", lambda self: None)


def plugin(mode, **options):
    dtype = None if "int8" in mode else torch.float32
    return {"plugins": [BitsandbytesPrecision(mode, dtype=dtype, **options)], "precision": None}


@pytest.mark.parametrize(
    ("mode", "where", "options", "dtype"),
    [
        ("nf4", "__init__", {}, torch.uint8),
        ("fp4-dq", "setup", {"use_dora": True}, torch.uint8),
        ("nf4-dq", "configure_model", {"init": "pissa"}, torch.uint8),
        ("int8", "configure_model", {}, torch.int8),
        ("int8-training", "__init__", {}, torch.float32),
    ],
)
def test_lightnings_plug_in_has_its_turn_before_the_delta(on_cpu, mode, where, options, dtype, tmp_path, recwarn):
    callback = lora(modules_to_save=[], **options)
    module = resumed(lambda: Built(where, lambda net: net), tmp_path, recwarn, callback, **plugin(mode))
    assert base_class(module.net.fc1).__module__.startswith("lightning.")
    assert module.net.fc1.weight.dtype is dtype
    assert torch.nn.Linear is torch.nn.modules.Linear


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "pissa"}], ids=str)
def test_starts_as_what_the_plug_in_made_of_the_base(on_cpu, options):
    fresh, x = Module(Net()), torch.randn(4, 6)
    run = trainer(lora(modules_to_save=[], **options), limit_val_batches=1, **plugin("nf4"))
    run.validate(fresh, datamodule=Data(), verbose=False)
    with torch.no_grad():
        start = fresh.net.eval()(x)
        with Adapted(fresh.net).disabled():
            assert torch.equal(fresh.net(x), start)
    delta = fresh.net.fc1.pet["lora_default"]
    if delta.magnitude is not None:
        assert torch.equal(delta.magnitude, dense_values(fresh.net.fc1, "weight").norm(dim=1))


def test_ignored_layers_may_train(on_cpu, tmp_path, recwarn):
    options = plugin("nf4", ignore_modules={"net.head"})
    module = resumed(lambda: Module(Net()), tmp_path, recwarn, lora(), BitFitCallback(), **options)
    assert type(module.net.head) is nn.Linear
    assert module.net.head.weight.requires_grad


def test_a_quantised_head_is_refused_before_anything_happens(on_cpu):
    module = Module(Net())
    with pytest.raises(
        TargetError, match=r"head\.weight is stored as bitsandbytes nf4 and cannot train.*ignore_modules"
    ):
        fit(module, lora(), **plugin("nf4"))
    assert is_pristine(module)


def test_deltas_that_the_plug_in_would_replace_are_refused(on_cpu):
    module = Module(Net())
    adapted = apply(module, [lora()])
    before = adapted.state_dict()
    with pytest.raises(PETError, match="BitsandbytesPrecision would replace the layer"):
        fit(module, lora(), **plugin("nf4"))
    assert base_class(module.net.fc1) is nn.Linear
    assert before.keys() == adapted.state_dict().keys()


def test_averages_of_the_model_before_its_layers_were_replaced_are_refused(on_cpu):
    with pytest.raises(UnsupportedStrategyError, match="a precision plug-in replaces layers"):
        fit(Module(Net()), lora(modules_to_save=[]), EMAWeightAveraging(), **plugin("nf4"))


class Doubled(nn.Linear):
    """What another vendor's layer is to us: one with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Doubling(Precision):
    """Replaces layers, and casts: what Transformer Engine's plug-in does."""

    def convert_module(self, module):
        for name, child in list(module.named_modules()):
            if type(child) is nn.Linear:
                made = Doubled(child.in_features, child.out_features)
                made.load_state_dict(child.state_dict())
                module.set_submodule(name, made)
        return module.bfloat16()

    def forward_context(self):
        return torch.autocast("cpu", torch.bfloat16)


def test_any_plug_in_that_replaces_layers_has_its_turn_first(tmp_path, recwarn):
    module = resumed(lambda: Module(Net()), tmp_path, recwarn, lora(modules_to_save=[]), plugins=[Doubling()])
    assert base_class(module.net.fc1) is Doubled
    assert {p.dtype for p in deltas(module).values()} == {torch.float32}
    assert module.net.fc1.weight.dtype is torch.bfloat16


def test_only_plug_ins_that_cast_wait_for_their_turn():
    assert replaces_layers(object.__new__(TransformerEnginePrecision))
    assert replaces_layers(Doubling())
    assert not replaces_layers(Precision())
    assert not replaces_layers(MixedPrecision("bf16-mixed", "cpu"))


# --- what cannot train, and two processes -----------------------------------------------------------


def test_a_format_without_gradient_is_refused_for_training_and_serves_otherwise(tmp_path):
    module = Built("__init__", FORMATS["torchao int8"])
    fit(module, lora(), every_step(tmp_path), max_epochs=1)
    other = Built("__init__", int8_activations)
    with pytest.raises(
        UnsupportedStrategyError, match=r"fc1 is stored as torchao Int8Tensor.*no gradient.*weight-only"
    ):
        fit(other, lora())
    assert is_pristine(other)
    trainer(lora(), limit_val_batches=1.0).validate(
        other, datamodule=Data(), ckpt_path=ckpt(tmp_path, 5), verbose=False
    )
    assert equal(other, module)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    codes, outputs = launch([SCRIPT, str(folder)], timeout=200)
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return folder, [json.loads(output.split("FOUND ")[1].splitlines()[0]) for output in outputs]


@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes nf4"])
def test_two_processes_train_what_one_trains(two, name):
    folder, ranks = two
    module = Module(FORMATS[name](Net(dropout=0)))
    fit(module, lora(), data=Data(shuffle=False))
    for rank in ranks:
        assert rank[name] == pytest.approx(module.losses, rel=1e-4)
    loaded = load_from_checkpoint(Module(FORMATS[name](Net(dropout=0))), folder / f"{name}.ckpt")
    for parameter, same in zip(deltas(loaded).values(), deltas(module).values(), strict=True):
        assert torch.allclose(parameter, same, atol=1e-5)


def test_engines_that_shard_refuse_it_by_name(two):
    for rank in two[1]:
        assert "fc1.weight is stored as torchao Int8Tensor, which ModelParallelStrategy cannot split" in rank["sharded"]
