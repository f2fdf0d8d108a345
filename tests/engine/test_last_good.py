"""After a crash: the newest checkpoint that verifies, and the reason for every one that was passed over."""

import os
import shutil

import pytest
import torch
from models import Module, Net, ckpt, cosine, digest, every_step, fit, full_run, lora

from lightning_pet import BitFitCallback, last_good
from lightning_pet.errors import DeltaFileError
from lightning_pet.store import reader as last_good_module


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "version_0"
    module = full_run(folder)
    for step in range(1, 11):  # file systems may give one time to files that are written quickly
        os.utime(ckpt(folder, step), (step, step))
    return folder, module


def tear(path):
    path.write_bytes(path.read_bytes()[:-200])
    os.utime(path, (100, 100))


def flip(path, time):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, (time, time))


def test_damaged_and_incomplete_files_are_passed_over(run, caplog):
    folder, whole = run
    assert last_good(folder.parent) == ckpt(folder, 10)
    tear(ckpt(folder, 10))
    flip(ckpt(folder, 9), 99)
    checkpoint = torch.load(ckpt(folder, 8), weights_only=True)
    for key in ("loops", "optimizer_states", "lr_schedulers"):
        del checkpoint[key]
    torch.save(checkpoint, ckpt(folder, 8))
    os.utime(ckpt(folder, 8), (98, 98))
    assert last_good(folder) == ckpt(folder, 7)
    reasons = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert [reason.split(": ")[0].split("=")[-1] for reason in reasons] == ["10.ckpt", "9.ckpt", "8.ckpt"]
    assert "holds only weights" in reasons[2]
    module = Module(Net(norm=True), cosine)
    fit(module, lora(dropout=0.2), every_step(folder), ckpt=last_good(folder))
    assert module.losses == whole.losses[7:]
    assert digest(module) == digest(whole)


def test_another_base_and_an_empty_file_are_passed_over(run, tmp_path, caplog):
    folder, _ = run
    full_run(tmp_path / "other", seed=2)
    shutil.copy(ckpt(tmp_path / "other", 10), ckpt(folder, 10))
    ckpt(folder, 9).write_bytes(b"")
    for step in (9, 10):
        os.utime(ckpt(folder, step), (step, step))
    base = Module(Net(norm=True))
    assert last_good(folder) == ckpt(folder, 10)
    assert last_good(folder, base) == ckpt(folder, 8)
    reasons = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert "step=10.ckpt: it was trained on another base model: the values of" in reasons[0]
    assert "step=9.ckpt" in reasons[1]
    with pytest.raises(DeltaFileError, match=r"trained in a module with 'net'"):
        last_good(folder / "..", torch.nn.Sequential(torch.nn.Linear(1, 1)))
    assert last_good(folder, torch.nn.Module()) == ckpt(folder, 10)  # built later; compared when it is read


def test_what_training_changes_is_no_other_base(tmp_path):
    """Heads and biases that train are in the file; PiSSA moves a part of the base into the delta."""
    methods = {"pissa": lora(init="pissa"), "bias": BitFitCallback(verbose=False)}
    for name, method in methods.items():
        net = Net(norm=True)
        fit(Module(net), method, every_step(tmp_path / name), max_steps=2)
        assert last_good(tmp_path / name, Module(Net(norm=True))) == ckpt(tmp_path / name, 2), name


def test_never_from_the_beginning_over_damaged_files(run):
    folder, _ = run
    for step in range(1, 11):
        tear(ckpt(folder, step))
    with pytest.raises(DeltaFileError, match="none of 10 checkpoints can be resumed") as caught:
        last_good(folder)
    assert caught.value.code == "corrupt"


def test_the_first_start(tmp_path):
    assert last_good(tmp_path) is None
    assert last_good(tmp_path / "not_there") is None


def test_links_that_dangle_and_files_that_vanish(run, caplog, monkeypatch):
    folder, _ = run
    (folder / "last.ckpt").symlink_to("gone.ckpt")
    assert last_good(folder) == ckpt(folder, 10)
    assert "a link to gone.ckpt, which is gone" in caplog.text
    original = last_good_module.load_checkpoint

    def prune(path):
        ckpt(folder, 10).unlink(missing_ok=True)  # the run that is still writing keeps the newest nine
        return original(path)

    monkeypatch.setattr(last_good_module, "load_checkpoint", prune)
    assert last_good(folder) == ckpt(folder, 9)


def test_everything_vanishes_and_something_new_is_there(tmp_path, run, monkeypatch):
    """A look that finds nothing but what has just been removed is no reason to give up."""
    folder, _ = run
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(ckpt(folder, 3), only / "old.ckpt")
    original = last_good_module.load_checkpoint

    def replaced(path):
        if path.name == "old.ckpt":
            path.unlink()
            shutil.copy(ckpt(folder, 4), only / "new.ckpt")
        return original(path)

    monkeypatch.setattr(last_good_module, "load_checkpoint", replaced)
    assert last_good(only) == only / "new.ckpt"


def test_a_link_alone_tells_of_a_checkpoint_that_was_lost(tmp_path):
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    with pytest.raises(DeltaFileError, match="which is gone"):
        last_good(tmp_path)
