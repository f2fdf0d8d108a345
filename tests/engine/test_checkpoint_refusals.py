"""What a run refuses to resume from: before the first step, by name, and with the model as it was."""

import struct
import zipfile

import pytest
import torch
from models import Data, Module, Net, ckpt, cosine, digest, every_step, fit, full_run, is_pristine, lora, sgd, trainer
from torch import nn

from lightning_pet.errors import BaseMismatchError, DeltaFileError, OptimizerMismatchError, PETError
from lightning_pet.operations.delta import read
from lightning_pet.store.fingerprint import digest as tensor_digest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, full_run(folder)


def refused(path, *callbacks, net=None, error=DeltaFileError, method="fit", optimizers=cosine):
    """The error of a resume: before the first step, and with the model as it was."""
    module = Module(net or Net(norm=True), optimizers)
    before = digest(module)
    options = {"verbose": False} if method == "validate" else {}
    with pytest.raises(error) as caught:
        getattr(trainer(*(callbacks or [lora(dropout=0.2)])), method)(
            module, datamodule=Data(), ckpt_path=path, **options
        )
    assert isinstance(caught.value, PETError)
    assert module.losses == []
    assert digest(module) == before
    assert is_pristine(module)
    assert all(p.requires_grad for p in module.parameters())
    return caught.value


@pytest.mark.parametrize("method", ["fit", "validate"])
@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([lora(r=3)], "r=2 there and 3 here"),
        ([lora(alpha=1)], "alpha=16 there and 1 here"),
        ([lora(use_dora=True)], "use_dora=False there and True here"),
        ([lora(name="other")], "holds the methods ['lora:default'], this run has ['lora:other']"),
        ([lora(), lora(name="two")], "this run has ['lora:default', 'lora:two']"),
        ([lora(target_modules=["fc1"])], "trained on 2 places, this run has 1; they differ in fc2"),
        ([lora(modules_to_save=[])], "net.head"),
    ],
)
def test_other_callbacks(run, callbacks, words, method):
    folder, _ = run
    error = refused(ckpt(folder, 4), *callbacks, method=method)
    assert error.code == "mismatch"
    assert words.replace("net.head", "head.weight") in str(error)


def test_other_order(tmp_path):
    fit(Module(Net()), lora(name="a"), lora(name="b"), every_step(tmp_path), max_epochs=1)
    error = refused(ckpt(tmp_path, 2), lora(name="b"), lora(name="a"), net=Net())
    assert "the same callbacks in the same order" in str(error)


def test_other_base(run):
    folder, _ = run
    error = refused(ckpt(folder, 4), net=Net(seed=2, norm=True), error=BaseMismatchError)
    assert error.code == "base"
    assert "fc1.bias" in str(error)
    with pytest.warns(UserWarning, match="another base model"):
        trainer(lora(dropout=0.2, base_check="warn")).validate(
            Module(Net(seed=2, norm=True)), datamodule=Data(), ckpt_path=ckpt(folder, 4), verbose=False
        )
    trainer(lora(dropout=0.2, base_check="off")).validate(
        Module(Net(seed=2, norm=True)), datamodule=Data(), ckpt_path=ckpt(folder, 4), verbose=False
    )


def test_another_architecture(run):
    folder, _ = run
    net = Net(norm=True)
    net.fc2 = nn.Sequential(nn.Linear(8, 8))
    refused(ckpt(folder, 4), lora(dropout=0.2, target_modules=["fc1", "fc2.0"]), net=net)


def test_a_base_checkpoint(tmp_path):
    fit(Module(Net(norm=True)), every_step(tmp_path), max_epochs=1)
    error = refused(ckpt(tmp_path, 2))
    assert error.code == "mismatch"
    assert "is not a delta checkpoint" in str(error)
    assert "load them where the LightningModule builds its model" in str(error)


def test_a_file_that_is_no_checkpoint(tmp_path):
    for number, content in enumerate((b"", b"PK\x03\x04", b"hello" * 100, b"\x80\x02.")):
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(content)
        assert refused(path).code == "corrupt"
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert refused(tmp_path / "list.ckpt").code == "schema"


