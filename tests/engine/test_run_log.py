"""What loggers learn of a run: methods, options, numbers and shares; and the figures that were asked for."""

import math

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger
from models import Data, Module, Net, fit, lora, trainer

import lightning_pet as lp
from lightning_pet import Adapted, ArgumentError


class Recorder(Logger):
    """Any logger: it is told hyper-parameters and metrics, and that is all."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.told, self.metrics = [], {}

    def log_hyperparams(self, params, *args, **kwargs):
        self.told.append(dict(params))

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)


class Saves(Module):
    def __init__(self, net, width=8):
        super().__init__(net)
        self.save_hyperparameters(ignore=["net"])


def test_methods_options_numbers_and_shares_reach_every_logger(tmp_path):
    one, other = Recorder(), CSVLogger(tmp_path)
    module = Saves(Net())
    bias = lp.BitFitCallback(name="all", biases="all", verbose=False, modules_to_save=[])
    run = fit(module, lora(rank_pattern={"fc2": 1}), bias, max_epochs=1, logger=[one, other])
    told = one.told[0]
    assert told["width"] == 8  # with the module's own: TensorBoard shows what comes first
    assert told["pet/methods"] == "lora_default, bitfit_all"
    assert (told["pet/lora_default/r"], told["pet/lora_default/rank_pattern"]) == (2, {"fc2": 1})
    assert told["pet/lora_default/target_modules"] == ["fc1", "fc2"]
    plan = Adapted(module).plan()
    heads = 8 * 3 + 3
    assert told["pet/lora_default/parameters"] == 2 * (6 + 8) + 1 * (8 + 8) + heads
    assert told["pet/bitfit_all/parameters"] == 8 + 8 + 3
    assert told["pet/bitfit_all/share"] == (8 + 8 + 3) / plan.base
    assert (told["pet/parameters"], told["pet/base"], told["pet/share"]) == (plan.trainable, plan.base, plan.share)
    written = yaml.safe_load((tmp_path / "lightning_logs/version_0/hparams.yaml").read_text())
    assert {name: value for name, value in written.items() if name.startswith("pet/")} == {
        name: value for name, value in told.items() if name.startswith("pet/")
    }
    run.validate(module, datamodule=Data(), verbose=False)  # has nothing to tell, and does not fail


def test_without_a_logger_nothing_is_asked():
    fit(Module(Net()), lora(scalars=["norm"]), max_epochs=1, logger=False)


def logged(method, **options):
    recorder, module = Recorder(), Module(Net())
    run = fit(module, method, logger=recorder, log_every_n_steps=2, **options)
    return recorder.metrics, module, run


def test_figures_are_logged_as_often_as_the_trainer_logs():
    metrics, module, _ = logged(lora(scalars=["norm", "rank"], rank_pattern={"fc2": 1}), max_epochs=2)
    assert metrics["pet/lora_default/rank"] == [1.5] * 5
    assert len(metrics["pet/lora_default/norm"]) == 5
    squares = sum(p.detach().square().sum() for n, p in module.net.named_parameters() if ".pet." in n)
    head = Net().head
    squares += sum((p - getattr(head, n)).detach().square().sum() for n, p in module.net.head.named_parameters())
    assert metrics["pet/lora_default/norm"][-1] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert "pet/lora_default/norm" not in logged(lora(), max_epochs=1)[0]


def test_the_norm_of_what_trains_as_it_is_is_that_of_its_change():
    for method in (lp.FullFineTuningCallback, lp.BitFitCallback):
        metrics, module, _ = logged(method(scalars=["norm"], verbose=False), max_epochs=2)
        start = Net().state_dict()
        change = sum((p - start[n]).detach().square().sum() for n, p in module.net.named_parameters())
        (name,) = [name for name in metrics if name.endswith("/norm")]
        assert metrics[name][-1] == pytest.approx(math.sqrt(change), rel=1e-5)
        assert metrics[name][0] < metrics[name][-1]


def test_figures_of_methods_that_change_their_size():
    adalora = lp.AdaLoRACallback(
        init_r=3, target_r=1, target_modules=["fc1", "fc2"], tinit=1, tfinal=2, verbose=False, scalars=["rank"]
    )
    ranks = logged(adalora, max_epochs=2)[0]["pet/adalora_default/rank"]
    assert ranks[0] == 3
    assert ranks[-1] == 1
    pruning = lp.DiffPruningCallback(density=0.1, verbose=False, plot=False, scalars=["density", "norm"])
    metrics, module, _ = logged(pruning, max_epochs=4)
    assert metrics["pet/diff_pruning_default/density"][0] > 0.5
    assert metrics["pet/diff_pruning_default/density"][-1] <= 0.1
    assert all(math.isfinite(value) for value in metrics["pet/diff_pruning_default/norm"])
    assert torch.isfinite(torch.tensor(module.losses)).all()


def test_a_figure_that_the_method_does_not_have_is_refused():
    with pytest.raises(ArgumentError, match="'density' is not a figure of LoRACallback, which has 'norm', 'rank'"):
        lora(scalars=["density"])


def test_what_is_logged_may_change_when_a_run_is_resumed(tmp_path):
    path = tmp_path / "a.ckpt"
    fit(Module(Net()), lora(), max_epochs=1).save_checkpoint(path)
    recorder = Recorder()
    trainer(lora(scalars=["norm"]), logger=recorder, log_every_n_steps=1).fit(Module(Net()), Data(), ckpt_path=path)
    assert len(recorder.metrics["pet/lora_default/norm"]) == 5
