"""Training checkpoints made to harm: every reader refuses them with its code, soon, and with little memory."""

import copy
import os
import resource
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "engine"))

import lightning_pet as pet
from lightning_pet.errors import DeltaFileError
from lightning_pet.operations.saved import base_fingerprint
from lightning_pet.store.entry import KEY, make_entry
from lightning_pet.store.fingerprint import digest
from lightning_pet.store.reader import read

SECONDS, MEGABYTES = 2.0, 256


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def good():
    net = base()
    adapted = pet.apply(net, [pet.LoRACallback(r=2, target_modules=["0"])])
    state = adapted.state_dict()
    entry = make_entry(adapted.record, "", base_fingerprint(net, adapted.record, state), state)
    return {"state_dict": state, KEY: entry, "global_step": 1, "loops": {}, "optimizer_states": [], "lr_schedulers": []}


def readers(path, folder):
    """Everything that reads a checkpoint of somebody else."""
    yield lambda: read(path)
    yield lambda: pet.inspect_delta(path)
    yield lambda: pet.extract_delta(path, folder / "out.pet.safetensors")
    yield lambda: pet.load_delta(base(), path)
    yield lambda: pet.load_from_checkpoint(base(), path)
    yield lambda: pet.apply(base(), [pet.LoRACallback(r=2, target_modules=["0"], start_from=str(path))])


def refuse(path, folder, code):
    for reader in readers(path, folder):
        start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DeltaFileError) as caught:
            reader()
        assert caught.value.code == code, caught.value
        assert time.process_time() - start < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES * 1024
        assert len(str(caught.value)) < 1500
    assert not (folder / "out.pet.safetensors").exists()


def edited(good, change):
    content = copy.deepcopy(good)
    change(content)
    return content


def with_method(**fields):
    return lambda content: content[KEY]["methods"][0].update(fields)


def with_target(**fields):
    def change(content):
        method = content[KEY]["methods"][0]
        method["targets"] = [{**method["targets"][0], **fields}]

    return change


def repeated(depth, width=15_000):
    value = 1
    for _ in range(depth):
        value = [value] * width
    return value


def expanded(content):
    content["state_dict"] = {name: torch.zeros(()).expand(50_000, 50_000) for name in content["state_dict"]}


A = "0.pet.lora_default.a"
HOSTILE = {
    "integer names of tensors": ("schema", lambda c: c["state_dict"].update({3: torch.zeros(1)})),
    "an integer beside the entry": ("schema", lambda c: c.update({3: 1})),
    "no tensors": ("schema", lambda c: c.update(state_dict=[1])),
    "text for a tensor": ("schema", lambda c: c["state_dict"].update({A: "a"})),
    "numbers that are repeated by strides": ("limit", expanded),
    "a sparse tensor": ("schema", lambda c: c["state_dict"].update({A: torch.zeros(2, 4).to_sparse()})),
    "an entry that is none": ("mismatch", lambda c: c.update({KEY: [1]})),
    "a format as a fraction": ("version", lambda c: c[KEY].update(format=1.0)),
    "a format that is huge": ("version", lambda c: c[KEY].update(format=2**200)),
    "an integer field": ("schema", lambda c: c[KEY].update({7: 1})),
    "a field too many": ("schema", lambda c: c[KEY].update(_class_path="os.system")),
    "a root that climbs": ("unsafe", lambda c: c[KEY].update(root="../x")),
    "a writer of a megabyte": ("limit", lambda c: c[KEY].update(written_by="x" * 1_000_000)),
    "no method": ("limit", lambda c: c[KEY].update(methods=[])),
    "a method twice": ("schema", lambda c: c[KEY].update(methods=c[KEY]["methods"] * 2)),
    "a thousand methods": ("limit", lambda c: c[KEY].update(methods=c[KEY]["methods"] * 1000)),
    "a method that is a number": ("schema", lambda c: c[KEY].update(methods=[1])),
    "a method of a module": ("unsafe", with_method(method="os.system")),
    "a name with a dot": ("unsafe", with_method(name="a.b")),
    "a name that is a list": ("schema", with_method(name=["default"])),
    "an option that is an integer": ("schema", with_method(config={1: 2})),
    "options that nest": ("limit", with_method(config={"r": [[[[[[1]]]]]]})),
    "one list in many places": ("limit", with_method(config={"r": repeated(3)})),
    "a tensor as an option": ("schema", with_method(config={"r": torch.zeros(1)})),
    "a set as an option": ("schema", with_method(config={"r": {1}})),
    "targets that are text": ("schema", with_method(targets="all")),
    "a target that is text": ("schema", with_method(targets=["0"])),
    "targets without end": ("limit", lambda c: with_method(targets=c[KEY]["methods"][0]["targets"] * 20_001)(c)),
    "the same target again": ("schema", lambda c: with_method(targets=c[KEY]["methods"][0]["targets"] * 500)(c)),
    "a role of its own": ("schema", with_target(role="os.system")),
    "rows that are no pairs": ("schema", with_target(rows=[[1, 2, 3]])),
    "rows that end before they start": ("schema", with_target(rows=[[2, 1]])),
    "sizes without end": ("limit", with_target(sizes=[1] * 10_000)),
    "a base of integers": ("schema", lambda c: c[KEY]["base"].update(dtypes={5: 1})),
    "digests of integers": ("schema", lambda c: c[KEY].update(digests={5: "x"})),
    "a rank of a billion": ("mismatch", with_method(config={"r": 10**9, "target_modules": ["0"]})),
    "a scale beyond all bounds": ("schema", with_method(config={"r": 2, "alpha": 1e308, "target_modules": ["0"]})),
    "a voice in the base check": ("unsafe", with_method(config={"base_check": "off"})),
    "a file to read": ("unsafe", with_method(config={"start_from": "/etc/passwd"})),
}
ONLY_WHEN_BUILT = {  # what reading alone cannot tell
    "the same target again",
    "a rank of a billion",
    "a scale beyond all bounds",
    "a voice in the base check",
    "a file to read",
}


