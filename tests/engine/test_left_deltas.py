"""A module that comes to a Trainer with a delta: without a callback for it, or with hooks that build it anew."""

import warnings

import pytest
import torch
from models import BATCHES, Data, Module, Net, adamw, ckpt, digest, every_step, fit, lora, trainer
from torch import nn

from lightning_pet.callbacks.adalora import AdaLoRACallback
from lightning_pet.callbacks.bitfit import BitFitCallback
from lightning_pet.errors import PETError, UnsupportedStrategyError
from lightning_pet.operations.apply import apply
from lightning_pet.operations.delta import load_delta, save_delta

# --- without a callback -----------------------------------------------------------------------------------------


def said(action):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in found if "carries a delta" in str(w.message)]


def by_apply(module, methods, folder):
    apply(module, methods)


def by_apply_to_the_net(module, methods, folder):
    apply(module.net, methods)


def from_a_file(module, methods, folder):
    net = Net()
    apply(net, methods)
    save_delta(net, folder / "x.pet.safetensors")
    load_delta(module, folder / "x.pet.safetensors")


def from_an_earlier_fit(module, methods, folder):
    fit(module, *methods, max_epochs=1, max_steps=0)


@pytest.mark.parametrize("way", [by_apply, by_apply_to_the_net, from_a_file, from_an_earlier_fit])
def test_it_trains_as_with_its_callbacks(way, tmp_path):
    methods = lambda: [lora(dropout=0.2), lora(name="two", target_modules=["fc2"])]  # noqa: E731
    module, reference = Module(Net()), Module(Net())
    for each in (module, reference):
        torch.manual_seed(3)
        way(each, methods(), tmp_path)
    fit(reference, *methods(), every_step(tmp_path / "with"))
    found = said(lambda: fit(module, every_step(tmp_path / "without")))
    assert len(found) == 1
    assert "lora:default, lora:two" in found[0]
    assert "Pass the callbacks" in found[0]
    assert module.losses == reference.losses
    assert digest(module) == digest(reference)
    states = [torch.load(ckpt(tmp_path / name, 10), weights_only=True)["state_dict"] for name in ("with", "without")]
    assert states[0].keys() == states[1].keys()
    again = Module(Net())
    load_delta(again, ckpt(tmp_path / "without", 10))
    assert digest(again) == digest(module)


def test_schedules_of_the_method_run():
    module = Module(Net())
    apply(module, [AdaLoRACallback(target_r=1, init_r=3, tinit=1, tfinal=1, target_modules=["fc1", "fc2"])])
    fit(module)
    kept = [layer.pet["adalora_default"].kept.sum().item() for layer in (module.net.fc1, module.net.fc2)]
    assert sum(kept) == 2, "the budget went down to its target"


def test_it_resumes_and_validates(tmp_path):
    module, again = Module(Net()), Module(Net())
    torch.manual_seed(3)
    apply(module, [lora()])
    run = fit(module, every_step(tmp_path))
    assert [type(callback).__name__ for callback in run.callbacks] == ["ModelCheckpoint"]
    apply(again, [lora()])
    run = fit(again, ckpt=ckpt(tmp_path, 5))
    assert digest(again) == digest(module)
    assert said(lambda: run.validate(again, datamodule=Data(), verbose=False)) == []
    fresh = Module(Net())
    apply(fresh, [lora()])
    trainer(limit_val_batches=1.0).validate(
        fresh, datamodule=Data(), ckpt_path=ckpt(tmp_path, 10), verbose=False, weights_only=True
    )
    assert digest(fresh) == digest(module)


def test_a_module_without_delta_is_left_alone():
    module = Module(Net())
    apply(module, [lora()]).remove()
    assert said(lambda: fit(module, max_epochs=1)) == []
    assert all(p.requires_grad for p in module.parameters())


# --- built anew ------------------------------------------------------------------------------------------------------


class Rebuilds(Module):
    """Does something in each ``setup`` after the first fit."""

    def __init__(self, deed):
        super().__init__(Net())
        self.deed = deed
        self.again = False

    def setup(self, stage):
        if self.again:
            self.deed(self)
        self.again = True


def whole(module):
    module.net = Net()


def head(module):
    module.net.head = nn.Linear(8, 3)


def head_in_place(module):
    module.net.head.load_state_dict(Net(seed=2).head.state_dict())


def delta_in_place(module):
    for parameter in module.net.fc1.pet.parameters():
        parameter.data.zero_()


@pytest.mark.parametrize("deed", [whole, head])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_trained_parts_that_setup_builds_anew(deed, verb, tmp_path):
    module = Rebuilds(deed)
    run = fit(module, lora(), every_step(tmp_path), max_epochs=1)
    before = digest(module)
    run.validate(module, datamodule=Data(), ckpt_path=ckpt(tmp_path, 5), verbose=False, weights_only=True)
    assert digest(module) == before, "a checkpoint brings them back"
    with pytest.raises(PETError, match=r"Rebuilds built anew what was trained.*only if it is not there"):
        getattr(run, verb)(module, datamodule=Data())


@pytest.mark.parametrize("deed", [whole, head])
def test_a_fit_that_starts_anew(deed):
    module = Rebuilds(deed)
    fit(module, lora(), max_epochs=1)
    with pytest.warns(UserWarning, match="This fit starts from what is new"):
        fit(module, lora(), max_epochs=1)


def base_in_place(module):
    module.net.load_state_dict(Net().state_dict(), strict=False)


@pytest.mark.parametrize("deed", [base_in_place, head_in_place, delta_in_place])
def test_trained_values_that_setup_loads_over(deed):
    """A base that is loaded each time, head and all, leaves the trained values."""
    module = Rebuilds(deed)
    run = fit(module, lora(), max_epochs=1)
    before = digest(module)
    run.validate(module, datamodule=Data(), verbose=False)
    assert digest(module) == before


# --- optimizers in turns ----------------------------------------------------------------------------------------------


class Turns(Module):
    """Two optimizers, one of them toggled at a time; the second has a critic."""

    automatic_optimization = False

    def __init__(self):
        super().__init__(Net(), lambda m: [adamw(m.net), adamw(m.critic)])
        self.critic = nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = nn.functional.cross_entropy(self.critic(self.net(x)).float(), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.losses.append(loss.item())


METHODS = {
    "lora on one": lambda: lora(module="net", modules_to_save=[]),
    "lora on both": lambda: lora(target_modules=["net.fc1", "critic"], modules_to_save=[]),
    "lora on one of the base": lambda: lora(target_modules=["net.fc1"], modules_to_save=[]),
    "adalora": lambda: AdaLoRACallback(target_r=1, init_r=3, tinit=1, tfinal=1, target_modules=["net.fc1", "critic"]),
    "bitfit": lambda: BitFitCallback(modules_to_save=[]),
}


@pytest.mark.parametrize("method", METHODS)
def test_toggled_optimizers(method, tmp_path):
    module, fresh = Turns(), Turns()
    fresh.load_state_dict(module.state_dict())
    fit(module, METHODS[method](), every_step(tmp_path))
    assert len(module.losses) == 2 * BATCHES
    load_delta(fresh, ckpt(tmp_path, torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["global_step"]))


# --- the other package ----------------------------------------------------------------------------------------------


def test_a_trainer_of_pytorch_lightning():
    old = pytest.importorskip("pytorch_lightning")
    run = old.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    with pytest.raises(UnsupportedStrategyError, match="import lightning as L") as caught:
        lora().setup(run, Module(Net()), "fit")
    assert "Supported" not in str(caught.value)
