"""Checkpoints of a run: what is in them, what refuses them, and that a resume continues bit for bit."""

import os
import resource

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from models import Data, Module, Net, ckpt, cosine, digest, every_step, fit, full_run, lora, names_in, trainer
from torch import nn

from lightning_pet.errors import DeltaFileError
from lightning_pet.training.durable_io import DurableCheckpointIO

DELTA = {f"net.fc{i}.pet.lora_default.{p}" for i in (1, 2) for p in "ab"}
HEAD = {"net.head.weight", "net.head.bias"}
NORM = {f"net.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
LAST = 10  # 2 epochs of 5 batches


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, full_run(folder)


def resumed(path, *callbacks, **options):
    module = Module(Net(norm=True), cosine)
    torch.manual_seed(987)  # the state must come from the file
    trainer(lora(dropout=0.2), *callbacks, **options).fit(module, datamodule=Data(), ckpt_path=path)
    return module


# --- what is in a file --------------------------------------------------------------------------------


def test_only_the_delta_heads_and_changed_buffers(run):
    folder, _ = run
    saved = torch.load(ckpt(folder, 4), weights_only=True)
    assert names_in(saved) == DELTA | HEAD | NORM
    assert {"epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers"} <= set(saved)
    assert len(saved["optimizer_states"][0]["state"]) == len(DELTA | HEAD)
    assert torch.load(ckpt(folder, LAST), weights_only=True)["state_dict"].keys() == saved["state_dict"].keys()
    unnormed = Module(Net())
    fit(unnormed, lora(), every_step(folder / "plain"), max_epochs=1)
    assert names_in(torch.load(ckpt(folder / "plain", 5), weights_only=True)) == DELTA | HEAD


def test_save_weights_only_and_saving_after_fit(tmp_path):
    module = Module(Net())
    fitted = fit(module, lora(), every_step(tmp_path, save_weights_only=True), max_epochs=1)
    small = torch.load(ckpt(tmp_path, 5), weights_only=True)
    assert names_in(small) == DELTA | HEAD
    assert "optimizer_states" not in small
    fitted.save_checkpoint(tmp_path / "after.ckpt")
    fitted.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("after", "weights"):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert all(torch.equal(saved["state_dict"][n], module.state_dict()[n]) for n in DELTA | HEAD)
    fresh = Module(Net())
    trainer(lora()).validate(fresh, datamodule=Data(), ckpt_path=ckpt(tmp_path, 5), verbose=False)
    assert digest(fresh) == digest(module)


# --- exact resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 4, 5, 6, 8, 9])
def test_a_resume_continues_bit_for_bit(run, step):
    folder, module = run
    again = resumed(ckpt(folder, step))
    assert again.losses == module.losses[step:]
    assert digest(again) == digest(module)


@pytest.mark.parametrize(("first", "second"), [(1, 3), (2, 5), (4, 6), (5, 9), (5, 7)])
def test_two_interruptions(run, tmp_path, first, second):
    folder, module = run
    resumed(ckpt(folder, first), every_step(tmp_path), max_epochs=-1, max_steps=second)
    again = resumed(ckpt(tmp_path, second))
    assert again.losses == module.losses[second:]
    assert digest(again) == digest(module)


def test_a_finished_run_is_continued_bit_for_bit(tmp_path):
    """Saved by hand after fit, then resumed for more epochs."""
    long = Module(Net(), cosine)
    fit(long, lora(), max_epochs=3)
    fitted = fit(Module(Net(), cosine), lora(), max_epochs=2)
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    module = Module(Net(), cosine)
    torch.manual_seed(987)
    trainer(lora(), max_epochs=3).fit(module, datamodule=Data(), ckpt_path=tmp_path / "end.ckpt")
    assert module.losses == long.losses[LAST:]
    assert digest(module) == digest(long)


def test_saved_in_a_validation(tmp_path):
    options = {"limit_val_batches": 1.0, "val_check_interval": 2}
    saver = ModelCheckpoint(tmp_path, filename="{step}", monitor="val_loss", save_top_k=-1)
    module = Module(Net(), cosine)
    fit(module, lora(), saver, **options)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 4
    for path in files:
        again = Module(Net(), cosine)
        torch.manual_seed(987)
        trainer(lora(), **options).fit(again, datamodule=Data(), ckpt_path=path)
        assert again.losses == module.losses[len(module.losses) - len(again.losses) :]
        assert digest(again) == digest(module)


# --- the ways of Lightning --------------------------------------------------------------------------------


@pytest.mark.parametrize("save_last", [True, "link"])
def test_best_and_last(tmp_path, save_last):
    saver = ModelCheckpoint(tmp_path, filename="{step}", monitor="val_loss", save_top_k=2, save_last=save_last)
    module = Module(Net())
    fitted = fit(module, lora(), saver, limit_val_batches=1.0, max_epochs=4)
    assert len(list(tmp_path.glob("step=*.ckpt"))) <= 3
    best, last = saver.best_model_path, saver.last_model_path  # Lightning restores both from what it loads
    for which, path in (("best", best), ("last", last), (best, best)):
        for method in (fitted.validate, fitted.test, fitted.predict):
            saver.best_model_path = best
            method(datamodule=Data(), ckpt_path=which)
            saved = torch.load(path, weights_only=True)
            assert all(torch.equal(module.state_dict()[n], saved["state_dict"][n]) for n in names_in(saved))
    fresh, best_score = Module(Net()), torch.load(best, weights_only=True)["callbacks"]
    best_score = next(state["best_model_score"] for key, state in best_score.items() if "ModelCheckpoint" in key)
    score = trainer(lora(), limit_val_batches=1.0).validate(fresh, datamodule=Data(), ckpt_path=best)
    assert score[0]["val_loss"] == best_score.item()
    continued = Module(Net())
    more = trainer(lora(), ModelCheckpoint(tmp_path, save_last=save_last), max_epochs=5, limit_val_batches=1.0)
    step = torch.load(last, weights_only=True)["global_step"]
    more.fit(continued, datamodule=Data(), ckpt_path="last")
    assert len(continued.losses) == 25 - step
    assert continued.losses[: LAST * 2 - step] == module.losses[step:]


def test_asynchronous_writing(tmp_path):
    io = AsyncCheckpointIO()
    module = Module(Net())
    fit(module, lora(), every_step(tmp_path), max_epochs=1, plugins=[io])
    assert isinstance(io.checkpoint_io, DurableCheckpointIO)
    again = Module(Net())
    trainer(lora(), max_epochs=1).fit(again, datamodule=Data(), ckpt_path=ckpt(tmp_path, 3))
    assert again.losses == module.losses[3:]
    assert names_in(torch.load(ckpt(tmp_path, 3), weights_only=True)) == DELTA | HEAD


def test_loading_forgets_buffers_that_the_checkpoint_does_not_have(tmp_path):
    module = Module(Net(norm=True))
    start = trainer(lora())
    start.validate(module, datamodule=Data(), verbose=False)
    start.save_checkpoint(tmp_path / "start.ckpt")
    assert not NORM & names_in(torch.load(tmp_path / "start.ckpt", weights_only=True))
    before = digest(module)
    fit(module, lora())
    assert digest(module) != before
    trainer(lora()).validate(module, datamodule=Data(), ckpt_path=tmp_path / "start.ckpt", verbose=False)
    assert digest(module) == before


def test_metrics_beside_the_net_are_saved(tmp_path):
    class Counts(Module):
        def __init__(self, net):
            super().__init__(net)
            self.counter = nn.Module()
            self.counter.register_buffer("seen", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.counter.seen += 1
            return super().training_step(batch, batch_idx)

    module = Counts(Net())
    fit(module, lora(), every_step(tmp_path), max_epochs=1)
    again = Counts(Net())
    trainer(lora(), max_epochs=1).fit(again, datamodule=Data(), ckpt_path=ckpt(tmp_path, 2))
    assert again.counter.seen == 5
    assert digest(again) == digest(module)


# --- disks -------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_good_file(tmp_path):
    module = Module(Net())
    fitted = fit(module, lora(), max_epochs=1)
    path = tmp_path / "last.ckpt"
    fitted.save_checkpoint(path)
    good, size = path.read_bytes(), path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(DeltaFileError) as caught:
                fitted.save_checkpoint(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.code == "io"
        assert str(path) in str(caught.value)
        assert path.read_bytes() == good
        assert os.listdir(tmp_path) == ["last.ckpt"]


def test_the_temporary_folder_plays_no_part(tmp_path, monkeypatch):
    """Also not one on another file system, or one that is not there at all."""
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    fit(Module(Net()), lora(), every_step(tmp_path), max_epochs=1)
    assert len(list(tmp_path.iterdir())) == 5
