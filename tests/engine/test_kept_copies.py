"""Averages that a module keeps itself (BYOL, MoCo, a mean teacher) are saved and come back, bit for bit."""

import pytest
import torch
from models import Data, Module, Net, ckpt, cosine, digest, every_step, fit, lora
from torch import nn

from lightning_pet.callbacks.bitfit import BitFitCallback
from lightning_pet.callbacks.full_fine_tuning import FullFineTuningCallback
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.apply import apply
from lightning_pet.operations.delta import load_delta, load_from_checkpoint, save_delta


def through_data(slow, fast):
    slow.data.lerp_(fast.data, 0.3)  # counts as no change in slow's version


def in_place(slow, fast):
    slow.mul_(0.7).add_(fast, alpha=0.3)


def new_memory(slow, fast):
    slow.data = slow.data * 0.7 + fast.data * 0.3


class Momentum(Module):
    """An online net, a slow copy that another start makes visible, a predictor, and a queue of losses."""

    def __init__(self, update=through_data, widening=False):
        super().__init__(Net(1, norm=True), cosine)
        self.slow = Net(7, norm=True).requires_grad_(False)
        self.predictor = nn.Linear(3, 3)
        nn.init.eye_(self.predictor.weight)
        nn.init.zeros_(self.predictor.bias)
        self.register_buffer("queue", torch.zeros(4))
        self.update = update
        self.widening = widening

    def loss(self, batch):
        logits = self.net(batch[0])
        with torch.no_grad():
            goal = self.slow(batch[0])
        consistency = nn.functional.mse_loss(self.predictor(logits), goal)
        return nn.functional.cross_entropy(logits.float(), batch[1]) + consistency + 0.01 * self.queue.mean()

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.widening and self.global_step < 4:
            return
        self.queue = self.queue.roll(1)
        self.queue[0] = self.losses[-1]
        fast = dict(self.net.named_parameters())
        for name, slow in self.slow.named_parameters():
            if "pet" not in name:
                self.update(slow, fast[name])


METHODS = {
    "lora": lambda: lora(module="net", dropout=0.2),
    "bitfit": lambda: BitFitCallback(module="net", modules_to_save=[], verbose=False),
}


@pytest.fixture(scope="module", params=METHODS)
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    module = Momentum()
    fit(module, METHODS[request.param](), every_step(folder))
    return folder, module, METHODS[request.param]


@pytest.mark.parametrize("step", [3, 5])
def test_resuming_is_exact(runs, step):
    folder, module, method = runs
    again = Momentum()
    fit(again, method(), ckpt=ckpt(folder, step))
    assert again.losses == module.losses[step:]
    assert digest(again) == digest(module)


def test_it_loads_into_a_new_module(runs, tmp_path):
    folder, module, _ = runs
    save_delta(module, tmp_path / "x.pet.safetensors")
    for path in (ckpt(folder, 10), tmp_path / "x.pet.safetensors"):
        fresh = Momentum()
        load_delta(fresh, path)
        assert digest(fresh) == digest(module)
        save_delta(fresh, tmp_path / "again.pet.safetensors")
        third = load_from_checkpoint(Momentum(), tmp_path / "again.pet.safetensors")
        assert digest(third) == digest(module), "what came from a file belongs to the delta"


@pytest.mark.parametrize("update", [in_place, new_memory])
def test_however_it_is_written(update, tmp_path):
    module, fresh = Momentum(update), Momentum()
    fit(module, lora(module="net"), every_step(tmp_path), max_epochs=1)
    load_delta(fresh, ckpt(tmp_path, 5))
    assert digest(fresh) == digest(module)


def test_a_copy_that_is_only_read_is_in_no_file(tmp_path):
    module = Momentum(update=lambda slow, fast: None)
    fit(module, lora(module="net"), every_step(tmp_path), max_epochs=1)
    saved = torch.load(ckpt(tmp_path, 5), weights_only=True)["state_dict"]
    assert not [name for name in saved if name.startswith("slow.") and not name.startswith("slow.norm.")]
    assert "predictor.weight" in saved


def test_it_may_begin_to_move_after_the_first_checkpoint(tmp_path):
    """The base is what no file holds: its fingerprint is of fewer tensors, then."""
    module, fresh = Momentum(widening=True), Momentum()
    fit(module, lora(module="net"), every_step(tmp_path))
    names = [set(torch.load(ckpt(tmp_path, step), weights_only=True)["state_dict"]) for step in (2, 6)]
    assert "slow.fc1.weight" not in names[0]
    assert "slow.fc1.weight" in names[1]
    load_delta(fresh, ckpt(tmp_path, 10))
    assert digest(fresh) == digest(module)
    again = Momentum(widening=True)
    fit(again, lora(module="net"), ckpt=ckpt(tmp_path, 2))
    assert digest(again) == digest(module)


