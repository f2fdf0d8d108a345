"""Deltas of other libraries as files of ours."""

import os
from pathlib import Path

from torch import nn

from lightning_pet.errors import ArgumentError
from lightning_pet.exchange.folder import is_folder
from lightning_pet.exchange.source import read_source
from lightning_pet.operations.delta import load_delta, load_model, save_delta
from lightning_pet.store.delta_file import write_delta
from lightning_pet.store.entry import written_by
from lightning_pet.store.manifest import Manifest
from lightning_pet.store.reader import PathLike


def import_delta(source: PathLike, path: PathLike, *, base: nn.Module | PathLike | None = None) -> int:
    """Write what a folder of HF PEFT holds into a delta file.

    Args:
        source: the folder.
        path: usually ends in ``.pet.safetensors``; an existing file is replaced.
        base: the model that it is for, or a local folder of it. With it everything is checked against the model, and
            the file knows its fingerprint. PiSSA, OLoRA, prompts, prefixes and deltas on parameters that no layer
            calls cannot be understood without.

    Returns:
        Bytes written.

    Raises:
        ArgumentError: if the source is no folder.
        DeltaFileError: if it is damaged, has no counterpart here, or does not fit the base. Nothing is written then.
    """
    if not is_folder(source):
        raise ArgumentError(f"{source} is no folder: give the one that save_pretrained wrote.")
    if base is None:
        stored = read_source(source)
        manifest = Manifest(stored.methods, notes=stored.notes, written_by=written_by())
        return write_delta(path, stored.tensors, manifest)
    model = load_model(Path(os.fspath(base))) if isinstance(base, str | os.PathLike) else base
    adapted = load_delta(model, source, name="imported")
    try:
        return save_delta(model, path, name="imported", notes={"imported_from": "HF PEFT"})
    finally:
        adapted["imported"].remove()
