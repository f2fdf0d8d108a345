"""Optimizers in turns: every method, and the look at a structure that only such a training step can show."""

import math

import method_runs
import pytest
import torch
from models import BATCHES, Module, adamw, fit, lora, trainer
from torch import nn

import lightning_pet as pet


class Turns(method_runs.Classifier):
    """A model of transformers and a critic of the user's own beside it; one optimizer each, toggled."""

    automatic_optimization = False

    def __init__(self):
        super().__init__(method_runs.build(), adam=True)
        self.critic = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.critic.weight)

    def loss(self, batch):
        out = self.net(**batch)
        return out.loss + 0.1 * self.critic(out.logits).square().mean()

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second):
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("loss", loss)
        self.lr_schedulers().step()
        self.losses.append(loss.item())

    def on_train_batch_end(self, *args):
        pass

    def configure_optimizers(self):
        optimizers = [torch.optim.AdamW(part.parameters(), lr=0.01) for part in (self.net, self.critic)]
        return optimizers, [torch.optim.lr_scheduler.ConstantLR(optimizers[0])]


class Alone(Turns):
    """One optimizer, which automatic optimization allows, toggled all the same."""

    automatic_optimization = True

    def training_step(self, batch, batch_idx):
        self.toggle_optimizer(self.optimizers())
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def values():
    return Turns().state_dict()


WITH_HOOKS = ["AdaLoRA", "Adapter, robust drop", "Adapter fusion", "AutoPrompt", "Diff pruning", "Gradual unfreezing"]


@pytest.mark.parametrize(
    ("method", "kind"),
    [(method, Turns) for method in method_runs.METHODS] + [(method, Alone) for method in WITH_HOOKS],
)
def test_every_method(method, kind, values, tmp_path):
    module, fresh = kind(), kind()
    for each in (module, fresh):
        each.load_state_dict(values)
    callbacks = method_runs.METHODS[method](tmp_path)
    run = trainer(*callbacks, max_epochs=1, limit_val_batches=0)
    if method == "AutoPrompt" and kind is Turns:
        with pytest.raises(pet.UnsupportedStrategyError, match="Turns optimizes manually"):
            run.fit(module, method_runs.loader(1, 0))
        assert module.state_dict().keys() == values.keys()
        return
    run.fit(module, method_runs.loader(1, 0))
    if method != "AutoPrompt":  # which evaluates a step more often
        assert len(module.losses) == method_runs.STEPS, "and none of a look"
    assert all(math.isfinite(loss) for loss in module.losses)
    assert not torch.equal(module.critic.weight, values["critic.weight"])
    run.save_checkpoint(tmp_path / "last.ckpt")
    pet.load_delta(fresh, tmp_path / "last.ckpt")
    assert torch.equal(fresh.critic.weight, module.critic.weight)
    torch.testing.assert_close(method_runs.outputs(fresh.net), method_runs.outputs(module.net), rtol=0, atol=0)


# --- the look at a structure -----------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.up, self.down, self.last = (nn.Linear(*s) for s in ((6, 8), (8, 16), (16, 8), (8, 3)))

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.down(self.up(x).relu()))


class Writes(Module):
    """No forward of its own: only its training step shows what it is made of, and it leaves traces everywhere."""

    automatic_optimization = False

    def __init__(self, *, backward="manual", failing=False):
        super().__init__(Block(), lambda m: ([adamw(m.net)], []))
        self.critic = nn.Linear(3, 3)
        self.slow = nn.Linear(3, 3).requires_grad_(False)
        self.by, self.failing = backward, failing
        self.seen, self.table, self.steps, self.clipped = [], {}, 0, 0.0

    def forward(self, *args):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        if self.failing:
            raise RuntimeError("the ring was not set up")
        optimizer = self.optimizers()
        assert len(optimizer.param_groups) == 1
        self.seen.append(batch_idx)
        self.table[len(self.table)] = batch_idx
        self.steps += 1
        with self.toggled_optimizer(optimizer), optimizer.toggle_model(sync_grad=True):
            logits = self.critic(self.net(batch[0]))
            loss = nn.functional.cross_entropy(logits.float(), batch[1])
            optimizer.zero_grad()
            self.backpropagate(loss, optimizer)
        with torch.no_grad():
            torch._foreach_mul_([self.slow.weight], 0.5)
            self.slow.bias.data = self.slow.bias.data + 1
        self.critic.bias.data.clamp_(-1e-3, 1e-3)
        assert self.lr_schedulers() is None
        self.log_dict({"loss": loss})

    def backpropagate(self, loss, optimizer):
        if self.by == "closure":
            optimizer.step(lambda: (self.manual_backward(loss), loss)[1])
            return
        loss.backward() if self.by == "torch" else self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()


def roles():
    return lora(module="net", target_modules=["ffn.up"], modules_to_save=[])


@pytest.mark.parametrize("backward", ["manual", "torch", "closure"])
def test_a_look_leaves_no_trace(backward):
    module = Writes(backward=backward)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = fit(module, roles(), max_steps=0)
    assert run.global_step == 0
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name in after)
    assert (module.seen, module.table, module.steps) == ([], {}, 0)
    assert "optimizers" not in vars(module)
    fit(module, roles(), max_epochs=1)
    assert module.seen == list(range(BATCHES))
    assert len(module.net.up.pet) == 1


def test_a_look_that_fails_says_what_to_do():
    with pytest.raises(pet.TargetError, match=r"the ring was not set up.*example_input_array.*forward="):
        fit(Writes(failing=True), roles(), max_epochs=1)


def test_robust_drop_does_not_hide_why_nothing_was_applied():
    with pytest.raises(pet.TargetError, match="the ring was not set up"):
        fit(Writes(failing=True), pet.AdapterCallback(robust_drop=True), max_epochs=1)


# --- adapters of a bare model in a module that holds it --------------------------------------------------------------


def test_fusion_takes_adapters_of_the_model_inside(values, tmp_path):
    files = method_runs.adapters(tmp_path)
    module = Turns()
    module.load_state_dict(values)
    pet.apply(module.net, pet.AdapterFusionCallback(files))
    reference = method_runs.outputs(module.net)
    other = Turns()
    other.load_state_dict(values)
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.zeros(1, dtype=torch.long)}
    pet.apply(other, pet.AdapterFusionCallback(files), forward=lambda: other.loss(batch))
    assert torch.equal(method_runs.outputs(other.net), reference)
    foreign = Turns()
    nn.init.zeros_(foreign.net.bert.embeddings.word_embeddings.weight)
    with pytest.raises(pet.BaseMismatchError, match="another base model"):
        pet.apply(foreign, pet.AdapterFusionCallback(files), forward=lambda: foreign.loss(batch))


def test_fusion_takes_applied_adapters_by_name(values):
    module = Turns()
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.zeros(1, dtype=torch.long)}
    look = lambda: module.loss(batch)  # noqa: E731
    options = {"bottleneck_size": 4, "modules_to_save": []}
    pet.apply(module, [pet.AdapterCallback(name=n, **options) for n in ("one", "two")], forward=look)
    with pytest.raises(pet.ArgumentError, match="'three' is no file, and the name of no applied adapters"):
        pet.apply(module, pet.AdapterFusionCallback(["one", "three"]), forward=look)
    adapted = pet.apply(module, pet.AdapterFusionCallback(["one", "two"]), forward=look)
    assert [applied.method for applied in adapted.record.applied] == ["adapter_fusion"]
