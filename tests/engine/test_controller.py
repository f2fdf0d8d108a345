"""What users do with a Trainer: all verbs, optimizers of all kinds, averaging, tuners, compile, checkpointing."""

import signal
import sys
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from models import Data, Module, Net, adamw, classes, cosine, digest, fit, is_pristine, lora, names_in, sgd, trainer

from lightning_pet.errors import UnsupportedStrategyError
from lightning_pet.operations.adapted import Adapted

DELTA = [f"net.fc{i}.pet.lora_default.{p}" for i in (1, 2) for p in "ab"]
BASE = [f"net.fc{i}.{p}" for i in (1, 2) for p in ("weight", "bias")]


def base_of(module):
    return {name: module.state_dict()[name].clone() for name in BASE}


def same_base(module, seed=1):
    reference = Module(Net(seed=seed)).state_dict()
    return all(torch.equal(module.state_dict()[name], reference[name]) for name in BASE)


# --- verbs, Trainers and modules -----------------------------------------------------------------------------


def test_all_verbs_twice_and_in_any_order():
    module, run = Module(Net()), trainer(lora(), limit_val_batches=1.0, max_epochs=1)
    run.validate(module, datamodule=Data(), verbose=False)
    run.fit(module, datamodule=Data())
    first = digest(module)
    run.validate(module, datamodule=Data(), verbose=False)
    run.test(module, datamodule=Data(), verbose=False)
    assert len(run.predict(module, datamodule=Data())) == 5
    assert digest(module) == first
    run.fit_loop.max_epochs = 2
    run.fit(module, datamodule=Data())
    assert digest(module) != first
    assert len(module.losses) == 10
    assert list(module.net.fc1.pet) == ["lora_default"]
    assert same_base(module)
    assert {"setup", "configure_model", "configure_optimizers"}.isdisjoint(module.__dict__)


def test_a_second_fit_goes_on_from_the_first():
    module, method = Module(Net(dropout=0)), lora()
    fit(module, method, max_epochs=1)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, method, max_epochs=1, max_steps=0)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    fit(module, lora(), max_epochs=1)
    assert module.losses[5] < module.losses[0]


def test_one_callback_for_two_modules():
    method, first, second = lora(), Module(Net()), Module(Net())
    fit(first, method)
    fit(second, method)
    assert first.losses == second.losses
    assert digest(first) == digest(second)
    run = trainer(method, max_epochs=1)
    run.fit(first, datamodule=Data())
    third = Module(Net())
    run.validate(third, datamodule=Data(), verbose=False)
    assert Adapted(third.net).record is not Adapted(first.net).record


def test_methods_may_come_from_the_module():
    class Configures(Module):
        def configure_callbacks(self):
            return [lora()]

    module = Configures(Net())
    fit(module)
    assert list(module.net.fc1.pet) == ["lora_default"]


def test_a_failed_fit_leaves_nothing_before_the_first_step_and_the_delta_after_it():
    class Fails(Module):
        at = 0

        def training_step(self, batch, batch_idx):
            if batch_idx == self.at:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    early, late = Fails(Net()), Fails(Net())
    late.at = 3
    before, kinds = digest(early), classes(early)
    for module in (early, late):
        with pytest.raises(RuntimeError, match="stop"):
            fit(module, lora())
    assert (digest(early), classes(early), is_pristine(early)) == (before, kinds, True)
    assert list(late.net.fc1.pet) == ["lora_default"]
    assert {"setup", "configure_model", "configure_optimizers"}.isdisjoint(late.__dict__)


def test_the_table_is_shown_once(capsys):
    fit(Module(Net()), lora(verbose=True), lora(name="two", verbose=True), max_epochs=1)
    shown = capsys.readouterr().out
    assert shown.count("Trained parameters") == 1
    assert "lora:two" in shown


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_saving_on_exceptions(at, stop, tmp_path):
    class Fails(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == at:
                raise stop("stop")
            return super().training_step(batch, batch_idx)

    module = Fails(Net())
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit if stop is KeyboardInterrupt else stop):
        fit(module, lora(), OnExceptionCheckpoint(tmp_path, "stopped"))
    signal.signal(signal.SIGINT, handler)
    saved = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    if at == 0:
        assert is_pristine(module)
        return
    assert names_in(saved) == {*DELTA, "net.head.weight", "net.head.bias"}
    again = Module(Net())
    with pytest.warns(UserWarning, match="not bit for bit"):
        trainer(lora()).fit(again, datamodule=Data(), ckpt_path=tmp_path / "stopped.ckpt")
    assert len(again.losses) == 10 - at


