"""Wherever the model is built, and whatever user code does to it afterwards, the same delta trains."""

import copy
import pickle
import warnings

import pytest
import torch
from models import CLASSES, Data, Module, Net, digest, fit, is_pristine, lora, trainer
from torch import nn

from lightning_pet.errors import ArgumentError, DeltaFileError, TargetError
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.apply import apply
from lightning_pet.operations.delta import save_delta
from lightning_pet.operations.roots import root_of

DELTA = [f"net.fc{i}.pet.lora_default.{p}" for i in (1, 2) for p in "ab"]
HEAD = ["net.head.bias", "net.head.weight"]


class InSetup(Module):
    def setup(self, stage):
        if not hasattr(self, "net"):
            self.net = Net()


class InConfigureModel(Module):
    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = Net()


class Thaws(Module):
    def setup(self, stage):
        self.requires_grad_(True)


class HeadLater(Module):
    """The head is a second child of the LightningModule, or a late child of the net."""

    inside = True

    def configure_model(self):
        owner = self.net if self.inside else self
        if not hasattr(owner, "head"):
            owner.head = copy.deepcopy(Net().head)

    def loss(self, batch):
        x, y = batch
        features = self.net(x)
        return nn.functional.cross_entropy(features if self.inside else self.head(features), y)


class HeadOutside(HeadLater):
    inside = False


class LoadsBase(Module):
    """Loads pretrained weights strictly, after the delta is in."""

    where = "setup"

    def _load(self):
        self.net.load_state_dict(Net(seed=1).state_dict(), strict=True)

    def setup(self, stage):
        if self.where == "setup":
            self._load()

    def configure_model(self):
        if self.where == "configure_model":
            self._load()


class LoadsInConfigureModel(LoadsBase):
    where = "configure_model"


def trainable(module):
    return sorted(name for name, p in module.named_parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def reference():
    """Losses of the plainest case: the model is there in ``__init__``."""
    module = Module(Net())
    fit(module, lora())
    assert len(module.losses) == 10
    assert len(set(module.losses)) == 10
    return module


@pytest.mark.parametrize("kind", [InSetup, InConfigureModel, Thaws, LoadsBase, LoadsInConfigureModel])
def test_equal_losses_wherever_the_model_is_completed(kind, reference):
    start = {Thaws: Net(), LoadsBase: Net(seed=9), LoadsInConfigureModel: Net(seed=9)}
    module = kind(start.get(kind))
    fit(module, lora())
    assert module.losses == reference.losses
    assert digest(module) == digest(reference)
    assert trainable(module) == sorted(DELTA + HEAD)
    base = Net().state_dict()
    frozen = [f"fc{i}.{p}" for i in (1, 2) for p in ("weight", "bias")]
    assert all(torch.equal(module.net.state_dict()[name], base[name]) for name in frozen)
    adapted = Adapted(root_of(module)[1])
    adapted.remove()
    assert is_pristine(module)
    assert all(torch.equal(a, b) for a, b in zip(module.net.state_dict().values(), base.values(), strict=True))


def test_a_head_built_later_trains_and_is_part_of_the_delta(reference):
    module = HeadLater(Net(head=False))
    fit(module, lora())
    assert trainable(module) == sorted(DELTA + HEAD)
    assert not torch.equal(module.net.head.weight, Net().head.weight)
    assert sorted(Adapted(module.net).state_dict()) == sorted(Adapted(reference.net).state_dict())


def test_a_head_beside_the_net_moves_the_root():
    module = HeadOutside(Net(head=False))
    fit(module, lora())
    assert root_of(module) == ("", module)
    assert trainable(module) == ["head.bias", "head.weight", *DELTA]
    assert sum("_pet" in child.__dict__ for child in module.modules()) == 1


@pytest.mark.parametrize("kind", [LoadsBase, LoadsInConfigureModel])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "pissa"}])
def test_initialisation_from_the_weights_that_are_loaded_last(kind, options):
    plain, late = Module(Net()), kind(Net(seed=9))
    fit(plain, lora(**options))
    fit(late, lora(**options))
    assert late.losses == plain.losses
    assert digest(late) == digest(plain)


@pytest.mark.parametrize("kind", [Thaws, LoadsBase, InConfigureModel])
def test_every_further_run_freezes_again(kind):
    module = kind(None if kind is InConfigureModel else Net())
    run = fit(module, lora())
    loaded = {name: p.detach().clone() for name, p in module.named_parameters()}
    for method in (run.validate, run.test, run.predict):
        method(module, datamodule=Data())
        assert trainable(module) == sorted(DELTA + HEAD)
    fit(module, lora())
    assert trainable(module) == sorted(DELTA + HEAD)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, loaded[name])}
    assert moved == {*DELTA, *HEAD}


