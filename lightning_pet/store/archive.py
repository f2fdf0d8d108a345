"""Reading ``.ckpt`` files: damage is found before anything is unpickled, and every fault has one kind of error."""

import io
import os
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, Final, cast

import torch

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.container import Limits, open_regular
from lightning_pet.store.entry import MARK

_ANY_SIZE: Final = Limits(file_bytes=2**63)  # a checkpoint of full fine-tuning is as large as the model and more
_INFLATED: Final = 64 << 20  # torch.save compresses nothing; what else packs a checkpoint gains little


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a training checkpoint, on the CPU; the file is opened once, and never waited for.

    Raises:
        DeltaFileError: ``io`` if it cannot be opened, ``unsafe`` if it is a folder, pipe, socket or device;
            ``limit``, ``corrupt`` or ``schema`` as :func:`read_checkpoint`.
    """
    with open_regular(path, _ANY_SIZE) as (file, _):
        return read_checkpoint(path, lambda: torch.load(file, map_location="cpu", weights_only=True), file)


def read_checkpoint(
    path: str | os.PathLike[str], load: Callable[[], Any], file: BinaryIO | None = None
) -> dict[str, Any]:
    """Read a checkpoint file.

    ``torch.load`` does not compare the checksums that ``torch.save`` wrote, so they are compared here: a
    flipped bit in the state of an optimizer would otherwise change a run without a word.

    Args:
        path: local or remote; checksums are compared for local files.
        load: reads the file.
        file: the file, if it is open already.

    Raises:
        DeltaFileError: ``corrupt`` if the file is damaged or holds more than plain data; ``limit`` if it would
            inflate; ``unsafe`` if it is a pipe, socket or device; ``schema`` if it is no checkpoint of Lightning.
        FileNotFoundError: if there is no such file.
    """
    checkpoint = _plain(path, load, file, "a checkpoint")
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in (*checkpoint, *state)):
        raise DeltaFileError(f"{path} is not a Lightning checkpoint: it has no state_dict of names.", "schema")
    state.pop(MARK, None)
    return cast(dict[str, Any], checkpoint)


def load_plain(path: str | os.PathLike[str]) -> Any:
    """Plain data and tensors that ``torch.save`` wrote, on the CPU; an object of any class is refused.

    Raises:
        DeltaFileError: as :func:`load_checkpoint`.
    """
    with open_regular(path, _ANY_SIZE) as (file, _):
        return _plain(path, lambda: torch.load(file, map_location="cpu", weights_only=True), file, "tensors")


def _plain(path: str | os.PathLike[str], load: Callable[[], Any], file: BinaryIO | None, what: str) -> Any:
    """Look for damage, then load; a file of whatever else is an error of one kind."""
    try:
        if file is not None:
            _look_into(path, file)
        elif os.path.isfile(path):
            with open(path, "rb") as opened:
                _look_into(path, opened)
        elif os.path.exists(path) and not os.path.isdir(path):  # reading it would wait for ever
            with open_regular(path, _ANY_SIZE):
                pass
        return load()
    except (FileNotFoundError, DeltaFileError):
        raise
    except Exception as error:
        raise DeltaFileError(
            f"{path} cannot be read as {what} ({type(error).__name__}: {_first_line(error)}): it is damaged, or "
            "holds objects that are not plain data. Copy it again, or use an earlier save.",
            "corrupt",
        ) from error


def _look_into(path: str | os.PathLike[str], file: BinaryIO) -> None:
    """Compare sizes and checksums, and leave the file at its beginning."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    with zipfile.ZipFile(cast(Any, file)) as archive:
        inflated = sum(member.file_size for member in archive.infolist())
        if inflated > size + _INFLATED:
            raise DeltaFileError(
                f"{path}: found {size} bytes that inflate to {inflated}, expected a checkpoint as torch.save writes "
                "it, which is not compressed. Write it again with torch.save, or do not trust its source.",
                "limit",
            )
        damaged = archive.testzip() if torch.serialization.get_crc32_options() else None
    file.seek(0)
    if damaged is not None:
        raise DeltaFileError(
            f"{path} is damaged: the bytes of {damaged!r} do not match their checksum. Copy it again, or use an "
            "earlier save.",
            "corrupt",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