@pytest.mark.parametrize(("code", "change"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_checkpoint_is_refused(tmp_path, good, code, change, request):
    content = edited(good, change)
    if isinstance(content["state_dict"], dict) and isinstance(content[KEY], dict) and "digests" in content[KEY]:
        tensors = {n: t for n, t in content["state_dict"].items() if isinstance(t, torch.Tensor)}
        dense = all(t.layout is torch.strided and t.numel() < 10**6 for t in tensors.values())
        if dense and all(isinstance(name, str) for name in (*tensors, *content[KEY]["digests"])):
            content[KEY]["digests"] = {name: digest(tensor) for name, tensor in tensors.items()}
    torch.save(content, tmp_path / "x.ckpt")
    if request.node.callspec.id in ONLY_WHEN_BUILT:
        with pytest.raises(DeltaFileError) as caught:
            pet.load_delta(base(), tmp_path / "x.ckpt")
        assert caught.value.code == code, caught.value
        return
    refuse(tmp_path / "x.ckpt", tmp_path, code)
    with pytest.raises(DeltaFileError):
        pet.last_good(tmp_path)


def test_what_is_no_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "to_pipe.ckpt").symlink_to("pipe.ckpt")
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    for name in ("pipe.ckpt", "to_pipe.ckpt", "folder.ckpt"):
        refuse(tmp_path / name, tmp_path, "unsafe")
    refuse("/dev/zero", tmp_path, "unsafe")
    refuse(tmp_path / "loop.ckpt", tmp_path, "io")
    refuse(tmp_path / "absent.ckpt", tmp_path, "io")
    refuse(f"{tmp_path}/a\0b.ckpt", tmp_path, "io")
    with pytest.raises(DeltaFileError, match="none of 4 checkpoints"):
        pet.last_good(tmp_path)


def test_a_small_archive_that_inflates_to_gigabytes(tmp_path, good):
    torch.save(good, tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as old, zipfile.ZipFile(tmp_path / "x.ckpt", "w") as new:
        for member in old.infolist():
            new.writestr(member, old.read(member))
        bomb = zipfile.ZipInfo("good/data/1000")
        bomb.compress_type = zipfile.ZIP_DEFLATED
        with new.open(bomb, "w", force_zip64=True) as entry:
            for _ in range(300):
                entry.write(bytes(1 << 20))
    assert (tmp_path / "x.ckpt").stat().st_size < 1 << 20
    refuse(tmp_path / "x.ckpt", tmp_path, "limit")


def test_the_good_one_is_read(tmp_path, good):
    torch.save(good, tmp_path / "x.ckpt")
    for reader in readers(tmp_path / "x.ckpt", tmp_path):
        reader()
    assert pet.last_good(tmp_path) == tmp_path / "x.ckpt"
