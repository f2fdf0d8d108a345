"""The values of a delta file, verified and measured without torch, whose import takes longer than most files do."""

import hashlib
import math
import os
from typing import Any

import numpy as np

from lightning_pet.store.container import DEFAULT, DIGEST_BYTES, TYPES, Entry, fill, open_regular, read_header
from lightning_pet.store.files import expanded
from lightning_pet.store.manifest import Manifest, manifest_in
from lightning_pet.store.strict_json import damaged_tensor, not_finite


def verified_norms(path: str | os.PathLike[str]) -> tuple[Manifest, dict[str, float]]:
    """What a delta file says of itself, and the norm of each of its tensors; every byte is checked.

    Raises:
        DeltaFileError: see :func:`~lightning_pet.store.delta_file.read_delta`.
    """
    where = expanded(path)
    with open_regular(path, DEFAULT) as (file, size):
        header = read_header(file, size, DEFAULT, where)
        manifest = manifest_in(header, where)
        digests = {record.name: record.digest for record in manifest.tensors}
        norms = {}
        for entry in header.entries:
            data = bytearray(entry.end - entry.begin)
            fill(file, memoryview(data), f"{where}: tensor {entry.name!r}")
            if _digest(entry, data) != digests[entry.name]:
                raise damaged_tensor(entry.name, where)
            values = _numbers(entry.dtype, data)
            if bad := _not_finite(values):
                raise not_finite(entry.name, bad, values.size, where)
            norms[entry.name] = norm(values)
    return manifest, norms


def norm(values: np.ndarray[Any, Any]) -> float:
    """The Euclidean norm, summed in double precision."""
    return math.sqrt(float(np.square(values.reshape(-1).astype(np.float64)).sum()))


def _digest(entry: Entry, data: bytearray) -> str:
    # As tensors.digest, which has a tensor at hand.
    found = hashlib.sha256(f"torch.{TYPES[entry.dtype][0]}{entry.shape}".encode())
    found.update(data)
    return found.hexdigest()[: 2 * DIGEST_BYTES]


def _numbers(code: str, data: bytearray) -> np.ndarray[Any, Any]:
    if code == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype=np.dtype(TYPES[code][0]).newbyteorder("<"))


def _not_finite(values: np.ndarray[Any, Any]) -> int:
    return int(np.logical_not(np.isfinite(values)).sum())
