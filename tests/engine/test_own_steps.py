"""Schedules where a module steps several optimizers by itself: they count the steps of the one that holds the delta."""

import pytest
import torch
from lightning.pytorch import Callback
from models import BATCHES, Data, Module, Net, every_step, fit, lora
from torch import nn

from lightning_pet import AdaLoRACallback, ArgumentError, DiffPruningCallback, LayerFreezingCallback

QUIET = {"verbose": False, "module": "net"}
RANKS = {"target_modules": ["fc1", "fc2"], "init_r": 2, "target_r": 1, "tinit": 2, "tfinal": 3}


class Pair(Module):
    """A net, and a critic that steps twice as often."""

    automatic_optimization = False

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net or Net(dropout=0.0))
        self.critic = nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        critic, own = self.optimizers()
        for optimizer in (critic, own, critic):
            loss = self.loss(batch) + 0.1 * self.critic(self.net(batch[0])).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.losses.append(loss.item())

    def configure_optimizers(self):
        net = [p for name, p in self.named_parameters() if not name.startswith("critic.")]
        return [torch.optim.SGD(self.critic.parameters(), lr=0.01), torch.optim.AdamW(net, lr=0.02)]


class Note(Callback):
    """What a schedule has reached after each batch."""

    def __init__(self, what):
        self.what, self.found = what, []

    def on_train_batch_end(self, trainer, *args):
        self.found.append(self.what(trainer))


def run(method, what, *callbacks, **options):
    note, module = Note(what), Pair()
    run = fit(module, method, note, *callbacks, data=Data(shuffle=False), **options)
    return module, run, note.found


def test_ranks_are_reduced_over_the_steps_of_their_optimizer():
    method = AdaLoRACallback(**RANKS, **QUIET)
    _, trainer, ranks = run(method, lambda t: method.figure("rank", t))
    assert trainer.global_step == 6 * BATCHES
    assert ranks[:2] == [2.0, 2.0]  # tinit
    assert ranks[-4:] == [1.0] * 4  # seven is the last step of a reduction, of ten
    assert ranks[2] > 1.0  # of all optimizers it would be the ninth
    assert method.state_dict()["own_steps"] == [4 * BATCHES, 2 * BATCHES]


def test_differences_are_cut_after_their_share_of_the_run():
    method = DiffPruningCallback(density=0.3, plot=False, **QUIET)
    module, _, cut = run(method, lambda t: method._is_cut)
    assert cut == [False] * 5 + [True] * 5  # the sixth step is the last of the first stage; cut before this note
    assert len(module.losses) == 2 * BATCHES


def test_layers_thaw_after_so_many_own_steps():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return self.head(x)

    net, method = Stack(), LayerFreezingCallback(train_last=2, unfreeze_every=4, unfreeze_interval="step", **QUIET)
    note = Note(lambda t: [layer.weight.requires_grad for layer in net.layers])
    fit(Pair(net), method, note, data=Data(shuffle=False))
    assert note.found == [[False, False]] * 4 + [[False, True]] * 4 + [[True, True]] * 2
    method = LayerFreezingCallback(train_last=2, unfreeze_every=5, unfreeze_interval="step", **QUIET)
    with pytest.raises(ArgumentError, match="after 10 steps, but the run ends after 10"):
        fit(Pair(Stack()), method, data=Data(shuffle=False))


def test_a_length_in_steps_of_all_is_shared_out():
    method = AdaLoRACallback(**RANKS, **QUIET)
    with pytest.raises(ArgumentError, match="leave no step of a run of 5 to reduce"):
        run(method, lambda t: None, max_steps=9)
    assert run(method, lambda t: method._last, max_steps=24, max_epochs=-1)[2][0] == 12 - 3


def test_a_resumed_run_goes_on_counting(tmp_path):
    method = AdaLoRACallback(**RANKS, **QUIET)
    whole, _, ranks = run(method, lambda t: method.figure("rank", t), every_step(tmp_path))
    again = AdaLoRACallback(**RANKS, **QUIET)
    half, _, rest = run(again, lambda t: again.figure("rank", t), ckpt=tmp_path / "step=12.ckpt")  # of 30: four batches
    assert rest == ranks[4:]
    assert half.losses == whole.losses[4:]


def test_one_optimizer_is_counted_by_the_trainer(tmp_path):
    method = AdaLoRACallback(**RANKS, verbose=False)
    saved = fit(Module(Net()), method, max_epochs=2)
    assert method.state_dict().keys() == {"importance"}
    assert method._steps.made(saved) == saved.global_step
    assert lora().state_dict() == {}
