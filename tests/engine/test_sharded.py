"""Engines that shard, on two gloo processes: what one process trains, and files that every engine reads."""

from pathlib import Path

import pytest
import torch
from engines import PLUS
from models import Data, Module, Net, cosine, every_step, fit, lora, names_in, trainer
from two_processes import on_engine

from lightning_pet.operations.delta import inspect_delta, load_delta

SCRIPT = str(Path(__file__).with_name("sharded_runs.py"))
PADDING = 5  # numbers, one in each unit of FSDP1 at most
ENGINES = ["fsdp2", "fsdp", "zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2"))]
VARIANTS = ["fsdp-bf16", "fsdp2-bf16", "zero2-bf16", "fsdp-layers", "fsdp2-early", "fsdp2-meta", "fsdp2-late"]


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """One process on the global batch, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("single")
    module = Module(Net(dropout=0), cosine)
    fit(module, lora(**PLUS, scalars=["norm"]), every_step(folder), data=Data(shuffle=False), log_every_n_steps=2)
    return folder, module


def run(engine, one, factory):
    return on_engine(SCRIPT, engine, one[0], factory.mktemp(engine), timeout=200)


@pytest.fixture(scope="session", params=ENGINES)
def two(request, one, tmp_path_factory):
    """Two processes: their folder, and what each found."""
    return run(request.param, one, tmp_path_factory)


@pytest.fixture(scope="session", params=[pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS])
def variant(request, one, tmp_path_factory):
    return run(request.param, one, tmp_path_factory)


def state(path):
    return torch.load(path, weights_only=True)


def same_delta(path, other, **tolerance):
    a, b = state(path)["state_dict"], state(other)["state_dict"]
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def check_training(one, two):
    folder, ranks = two
    assert ranks[0]["losses"] == ranks[1]["losses"] == pytest.approx(one[1].losses, rel=1e-5)
    norm = float(one[1].trainer.callback_metrics["pet/lora_default/norm"])
    assert ranks[0]["norm"] == ranks[1]["norm"] == pytest.approx(norm, rel=1e-4)
    same_delta(folder / "plain" / "step=10.ckpt", one[0] / "step=10.ckpt", atol=1e-5, rtol=1e-4)
    same_delta(folder / "plain" / "step=10.ckpt", folder / "after.ckpt", atol=0, rtol=0)


def check_resuming(two):
    folder, ranks = two
    for rank in ranks:
        assert rank["again"] == rank["noisy"][3:]
    same_delta(folder / "noisy" / "step=10.ckpt", folder / "again" / "step=10.ckpt", atol=0, rtol=0)


def test_variants_train_and_resume(one, variant):
    folder, ranks = variant
    if folder.name.startswith(("fsdp-layers", "fsdp2-early")):
        check_training(one, variant)
    # What fills the meta device draws other numbers for the delta's start; bfloat16 rounds.
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert ranks[0]["losses"][0] == pytest.approx(one[1].losses[0], rel=1e-2)
    assert sum(ranks[0]["losses"][5:]) < sum(ranks[0]["losses"][:5])  # the second epoch on the same batches
    saved = state(folder / "after.ckpt")["state_dict"]
    assert {value.dtype for name, value in saved.items() if ".pet." in name} == {torch.float32}
    check_resuming(variant)


def test_the_delta_of_one_process(one, two):
    check_training(one, two)


def test_resumed_bit_for_bit(two):
    check_resuming(two)


def test_files_hold_what_those_of_one_process_hold(one, two):
    there, here = state(one[0] / "step=4.ckpt"), state(two[0] / "plain" / "step=4.ckpt")
    assert there.keys() == here.keys() - {"deepspeed"}
    assert there["lightning_pet"].keys() == here["lightning_pet"].keys()
    for key in ("methods", "base", "optimizers", "optimizer_classes", "root"):
        assert there["lightning_pet"][key] == here["lightning_pet"][key], key
    mine, theirs = here["optimizer_states"][0], there["optimizer_states"][0]
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, values in theirs["state"].items():
        torch.testing.assert_close(mine["state"][key], values, atol=1e-5, rtol=1e-4)


def test_each_process_holds_its_part(one, two):
    whole = sum(p.numel() for p in one[1].parameters() if p.requires_grad)
    held = [sum(rank["held"]) for rank in two[1]]
    assert whole <= sum(held) <= whole + 2 * PADDING
    assert max(held) <= 0.7 * whole
    assert sum(rank["gradients"] for rank in two[1]) <= whole + 2 * PADDING  # none for what is frozen


def test_resumes_what_one_process_began(one, two):
    """With an optimizer that knows the parameters in another order: moments belong to names."""
    for rank in two[1]:
        assert rank["from_single"] == pytest.approx(one[1].losses[4:], rel=1e-5)


def test_one_process_resumes_it(one, two):
    module = Module(Net(dropout=0), cosine)
    fit(module, lora(**PLUS), data=Data(shuffle=False), ckpt=two[0] / "plain" / "step=4.ckpt")
    assert module.losses == pytest.approx(one[1].losses[4:], rel=1e-5)


def test_loads_without_any_engine(one, two):
    x = torch.randn(7, 6)
    for name in ("after.ckpt", "weights.ckpt", "validated.ckpt"):
        net = Net(dropout=0)
        load_delta(net, two[0] / name)
        torch.testing.assert_close(net.eval()(x), one[1].net.eval()(x), atol=1e-4, rtol=1e-4)
        same_delta(two[0] / name, two[0] / "plain" / "step=10.ckpt", atol=0, rtol=0)


def test_starts_from_a_file(one, two):
    net = Net(dropout=0)
    load_delta(net, two[0] / "after.ckpt")
    batch = next(iter(Data(shuffle=False).train_dataloader()))
    expected = Module(net).loss(batch).item()
    assert [rank["started"] for rank in two[1]] == pytest.approx([expected] * 2, rel=1e-5)


def test_delta_files_of_parts(one, two):
    """Written by one process, whole, in a hook and after the fit; they hold what a checkpoint of the step holds."""
    folder, ranks = two
    assert ranks[0]["bytes"] == ranks[1]["bytes"] == (folder / "rank0.pet.safetensors").stat().st_size
    assert not (folder / "rank1.pet.safetensors").exists()
    for name, step in (("plain/hook", 4), ("plain/step=4", 4), ("rank0", 10), ("together", 10)):
        expected = Net(dropout=0), Net(dropout=0)
        load_delta(expected[0], folder / f"{name}.pet.safetensors", base_check="exact" if name == "rank0" else "error")
        load_delta(expected[1], folder / "plain" / f"step={step}.ckpt")
        for key, value in expected[1].state_dict().items():
            assert torch.equal(value, expected[0].state_dict()[key]), (name, key)
    assert inspect_delta(folder / "together.pet.safetensors").notes == {"task": "none"}


def test_delta_files_that_fail(two):
    folder, (first, second) = two
    assert "writing failed with errno" in first["blocked"]
    assert "failed in process 0, so that this one stops as well: DeltaFileError" in second["blocked"]
    assert "called in some processes only" in first["alone"]
    assert not (folder / "alone.pet.safetensors").exists()
    if not folder.name.startswith(("zero1", "zero2")):
        assert "Pass the LightningModule, in every process" in first["inner"]


def test_a_full_disk_stops_every_rank(two):
    first, second = (rank["full"] for rank in two[1])
    assert first == "[Errno 28] No space left on device"
    assert "failed in process 0, so that this one stops as well: OSError: [Errno 28]" in second
    assert not (two[0] / "full.ckpt").exists()


def test_refused_on_every_rank(two):
    assert [rank["refused"] for rank in two[1]] == ["mismatch", "mismatch"]


def test_validates_in_one_process(two):
    module = Module(Net(dropout=0))
    trainer(lora(**PLUS)).validate(module, datamodule=Data(), ckpt_path=two[0] / "after.ckpt", verbose=False)
    saved = state(two[0] / "after.ckpt")
    assert all(torch.equal(saved["state_dict"][name], module.state_dict()[name]) for name in names_in(saved))
