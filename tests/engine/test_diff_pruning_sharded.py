"""Diff pruning on engines that shard, on two gloo processes: both stages, and files that every engine goes on with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diff_runs import CLIPPED, STEPS, diff, flat
from models import Data, Module, Net, cosine, every_step, fit
from two_processes import on_engine

from lightning_pet.operations.delta import load_delta

SCRIPT = str(Path(__file__).with_name("diff_sharded_runs.py"))
ENGINES = ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero1", "zero2", "zero3"))]
VARIANTS = ["fsdp-layers", "fsdp2-early", "fsdp2-meta"]


def single(folder: Path, **options: Any) -> tuple[Module, list[list[float]]]:
    """One process on the global batch, with a checkpoint of each step."""
    module, callback = Module(Net(dropout=0), cosine), diff(**CLIPPED)
    fit(module, callback, every_step(folder), data=Data(shuffle=False), log_every_n_steps=1, **options)
    return module, callback._curve.history


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Module, list[list[float]]]:
    folder = tmp_path_factory.mktemp("single")
    return folder, *single(folder)


def run(engine: str, one: Any, factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    return on_engine(SCRIPT, engine, one[0], factory.mktemp(engine), timeout=300)


@pytest.fixture(scope="session", params=ENGINES)
def two(request: Any, one: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    return run(request.param, one, tmp_path_factory)


def state(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def test_the_gates_are_clipped(tmp_path: Path) -> None:
    module = Module(Net(dropout=0), cosine)
    fit(module, diff(**CLIPPED | {"alpha_clip": 1e3}), data=Data(shuffle=False))
    assert single(tmp_path)[0].losses != module.losses  # or nothing here tells whether an engine clips


def test_both_stages_as_in_one_process(one: Any, two: Any) -> None:
    for rank in two[1]:
        assert rank["losses"] == pytest.approx(one[1].losses, rel=1e-5)
        assert [row[0] for row in rank["history"]] == [row[0] for row in one[2]]
        for mine, theirs in zip(rank["history"], one[2], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)


def test_files_of_both_stages_hold_what_those_of_one_process_hold(one: Any, two: Any) -> None:
    for step in (3, 6, STEPS):
        there, here = state(one[0] / f"step={step}.ckpt"), state(two[0] / "plain" / f"step={step}.ckpt")
        assert here["lightning_pet"]["optimizers"] == there["lightning_pet"]["optimizers"]
        assert here["lr_schedulers"] == there["lr_schedulers"]
        mine, theirs = here["optimizer_states"][0], there["optimizer_states"][0]
        assert mine["param_groups"] == theirs["param_groups"]
        for found, expected in ((here["state_dict"], there["state_dict"]), (mine["state"], theirs["state"])):
            assert found.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


def test_resumed_in_any_stage_bit_for_bit(two: Any) -> None:
    for rank in two[1]:
        for step, losses in rank["again"].items():
            assert losses == rank["losses"][int(step) :], step
    last = state(two[0] / "plain" / f"step={STEPS}.ckpt")["state_dict"]
    for step in (3, 6, 8):
        again = state(two[0] / f"from{step}" / f"step={STEPS}.ckpt")["state_dict"]
        assert all(torch.equal(again[name], value) for name, value in last.items()), step


def test_resumes_what_one_process_began(one: Any, two: Any) -> None:
    for rank in two[1]:
        for step, losses in rank["single"].items():
            assert losses == pytest.approx(one[1].losses[int(step) :], rel=1e-5), step


@pytest.mark.parametrize("step", [3, 8])
def test_one_process_resumes_it(one: Any, two: Any, step: int) -> None:
    module = Module(Net(dropout=0), cosine)
    fit(module, diff(**CLIPPED), data=Data(shuffle=False), ckpt=two[0] / "plain" / f"step={step}.ckpt")
    assert module.losses == pytest.approx(one[1].losses[step:], rel=1e-5)
    torch.testing.assert_close(flat(module), flat(one[1]), atol=1e-5, rtol=1e-4)


def test_loads_and_validates(one: Any, two: Any) -> None:
    x = torch.randn(7, 6)
    for name in ("after.ckpt", "delta.pet.safetensors"):
        net = Net(dropout=0)
        load_delta(net, two[0] / name)
        torch.testing.assert_close(net.eval()(x), one[1].net.eval()(x), atol=1e-4, rtol=1e-4)
    for step in (3, 8):
        mine, theirs = state(two[0] / f"validated{step}.ckpt"), state(two[0] / "plain" / f"step={step}.ckpt")
        assert mine["state_dict"].keys() == theirs["state_dict"].keys()
        assert all(torch.equal(mine["state_dict"][name], value) for name, value in theirs["state_dict"].items())


def test_starts_from_its_file_with_the_second_stage(one: Any, two: Any) -> None:
    net = Net(dropout=0)
    load_delta(net, two[0] / "after.ckpt")
    first = Module(net).loss(next(iter(Data(shuffle=False).train_dataloader()))).item()
    for rank in two[1]:
        assert rank["started"][0] == pytest.approx(first, rel=1e-5)
        assert len(rank["started"]) == STEPS
        assert rank["restarted"] == rank["started"][4:]
    places = state(two[0] / "after.ckpt")["state_dict"]
    started = state(two[0] / "started" / f"step={STEPS}.ckpt")["state_dict"]
    assert all(torch.equal(started[n], places[n]) for n in places if n.endswith("indices"))


def test_gates_of_half_the_precision_are_refused(two: Any) -> None:
    for rank in two[1]:
        assert "state='fp32'" in rank["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, one: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    _, ranks = run(variant, one, tmp_path_factory)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one[1].losses, rel=1e-5)
        assert rank["again"] == {step: rank["losses"][int(step) :] for step in rank["again"]}
