"""``delta_files=True``: a delta file beside every checkpoint, in step with it, and gone with it."""

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from models import Module, Net, ckpt, every_step, fit, lora

from lightning_pet.callbacks.bitfit import BitFitCallback
from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.operations.delta import inspect_delta, load_delta
from lightning_pet.store.fingerprint import digest
from lightning_pet.training.durable_io import DurableCheckpointIO


def stems(folder, suffix):
    return sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))


def in_step(folder):
    """Every checkpoint has its delta file, of its own step, and there are no others."""
    assert stems(folder, ".ckpt") == stems(folder, ".pet.safetensors") != []
    for path in folder.glob("*.ckpt"):
        beside = path.with_suffix(".pet.safetensors")
        assert inspect_delta(beside).step == torch.load(path, weights_only=True)["global_step"]
        nets = Net(), Net()
        for net, file in zip(nets, (path, beside), strict=True):
            load_delta(net, file)
        for name, value in nets[0].state_dict().items():
            assert torch.equal(value, nets[1].state_dict()[name])


def top_two(folder):
    return ModelCheckpoint(
        folder, filename="{step}", monitor="train_loss", save_top_k=2, every_n_train_steps=1, save_last=True
    )


def test_pruned_with_its_checkpoint(tmp_path):
    fit(Module(Net()), lora(delta_files=True), BitFitCallback(verbose=False), top_two(tmp_path))
    assert len(stems(tmp_path, ".ckpt")) == 3
    in_step(tmp_path)


def test_in_the_queue_of_an_asynchronous_writer(tmp_path):
    fit(Module(Net()), lora(delta_files=True), top_two(tmp_path), plugins=[AsyncCheckpointIO()])
    in_step(tmp_path)


def test_none_unless_asked(tmp_path):
    fit(Module(Net()), lora(), every_step(tmp_path), max_epochs=1)
    assert stems(tmp_path, ".pet.safetensors") == []


def test_an_interrupted_save_leaves_no_outdated_file(tmp_path, monkeypatch):
    fit(Module(Net()), lora(delta_files=True), every_step(tmp_path), max_epochs=1)

    def full(*args):
        raise OSError(28, "No space left on device")

    writer = DurableCheckpointIO(delta_files=True)
    content = torch.load(ckpt(tmp_path, 2), weights_only=True)
    monkeypatch.setattr("lightning_pet.training.durable_io.atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        writer.save_checkpoint(content, ckpt(tmp_path, 1))
    assert "step=1" not in stems(tmp_path, ".pet.safetensors")
    assert torch.load(ckpt(tmp_path, 1), weights_only=True)["global_step"] == 1


def test_a_delta_with_nan_is_announced_and_not_written(tmp_path):
    fit(Module(Net()), lora(delta_files=True), every_step(tmp_path), max_epochs=1)
    content = torch.load(ckpt(tmp_path, 2), weights_only=True)
    name = next(name for name in content["state_dict"] if name.endswith("lora_default.b"))
    content["state_dict"][name][0, 0] = float("nan")
    content["lightning_pet"]["digests"][name] = digest(content["state_dict"][name])
    with pytest.warns(UserWarning, match=r"step=3\.pet\.safetensors is not written: .*NaN"):
        DurableCheckpointIO(delta_files=True).save_checkpoint(content, ckpt(tmp_path, 3))
    assert "step=3" not in stems(tmp_path, ".pet.safetensors")
    with pytest.raises(DeltaFileError):
        load_delta(Net(), ckpt(tmp_path, 3))


def test_another_writer_is_refused(tmp_path):
    class Own(TorchCheckpointIO):
        pass

    with pytest.raises(ArgumentError, match=r"delta_files=True: .* written by Own"):
        fit(Module(Net()), lora(delta_files=True), every_step(tmp_path), plugins=[Own()])


def test_a_remote_folder(tmp_path):
    fit(Module(Net()), lora(), every_step(tmp_path), max_epochs=1)
    content = torch.load(ckpt(tmp_path, 2), weights_only=True)
    writer = DurableCheckpointIO(delta_files=True)
    writer.save_checkpoint(content, "memory://run/x.ckpt")
    system = fsspec.filesystem("memory")
    system.get("/run/x.pet.safetensors", str(tmp_path / "x.pet.safetensors"))
    assert inspect_delta(tmp_path / "x.pet.safetensors").step == 2
    writer.remove_checkpoint("memory://run/x.ckpt")
    assert system.ls("/run") == []
