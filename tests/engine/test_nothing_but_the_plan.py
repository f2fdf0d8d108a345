"""During a fit nothing changes but what the plan trains, or an error names who did it; what rests is named."""

import copy
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    LambdaCallback,
    ModelPruning,
    StochasticWeightAveraging,
)
from models import Module, Net, adamw, digest, every_step, fit, is_pristine, lora
from torch import nn
from torch.nn.utils import prune

from lightning_pet.callbacks.full_fine_tuning import FullFineTuningCallback
from lightning_pet.errors import OptimizerMismatchError, PETError, UnsupportedStrategyError
from lightning_pet.operations.delta import load_delta, save_delta

# --- the base stays as it is ----------------------------------------------------------------------------------


class Meddles(Module):
    """Does something to its net after the second batch."""

    def __init__(self, deed, net=None):
        super().__init__(net or Net())
        self.deed = deed

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 2:
            self.deed(self)


@torch.no_grad()
def clip(module):
    for parameter in module.net.parameters():
        parameter.clamp_(-0.05, 0.05)


def clip_data(module):
    for parameter in module.net.parameters():
        parameter.data.clamp_(-0.05, 0.05)


def one_number(module):
    module.net.fc1.weight.data[0, 0] += 1e-6


def other_memory(module):
    module.net.fc1.weight.data = module.net.fc1.weight.data * 1.01


def another_parameter(module):
    module.net.fc1.weight = nn.Parameter(module.net.fc1.weight.detach() * 1.01, requires_grad=False)


def pruned(module):
    prune.l1_unstructured(module.net.fc1, "weight", amount=0.5)


def stepped_outside(module):
    weight = module.net.fc1.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.1).step()
    weight.grad = None


DEEDS = [clip, clip_data, one_number, other_memory, another_parameter, pruned, stepped_outside]


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_a_base_that_changes(deed):
    module = Meddles(deed)
    with pytest.raises(PETError, match=r"at the end of epoch 0: .*net\.fc1\.weight.*Meddles\.on_train_batch_end"):
        fit(module, lora())