def test_a_cast_between_is_no_change(tmp_path):
    """Half precision is set up after the delta is in: what was restored is known as changed all the same."""
    module, again = Momentum(), Momentum()
    options = {"precision": "bf16-true", "max_epochs": 2}
    fit(module, lora(module="net"), every_step(tmp_path), **options)
    fit(again, lora(module="net"), every_step(tmp_path / "again"), ckpt=ckpt(tmp_path, 5), **options)
    assert digest(again) == digest(module)
    names = [set(torch.load(ckpt(f, 10), weights_only=True)["state_dict"]) for f in (tmp_path, tmp_path / "again")]
    assert names[0] == names[1]
    assert "slow.fc1.weight" in names[0]


def test_without_a_trainer(tmp_path):
    """``apply`` and a loop of one's own: the same rules."""
    model, fresh = Momentum(), Momentum()
    adapted = apply(model, [lora(module="net")])
    assert not [name for name in adapted.state_dict() if name.startswith("slow.")]
    through_data(model.slow.fc1.weight, model.net.fc1.weight)
    assert [name for name in adapted.state_dict() if name.startswith("slow.")] == ["slow.fc1.weight"]
    kept = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    save_delta(model, tmp_path / "x.pet.safetensors")
    load_delta(fresh, tmp_path / "x.pet.safetensors")
    assert digest(fresh) == digest(model)
    through_data(model.slow.fc1.weight, model.net.fc1.weight)
    adapted.load_state_dict(kept)
    assert digest(fresh) == digest(model)
    slow = digest(model.slow)
    adapted.remove()
    assert digest(model.slow) == slow, "taking the delta out leaves the user's own copy alone"


def test_what_a_shell_holds_beside_its_net(tmp_path):
    """Buffers of the LightningModule are beside the adapted root, and in the checkpoint."""

    class Queue(Module):
        def __init__(self):
            super().__init__(Net(1))
            self.register_buffer("queue", torch.zeros(4))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.queue[batch_idx % 4] = self.losses[-1]

    module, fresh = Queue(), Queue()
    fit(module, lora(), every_step(tmp_path), max_epochs=1)
    load_from_checkpoint(fresh, ckpt(tmp_path, 5))
    assert Adapted(fresh.net).record.applied
    assert digest(fresh) == digest(module)
    load_delta(net := Net(1), ckpt(tmp_path, 5))
    assert digest(net) == digest(module.net)


class Zipped(Momentum):
    """Names no base: the average is a copy within it, updated over ``zip(parameters())``, its deltas too."""

    def __init__(self, update):
        super().__init__(update)
        self.slow.load_state_dict(self.net.state_dict())

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
            self.update(slow, fast)


def bitfit():
    return BitFitCallback(verbose=False)


@pytest.mark.parametrize(
    ("methods", "update"),
    [
        (lambda: [lora(dropout=0.2)], in_place),
        (lambda: [lora(use_dora=True), bitfit()], through_data),
        (lambda: [lora()], new_memory),
        (lambda: [bitfit()], in_place),
        (lambda: [FullFineTuningCallback(verbose=False)], in_place),
    ],
    ids=["lora", "dora and bitfit", "new memory", "bitfit", "full"],
)
def test_a_copy_of_the_base_over_all_parameters(methods, update, tmp_path):
    module, again, fresh, other = (Zipped(update) for _ in range(4))
    fit(module, *methods(), every_step(tmp_path))
    assert not any(p.requires_grad for p in module.slow.parameters())
    start = dict(Net(1, norm=True).named_parameters())
    named = dict(module.slow.named_parameters())
    assert any(not torch.equal(p, start[n]) if n in start else n.endswith(".b") and p.any() for n, p in named.items())
    fit(again, *methods(), ckpt=ckpt(tmp_path, 3))
    assert again.losses == module.losses[3:]
    load_delta(fresh, ckpt(tmp_path, 10))
    save_delta(module, tmp_path / "x.pet.safetensors")
    load_delta(other, tmp_path / "x.pet.safetensors")
    assert digest(again) == digest(fresh) == digest(other) == digest(module)


def test_averages_of_lightning_beside_one_of_the_module(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module, again = Momentum(), Momentum()
    fit(module, lora(module="net"), EMAWeightAveraging(decay=0.5), every_step(tmp_path))
    fit(again, lora(module="net"), EMAWeightAveraging(decay=0.5), ckpt=ckpt(tmp_path, 5), data=Data())
    assert again.losses == module.losses[5:]
    assert digest(again) == digest(module)
