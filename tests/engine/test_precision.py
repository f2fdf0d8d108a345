"""Half-precision bases with a full-precision delta."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Data, Module, Net, cosine, digest, fit, lora, trainer

from lightning_pet.core.adapted import Adapted
from lightning_pet.engine.delta import load_delta, save_delta
from lightning_pet.layers.delta import Delta


def deltas(module):
    return [p for m in module.modules() if isinstance(m, Delta) for p in m.parameters()]


@pytest.mark.parametrize(("precision", "base"), [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_delta_and_optimizer_state_stay_in_full_precision(precision, base, options, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = Module(Net(dropout=0.2), cosine)
    run = fit(module, lora(**options), saver, precision=precision)
    assert module.net.fc1.weight.dtype is base
    assert {p.dtype for p in deltas(module)} == {torch.float32}
    optimizer = run.optimizers[0]
    for parameter in deltas(module):
        assert optimizer.state[parameter]["exp_avg"].dtype is torch.float32
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert {t.dtype for n, t in saved["state_dict"].items() if ".pet." in n} == {torch.float32}
    again = Module(Net(dropout=0.2), cosine)
    torch.manual_seed(987)
    trainer(lora(**options), precision=precision).fit(again, datamodule=Data(), ckpt_path=tmp_path / "step=4.ckpt")
    assert again.losses == module.losses[4:]
    assert digest(again) == digest(module)


def test_small_updates_arrive_although_the_base_could_not_hold_them():
    def slowly(module):
        return torch.optim.SGD(module.parameters(), lr=1e-6)

    module = Module(Net(), slowly)
    fit(module, lora(init="gaussian"), precision="bf16-true", max_epochs=1)
    b = module.net.fc2.pet["lora_default"].b
    assert 0 < b.abs().max() < 1e-3
    a = module.net.fc1.pet["lora_default"].a
    assert not torch.equal(a, a.bfloat16().float())


def test_double_precision_is_followed():
    module = Module(Net())
    module.loss = lambda batch: torch.nn.functional.cross_entropy(module.net(batch[0].double()), batch[1])
    fit(module, lora(), precision="64-true", max_epochs=1)
    assert {p.dtype for p in deltas(module)} == {torch.float64}


def test_a_delta_of_a_cast_base_loads_onto_the_base(tmp_path):
    module = Module(Net())
    fit(module, lora(), precision="bf16-true", max_epochs=1)
    save_delta(module, tmp_path / "d.pet.safetensors")
    net = Net()
    load_delta(net, tmp_path / "d.pet.safetensors")  # a cast is the same base
    assert torch.equal(net.fc1.pet["lora_default"].b, module.net.fc1.pet["lora_default"].b)
    assert net.fc1.weight.dtype is torch.float32


def test_a_second_run_in_another_precision():
    module = Module(Net())
    fit(module, lora(), precision="bf16-true", max_epochs=1)
    fit(module, lora(), precision="bf16-mixed", max_epochs=1)
    assert {p.dtype for p in deltas(module)} == {torch.float32}
    Adapted(module.net).remove()
    reference = Net().bfloat16().state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in module.net.state_dict().items())


@pytest.mark.parametrize(("precision", "warns"), [("bf16-true", True), ("bf16-mixed", False)])
def test_what_trains_in_half_precision_is_named(precision, warns, recwarn):
    """A delta keeps float32; a head is a part of the base."""
    fit(Module(Net()), lora(), precision=precision, max_epochs=1)
    said = [str(w.message) for w in recwarn if "numbers train in bfloat16" in str(w.message)]
    assert len(said) == warns
    assert all("27 numbers" in words and "net.head.weight, net.head.bias" in words for words in said)


def test_a_delta_alone_is_no_reason_to_warn(recwarn):
    fit(Module(Net()), lora(modules_to_save=[]), precision="bf16-true", max_epochs=1)
    assert not [w for w in recwarn if "numbers train in" in str(w.message)]
