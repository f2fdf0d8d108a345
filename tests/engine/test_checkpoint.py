"""Checkpoints of a run: what is in them, what refuses them, and that a resume continues bit for bit."""

import os
import resource
import struct
import zipfile

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from models import Data, Module, Net, cosine, digest, fit, is_pristine, lora, sgd, trainer
from torch import nn

from lightning_pet.engine.durable_io import DurableCheckpointIO
from lightning_pet.errors import BaseMismatchError, DeltaFileError, OptimizerMismatchError, PETError

DELTA = {f"net.fc{i}.pet.lora_default.{p}" for i in (1, 2) for p in "ab"}
HEAD = {"net.head.weight", "net.head.bias"}
NORM = {f"net.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
LAST = 10  # 2 epochs of 5 batches


def every_step(folder, **options):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, **options)


def ckpt(folder, step):
    return folder / f"step={step}.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One uninterrupted run with a checkpoint of every step: dropout, shuffling, batch norm, AdamW and a schedule."""
    folder = tmp_path_factory.mktemp("run")
    module = Module(Net(norm=True), cosine)
    fit(module, lora(dropout=0.2), every_step(folder))
    assert len(module.losses) == LAST
    return folder, module


def resumed(path, *callbacks, **options):
    module = Module(Net(norm=True), cosine)
    torch.manual_seed(987)  # the state must come from the file
    trainer(lora(dropout=0.2), *callbacks, **options).fit(module, datamodule=Data(), ckpt_path=path)
    return module


# --- what is in a file --------------------------------------------------------------------------------


def test_only_the_delta_heads_and_changed_buffers(run):
    folder, _ = run
    saved = torch.load(ckpt(folder, 4), weights_only=True)
    assert set(saved["state_dict"]) == DELTA | HEAD | NORM
    assert {"epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers"} <= set(saved)
    assert len(saved["optimizer_states"][0]["state"]) == len(DELTA | HEAD)
    assert torch.load(ckpt(folder, LAST), weights_only=True)["state_dict"].keys() == saved["state_dict"].keys()
    unnormed = Module(Net())
    fit(unnormed, lora(), every_step(folder / "plain"), max_epochs=1)
    assert set(torch.load(ckpt(folder / "plain", 5), weights_only=True)["state_dict"]) == DELTA | HEAD


def test_save_weights_only_and_saving_after_fit(tmp_path):
    module = Module(Net())
    fitted = fit(module, lora(), every_step(tmp_path, save_weights_only=True), max_epochs=1)
    small = torch.load(ckpt(tmp_path, 5), weights_only=True)
    assert set(small["state_dict"]) == DELTA | HEAD
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
            saved = torch.load(path, weights_only=True)["state_dict"]
            assert all(torch.equal(module.state_dict()[name], value) for name, value in saved.items())
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
    assert set(torch.load(ckpt(tmp_path, 3), weights_only=True)["state_dict"]) == DELTA | HEAD


def test_loading_forgets_buffers_that_the_checkpoint_does_not_have(tmp_path):
    module = Module(Net(norm=True))
    start = trainer(lora())
    start.validate(module, datamodule=Data(), verbose=False)
    start.save_checkpoint(tmp_path / "start.ckpt")
    assert not NORM & set(torch.load(tmp_path / "start.ckpt", weights_only=True)["state_dict"])
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


# --- refusals ------------------------------------------------------------------------------------------------


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
    from lightning_pet.engine.delta import read

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
    from lightning_pet.store.tensors import digest as tensor_digest

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
