"""After a crash: the newest checkpoint that verifies, and the reason for every one that was passed over."""

import os

import pytest
import torch
from models import Module, Net, ckpt, cosine, digest, every_step, fit, full_run, lora

from lightning_pet import last_good
from lightning_pet.errors import DeltaFileError


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
