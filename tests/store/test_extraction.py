"""From a training checkpoint to a delta file without the model, and delta files beside checkpoints."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from models import Module, Net, ckpt, every_step, fit, lora

import lightning_pet as pet
from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.operations.saved import base_fingerprint
from lightning_pet.store.entry import KEY, make_entry
from lightning_pet.store.manifest import read_manifest
from tests.methods import zoo


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit with a checkpoint of each step, a delta file beside each, and one of save_delta."""
    folder = tmp_path_factory.mktemp("run")
    module = Module(Net(norm=True))
    fit(module, lora(delta_files=True), every_step(folder))
    pet.save_delta(module, folder / "saved.safetensors")
    return folder, module


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def loaded(path):
    net = Net(norm=True)
    pet.load_delta(net, path)
    return net.state_dict()


def test_holds_what_the_checkpoint_holds(run, tmp_path):
    folder, module = run
    size = pet.extract_delta(ckpt(folder, 10), tmp_path / "deep" / "d.pet.safetensors", notes={"task": "none"})
    path = tmp_path / "deep" / "d.pet.safetensors"
    assert size == path.stat().st_size
    same(loaded(path), module.net.state_dict())
    manifest, saved = read_manifest(path), read_manifest(folder / "saved.safetensors")
    assert (manifest.step, manifest.notes) == (10, {"task": "none"})
    for part in ("methods", "base", "root", "tensors", "written_by"):
        assert getattr(manifest, part) == getattr(saved, part), part


@pytest.mark.parametrize(
    "method",
    [
        lambda: pet.PrefixTuningCallback(length=3, projection_size=4),
        lambda: pet.PromptTuningCallback(length=3, encoder="mlp"),
        lambda: pet.AdaLoRACallback(),
        lambda: pet.CompacterCallback(bottleneck_size=4, phm_dim=2),
    ],
    ids=["prefix", "prompt", "adalora", "compacter"],
)
def test_methods_whose_files_are_packed(method, tmp_path):
    """The form that training holds gives the same outputs as the packed form of save_delta."""
    model, run = zoo.bert()
    adapted = pet.apply(model, [method()])
    with torch.no_grad():
        for name, tensor in adapted.state_dict().items():
            if tensor.is_floating_point() and "pet" in name:
                tensor.add_(torch.linspace(0.01, 0.2, tensor.numel()).view(tensor.shape))
    state = adapted.state_dict()
    entry = make_entry(adapted.record, "", base_fingerprint(adapted.root, adapted.record, state), state)
    torch.save({"state_dict": state, KEY: entry, "global_step": 1}, tmp_path / "c.ckpt")
    pet.extract_delta(tmp_path / "c.ckpt", tmp_path / "d.pet.safetensors")
    fresh, _ = zoo.bert()
    pet.load_delta(fresh, tmp_path / "d.pet.safetensors")
    assert torch.equal(run(fresh), run(model))


def test_refusals(run, tmp_path):
    path = tmp_path / "c.ckpt"
    with pytest.raises(ArgumentError, match="no training checkpoint"):
        pet.extract_delta(run[0] / "saved.safetensors", tmp_path / "d.pet.safetensors")
    with pytest.raises(DeltaFileError, match=r"absent\.ckpt: cannot be opened") as caught:
        pet.extract_delta(tmp_path / "absent.ckpt", tmp_path / "d.pet.safetensors")
    assert caught.value.code == "io"
    path.write_bytes(ckpt(run[0], 2).read_bytes())
    with pytest.raises(ArgumentError, match="is the checkpoint itself"):
        pet.extract_delta(path, path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(DeltaFileError, match="checksum"):
        pet.extract_delta(path, tmp_path / "d.pet.safetensors")
    content = torch.load(ckpt(run[0], 2), weights_only=True)
    del content["lightning_pet"]
    torch.save(content, path)
    with pytest.raises(DeltaFileError, match="not a delta checkpoint"):
        pet.extract_delta(path, tmp_path / "d.pet.safetensors")
    assert list(tmp_path.iterdir()) == [path]
