"""Reading a delta, from a delta file or a training checkpoint."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.archive import read_checkpoint
from lightning_pet.store.delta_file import read_delta
from lightning_pet.store.entry import check_tensors, methods_of, read_entry, saved_fingerprint
from lightning_pet.store.fingerprint import Fingerprint
from lightning_pet.store.manifest import MethodRecord

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Stored:
    """A delta as it was read, from a delta file or from a training checkpoint.

    Attributes:
        path: the file.
        methods: short name, user's name, options and places of every method.
        tensors: by name from the adapted root.
        base: fingerprint of the base it was trained on.
        root: path of the adapted root in the LightningModule that wrote it.
        beside: tensors of that LightningModule beside the root, by name; a training checkpoint has them.
    """

    path: Path
    methods: tuple[MethodRecord, ...]
    tensors: dict[str, Tensor]
    base: Fingerprint | None
    root: str = ""
    beside: dict[str, Tensor] = field(default_factory=dict)


def read(path: PathLike) -> Stored:
    """Read and verify a delta file or a training checkpoint.

    Raises:
        DeltaFileError: if it is damaged or not ours.
    """
    if is_delta_file(path):
        found = read_delta(path)
        manifest = found.manifest
        return Stored(Path(path), manifest.methods, dict(found.tensors), manifest.base, manifest.root)
    return delta_of(load_checkpoint(Path(path)), path)


def delta_of(checkpoint: Mapping[str, Any], path: PathLike) -> Stored:
    """Verify the delta in the contents of a training checkpoint.

    Raises:
        DeltaFileError: if it is damaged or not ours.
    """
    entry = read_entry(checkpoint, path)
    check_tensors(checkpoint, entry, path)
    prefix = f"{entry['root']}." if entry["root"] else ""
    state = checkpoint["state_dict"]
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    beside = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return Stored(Path(path), methods_of(entry), tensors, saved_fingerprint(entry, path), entry["root"], beside)


def is_delta_file(path: PathLike) -> bool:
    """Whether a path is to be read as a delta file; otherwise it is a training checkpoint."""
    # A .ckpt is a zip archive; everything else (a pipe, too) is for the strict reader to accept or refuse.
    if not Path(path).is_file():
        return True
    try:
        with open(path, "rb") as file:
            return file.read(2) != b"PK"
    except OSError as error:
        raise DeltaFileError(f"{path}: {error.strerror}. Give the path of a delta file or checkpoint.", "io") from error


def load_checkpoint(path: PathLike) -> dict[str, Any]:
    """Everything in a training checkpoint, on the CPU."""
    return read_checkpoint(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