def test_truncated(run, tmp_path):
    data = ckpt(run[0], 4).read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        path = tmp_path / "short.ckpt"
        path.write_bytes(data[: int(len(data) * share)])
        assert refused(path).code == "corrupt"


def payloads(path):
    """Start and length of every record's bytes in a zip file."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            yield info.filename, info.header_offset + 30 + name + extra, info.file_size


def test_one_flipped_bit_in_any_record(run, tmp_path):
    """Also in the state of the optimizer and of the loops, which have no digest of their own."""
    path = ckpt(run[0], 4)
    data = bytearray(path.read_bytes())
    records = [record for record in payloads(path) if record[2] > 0]
    assert len(records) > 20
    for name, start, size in records:
        damaged = bytearray(data)
        damaged[start + size // 2] ^= 16
        (tmp_path / "bad.ckpt").write_bytes(damaged)
        with pytest.raises(DeltaFileError, match="damaged") as caught:
            read(tmp_path / "bad.ckpt")
        assert caught.value.code == "corrupt", name
    assert refused(tmp_path / "bad.ckpt").code == "corrupt"


def edited(run, tmp_path, change, sign=True):
    """A checkpoint that somebody changed, with digests that fit."""
    saved = torch.load(ckpt(run[0], 4), weights_only=True)
    change(saved)
    if sign:
        saved["lightning_pet"]["digests"] = {n: tensor_digest(t) for n, t in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "edited.ckpt")
    return tmp_path / "edited.ckpt"


A = "net.fc1.pet.lora_default.a"


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda s: s["state_dict"][A].fill_(float("nan")), "nonfinite", A),
        (lambda s: s["state_dict"].pop(A), "mismatch", "missing fc1.pet.lora_default.a"),
        (lambda s: s["state_dict"].update({A: torch.zeros(3, 6)}), "mismatch", "(3, 6)"),
        (lambda s: s["state_dict"].update({"net.fc1.weight": torch.zeros(8, 6)}), "mismatch", "unexpected fc1.weight"),
        (lambda s: s["state_dict"].update({"net.new": torch.zeros(1)}), "mismatch", "unexpected new"),
        (lambda s: s["state_dict"].update({"other": torch.zeros(1)}), "mismatch", "other"),
        (lambda s: s["lightning_pet"].update({"format": 99}), "version", "99"),
        (lambda s: s["lightning_pet"].pop("methods"), "schema", "methods"),
        (lambda s: s["lightning_pet"].update({"methods": [3]}), "schema", "methods"),
        (lambda s: s["lightning_pet"].update({"surprise": 1}), "schema", "surprise"),
        (lambda s: s["lightning_pet"]["methods"][0]["targets"][0].update({"rows": [1]}), "schema", "rows"),
        (lambda s: s["lightning_pet"]["base"].pop("sample"), "schema", "sample"),
        (lambda s: s.pop("lightning_pet"), "mismatch", "not a delta checkpoint"),
    ],
)
def test_edited_checkpoints(run, tmp_path, change, code, words):
    path = edited(run, tmp_path, change, sign=words != "not a delta checkpoint")
    error = refused(path)
    assert (error.code, words in str(error)) == (code, True), error


def test_a_changed_value_without_a_new_digest(run, tmp_path):
    path = edited(run, tmp_path, lambda s: s["state_dict"][A].add_(1), sign=False)
    assert refused(path).code == "corrupt"


def test_other_optimizers(run):
    def two(module):
        parameters = list(module.parameters())
        return [torch.optim.SGD(part, 0.1) for part in (parameters[:4], parameters[4:])]

    class Two(Module):
        automatic_optimization = False

    module = Two(Net(norm=True), two)
    before = digest(module)
    with pytest.raises(OptimizerMismatchError, match=r"1 optimizers .* this run has 2"):
        trainer(lora(dropout=0.2)).fit(module, datamodule=Data(), ckpt_path=ckpt(run[0], 4))
    assert digest(module) == before
    assert is_pristine(module)


def test_another_class_of_optimizer(run):
    """Its state would be taken for its own, and fail in the middle of the first step."""
    error = refused(ckpt(run[0], 4), error=OptimizerMismatchError, optimizers=sgd)
    assert "AdamW" in str(error)
    assert "SGD" in str(error)
