"""The optimizer holds exactly what trains, and its state follows the parameters by name."""

import copy
import random

import lightning as L
import models
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_pet.errors import DeltaFileError, OptimizerMismatchError
from lightning_pet.strategies import parameter_groups, private
from lightning_pet.strategies.optimizers import check, hold_delta, parameter_names, reorder_state


class Pet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.ones(2, 4))


class Module(L.LightningModule):
    """Two hosts with a delta each (``q.pet.a`` …), a frozen layer between them, and a head that trains."""

    def __init__(self, configure=None, attach: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.mid, self.v, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.configure, self.ratios = configure, {}
        self.eager = configure(self) if configure and not attach else None
        if attach:
            self.attach()

    def attach(self) -> "Module":
        self.q.pet, self.v.pet = Pet(), Pet()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("pet" in name or name.startswith("head"))
        return self

    @property
    def delta(self):
        return {name: parameter for name, parameter in self.named_parameters() if ".pet." in name}

    @property
    def hosts(self):
        return {name: name.split(".pet.")[0] + ".weight" for name in self.delta}

    def hold(self, returned):
        return hold_delta(returned, self, self.delta, self.hosts, self.ratios)

    def configure_optimizers(self):
        return self.hold(self.eager if self.eager is not None else self.configure(self))

    def forward(self, x):
        for host in (self.q, self.v):
            x = host(x) + x @ host.pet.a @ host.pet.b
        return self.head(self.mid(x))

    def training_step(self, batch, batch_idx):
        loss = self(batch).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss


def names(module, *optimizers):
    return parameter_names(optimizers, module)


ALL = ["head.bias", "head.weight", "q.pet.a", "q.pet.b", "v.pet.a", "v.pet.b"]


def adam(module):
    return optim.AdamW(module.parameters(), lr=0.1)


def only_head(module):
    return optim.SGD(module.head.parameters(), lr=0.1)


def only_trainable(module):
    return optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)


def layer_wise(module):
    return optim.AdamW(
        [{"params": module.q.parameters(), "lr": 0.1}, {"params": module.v.parameters(), "lr": 0.2},
         {"params": module.head.parameters(), "lr": 0.3}]
    )  # fmt: skip


def hosts_by_name(module):
    return optim.AdamW([module.q.weight, module.v.weight], lr=0.1)


def named(module):
    return optim.AdamW(module.named_parameters(), lr=0.1)


def lbfgs(module):
    return optim.LBFGS(module.parameters(), lr=0.1)


BUILDERS = [adam, only_head, only_trainable, layer_wise, hosts_by_name, named, lbfgs]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("eager", [False, True], ids=["inside", "before the delta"])
def test_holds_exactly_what_trains(build, eager):
    module = Module(build, attach=not eager)
    optimizer = module.attach().hold(module.eager) if eager else module.configure_optimizers()
    assert sorted(n for group in names(module, optimizer)[0] for n in group) == ALL
    check([optimizer], module, module.delta)


def step_lr(optimizer):
    return lr_scheduler.StepLR(optimizer, 1)


SHAPES = {
    "optimizer": lambda o: o,
    "list": lambda o: [o],
    "tuple of lists": lambda o: ([o], [step_lr(o)]),
    "tuple of lists with dict": lambda o: ([o], [{"scheduler": step_lr(o), "interval": "step"}]),
    "dict": lambda o: {"optimizer": o},
    "dict with scheduler": lambda o: {"optimizer": o, "lr_scheduler": step_lr(o)},
    "dict with config": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o), "interval": "epoch"}},
    "list of dicts": lambda o: [{"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o)}}],
    "tuple of dicts": lambda o: ({"optimizer": o, "lr_scheduler": step_lr(o)},),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_that_lightning_takes(shape):
    """A real fit: Lightning accepts what comes back, everything trains, and the ratio holds after two epochs."""
    module = Module(lambda m: SHAPES[shape](only_head(m)))
    module.ratios = {"q.pet.b": 16.0, "v.pet.b": 16.0}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = fit(module)
    changed = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    assert sorted(changed) == ALL
    slow, fast = trainer.optimizers[0].param_groups
    assert fast["lr"] == pytest.approx(16 * slow["lr"])
    check(trainer.optimizers, module, module.delta)


def fit(module, epochs=2, **options):
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(8, 4), batch_size=4))
    return trainer


def test_the_object_returned_and_the_lists_in_it_stay_the_same():
    module = Module()
    optimizer = adam(module)
    returned, params = {"optimizer": optimizer}, optimizer.param_groups[0]["params"]
    assert module.hold(returned) is returned
    assert optimizer.param_groups[0]["params"] is params