# --- optimizers -------------------------------------------------------------------------------------------------


def held(run):
    return [p for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]


def groups_by_place(module):
    return torch.optim.AdamW(
        [{"params": module.net.fc1.parameters(), "lr": 0.01}, {"params": module.net.fc2.parameters(), "lr": 0.02},
         {"params": module.net.head.parameters(), "lr": 0.03}]
    )  # fmt: skip


def frozen_ones_too(module):
    return torch.optim.SGD([module.net.fc1.weight, module.net.fc2.weight, *module.net.head.parameters()], lr=0.1)


def plateau(module):
    optimizer = sgd(module)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}


@pytest.mark.parametrize(
    "optimizers", [sgd, adamw, cosine, plateau, groups_by_place, frozen_ones_too], ids=lambda f: f.__name__
)
def test_exactly_what_trains_is_in_the_optimizer(optimizers):
    module = Module(Net(), optimizers)
    run = fit(module, lora(lora_plus_ratio=4.0))
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    assert sorted(map(id, held(run))) == sorted(trained)
    assert len(trained) == 6
    assert same_base(module)
    rate = {id(p): group["lr"] for o in run.optimizers for group in o.param_groups for p in group["params"]}
    for layer in (module.net.fc1, module.net.fc2):
        delta = layer.pet["lora_default"]
        assert rate[id(delta.b)] == pytest.approx(4 * rate[id(delta.a)])
    assert not torch.equal(module.net.fc1.pet["lora_default"].b, torch.zeros(8, 2))


def test_layer_wise_learning_rates_hold_for_the_delta():
    module = Module(Net(), groups_by_place)
    run = fit(module, lora(), max_epochs=1)
    for group, layer in zip(run.optimizers[0].param_groups, (module.net.fc1, module.net.fc2), strict=False):
        assert {id(p) for p in group["params"]} == {id(p) for p in layer.pet.parameters()}


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss


def two_optimizers(module):
    first, second = [*module.net.fc1.parameters()], [*module.net.fc2.parameters(), *module.net.head.parameters()]
    return [torch.optim.SGD(first, 0.1), torch.optim.AdamW(second, 0.01)]


def test_several_optimizers_with_manual_optimisation(tmp_path):
    module = Manual(Net(), two_optimizers)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    run = fit(module, lora(), saver)
    first, second = run.optimizers
    assert {id(p) for g in first.param_groups for p in g["params"]} == {id(p) for p in module.net.fc1.pet.parameters()}
    assert len(second.state) == 4
    again = Manual(Net(), two_optimizers)
    torch.manual_seed(987)
    trainer(lora()).fit(again, datamodule=Data(), ckpt_path=tmp_path / "step=12.ckpt")
    assert digest(again) == digest(module)


