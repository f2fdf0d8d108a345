"""Parameters without gradient in some steps: what DDP makes of them on two processes, and who refuses them."""

import sys
import tempfile
from pathlib import Path

import pytest
from launch import launch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from models import Data, Module, Net, digest, fit, trainer

from lightning_pet import AdapterCallback, AutoPromptCallback, LayerFreezingCallback, UnsupportedStrategyError
from lightning_pet.strategies.ddp import DDPAdapter

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.methods import test_adapter_drop as dropping
from tests.methods.test_layer_freezing import Deep, decaying, gradual


def found(**options):
    """What training leaves: layers that join one after the other; adapters that are dropped, also within one step."""
    joining, dropped = Module(Deep(), decaying), dropping.Regression()
    fit(joining, gradual(), max_epochs=5, data=Data(shuffle=False), **options)
    folder = tempfile.mkdtemp()
    steps = {"max_steps": 8, "accumulate_grad_batches": 2, "default_root_dir": folder}
    dropping.fit(dropped, dropping.robust(), **steps, **options)
    return digest(joining), digest(dropped)


ONE_OF_TWO = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from test_gaps import found
print("FOUND", *found(strategy="ddp", devices=2, use_distributed_sampler=False))
"""


def test_two_processes_on_the_same_rows_equal_one():
    codes, outputs = launch(["-c", ONE_OF_TWO], timeout=300)
    assert codes == [0, 0], outputs[0][-3000:]
    assert {tuple(output.split("FOUND ")[1].split()[:2]) for output in outputs} == {found()}


def test_ddp_looks_for_them_only_where_they_come_and_go():
    strategy = DDPStrategy()
    DDPAdapter(strategy).require_passing_over("layers")
    assert not strategy._ddp_kwargs.get("find_unused_parameters")
    DDPAdapter(strategy).expect_gaps(trainer(), "adapters")
    assert strategy._ddp_kwargs["find_unused_parameters"]
    with pytest.raises(UnsupportedStrategyError, match="Leave static_graph out"):
        DDPAdapter(DDPStrategy(static_graph=True)).expect_gaps(trainer(), "adapters")


@pytest.mark.parametrize(
    ("strategy", "method", "words"),
    [
        (DeepSpeedStrategy, LayerFreezingCallback(unfreeze_every=1), r"unfreeze_every=1\).*flat partitions"),
        (DeepSpeedStrategy, AdapterCallback(robust_drop=True), r"robust_drop=True\).*flat partitions"),
        (FSDPStrategy, AdapterCallback(robust_drop=True), "accumulate_grad_batches=2: FSDP1"),
        (FSDPStrategy, AutoPromptCallback(), "all rows of the token table"),
    ],
)
def test_refused_before_anything_is_changed(strategy, method, words):
    run, module = trainer(method, accumulate_grad_batches=2), Module(Net())
    run._accelerator_connector.strategy = strategy.__new__(strategy)
    before = digest(module)
    with pytest.raises(UnsupportedStrategyError, match=words):
        method.setup(run, module, "fit")
    assert digest(module) == before