def test_layer_wise_rates_are_those_of_the_host():
    module = Module(layer_wise)
    optimizer = module.configure_optimizers()
    assert names(module, optimizer) == [[["q.pet.a", "q.pet.b"], ["v.pet.a", "v.pet.b"], ["head.weight", "head.bias"]]]
    module = Module(layer_wise, attach=False).attach()
    assert names(module, module.configure_optimizers())[0][1] == ["v.pet.a", "v.pet.b"]


def test_a_tied_host_is_found_under_either_name():
    module = Module(attach=False)
    module.v.weight = module.q.weight
    eager = optim.SGD([{"params": [module.mid.weight]}, {"params": [module.q.weight], "lr": 0.7}], lr=0.1)
    module.attach().hold(eager)
    assert "v.pet.a" in names(module, eager)[0][1]


def test_no_optimizer():
    with pytest.raises(OptimizerMismatchError, match="returned no optimizer"):
        Module().hold(None)
    assert Module().requires_grad_(False).hold(None) is None


def test_several_optimizers():
    module = Module(attach=False)
    both = [optim.SGD(module.q.parameters(), lr=0.1), optim.SGD(module.v.parameters(), lr=0.1)]
    module.attach()
    with pytest.raises(OptimizerMismatchError, match=r"'head\.weight' is in none of the 2 optimizers"):
        module.hold(both)
    module.head.requires_grad_(False)
    assert names(module, *module.hold(both)) == [[["q.pet.a", "q.pet.b"]], [["v.pet.a", "v.pet.b"]]]
    check(both, module, module.delta)


def test_several_optimizers_and_no_host():
    module = Module()
    module.head.requires_grad_(False)
    both = [optim.SGD(module.q.pet.parameters(), lr=0.1), optim.SGD(module.mid.parameters(), lr=0.1)]
    with pytest.raises(OptimizerMismatchError, match=r"'v\.pet\.a' is in none"):
        module.hold(both)


def test_an_optimizer_left_empty_is_announced():
    module = Module()
    both = [only_trainable(module), optim.SGD(module.mid.parameters(), lr=0.1)]
    with pytest.warns(UserWarning, match=r"Optimizer 1 \(SGD\) holds no trainable parameter"):
        module.hold(both)


def test_stale_parameters_and_their_state_are_dropped():
    """As when sharding replaces the parameters that an eager optimizer was built over."""
    module = Module()
    optimizer = adam(module)
    module(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    old = module.head.weight
    module.head.weight = nn.Parameter(old.detach().clone())
    with pytest.warns(UserWarning, match=r"Dropped 1 tensors .* of shapes \(4, 4\)"):
        module.hold(optimizer)
    assert old not in optimizer.state
    assert sorted(n for g in names(module, optimizer)[0] for n in g) == ALL
    check([optimizer], module, module.delta)


# ---- learning-rate ratios ----------------------------------------------------------------------------


def sequential(o):
    return lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 9)], milestones=[3]
    )


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 3),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "linear": lr_scheduler.LinearLR,
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lr_scheduler.PolynomialLR,
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "sequential": sequential,
    "chained": lambda o: lr_scheduler.ChainedScheduler([step_lr(o), lr_scheduler.ConstantLR(o)], optimizer=o),
    "nested": lambda o: lr_scheduler.ChainedScheduler([sequential(o), lr_scheduler.ConstantLR(o)], optimizer=o),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("build", [adam, layer_wise, named])
def test_the_ratio_holds_at_every_step(name, build):
    module = Module()
    module.ratios = {"q.pet.b": 4.0, "v.pet.b": 0.5}
    optimizer = build(module)
    scheduler = SCHEDULERS[name](optimizer)
    first = len(optimizer.param_groups)
    module.hold({"optimizer": optimizer, "lr_scheduler": scheduler})
    group_of = {
        n: g for n_group, g in zip(names(module, optimizer)[0], optimizer.param_groups, strict=True) for n in n_group
    }
    assert len(optimizer.param_groups) == first + 2
    for _ in range(11):
        assert group_of["q.pet.b"]["lr"] == pytest.approx(4 * group_of["q.pet.a"]["lr"])
        assert group_of["v.pet.b"]["lr"] == pytest.approx(0.5 * group_of["v.pet.a"]["lr"])
        optimizer.step()
        scheduler.step()
    assert len(scheduler.get_last_lr()) == first + 2
    check([optimizer], module, module.delta)


