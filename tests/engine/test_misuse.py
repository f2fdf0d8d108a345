"""Every misuse is a named error before the first step, whose text says what to do, and leaves the model as it was."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from models import Data, Module, Net, classes, digest, fit, is_pristine, lora, trainer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_pet.arguments import NOT_NEEDED, OTHER_NAMES
from lightning_pet.callbacks.adalora import AdaLoRACallback
from lightning_pet.callbacks.bitfit import BitFitCallback
from lightning_pet.callbacks.lora import LoRACallback
from lightning_pet.callbacks.prompt_tuning import PromptTuningCallback
from lightning_pet.errors import (
    ArgumentError,
    DeadSiteError,
    OptimizerMismatchError,
    PETError,
    TargetError,
    UnsupportedStrategyError,
)
from lightning_pet.insertion.method import METHODS
from lightning_pet.operations.apply import apply
from lightning_pet.strategies.fsdp import FSDPAdapter
from lightning_pet.strategies.model_parallel import ModelParallelAdapter


def lbfgs(module):
    return torch.optim.LBFGS(module.parameters())


def nothing(module):
    return None


def two(module):
    """Neither the hosts nor the deltas are in one of them."""
    return [torch.optim.SGD([p], 0.1) for p in module.net.head.parameters()]


def twice(module):
    parameters = list(module.parameters())
    return [torch.optim.SGD(parameters, 0.1), torch.optim.SGD(parameters, 0.1)]


class TwoOptimizers(Module):
    automatic_optimization = False


class Skips(Module):
    """fc2 is there, but no forward runs it."""

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net.head(self.net.fc1(x)), y)


class Detached(Module):
    def loss(self, batch):
        x, y = batch
        with torch.no_grad():
            features = self.net.fc1(x)
        return nn.functional.cross_entropy(self.net.head(self.net.fc2(features)), y)


class OwnChild(Net):
    def __init__(self):
        super().__init__()
        self.fc1.pet = nn.Identity()


class Patched(Net):
    def __init__(self):
        super().__init__()
        self.fc1.forward = self.fc1.forward


class Reentrant(Module):
    def loss(self, batch):
        from torch.utils.checkpoint import checkpoint

        x, y = batch
        return nn.functional.cross_entropy(self.net.head(checkpoint(self.net.fc1, x, use_reentrant=True)), y)


CASES = {
    "unknown target": (lambda: (Module(Net()), [lora(target_modules=["fc9"])]), TargetError, ["'fc9'", "fc1"]),
    "one of two unknown": (lambda: (Module(Net()), [lora(target_modules=["fc1", "nope"])]), TargetError, ["'nope'"]),
    "unknown role": (
        lambda: (Module(Net()), [LoRACallback(target_modules=["attention.qq"], verbose=False)]),
        TargetError,
        ["attention.qq"],
    ),
    "no such role here": (lambda: (Module(Net()), [LoRACallback(verbose=False)]), TargetError, ["attention.q"]),
    "everything excluded": (
        lambda: (Module(Net()), [lora(exclude_modules=["fc1", "fc2"])]),
        TargetError,
        ["exclude"],
    ),
    "unknown exclusion": (lambda: (Module(Net()), [lora(exclude_modules=["fc7"])]), TargetError, ["fc7"]),
    "a target that hosts nothing": (lambda: (Module(Net()), [lora(target_modules=["drop"])]), TargetError, ["drop"]),
    "rank too large": (lambda: (Module(Net()), [lora(r=7)]), TargetError, ["at most 6", "Lower r"]),
    "unknown submodule": (lambda: (Module(Net()), [lora(module="nett")]), TargetError, ["'nett'", "net"]),
    "unknown head": (lambda: (Module(Net()), [lora(modules_to_save=["hed"])]), TargetError, ["'hed'", "head"]),
    "unknown rank pattern": (
        lambda: (Module(Net()), [lora(rank_pattern={"fc9": 3})]),
        ArgumentError,
        ["rank_pattern", "fc9"],
    ),
    "one name twice": (lambda: (Module(Net()), [lora(), lora()]), ArgumentError, ["'default'", "name='second'"]),
    "no biases": (
        lambda: (Module(nn.Sequential(nn.Linear(6, 3, bias=False))), [lora(target_modules=["0"], bias="all")]),
        TargetError,
        ["bias='none'"],
    ),
    "a child called pet": (lambda: (Module(OwnChild()), [lora()]), TargetError, ["fc1", "'pet'"]),
    "a patched forward": (lambda: (Module(Patched()), [lora()]), TargetError, ["fc1", "device_map"]),
    "no optimizer": (lambda: (Module(Net(), nothing), [lora()]), OptimizerMismatchError, ["returned no optimizer"]),
    "several without a place": (
        lambda: (TwoOptimizers(Net(), two), [lora()]),
        OptimizerMismatchError,
        ["net.fc1.pet.lora_default.a", "2 optimizers"],
    ),
    "in two optimizers": (
        lambda: (TwoOptimizers(Net(), twice), [lora()]),
        OptimizerMismatchError,
        ["more than one group"],
    ),
    "LBFGS with a ratio": (
        lambda: (Module(Net(), lbfgs), [lora(lora_plus_ratio=2.0)]),
        OptimizerMismatchError,
        ["LBFGS", "ratio to 1"],
    ),
    "a host that never runs": (
        lambda: (Skips(Net()), [lora(target_modules=["fc2"])]),
        DeadSiteError,
        ["net.fc2", "exclude_modules"],
    ),
    "a cut graph": (
        lambda: (Detached(Net()), [lora(target_modules=["fc1"])]),
        DeadSiteError,
        ["net.fc1", "no_grad"],
    ),
    "reentrant checkpointing": (
        lambda: (Reentrant(Net()), [lora(target_modules=["fc1"])]),
        DeadSiteError,
        ["net.fc1", "use_reentrant=False"],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_misuse(case):
    build, error, words = CASES[case]
    module, callbacks = build()
    before, kinds = digest(module), classes(module)
    children = {name for name, _ in module.named_modules()}
    with pytest.raises(error) as caught:
        fit(module, *callbacks)
    assert isinstance(caught.value, PETError)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert (digest(module), classes(module)) == (before, kinds)
    assert {name for name, _ in module.named_modules()} == children
    assert is_pristine(module) or case == "a child called pet"
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r=0: the rank must be a positive integer"),
        ({"r": -3}, "r=-3"),
        ({"r": 2.5}, "r=2.5"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"lora_plus_ratio": -1.0}, "lora_plus_ratio=-1.0"),
        ({"init": "zero"}, "init='zero'"),
        ({"bias": "some"}, "bias='some'"),
        ({"use_dora": True, "init": "pissa"}, "choose one"),
        ({"name": "a.b"}, "name='a.b'"),
        ({"name": ""}, "name=''"),
        ({"base_check": "maybe"}, "base_check='maybe'"),
    ],
)
def test_arguments(options, words):
    with pytest.raises(ArgumentError) as caught:
        lora(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoRACallback(lora_alpha=8), ["LoRACallback has no option 'lora_alpha'", "Did you mean 'alpha'?"]),
        (lambda: LoRACallback(rank=8), ["Did you mean 'r'?"]),
        (lambda: LoRACallback(inference_mode=False), ["'inference_mode'", "Leave it out"]),
        (lambda: LoRACallback(drop_out=0.1), ["Did you mean 'dropout'?"]),
        (lambda: AdaLoRACallback(r=8), ["AdaLoRACallback has no option 'r'", "Did you mean 'init_r'?"]),
        (lambda: PromptTuningCallback(num_virtual_tokens=8), ["PromptTuningCallback", "Did you mean 'length'?"]),
        (lambda: BitFitCallback(quux=8), ["BitFitCallback has no option 'quux'. Its options are: biases"]),
        (lambda: LoRACallback(layers_to_transform=[True]), ["layers_to_transform=[True]", "[0, 1]"]),
        (lambda: LoRACallback(modules_to_save=5), ["5 names nothing", "list"]),
        (lambda: apply(Net(), LoRACallback), ["LoRACallback is not a method", "LoRACallback()"]),
        (lambda: apply(Net(), ["lora"]), ["str is not a method"]),
        (lambda: apply(Net(), []), ["no method was given"]),
    ],
)
def test_names_of_other_libraries_and_other_slips(make, words):
    with pytest.raises(ArgumentError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_every_name_of_others_leads_to_an_option():
    """The table of foreign names must not outlive an option of ours."""
    ours = {option for cls in METHODS.values() for option in cls.options()}
    assert {name for names in OTHER_NAMES.values() for name in names} <= ours
    assert not set(NOT_NEEDED) & ours


def test_one_method_or_name_or_layer_need_not_be_a_list():
    chosen = LoRACallback(
        r=2, target_modules="fc1, fc2", exclude_modules="fc2", modules_to_save="head", layers_to_transform=3
    )
    assert (
        chosen.config()
        == LoRACallback(
            r=2,
            target_modules=["fc1", "fc2"],
            exclude_modules=["fc2"],
            modules_to_save=["head"],
            layers_to_transform=[3],
        ).config()
    )
    chosen.layers_to_transform = None
    adapted = apply(Net(), chosen)
    assert [target.module for _, target, _ in adapted.record.places()] == ["fc1"]
    assert all(name.startswith("head.") for name in adapted.record.trained_names)


@pytest.mark.parametrize("kind", [XLAStrategy, SingleDeviceXLAStrategy])
def test_unsupported_strategies(kind):
    """Refused in setup, by name. Without their hardware they cannot be built in full; their class is what counts."""
    method, module = lora(), Module(Net())
    run = trainer(method)
    run._accelerator_connector.strategy = kind.__new__(kind)
    with pytest.raises(UnsupportedStrategyError) as caught:
        method.setup(run, module, "fit")
    assert kind.__name__ in str(caught.value)
    assert "strategy='auto' or 'ddp'" in str(caught.value)
    assert is_pristine(module)


def two_by_two():
    strategy = ModelParallelStrategy(2, 2)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    return strategy


def with_optimizer():
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    strategy.config = {"optimizer": {"type": "AdamW"}}
    return strategy


@pytest.mark.parametrize(
    ("strategy", "callbacks", "words"),
    [
        (lambda: FSDPStrategy(use_orig_params=False), [], "use_orig_params=False"),
        (lambda: FSDPStrategy(sharding_strategy="NO_SHARD"), [], "strategy='ddp'"),
        (lambda: FSDPStrategy(), [EMAWeightAveraging()], "EMAWeightAveraging keeps a copy"),
        (two_by_two, [], "tensor_parallel_size=1"),
        (with_optimizer, [], "return the optimizer from configure_optimizers"),
    ],
)
def test_options_of_strategies(strategy, callbacks, words):
    """What an engine cannot do with a delta is refused before anything is changed."""
    run = trainer(lora(), *callbacks)
    run._accelerator_connector.strategy = strategy()
    module = Module(Net())
    with pytest.raises(UnsupportedStrategyError, match=words):
        run.callbacks[0].setup(run, module, "fit")
    assert is_pristine(module)


def test_manual_optimization_on_fsdp1():
    """Its backward pass would run within the forward of the outermost unit: values of the third step were wrong."""
    run, module = trainer(lora()), Module(Net())
    module.automatic_optimization = False
    run._accelerator_connector.strategy = FSDPStrategy()
    run.strategy.connect(module)
    with pytest.raises(UnsupportedStrategyError, match=r"Module optimizes manually.*ModelParallelStrategy"):
        run.callbacks[0].setup(run, module, "fit")
    assert is_pristine(module)


def test_parameters_that_fully_shard_left_out():
    module = Module(Net())
    fitted = SimpleNamespace(world_size=2, optimizers=[torch.optim.SGD(module.parameters(), lr=0.1)])
    with pytest.raises(UnsupportedStrategyError, match="call fully_shard on the whole model"):
        ModelParallelAdapter(fitted).check_wrapped(module)


def test_a_model_that_is_wrapped_already():
    net = Net()
    net.fc1 = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(net.fc1)
    with pytest.raises(UnsupportedStrategyError, match="build the module anew"):
        FSDPAdapter(FSDPStrategy()).after_insertion(net, complete=False)


def test_modules_that_setup_replaces_in_a_later_run():
    class Rebuilds(Module):
        def setup(self, stage):
            if stage == "validate":
                self.net.fc1 = nn.Linear(6, 8)

    module = Rebuilds(Net())
    run = fit(module, lora(), max_epochs=1)
    with pytest.raises(PETError, match=r"net.fc1|fc1.pet.lora_default.a.*only if it is not there yet"):
        run.validate(module, datamodule=Data(), verbose=False)


def test_applied_twice():
    net = Net()
    apply(net, [lora()])
    before = digest(net)
    with pytest.raises(ArgumentError, match="other options"):
        apply(net, [lora(r=1)])
    assert apply(net, [lora()]).record.applied[0].name == "default"
    assert digest(net) == before
    with pytest.raises(ArgumentError, match="at least one callback"):
        apply(Net(), [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"module": 3}, "module=3: LoRACallback takes text"),
        ({"start_from": 3}, "start_from=3: LoRACallback takes text"),
        ({"scalars": 3}, "3 names nothing"),
        ({"scalars": "nom"}, "'nom' is not a figure of LoRACallback"),
    ],
)
def test_options_of_another_type(options, words):
    with pytest.raises(ArgumentError, match=words):
        lora(**options)


@pytest.mark.parametrize("model", ["bert-base", None, Net], ids=str)
def test_what_is_no_model(model, tmp_path):
    with pytest.raises(ArgumentError, match="expected a model"):
        apply(model, [lora()])


def test_a_callback_outside_of_a_trainer():
    with pytest.raises(PETError, match="never set up"):
        lora().on_fit_start(trainer(), Module(Net()))


def test_nothing_trains_is_impossible():
    """Whatever the module froze before, the delta trains."""
    module = Module(Net())
    module.requires_grad_(False)
    fit(module, lora(), max_epochs=1)
    assert not torch.equal(module.net.fc1.pet["lora_default"].b, torch.zeros(8, 2))


def test_a_frozen_optimizer_is_filled():
    module = Module(Net(), lambda m: torch.optim.SGD([m.net.fc1.weight], 0.1))
    run = fit(module, lora(), max_epochs=1)
    assert len(run.optimizers[0].param_groups[0]["params"]) == 6