def test_several_callbacks_act_in_the_order_of_the_list():
    module = InSetup()
    first, last = lora(name="one", target_modules=["fc1"]), lora(name="three", target_modules=["fc2"])
    fit(module, first, lora(name="two", r=3), last)
    assert list(module.net.fc1.pet) == ["lora_one", "lora_two"]
    assert list(module.net.fc2.pet) == ["lora_two", "lora_three"]
    assert [applied.name for applied in Adapted(module.net).record.applied] == ["one", "two", "three"]


def test_all_are_deferred_if_one_has_to_wait():
    """fc1 is there from the start, the head only later: the order of insertion is that of the list all the same."""
    module = HeadLater(Net(head=False))
    fit(module, lora(name="late", target_modules=["head"]), lora(name="early", target_modules=["fc1"]))
    assert [applied.name for applied in Adapted(module.net).record.applied] == ["late", "early"]
    assert list(module.net.head.pet) == ["lora_late"]


def test_layers_built_after_the_insertion_are_adapted_too():
    class Grows(Module):
        def configure_model(self):
            if isinstance(self.net.fc2, nn.Identity):
                self.net.fc2 = copy.deepcopy(Net().fc2)

    net = Net()
    net.fc2 = nn.Identity()
    module = Grows(net)
    fit(module, lora(target_modules=["fc*"]))
    assert list(module.net.fc2.pet) == ["lora_default"]


def test_a_host_that_user_code_replaces_is_adapted_again():
    class Replaces(Module):
        def setup(self, stage):
            self.net.fc1 = copy.deepcopy(Net().fc1)

    module = Replaces(Net(seed=1))
    fit(module, lora())
    assert list(module.net.fc1.pet) == list(module.net.fc2.pet) == ["lora_default"]
    assert not torch.equal(module.net.fc1.pet["lora_default"].b, torch.zeros(8, 2))


def test_applied_eagerly(reference):
    torch.manual_seed(5)
    module = Module(Net())
    adapted = apply(module, [lora()])
    assert adapted.root is module.net
    run = trainer(lora())
    run.fit(module, datamodule=Data())
    assert module.losses == reference.losses
    assert list(module.net.fc1.pet) == ["lora_default"]


def test_applied_eagerly_with_other_options_is_an_error():
    module = Module(Net())
    apply(module, [lora(r=1)])
    with pytest.raises(ArgumentError, match=r"lora:default was applied to this model with other options \(r\)"):
        fit(module, lora(r=2))
    assert module.net.fc1.pet["lora_default"].r == 1


def test_only_a_submodule_is_adapted_and_the_rest_is_as_the_user_left_it():
    class FreezesInSetup(Module):
        def setup(self, stage):
            self.net.head.bias.requires_grad_(False)

    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    module = FreezesInSetup(nn.ModuleDict({"body": body, "head": nn.Linear(8, CLASSES)}))
    module.loss = lambda batch: nn.functional.cross_entropy(module.net.head(module.net.body(batch[0])), batch[1])
    fit(module, lora(module="net.body", target_modules=["0"]))
    assert trainable(module) == ["net.body.0.pet.lora_default.a", "net.body.0.pet.lora_default.b", "net.head.weight"]
    assert Adapted(module.net).record.trained_names == ("head.weight",)


def test_start_from(tmp_path, reference):
    save_delta(reference, tmp_path / "d.pet.safetensors")
    start = {name: reference.state_dict()[name] for name in (*DELTA, *HEAD)}
    for module in (Module(Net()), InConfigureModel()):
        fit(module, lora(start_from=str(tmp_path / "d.pet.safetensors")), max_steps=0)
        assert all(torch.equal(module.state_dict()[name], value) for name, value in start.items())
    eager = Module(Net())
    apply(eager, [lora(start_from=str(tmp_path / "d.pet.safetensors"))])
    assert all(torch.equal(eager.state_dict()[name], value) for name, value in start.items())


def test_start_from_goes_for_the_method_that_is_new(tmp_path, reference):
    save_delta(reference, tmp_path / "d.pet.safetensors")
    module = Module(Net())
    fit(module, lora(name="old"))
    old = module.net.fc1.pet["lora_old"].a.detach().clone()
    fit(module, lora(name="old"), lora(start_from=str(tmp_path / "d.pet.safetensors"), base_check="off"), max_steps=0)
    assert torch.equal(module.net.fc1.pet["lora_default"].a, reference.net.fc1.pet["lora_default"].a)
    assert torch.equal(module.net.fc1.pet["lora_old"].a, old)