@pytest.mark.parametrize("floor", [0.01, [0.01]])
def test_plateau_scales_its_floor_too(floor):
    module = Module()
    module.ratios = {"q.pet.b": 10.0}
    optimizer = adam(module)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=floor)
    module.hold([{"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}])
    for _ in range(8):
        plateau.step(1.0)
        slow, fast = optimizer.param_groups
        assert fast["lr"] == pytest.approx(10 * slow["lr"])
    assert fast["lr"] == pytest.approx(0.1)


def test_plateau_within_a_fit():
    def configure(module):
        optimizer = adam(module)
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=2.0)
        return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "loss"}

    module = Module(configure)
    module.ratios = {"q.pet.b": 3.0}
    slow, fast = fit(module, epochs=4).optimizers[0].param_groups
    assert slow["lr"] < 0.1
    assert fast["lr"] == pytest.approx(3 * slow["lr"])


def test_a_rate_in_a_tensor_is_not_shared():
    module = Module()
    module.ratios = {"q.pet.b": 2.0}
    optimizer = optim.AdamW(module.parameters(), lr=torch.tensor(0.1))
    module.hold(optimizer)
    slow, fast = optimizer.param_groups
    slow["lr"].fill_(7.0)
    assert fast["lr"].item() == pytest.approx(0.2)


def test_one_group_optimizers_refuse_a_ratio():
    module = Module()
    module.ratios = {"q.pet.b": 2.0}
    with pytest.raises(OptimizerMismatchError, match="LBFGS steps one parameter group only"):
        module.hold(lbfgs(module))


def test_lbfgs_trains_the_delta():
    module = Module(only_head_lbfgs)
    before = module.q.pet.a.detach().clone()
    fit(module, epochs=1)
    assert not torch.equal(module.q.pet.a, before)


def only_head_lbfgs(module):
    return optim.LBFGS(module.head.parameters(), lr=0.1)


# ---- check -------------------------------------------------------------------------------------------


def test_check_names_what_is_wrong():
    module = Module()
    good = only_trainable(module)
    check([good], module, module.delta)
    check([good], module)
    with pytest.raises(OptimizerMismatchError, match=r"4 of 6 trainable parameters are in no optimizer: q\.pet\.a"):
        check([only_head(module)], module, module.delta)
    with pytest.raises(OptimizerMismatchError, match=r"2 parameters are in more than one group .*: head\.weight"):
        check([good, only_head(module)], module, module.delta)
    with pytest.raises(OptimizerMismatchError, match="hold 6 frozen parameters"):
        check([adam(module)], module, module.delta)
    lost = module.delta
    del module.q.pet
    with pytest.raises(OptimizerMismatchError, match=r"in no optimizer: q\.pet\.a"):
        check([optim.SGD([p for p in module.parameters() if p.requires_grad])], module, lost)


# ---- state by name -----------------------------------------------------------------------------------


def trained(module, optimizer):
    """Give every parameter a state that tells its name: the first moment is filled with a number."""
    values = {name: float(i + 1) for i, name in enumerate(ALL)}
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.grad = torch.full_like(parameter, values[name])
    optimizer.step()
    return {name: optimizer.state[dict(module.named_parameters())[name]]["exp_avg"].clone() for name in ALL}


def grouped(module, layout, **options):
    parameters = dict(module.named_parameters())
    groups = [{"params": [parameters[name] for name in group]} for group in layout]
    return optim.AdamW(groups, lr=0.1, **options)


def moments(module, optimizer):
    parameters = dict(module.named_parameters())
    return {name: optimizer.state[parameters[name]]["exp_avg"] for name in ALL}


@pytest.mark.parametrize("seed", range(50))
def test_permutations_never_swap_moments(seed):
    """Names shuffled within and across two groups of equal options."""
    draw, module = random.Random(seed), Module()
    layouts = []
    for _ in range(2):
        shuffled = draw.sample(ALL, len(ALL))
        cut = draw.randint(1, 5)
        layouts.append([shuffled[:cut], shuffled[cut:]])
    before = grouped(module, layouts[0])
    expected = trained(module, before)
    saved, state = names(module, before), copy.deepcopy(before.state_dict())
    after = grouped(module, layouts[1])
    after.load_state_dict(reorder_state([state], saved, names(module, after))[0])
    assert all(torch.equal(value, expected[name]) for name, value in moments(module, after).items())


def test_permutations_of_a_run(tmp_path):
    """A run is resumed 50 times with its callbacks, targets, groups and parameters shuffled: by name, or not at all."""
    draw = random.Random(0)

    def shuffled(module):
        named = [item for item in module.named_parameters() if item[1].requires_grad]
        named = draw.sample(named, len(named))
        cut = draw.randint(1, len(named) - 1)
        groups = [{"params": [p for _, p in part]} for part in (named[:cut], named[cut:])]
        return optim.AdamW(groups, lr=0.1)

    def run(order, ckpt=None):
        module = models.Module(models.Net(dropout=0), shuffled)
        places = {"default": draw.sample(["fc1", "fc2"], 2), "second": ["fc2"]}
        callbacks = [models.lora(name=name, target_modules=places[name]) for name in order]
        saver = [] if ckpt else [models.every_step(tmp_path)]
        trainer = models.trainer(*callbacks, *saver, max_steps=3)
        trainer.fit(module, datamodule=models.Data(), ckpt_path=ckpt)
        names_of = {id(p): name for name, p in module.named_parameters()}
        (optimizer,) = trainer.optimizers
        return {names_of[id(p)]: values for p, values in optimizer.state.items()}

    saved = run(["default", "second"])
    assert len(saved) == 8
    for number in range(50):
        if number % 5 == 0:
            with pytest.raises(DeltaFileError, match="give the same callbacks in the same order"):
                run(["second", "default"], models.ckpt(tmp_path, 3))
            continue
        found = run(["default", "second"], models.ckpt(tmp_path, 3))
        assert found.keys() == saved.keys()
        for name, values in saved.items():
            assert all(torch.equal(value, found[name][key]) for key, value in values.items()), name


def test_groups_that_changed_places():
    module = Module()
    layout = [ALL[:2], ALL[2:]]
    before = grouped(module, layout)
    expected = trained(module, before)
    saved = names(module, before)
    after = grouped(module, layout[::-1])
    after.load_state_dict(reorder_state([before.state_dict()], saved, names(module, after))[0])
    assert all(torch.equal(value, expected[name]) for name, value in moments(module, after).items())
    before.param_groups[1]["lr"] = 0.7
    with pytest.raises(OptimizerMismatchError, match="changed places"):
        reorder_state([before.state_dict()], saved, names(module, after))


def test_a_group_of_mixed_options_is_refused():
    module = Module()
    before = grouped(module, [ALL[:2], ALL[2:]])
    before.param_groups[1]["weight_decay"] = 0.5
    with pytest.raises(
        OptimizerMismatchError, match="Group 0 of optimizer 0 holds parameters that had different options"
    ):
        reorder_state([before.state_dict()], names(module, before), [[ALL[:3], ALL[3:]]])


def test_missing_and_extra_names():
    module = Module()
    before = grouped(module, [ALL])
    with pytest.raises(OptimizerMismatchError, match=r"has v\.pet\.b that are absent now, and lacks w\.pet\.b"):
        reorder_state([before.state_dict()], [[ALL]], [[[*ALL[:-1], "w.pet.b"]]])
    with pytest.raises(OptimizerMismatchError, match="holds 1 optimizers"):
        reorder_state([before.state_dict()], [[ALL]], [[ALL], [ALL]])


def test_unchanged_order_and_partial_state():
    module = Module()
    before = grouped(module, [ALL])
    module.head.weight.grad = torch.ones(4, 4)
    before.step()
    state = before.state_dict()
    assert reorder_state([state], [[ALL]], [[ALL]]) == [state]
    moved = reorder_state([state], [[ALL]], [[ALL[::-1]]])[0]
    assert list(moved["state"]) == [len(ALL) - 1 - ALL.index("head.weight")]
    assert state["param_groups"][0]["params"] == list(range(6))


def test_named_optimizers_keep_their_names_in_step():
    module = Module()
    before = named(module)
    module.hold(before)
    saved = names(module, before)
    moved = reorder_state([before.state_dict()], saved, [[ALL]])[0]
    assert moved["param_groups"][0]["param_names"] == ALL
    assert before.param_groups[0]["param_names"] == saved[0][0]


def test_joint_state_cannot_be_reordered():
    module = Module(only_head_lbfgs)
    optimizer = fit(module, epochs=1).optimizers[0]
    state, saved = optimizer.state_dict(), names(module, optimizer)
    assert reorder_state([state], saved, saved) == [state]
    with pytest.raises(OptimizerMismatchError, match="one joint state"):
        reorder_state([state], saved, [[saved[0][0][::-1]]])


def test_tensors_from_elsewhere_have_no_name():
    with pytest.raises(OptimizerMismatchError, match="holds 1 tensors that are not parameters of Module"):
        names(Module(), optim.SGD([torch.zeros(1, requires_grad=True)]))


def test_names_are_plain_and_canonical():
    module = Module()
    module.head = torch.compile(module.head)
    assert names(module, only_head(module)) == [[["head.weight", "head.bias"]]]


def test_private_names_exist():
    optimizer = adam(Module())
    assert hasattr(sequential(optimizer), private.LAST_LR)
    assert len(list(private.nested_schedulers(SCHEDULERS["nested"](optimizer)))) == 5
    assert private.uses_first_group_only(lbfgs(Module()))
    assert not private.uses_first_group_only(optimizer)
    assert private.LAST_LR in parameter_groups.LR_LISTS
