"""What a delta file holds, for people and for programs; without torch, whose import takes longer than most files do."""

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lightning_pet.model.naming import CHILD
from lightning_pet.model.structure import is_shared
from lightning_pet.store.container import (
    DEFAULT,
    DIGEST_BYTES,
    TYPES,
    Entry,
    TensorRecord,
    fill,
    open_regular,
    read_header,
)
from lightning_pet.store.files import expanded
from lightning_pet.store.manifest import Manifest, manifest_in
from lightning_pet.store.strict_json import damaged_tensor, not_finite

# --- its values, verified and measured ------------------------------------------------------------


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


# --- its summary ----------------------------------------------------------------------------------


def summarize_delta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a delta file completely (every digest is verified) and describe it in plain types; see :func:`described`.

    Raises:
        DeltaFileError: if the file is damaged or not ours.
    """
    return described(path, *verified_norms(path))


def described(path: str | os.PathLike[str], manifest: Manifest, norms: Mapping[str, float]) -> dict[str, Any]:
    """What a file holds.

    Returns:
        ``methods`` (name, options, places, parameters), ``tensors`` (shape and norm by name), ``bytes``,
        ``base`` (fingerprint digests).
    """
    # Integers say where numbers are (entries of a weight, rows of a table); they are none themselves.
    sizes = {record.name: math.prod(record.shape) for record in manifest.tensors if not _is_index(record)}
    base = manifest.base
    return {
        "path": str(path),
        "bytes": _size(Path(path)),
        "parameters": sum(sizes.values()),
        "methods": [_method(manifest, index, sizes) for index in range(len(manifest.methods))],
        "tensors": {record.name: _tensor(record, norms) for record in sorted(manifest.tensors)},
        "base": None if base is None else {"structure": base.structure, "sample": base.sample},
    }


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _is_index(record: TensorRecord) -> bool:
    return record.dtype in TYPES and TYPES[record.dtype][0].startswith(("int", "uint"))


def _tensor(record: TensorRecord, norms: Mapping[str, float]) -> dict[str, Any]:
    kind = TYPES[record.dtype][0] if record.dtype in TYPES else record.dtype
    return {"shape": list(record.shape), "dtype": kind, "norm": norms[record.name]}


def _method(manifest: Manifest, index: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    record = manifest.methods[index]
    return {
        "method": record.method,
        "name": record.name,
        "config": dict(record.config),
        "places": [target.path for target in record.targets if not is_shared(target) and target.role != "head"],
        "parameters": sum(size for name, size in sizes.items() if _owner(manifest, name) == index),
    }


def _owner(manifest: Manifest, name: str) -> int | None:
    """Index of the method that a tensor belongs to; ``None`` for trained base tensors."""
    host, _, rest = f".{name}".rpartition(f".{CHILD}.")
    key = rest.partition(".")[0]
    fits = {
        len(f"{record.method}_{record.name}"): index
        for index, record in enumerate(manifest.methods)
        if f"{key}_".startswith(f"{record.method}_{record.name}_")  # a suffix tells parts of one projection apart
        and host.removeprefix(".") in {target.module for target in record.targets}
    }
    return fits[max(fits)] if fits else None


def print_summary(summary: dict[str, Any]) -> None:
    """Print a summary as tables."""
    console = Console()
    console.print(f"{summary['path']}: {summary['bytes']:,} bytes, {summary['parameters']:,} numbers", soft_wrap=True)
    for method in summary["methods"]:
        table = Table(show_header=False)
        table.add_column("key")
        table.add_column("value")
        table.add_row(
            "places", f"{len(method['places'])}, the first {method['places'][0] if method['places'] else '-'}"
        )
        table.add_row("parameters", f"{method['parameters']:,}")
        for option, value in method["config"].items():
            if value is not None:
                table.add_row(option, str(value))
        title = f"{method['method']}:{method['name']}"
        console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
        console.print(table)
    heads = [name for name in summary["tensors"] if ".pet." not in f".{name}"]
    if heads:
        console.print(f"trained as they are: {', '.join(heads)}", soft_wrap=True)
    numbers = [item for item in summary["tensors"].items() if not item[1]["dtype"].startswith(("int", "uint"))]
    largest = sorted(numbers, key=lambda item: -item[1]["norm"])[:5]
    console.print("largest norms: " + ", ".join(f"{name} {info['norm']:.3g}" for name, info in largest), soft_wrap=True)
    if summary["base"]:
        console.print(f"base: structure {summary['base']['structure'][:12]}, sample {summary['base']['sample'][:12]}")