def test_what_a_start_leaves_in_the_file_is_said(tmp_path, recwarn):
    net = Net()
    apply(net, [lora(target_modules=["fc1", "fc2"], alpha_pattern={"fc1": 3.0})])
    save_delta(net, tmp_path / "d.pet.safetensors")
    apply(Net(), [lora(target_modules=["fc1"], start_from=str(tmp_path / "d.pet.safetensors"))])
    texts = "".join(str(one.message) for one in recwarn)
    assert "fc2.pet.lora_default are not taken over" in texts
    assert "alpha_pattern={'fc1': 3.0} there and None here" in texts
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        options = {"target_modules": ["fc1", "fc2"], "alpha_pattern": {"fc1": 3.0}}
        apply(Net(), [lora(**options, start_from=str(tmp_path / "d.pet.safetensors"))])


def test_start_from_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path, reference):
    save_delta(reference, tmp_path / "d.pet.safetensors")
    for module, method in [
        (Module(Net()), lora(r=3, start_from=str(tmp_path / "d.pet.safetensors"))),
        (Module(Net(seed=4)), lora(start_from=str(tmp_path / "d.pet.safetensors"))),
    ]:
        before = digest(module)
        with pytest.raises(DeltaFileError):
            fit(module, method)
        with pytest.raises(DeltaFileError):
            apply(module, [method])
        assert digest(module) == before
        assert is_pristine(module)


def test_a_fitted_module_pickles_and_copies(reference):
    for twin in (pickle.loads(pickle.dumps(reference.net)), copy.deepcopy(reference.net)):
        x = torch.ones(2, 6)
        assert torch.equal(twin.eval()(x), reference.net.eval()(x))
        assert digest(twin) == digest(reference.net)


class Mixer(nn.Module):
    """Attention whose names say nothing: only a forward tells which projection is which."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.w1, self.w2, self.w3, self.w4 = (nn.Linear(8, 8) for _ in range(4))
            self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = nn.functional.pad(x, (0, 2))[:, None].expand(-1, 5, -1) + torch.arange(5)[:, None]
        q, k, v = (w(x).unsqueeze(1) for w in (self.w3, self.w1, self.w4))
        mixed = x + self.w2(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))
        return self.out(mixed.mean(1))


@pytest.mark.parametrize("given", ["data module", "loader", "hook"])
def test_roles_are_found_on_the_first_batch_of_the_run(given):
    class Hooked(Module):
        def train_dataloader(self):
            return Data().train_dataloader()

    def run(*callbacks):
        module = Hooked(Mixer())
        torch.manual_seed(5)
        data = {"data module": {"datamodule": Data()}, "loader": {"train_dataloaders": Data().train_dataloader()}}
        trainer(*callbacks, max_epochs=1).fit(module, **data.get(given, {}))
        return module

    module = run(lora(target_modules=["attention.q", "attention.v"]))
    assert [t.module for t in Adapted(module.net).record.applied[0].targets] == ["w3", "w4"]
    assert len(module.losses) == 5, "the look at the model is one call of training_step, of which nothing is left"
    assert module.losses == run(lora(target_modules=["w3", "w4"])).losses, "the look shifted the run"


def test_data_that_can_be_read_once_is_left_alone():
    class Once:
        def __init__(self):
            self.rows = iter(list(Data().train_dataloader()))

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.rows)

    data = Once()
    with pytest.raises(TargetError):
        trainer(lora(target_modules=["attention.q"])).fit(Module(Mixer()), train_dataloaders=data)
    assert len(list(data)) == 5


class Reading(nn.Module):
    """Attention that only a forward finds, and a part that names find."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        self.q_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.three(torch.softmax(self.one(x) @ self.two(x).mT, -1) @ self.q_proj(x))


def broken():
    raise RuntimeError("no such batch")


@pytest.mark.parametrize("targets", [["q_proj"], ["attention.q"], ["one"]])
def test_a_given_forward_that_raises_is_an_error(targets):
    net = Reading()
    for forward, words in ((broken, "no such batch"), (lambda: net(torch.ones(1, 3, 8)).detach(), "no_grad")):
        with pytest.raises(TargetError, match=words):
            apply(net, [lora(target_modules=targets)], forward=forward)
        assert is_pristine(net)
    apply(net, [lora(target_modules=targets)], forward=lambda: net(torch.ones(1, 3, 8)))


def test_an_example_that_does_not_run_is_named():
    module = Module(Net())
    module.example_input_array = torch.ones(2, 5)
    with pytest.warns(UserWarning, match="without the example_input_array.*shapes cannot be multiplied"):
        apply(module, [lora()])


def test_a_role_that_is_missing_tells_why_there_were_only_names():
    class Wrong(Module):
        def training_step(self, batch, index):
            raise RuntimeError("no such batch")

    with pytest.raises(TargetError, match=r"only names.*no such batch"):
        fit(Wrong(Net()), lora(target_modules=["attention.q"]))