def test_eager_optimizer_of_the_cli(monkeypatch, tmp_path):
    """LightningCLI builds the optimizer over the parameters before any callback is set up."""
    monkeypatch.setattr(sys, "argv", ["script"])
    built = []

    class Model(Module):
        def __init__(self, dropout: float = 0.3) -> None:
            super().__init__(Net(dropout=dropout))
            built.append(self)

    Model.configure_optimizers = L.LightningModule.configure_optimizers
    arguments = [
        "fit", "--seed_everything=false", "--optimizer=torch.optim.AdamW", "--optimizer.lr=0.05",
        "--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=5",
        "--trainer.callbacks+=LoRACallback", "--trainer.callbacks.r=2", "--trainer.callbacks.target_modules=[fc1,fc2]",
        "--trainer.callbacks.lora_plus_ratio=4", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
        "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0",
        f"--trainer.default_root_dir={tmp_path}",
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LightningCLI(Model, Data, args=arguments, save_config_callback=None)
    module = built[-1]
    assert not torch.equal(module.net.fc1.pet["lora_default"].b, torch.zeros(8, 2))
    assert same_base(module)
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert names_in(saved) == {*DELTA, "net.head.weight", "net.head.bias"}


def test_accumulation_changes_nothing_but_the_step():
    module = Module(Net(dropout=0), sgd)
    run = fit(module, lora(), accumulate_grad_batches=5, data=Data(shuffle=False))
    whole = Module(Net(dropout=0), sgd)
    fit(whole, lora(), data=Data(batch_size=20, shuffle=False))
    assert run.global_step == 2
    for name, value in whole.state_dict().items():
        assert torch.allclose(module.state_dict()[name], value, atol=1e-6), name


# --- averaging and tuners -----------------------------------------------------------------------------------------


def test_averages_after_the_method(tmp_path):
    def run(folder, path=None):
        module, average = Module(Net(norm=True)), EMAWeightAveraging(decay=0.8)
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit(module, lora(), average, saver, ckpt=path, limit_val_batches=1.0)
        return module

    module = run(tmp_path / "a")
    saved = torch.load(tmp_path / "a" / "step=7.ckpt", weights_only=True)
    kept = {*DELTA, "net.head.weight", "net.head.bias"} | {
        f"net.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert names_in(saved) == set(saved["current_model_state"]) == kept
    assert not torch.equal(saved["state_dict"][DELTA[0]], saved["current_model_state"][DELTA[0]])
    assert same_base(module), "an average moved the frozen base"
    again = run(tmp_path / "b", tmp_path / "a" / "step=7.ckpt")
    assert again.losses == module.losses[7:]
    assert digest(again) == digest(module)
    validated = Module(Net(norm=True))
    trainer(lora(), limit_val_batches=1.0).validate(
        validated, datamodule=Data(), ckpt_path=tmp_path / "a" / "step=7.ckpt", verbose=False
    )
    assert torch.equal(validated.state_dict()[DELTA[0]], saved["state_dict"][DELTA[0]])


def test_averages_spare_the_copy_of_the_base():
    average = EMAWeightAveraging()

    class Looks(L.Callback):
        def on_train_end(self, trainer, pl_module):
            copied = average._average_model.module
            assert copied.net.fc1.weight.data_ptr() == pl_module.net.fc1.weight.data_ptr()
            assert copied.net.head.weight.data_ptr() != pl_module.net.head.weight.data_ptr()

    fit(Module(Net()), lora(), average, Looks())


def test_stochastic_weight_averaging_after_the_method():
    module = Module(Net(), sgd)
    fit(module, lora(), StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1), max_epochs=3)
    assert same_base(module)
    assert list(module.net.fc1.pet) == ["lora_default"]


@pytest.mark.parametrize("first", [EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging])
def test_averages_before_the_method_are_refused(first):
    module = Module(Net())
    before = digest(module)
    average = first(swa_lrs=0.05) if first is StochasticWeightAveraging else first()
    with pytest.raises(UnsupportedStrategyError, match=f"{first.__name__} is listed before LoRACallback.*List the PET"):
        fit(module, average, lora())
    assert digest(module) == before
    assert is_pristine(module)


def test_averages_of_a_model_that_is_built_later():
    class Later(Module):
        def setup(self, stage):
            self.net = Net()

    with pytest.raises(UnsupportedStrategyError, match="Build the model in __init__"):
        fit(Later(), lora(), EMAWeightAveraging())

    class Configured(Module):
        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = Net()

    module = Configured()
    fit(module, lora(), EMAWeightAveraging(decay=0.8))  # Lightning builds it for the copy
    assert same_base(module)
    assert not torch.equal(module.state_dict()[DELTA[1]], torch.zeros(8, 2))


class Sized(Data):
    def __init__(self):
        super().__init__(batch_size=2, rows=40)


@pytest.mark.parametrize("tuner", ["batch size", "learning rate"])
def test_tuners_that_save_and_restore_in_process(tuner, tmp_path):
    finder = {
        "batch size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2),
        "learning rate": lambda: LearningRateFinder(num_training_steps=8, early_stop_threshold=None),
    }[tuner]()
    module = Module(Net(), lambda m: torch.optim.SGD(m.parameters(), m.lr))
    saver = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run = fit(module, lora(), finder, saver, data=Sized(), max_epochs=1, default_root_dir=tmp_path)
    assert run.global_step == len(run.train_dataloader)
    assert same_base(module)
    assert not list(tmp_path.glob(".*ckpt"))
    saved = torch.load(tmp_path / "c" / "step=2.ckpt", weights_only=True)
    assert names_in(saved) == {*DELTA, "net.head.weight", "net.head.bias"}
    assert not torch.equal(module.state_dict()[DELTA[1]], torch.zeros(8, 2))
