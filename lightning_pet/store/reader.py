"""Reading a delta, from a delta file or a training checkpoint."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_pet.model.naming import in_file, split_below
from lightning_pet.store.archive import load_checkpoint
from lightning_pet.store.delta_file import read_delta, read_manifest
from lightning_pet.store.entry import MARK, check_tensors, methods_of, read_entry, saved_fingerprint
from lightning_pet.store.manifest import Manifest, MethodRecord
from lightning_pet.store.paths import is_delta_file as is_delta_file
from lightning_pet.store.remembered import Fingerprint
from lightning_pet.store.strict_json import fault
from lightning_pet.store.tensors import describe

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
        notes: free text for people.
    """

    path: Path
    methods: tuple[MethodRecord, ...]
    tensors: dict[str, Tensor]
    base: Fingerprint | None
    root: str = ""
    beside: dict[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def read(path: PathLike) -> Stored:
    """Read and verify a delta file or a training checkpoint.

    Raises:
        DeltaFileError: if it is damaged or not ours.
    """
    if is_delta_file(path):
        found = read_delta(path)
        manifest = found.manifest
        return Stored(
            Path(path), manifest.methods, dict(found.tensors), manifest.base, manifest.root, notes=manifest.notes
        )
    return delta_of(load_checkpoint(path), path)


def delta_of(checkpoint: Mapping[str, Any], path: PathLike) -> Stored:
    """Verify the delta in the contents of a training checkpoint.

    Raises:
        DeltaFileError: if it is damaged or not ours.
    """
    entry = read_entry(checkpoint, path)
    check_tensors(checkpoint, entry, path)
    tensors, rest = split_below(checkpoint["state_dict"], entry["root"])
    tensors.pop(MARK, None)  # of a checkpoint that was not read but is about to be written
    tensors = in_file(tensors)  # of a run among other deltas
    if odd := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise fault(f"{path}: {odd[0]}", f"found {type(tensors[odd[0]]).__name__}, expected a tensor.")
    beside = {name: tensor for name, tensor in rest.items() if name != MARK and isinstance(tensor, Tensor)}
    base = saved_fingerprint(entry, path)
    return Stored(Path(path), methods_of(entry, path), tensors, base, entry["root"], beside)


def manifest_of(path: PathLike) -> Manifest:
    """What a delta file or a training checkpoint says of itself.

    Of a delta file no values are read; a checkpoint can only be read as a whole.

    Raises:
        DeltaFileError: if it is damaged or not ours.
    """
    return read_manifest(path) if is_delta_file(path) else checkpoint_manifest(load_checkpoint(path), path)


def checkpoint_manifest(
    checkpoint: Mapping[str, Any], path: PathLike, notes: Mapping[str, str] | None = None
) -> Manifest:
    """What the contents of a training checkpoint say of their delta."""
    stored, step = delta_of(checkpoint, path), checkpoint.get("global_step")
    return Manifest(
        methods=stored.methods,
        tensors=describe(stored.tensors),
        base=stored.base,
        root=stored.root,
        step=step if type(step) is int and 0 <= step < 2**63 else None,
        notes=dict(notes or {}),
        written_by=read_entry(checkpoint, path)["written_by"],
    )
