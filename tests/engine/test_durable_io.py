"""Checkpoints on disk: the old one or the new one, whole; and nothing else."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_pet.callbacks.lora import LoRACallback
from lightning_pet.errors import DeltaFileError
from lightning_pet.strategies import private
from lightning_pet.training import durable_io
from lightning_pet.training.durable_io import DurableCheckpointIO, install


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_removal(tmp_path):
    io, path = DurableCheckpointIO(), tmp_path / "deep" / "er" / "a.ckpt"
    io.save_checkpoint({"a": torch.arange(3), "b": {"c": [1, "x"]}}, path)
    loaded = io.load_checkpoint(path, weights_only=True)
    assert loaded["a"].tolist() == [0, 1, 2]
    assert loaded["b"] == {"c": [1, "x"]}
    io.save_checkpoint({"a": 2}, f"file://{path}")
    assert io.load_checkpoint(path) == {"a": 2}
    assert files(path.parent) == ["a.ckpt"]
    io.remove_checkpoint(path)
    io.remove_checkpoint(path)
    io.remove_checkpoint(tmp_path / "never" / "was.ckpt")
    assert files(path.parent) == []
    (path.parent / "sharded.ckpt").mkdir()
    io.remove_checkpoint(path.parent / "sharded.ckpt")
    assert files(path.parent) == []


def test_weights_only_is_handed_on(tmp_path):
    path = tmp_path / "a.ckpt"
    DurableCheckpointIO().save_checkpoint({"path": Path("x")}, path)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        DurableCheckpointIO().load_checkpoint(path, weights_only=True)
    assert DurableCheckpointIO().load_checkpoint(path, weights_only=False) == {"path": Path("x")}
    with pytest.raises(FileNotFoundError, match=r"missing\.ckpt"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "missing.ckpt")


def test_remote_paths_go_through_lightning():
    io = DurableCheckpointIO()
    io.save_checkpoint({"a": 1}, "memory://folder/a.ckpt")
    assert io.load_checkpoint("memory://folder/a.ckpt") == {"a": 1}
    io.remove_checkpoint("memory://folder/a.ckpt")
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint("memory://folder/a.ckpt")


def test_storage_options_are_refused_as_by_lightning(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        DurableCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})


def test_what_cannot_be_serialised_leaves_no_trace(tmp_path):
    io, path = DurableCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(Exception, match=r"pickle|local|lambda"):
        io.save_checkpoint({"step": lambda: 2}, path)
    assert files(tmp_path) == ["a.ckpt"]
    assert io.load_checkpoint(path) == {"step": 1}


def test_mode_follows_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        DurableCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    finally:
        os.umask(previous)
    assert (tmp_path / "a.ckpt").stat().st_mode & 0o777 == 0o640


def test_stale_temporary_files_are_reaped_at_the_first_save(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    stale, fresh = (tmp_path / f".a.ckpt.{process.pid}.{n}.tmp" for n in ("0123abcd", "0123abce"))
    stale.touch()
    fresh.touch()
    os.utime(stale, (time.time() - 7200,) * 2)
    DurableCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert files(tmp_path) == [fresh.name, "a.ckpt"]


def test_a_removal_that_fails_names_the_file(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    DurableCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    monkeypatch.setattr(durable_io.os, "unlink", refuse)
    with pytest.raises(DeltaFileError, match=r"a\.ckpt: removing failed with errno 13") as caught:
        DurableCheckpointIO().remove_checkpoint(tmp_path / "a.ckpt")
    assert caught.value.code == "io"


def lora() -> LoRACallback:
    return LoRACallback(r=1, target_modules=["layer"], verbose=False)


def trainer(folder: Path, *callbacks: L.Callback, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks), limit_train_batches=6, limit_val_batches=0, max_epochs=1,
        **options,
    )  # fmt: skip


class Install(L.Callback):
    def setup(self, trainer, pl_module, stage):
        install(trainer.strategy)


def test_install_replaces_the_default_only_once(tmp_path):
    strategy = trainer(tmp_path).strategy
    install(strategy)
    first = strategy.checkpoint_io
    install(strategy)
    assert type(first) is DurableCheckpointIO
    assert strategy.checkpoint_io is first


@pytest.mark.parametrize("inner", [None, TorchCheckpointIO(), AsyncCheckpointIO()])
def test_install_reaches_into_wrappers(inner, tmp_path):
    strategy = trainer(tmp_path, plugins=[AsyncCheckpointIO(inner)]).strategy
    install(strategy)
    install(strategy)
    assert type(strategy.checkpoint_io) is AsyncCheckpointIO
    assert type(private.innermost_wrapper(strategy.checkpoint_io).checkpoint_io) is DurableCheckpointIO


class OwnIO(TorchCheckpointIO):
    pass


@pytest.mark.parametrize("plugin", [OwnIO(), AsyncCheckpointIO(OwnIO())])
def test_the_users_writer_is_kept_and_said_once(plugin, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(durable_io, "rank_zero_info", said.append)
    strategy = trainer(tmp_path, plugins=[plugin]).strategy
    install(strategy)
    install(strategy)
    assert len(said) == 1
    assert "OwnIO" in said[0]
    assert strategy.checkpoint_io is plugin


def test_a_run_writes_nothing_to_the_temporary_folder(tmp_path, monkeypatch):
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    os.utime(elsewhere, (0, 0))
    saver = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=1, save_last=True)
    run = trainer(tmp_path, Install(), saver)
    run.fit(BoringModel())
    assert elsewhere.stat().st_mtime == 0
    assert files(tmp_path / "c") == ["epoch=0-step=6.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)["global_step"] == 6


def test_asynchronous_saves_come_before_the_removals_they_allow(tmp_path):
    """Whenever a file is removed, a newer one is whole on the disk."""
    folder, at_removal = tmp_path / "c", []

    class Slow(DurableCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            time.sleep(0.1)
            super().save_checkpoint(checkpoint, path, storage_options)

        def remove_checkpoint(self, path):
            at_removal.append(files(folder))
            super().remove_checkpoint(path)

    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=1)
    run = trainer(tmp_path, saver, plugins=[AsyncCheckpointIO()])
    install(run.strategy)
    private.replace_wrapped(private.innermost_wrapper(run.strategy.checkpoint_io), Slow())
    run.fit(BoringModel())
    assert files(folder) == ["epoch=0-step=6.ckpt"]
    assert at_removal == [
        ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"],
        ["epoch=0-step=4.ckpt", "epoch=0-step=6.ckpt"],
    ]


def test_an_asynchronous_save_that_fails_removes_nothing(tmp_path):
    folder = tmp_path / "c"

    class Full(DurableCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            if "step=2" not in str(path):
                raise DeltaFileError(f"{path}: no space left", "io")
            super().save_checkpoint(checkpoint, path, storage_options)

    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=1)
    run = trainer(tmp_path, saver, plugins=[AsyncCheckpointIO()])
    install(run.strategy)
    private.replace_wrapped(private.innermost_wrapper(run.strategy.checkpoint_io), Full())
    with pytest.raises(DeltaFileError, match="no space left"):
        run.fit(BoringModel())
    assert "epoch=0-step=2.ckpt" in files(folder)


def test_a_link_to_the_last_checkpoint_never_dangles(tmp_path, monkeypatch):
    """At every operation of a run that keeps one checkpoint and a link to it, the link can be read."""
    folder, read = tmp_path / "c", []

    def look(original, *arguments):
        if (folder / "last.ckpt").is_symlink() or (folder / "last.ckpt").exists() or read:
            read.append(torch.load(folder / "last.ckpt", weights_only=True)["global_step"])
        return original(*arguments)

    for owner, name in ((os, "unlink"), (os, "remove"), (os, "symlink"), (os, "link"), (os, "replace")):
        original = getattr(os, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, **_: look(original, *a))
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_last="link")
    again = trainer(tmp_path, lora(), saver)
    again.fit(BoringModel())
    assert files(folder) == ["epoch=0-step=6.ckpt", "last.ckpt"]
    assert (folder / "last.ckpt").samefile(folder / "epoch=0-step=6.ckpt")
    assert set(read) == {2, 4, 6}
    pickle.loads(pickle.dumps(saver))


def test_a_link_to_a_file_that_a_queue_writes_later_is_lightnings(tmp_path):
    called = []
    run = trainer(tmp_path, plugins=[AsyncCheckpointIO()])
    durable_io._link(lambda *arguments: called.append(arguments), run, "a.ckpt", "last.ckpt")
    assert called == [(run, "a.ckpt", "last.ckpt")]


def test_private_names_exist():
    queue = AsyncCheckpointIO(TorchCheckpointIO())
    assert private.async_queue(queue) is None
    assert private.async_failed(queue) is False
    assert private.innermost_wrapper(TorchCheckpointIO()) is None
