"""Reading ``.ckpt`` files: damage is found before anything is unpickled, and every fault has one kind of error."""

import os
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from lightning_pet.errors import DeltaFileError


def read_checkpoint(path: str | os.PathLike[str], load: Callable[[], Any]) -> dict[str, Any]:
    """Read a checkpoint file.

    ``torch.load`` does not compare the checksums that ``torch.save`` wrote, so they are compared here: a
    flipped bit in the state of an optimizer would otherwise change a run without a word.

    Args:
        path: local or remote; checksums are compared for local files.
        load: reads the file.

    Raises:
        DeltaFileError: ``corrupt`` if the file is damaged or holds more than plain data; ``schema`` if it is no
            checkpoint of Lightning.
        FileNotFoundError: if there is no such file.
    """
    try:
        _compare_checksums(path)
        checkpoint = load()
    except (FileNotFoundError, DeltaFileError):
        raise
    except Exception as error:
        raise DeltaFileError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {_first_line(error)}): it is damaged, or "
            "holds objects that are not plain data. Copy it again, or use an earlier save.",
            "corrupt",
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise DeltaFileError(f"{path} is not a Lightning checkpoint: it has no state_dict.", "schema")
    return checkpoint


def _compare_checksums(path: str | os.PathLike[str]) -> None:
    if not os.path.isfile(path) or not torch.serialization.get_crc32_options():
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise DeltaFileError(
            f"{path} is damaged: the bytes of {damaged!r} do not match their checksum. Copy it again, or use an "
            "earlier save.",
            "corrupt",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
