"""Two gloo processes: the same delta as one, checkpoints that resume bit for bit, refusals on every rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Data, Module, Net, digest, fit, lora, names_in, trainer

sys.path.append(str(Path(__file__).parents[1]))
from launch import launch

from lightning_pet.operations.delta import load_delta

SPAWNING = ["ddp_spawn", "ddp_notebook"]
SCRIPT = str(Path(__file__).with_name("ddp_runs.py"))


def results(outputs):
    return [json.loads(output.split("FOUND ")[1].splitlines()[0]) for output in outputs]


def two_of(strategy, folder):
    codes, outputs = launch([SCRIPT, str(folder), strategy], timeout=200)
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return folder, results(outputs)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return two_of("ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def one():
    from models import cosine

    module = Module(Net(dropout=0), cosine)
    fit(module, lora(), data=Data(shuffle=False))
    return module


def same_as_one(two, one):
    folder, ranks = two
    assert ranks[0]["digest"] == ranks[1]["digest"]
    assert ranks[0]["losses"] == ranks[1]["losses"] == pytest.approx(one.losses, rel=1e-5)
    net = Net(dropout=0)
    load_delta(net, folder / "delta.pet.safetensors")
    for name, value in one.net.state_dict().items():
        assert torch.allclose(net.state_dict()[name], value, atol=1e-5), name


def test_two_processes_train_what_one_trains(two, one):
    same_as_one(two, one)


def test_finding_unused_parameters(one, tmp_path):
    same_as_one(two_of("ddp_find_unused_parameters_true", tmp_path), one)


def test_checkpoints_hold_the_delta_only(two):
    folder, _ = two
    saved = torch.load(folder / "noisy" / "step=3.ckpt", weights_only=True)
    delta = {f"net.fc{i}.pet.lora_default.{p}" for i in (1, 2) for p in "ab"}
    assert names_in(saved) == delta | {"net.head.weight", "net.head.bias"}
    assert len(saved["lightning_pet"]["resume"]["ranks"]) == 2


def test_resumed_bit_for_bit(two):
    folder, ranks = two
    module = Module(Net())
    trainer(lora()).validate(module, datamodule=Data(), ckpt_path=folder / "noisy" / "step=3.ckpt", verbose=False)
    for rank in ranks:
        assert rank["again"] == rank["noisy"][3:]
        assert rank["again_digest"] == rank["noisy_digest"]
        assert rank["validated"] == digest(module) != rank["again_digest"]


def test_a_full_disk_stops_every_rank(two):
    first, second = (rank["full"] for rank in two[1])
    assert first == "[Errno 28] No space left on device"
    assert "failed in process 0, so that this one stops as well: OSError: [Errno 28]" in second
    assert not (two[0] / "full.ckpt").exists()


def test_refused_on_every_rank(two):
    assert [rank["refused"] for rank in two[1]] == ["mismatch", "mismatch"]


def test_averages_agree_on_every_rank(two):
    assert two[1][0]["averaged"] == two[1][1]["averaged"]


def test_a_checkpoint_of_two_processes_loads_in_one(two):
    folder, ranks = two
    module = Module(Net(dropout=0))
    trainer(lora()).validate(module, datamodule=Data(), ckpt_path=folder / "plain" / "step=10.ckpt", verbose=False)
    assert digest(module) == ranks[0]["digest"]


@pytest.mark.parametrize("strategy", ["ddp_fork", *(pytest.param(s, marks=pytest.mark.slow) for s in SPAWNING)])
def test_new_processes_hand_the_delta_back_only_if_it_was_applied_before(strategy, tmp_path):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("spawn_runs.py")), str(tmp_path), strategy],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "FOUND " in done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND ")[1].splitlines()[0])
    assert found["returned"]
    assert found["trained"]
    assert found["loaded"]
    assert found["loss"] == pytest.approx(found["from_checkpoint"])
    assert "load_delta(model, checkpoint) first" in found["missing"]
    assert done.stderr.count("Call lightning_pet.apply(module, callbacks) before fit") == 1
    assert done.stderr.count("without ckpt_path, a new and untrained one is used") == 2
    net = Net(dropout=0)
    load_delta(net, tmp_path / "eager.pet.safetensors")