@pytest.mark.parametrize("moment", ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"])
def test_no_checkpoint_is_written_of_it(moment, tmp_path):
    def deed(run, module, *args):
        if run.global_step >= 4:
            clip_data(module)

    with pytest.raises(PETError, match=r"frozen tensors of the base"):
        fit(Module(Net()), lora(), LambdaCallback(**{moment: deed}), every_step(tmp_path))
    for path in tmp_path.glob("*.ckpt"):
        load_delta(Net(), path)  # those from before fit the base


def test_a_large_tensor_is_compared_to_the_last_number():
    net = Net()
    net.table = nn.Parameter(torch.randn(300, 77, dtype=torch.float64).t()[1:].float())

    def deed(module):
        module.net.table.data[-1, -1] += 1e-6

    with pytest.raises(PETError, match=r"net\.table"):
        fit(Meddles(deed, net), lora())


def rewrites(module):
    """The same values, in many ways."""
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.mul_(1)
    module.net.load_state_dict(copy.deepcopy(module.net.state_dict()))
    for parameter in module.net.parameters():
        parameter.data = parameter.data.clone()
    module.net.fc1.weight = nn.Parameter(module.net.fc1.weight.detach().clone(), requires_grad=False)
    module.net.double().float()


@pytest.mark.parametrize(
    "others",
    [
        [],
        [EMAWeightAveraging(decay=0.5)],
        [StochasticWeightAveraging(0.1, swa_epoch_start=1)],
    ],
    ids=["none", "ema", "swa"],
)
def test_what_leaves_the_values_is_no_change(others, tmp_path):
    module = Meddles(rewrites) if not others else Module(Net())
    fit(module, lora(), *others, every_step(tmp_path), limit_val_batches=1.0)
    assert len(module.losses) == 10


def test_weights_that_are_loaded_at_the_start():
    """Until the first batch the user's code may give the base its values."""

    class Loads(Module):
        def on_fit_start(self):
            self.net.fc1.weight.data.fill_(0.3)

        def on_train_start(self):
            self.net.fc2.weight.data.fill_(0.2)

        def on_train_epoch_start(self):
            if self.current_epoch == 0:
                self.net.fc2.bias.data.fill_(0.1)

    fit(Loads(Net()), lora())


def test_tables_that_renormalise_themselves(tmp_path):
    """No error during the fit, and what was trained loads on the pristine base as on the used one."""

    class Tokens(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 6, max_norm=0.5)

        def forward(self, x):
            return super().forward(x + self.table(x[:, 0].abs().mul(5).long().clamp(max=19)))

    module = Module(Tokens())
    pristine = copy.deepcopy(module)
    trainer = fit(module, lora())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    save_delta(module, tmp_path / "run.pet.safetensors")
    assert not torch.equal(module.net.table.weight, pristine.net.table.weight)
    x = torch.randn(7, module.net.fc1.in_features)
    for name in ("run.ckpt", "run.pet.safetensors"):
        used = copy.deepcopy(pristine)
        load_delta(used, tmp_path / name)
        with torch.no_grad():
            assert torch.equal(used.eval().net(x), module.eval().net(x))


def test_all_that_trains_may_change():
    fit(Meddles(clip_data), FullFineTuningCallback(verbose=False))


# --- optimizers hold the plan ------------------------------------------------------------------------------------


class Unfreezes(L.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            weight = pl_module.net.fc1.weight.requires_grad_(True)
            self.add(trainer.optimizers[0], weight)

    def add(self, optimizer, weight):
        optimizer.add_param_group({"params": [weight]})


class Appends(Unfreezes):
    def add(self, optimizer, weight):
        optimizer.param_groups[0]["params"].append(weight)


def test_a_group_with_a_part_of_the_base_is_refused_by_who_adds_it():
    module = Module(Net())
    with pytest.raises(OptimizerMismatchError, match=r"Unfreezes\.add adds .*net\.fc1\.weight.*unfreeze_every"):
        fit(module, lora(), Unfreezes())
    assert len(module.losses) == 5
    assert torch.equal(module.net.fc1.weight, Net().fc1.weight)


def test_a_part_of_the_base_that_slips_into_a_group():
    with pytest.raises(OptimizerMismatchError, match=r"at the end of epoch 1: optimizer 0 \(AdamW\).*net\.fc1\.weight"):
        fit(Module(Net()), lora(), Appends())


def test_what_lies_beside_the_base_may_join():
    class Beside(Module):
        def __init__(self):
            super().__init__(Net(), lambda module: adamw(module.net))
            self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

        def loss(self, batch):
            return super().loss(batch) * self.scale

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": [self.scale.requires_grad_(True)], "lr": 0.01})

    module = Beside()
    fit(module, lora(module="net"))
    assert module.scale != 1
    assert len(module.trainer.optimizers[0].param_groups) == 2
    assert "add_param_group" not in vars(module.trainer.optimizers[0])


class Gradual(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        pass

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


@pytest.mark.parametrize("callback", [BackboneFinetuning, Gradual, lambda: ModelPruning("l1_unstructured")])
@pytest.mark.parametrize("first", [True, False])
def test_callbacks_that_train_or_cut_the_base(callback, first):
    module, other = Module(Net()), callback()
    module.backbone = module.net.fc1
    before = digest(module)
    with pytest.raises(UnsupportedStrategyError, match=type(other).__name__):
        fit(module, *([other, lora()] if first else [lora(), other]))
    assert digest(module) == before
    assert is_pristine(module)


# --- parts that rest ------------------------------------------------------------------------------------------------


class Experts(Module):
    """One of four experts serves a batch, in turns; a fifth never does."""

    def __init__(self, optimizers=adamw, first=0):
        super().__init__(Net(), optimizers)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(5))
        self.turn = first

    def loss(self, batch):
        x, y = batch
        expert = self.experts[self.turn % 4]
        self.turn += 1
        return nn.functional.cross_entropy(self.net(x) + expert(x), y)


def messages(module, *callbacks, **options):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(module, *callbacks, **options)
    return [str(w.message) for w in found if "received" in str(w.message)]


def test_experts_that_rest_train_when_they_are_used():
    module = Experts()
    method = lora(target_modules=["net.fc1", "net.fc2", "re:experts.*"], modules_to_save=[])
    first, last = messages(module, method)
    assert "4 deltas received no gradient in the first step: experts.1, experts.2" in first
    assert "1 deltas never received a gradient in epoch 0: experts.4" in last
    moved = [bool(expert.pet["lora_default"].b.any()) for expert in module.experts]
    assert moved == [True, True, True, True, False]


def test_nothing_is_said_where_all_fire():
    assert messages(Module(Net()), lora()) == []


def test_an_optimizer_of_its_own_for_a_part_that_rests():
    class Manual(Experts):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def two(module):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (module.experts[1], module.net, module.experts)][:2]

    method = lora(target_modules=["experts.1", "net.fc1", "net.fc2"], modules_to_save=[])
    said = messages(Manual(two), method)
    assert len(said) == 1
    assert "experts.1" in said[0]
