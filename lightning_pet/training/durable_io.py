"""Training checkpoints that survive a kill, a full disk and a power loss, and when they are written.

Lightning writes a checkpoint to the system's temporary folder and moves it. Where that folder is another
file system the move is a copy: a kill tears it, and a full disk costs the last good file. This writer
goes through :func:`lightning_pet.store.files.atomic_write` instead.
"""

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH as Path
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.store.entry import KEY
from lightning_pet.store.files import DISK, atomic_write, durable_link, reap_once
from lightning_pet.store.reader import delta_path, write_delta_of
from lightning_pet.strategies import private

_told: WeakSet[Strategy] = WeakSet()


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes ``.ckpt`` files durably; reads them, and serves remote paths (``s3://`` …), as Lightning does.

    Args:
        delta_files: write a delta file beside each checkpoint, and remove it together with it.
        deltas: names of those that train together: each has a file of its own.
    """

    def __init__(self, delta_files: bool = False, deltas: Sequence[str] = ()) -> None:
        super().__init__()
        self.delta_files, self.deltas = delta_files, tuple(deltas)

    def _beside(self, path: Path) -> list[str]:
        """Paths of the delta files of a checkpoint."""
        return [delta_path(path, delta) for delta in self.deltas or ("",)]

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; when this returns, it survives a power loss.

        Args:
            checkpoint: anything that ``torch.save`` takes.
            path: destination. A local file of that name is replaced in one step.
            storage_options: not supported, as in Lightning's own writer.

        Raises:
            DeltaFileError: code ``io``, if the operating system refuses. The file that was there before
                is untouched and nothing temporary is left.
            TypeError: if ``storage_options`` are given.
        """
        beside = self.delta_files and KEY in checkpoint
        if beside:
            for file in self._beside(path):  # first: a kill between the two leaves none, rather than an outdated one
                self._remove(file)
        self._save(checkpoint, path, storage_options)
        if beside:
            for delta, file in zip(self.deltas or (None,), self._beside(path), strict=True):
                _write_beside(checkpoint, path, file, delta)

    def _save(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None) -> None:
        local = _local(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        reap_once(os.path.dirname(local))
        # Serialised first: torch turns a write error in the middle of a file into one without its cause.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        atomic_write(local, lambda file: file.write(buffer.getbuffer()))

    def remove_checkpoint(self, path: Path) -> None:
        """Remove a checkpoint file (or folder) durably; one that does not exist is no error.

        Raises:
            DeltaFileError: code ``io``, if the operating system refuses.
        """
        for file in self._beside(path) if self.delta_files else ():
            self._remove(file)
        self._remove(path)

    def _remove(self, path: Path) -> None:
        local = _local(path)
        if local is None:
            super().remove_checkpoint(path)
            return
        try:
            # A link goes, not what it points to.
            if os.path.isfile(local) or os.path.islink(local):
                os.unlink(local)
            else:
                super().remove_checkpoint(local)
            if os.path.isdir(folder := os.path.dirname(local)):
                DISK.sync_folder(folder)
        except OSError as error:
            raise DeltaFileError(
                f"{local}: removing failed with errno {error.errno} ({error.strerror}). Fix the folder's permissions.",
                "io",
            ) from error


def _write_beside(checkpoint: dict[str, Any], path: Path, beside: str, delta: str | None) -> None:
    """Write the delta file that goes with a checkpoint; one with NaN or infinity is none, and announced."""
    notes = None if delta is None else {"name": delta}
    try:
        if _local(path) is not None:
            write_delta_of(checkpoint, path, beside, notes, delta)
            return
        with tempfile.TemporaryDirectory() as folder:
            write_delta_of(checkpoint, path, made := os.path.join(folder, "delta"), notes, delta)
            system, plain = url_to_fs(beside)
            system.put_file(made, plain)
    except DeltaFileError as error:
        if error.code != "nonfinite":
            raise
        rank_zero_warn(f"{beside} is not written: {error}")


def install(strategy: Strategy, delta_files: bool = False, deltas: Sequence[str] = ()) -> None:
    """Let a strategy write its checkpoints durably, unless the user chose a writer.

    Replaced is exactly Lightning's default, :class:`TorchCheckpointIO`, also inside wrappers such as
    :class:`AsyncCheckpointIO`; there, old checkpoints are removed only after the new one is on the disk.
    May be called any number of times.

    Args:
        strategy: of the Trainer.
        delta_files: write a delta file beside each checkpoint.
        deltas: names of those that train together.

    Raises:
        ArgumentError: if delta files are wanted and another writer was chosen.
    """
    outer = strategy.checkpoint_io
    wrapper = private.innermost_wrapper(outer)
    current: CheckpointIO | None = outer if wrapper is None else wrapper.checkpoint_io
    if isinstance(current, DurableCheckpointIO):
        current.delta_files, current.deltas = delta_files, tuple(deltas)
        return
    if type(current) is not TorchCheckpointIO:
        if delta_files:
            raise ArgumentError(
                f"delta_files=True: checkpoints of this Trainer are written by {type(current).__name__}, which writes "
                "no delta files. Leave that plug-in out, or use lightning_pet.extract_delta on its checkpoints."
            )
        if strategy not in _told:
            _told.add(strategy)
            rank_zero_info(
                f"Checkpoints are written by {type(current).__name__}, which was chosen for this Trainer; they are as "
                "durable as that writer makes them."
            )
        return
    if wrapper is None:
        strategy.checkpoint_io = DurableCheckpointIO(delta_files, deltas)
        return
    private.replace_wrapped(wrapper, DurableCheckpointIO(delta_files, deltas))
    for layer in private.wrappers(outer):
        if isinstance(layer, AsyncCheckpointIO):
            private.replace_method(layer, "remove_checkpoint", _after_saves(layer))


def keep_last_linked(trainer: Trainer) -> None:
    """Let ``ModelCheckpoint(save_last="link")`` replace its link in one step.

    Lightning removes the old link, or lets it dangle, before it makes the new one; a run that is killed in
    between has no last checkpoint and would start again at step 0. Here the link is a second name of the file
    (a hard link), which outlives the removal of the first. May be called any number of times.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_last == "link":
            private.replace_link_checkpoint(callback, _link)


def _link(original: Callable[..., None], trainer: Trainer, path: str, link: str) -> None:
    durable = isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO)
    if not durable or os.path.isdir(path):  # a queue that has not written the file yet, or a writer of folders
        original(trainer, path, link)
        return
    if trainer.is_global_zero:
        durable_link(path, link)
    trainer.strategy.barrier()


def _after_saves(io: AsyncCheckpointIO) -> Callable[..., None]:
    """Queue removals behind the saves that they make room for, and drop them if a save failed."""

    def remove(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        def now() -> None:
            if not private.async_failed(io):
                original(*args, **kwargs)

        queue = private.async_queue(io)
        if queue is None:
            now()
        else:
            queue.submit(now)

    return remove


def _local(path: Path) -> str | None:
    """Return the plain path of a local file; ``None`` for a remote one."""
    system, plain = url_to_fs(str(path))
    return str(plain) if isinstance(system, LocalFileSystem) else None


# --- after the hook of the module, not before it --------------------------------------------------

# Lightning calls a hook of all callbacks, then that of the LightningModule. A checkpoint of the end of a batch would
# lack what the module does there (moving an average of its weights), and a run that resumes from it does not do it
# again.


_HOOKS: Final = ("on_train_batch_end", "on_validation_end")  # at an epoch's end Lightning keeps this order itself


def save_after_module(trainer: pl.Trainer, module: pl.LightningModule) -> Callable[[], None]:
    """Let the checkpoint callbacks wait for those hooks that the module has; returns what undoes it."""
    undo: list[Callable[[], None]] = []
    for hook in _HOOKS:
        if not is_overridden(hook, module):
            continue
        waiting: list[Callable[[], None]] = []
        for callback in trainer.checkpoint_callbacks:
            undo.append(private.replace_method(callback, hook, partial(_wait, waiting)))
        undo.append(private.replace_method(module, hook, partial(_then_save, waiting)))

    def back() -> None:
        for undone in reversed(undo):
            undone()

    return back


def _wait(waiting: list[Callable[[], None]], original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    waiting.append(partial(original, *args, **kwargs))


def _then_save(waiting: list[Callable[[], None]], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = original(*args, **kwargs)
    due, waiting[:] = list(waiting), []
    for save in due:
        save()
    return out
