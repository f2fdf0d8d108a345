"""Half-precision bases with a full-precision delta."""

import pickle
from copy import deepcopy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Data, Module, Net, cosine, digest, every_step, fit, lora, trainer

from lightning_pet.callbacks.bitfit import BitFitCallback
from lightning_pet.callbacks.full_fine_tuning import FullFineTuningCallback
from lightning_pet.layers.delta import Delta
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.apply import apply
from lightning_pet.operations.delta import load_delta, save_delta


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


def named(recwarn):
    return [str(w.message) for w in recwarn if "numbers train in bfloat16" in str(w.message)]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_what_trains_in_place_is_float32_with_its_optimizer_state(precision, recwarn, tmp_path):
    """Heads, biases and freed layers, as deltas: no update rounds to nothing, and a resume is exact."""

    def slowly(module):
        return torch.optim.AdamW(module.parameters(), lr=1e-6)

    saver = every_step(tmp_path)
    module = Module(Net(), slowly)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    run = fit(module, lora(), BitFitCallback(verbose=False), saver, precision=precision, max_epochs=1)
    in_place = {n: p for n, p in module.named_parameters() if p.requires_grad and ".pet." not in n}
    assert {"net.head.weight", "net.head.bias", "net.fc1.bias"} <= in_place.keys()
    for name, parameter in in_place.items():
        assert parameter.dtype is run.optimizers[0].state[parameter]["exp_avg"].dtype is torch.float32
        assert (parameter != start[name]).float().mean() > 0.7, name
    assert not named(recwarn)
    again = Module(Net(), slowly)
    trainer(lora(), BitFitCallback(verbose=False), precision=precision, max_epochs=1).fit(
        again, datamodule=Data(), ckpt_path=tmp_path / "step=2.ckpt"
    )
    assert digest(again) == digest(module)


def test_full_fine_tuning_trains_in_the_precision_of_the_base(recwarn):
    """As without a callback, and the start of the run says so."""
    module = Module(Net())
    fit(module, FullFineTuningCallback(verbose=False), precision="bf16-true", max_epochs=1)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert "net.head.weight" in named(recwarn)[0]


def test_a_delta_alone_is_no_reason_to_warn(recwarn):
    fit(Module(Net()), lora(modules_to_save=[]), precision="bf16-true", max_epochs=1)
    assert not [w for w in recwarn if "numbers train in" in str(w.message)]


# --- a base that was loaded in half precision ------------------------------------------------------


class Follows(torch.nn.Module):
    """A model that casts what it passes on to the precision of a weight that it looks at, as transformers' T5 does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(7, 8)
        self.inner = torch.nn.Linear(8, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.out = torch.nn.Linear(8, 7)
        self.untied = torch.nn.Linear(8, 7)

    def forward(self, ids):
        hidden = self.norm(self.inner(self.table(ids)))
        return self.out(hidden.to(self.out.weight.dtype)) + torch.nn.functional.linear(hidden, self.untied.weight)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def followed():
    base = Follows().bfloat16()
    adapted = apply(
        base, lora(target_modules=["inner"], modules_to_save=["out", "norm", "untied"]), forward=lambda: base(IDS)
    )
    return base, adapted


def moved(net):
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return net(IDS)


def test_a_half_precision_base_computes_as_before_with_float32_heads():
    expected = Follows().bfloat16()(IDS)
    net, _ = followed()
    # Files say nothing of who reads a part of a module: what is read by others stays.
    narrow = {"untied.weight", "untied.bias"}
    assert {n for n, p in net.named_parameters() if p.requires_grad and p.dtype is torch.bfloat16} == narrow
    assert torch.equal(net(IDS), expected)
    assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(IDS), expected)
    net(IDS).sum().backward()
    assert {p.grad.dtype for n, p in net.named_parameters() if p.requires_grad and n not in narrow} == {torch.float32}


def test_it_goes_through_files_copies_and_casts(tmp_path):
    net, _ = followed()
    outputs = moved(net)
    for copy in (deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copy(IDS), outputs)
    save_delta(net, tmp_path / "d.pet.safetensors")
    loaded = Follows().bfloat16()
    load_delta(loaded, tmp_path / "d.pet.safetensors")
    assert torch.equal(loaded(IDS), outputs)
    for name, parameter in net.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
        assert loaded.get_parameter(name).dtype is parameter.dtype
    assert loaded.float()(IDS).dtype is torch.float32
    assert loaded.half()(IDS).dtype is torch.float16


def test_the_base_has_its_own_precision_again():
    start = Follows().bfloat16()
    net, adapted = followed()
    outputs = moved(net)
    with adapted.disabled():
        assert torch.equal(net(IDS), start(IDS))
    assert torch.equal(net(IDS), outputs)
    merged = deepcopy(net)
    Adapted(merged).merge_()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(merged.out.weight, net.out.weight.bfloat16())
    adapted.remove()
    assert [type(m) for m in net.modules()] == [type(m) for m in start.modules()]
    for name, value in net.state_dict().items():
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, start.state_dict()[name])


@pytest.mark.parametrize("change", ["tie", "max_norm", "sparse", "weight_norm", "first"])
def test_where_nobody_can_tell_who_reads_it_it_stays_and_the_model_works(change):
    net = Follows()
    if change == "tie":
        net.out.weight = net.table.weight
    elif change == "weight_norm":
        torch.nn.utils.weight_norm(net.out)
        net.bfloat16().out(torch.ones(1, 8).bfloat16())  # it computes the weight anew
    elif change != "first":
        setattr(net.table, change, 1.0 if change == "max_norm" else True)
    net.bfloat16()
    part = "out" if change in ("tie", "weight_norm") else "table"
    expected = net(IDS)
    apply(net, lora(target_modules=["inner"], modules_to_save=[part]), forward=lambda: net(IDS))
    dtypes = {n: p.dtype for n, p in net.named_parameters() if p.requires_grad and ".pet." not in n}
    kept = {n for n, dtype in dtypes.items() if dtype is torch.bfloat16}
    assert kept >= ({"out.weight_g", "out.weight_v"} if change == "weight_norm" else {"table.weight"})
    assert torch.equal(net(IDS), expected)
    net(IDS).sum().backward()
