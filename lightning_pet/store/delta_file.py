"""One delta, one file: weights, configuration and provenance can never be of two generations.

The file is a safetensors file that any safetensors reader opens. Its ``__metadata__`` holds the
manifest and the SHA-256 of the manifest, which in turn holds the SHA-256 of every tensor. The digests
find damage, not forgery: who wrote a file is for a signature beside it to say.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO, Final, NamedTuple

import torch
from torch import Tensor

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.container import DEFAULT, Entry, Limits, fill, open_regular, read_header
from lightning_pet.store.files import atomic_write, expanded, reap_once
from lightning_pet.store.fingerprint import (
    CODES,
    DTYPES,
    byte_view,
    describe,
    digest,
    require_finite,
    to_host,
)
from lightning_pet.store.manifest import DIGEST_NAME, MANIFEST_NAME, Manifest, encode_manifest, manifest_in
from lightning_pet.store.strict_json import canonical, check_name, damaged_tensor, fault

_ALIGNMENT: Final = 8


class Stamp(NamedTuple):
    """What a file system says of a file: the same as long as nobody replaces it or writes into it."""

    device: int
    inode: int
    size: int
    changed: int


class Verified(NamedTuple):
    """Where the values lie in a file that was verified.

    Attributes:
        stamp: of the file when that was done.
        entries: its tensors, in file order.
        start: where their bytes begin.
    """

    stamp: Stamp
    entries: tuple[Entry, ...]
    start: int


@dataclass(frozen=True)
class DeltaFile:
    """A delta as read from its file.

    Attributes:
        manifest: what it says of itself.
        tensors: its values in main memory, by name; owned by the reader, no view of the file.
        verified: for :func:`read_again`; ``None`` if the file was changed meanwhile.
    """

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    verified: Verified | None = None


def write_delta(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], manifest: Manifest) -> int:
    """Write a delta file durably and atomically.

    Args:
        path: local destination; missing folders are created, an existing file is replaced.
        tensors: dense tensors of float64, 32, 16, bfloat16, int64 or int32, on any device, by name.
        manifest: all but its ``tensors``, which are filled in here.

    Returns:
        The size of the file in bytes.

    Raises:
        DeltaFileError: ``nonfinite`` if a tensor holds NaN or infinity; ``schema``, ``limit`` or
            ``unsafe`` for a name, dtype or manifest field that cannot be stored; ``io``. The previous
            file is then untouched.
    """
    where = expanded(path)
    values = {name: _storable(name, tensor, where) for name, tensor in tensors.items()}
    text = encode_manifest(replace(manifest, tensors=describe(values)), where=where)
    metadata = {"format": "pt", MANIFEST_NAME: text, DIGEST_NAME: hashlib.sha256(text.encode()).hexdigest()}
    header, order = _encode_header(values, metadata)

    def write(file: BinaryIO) -> None:
        file.write(header)
        for name in order:
            file.write(byte_view(values[name]))

    reap_once(os.path.dirname(where) or ".")
    return atomic_write(path, write)


def read_delta(path: str | os.PathLike[str], *, limits: Limits = DEFAULT) -> DeltaFile:
    """Read a delta file from an untrusted source, by copy, checking every byte.

    What remains for the caller: that the base is the right one, and that the tensors are exactly the
    ones that the method builds on it (:func:`~lightning_pet.store.fingerprint.require_exact_keys`).

    Args:
        path: the file, or a symbolic link to it.
        limits: sizes to accept; the file cannot raise them.

    Raises:
        DeltaFileError: ``io`` (cannot be read), ``unsafe`` (pickle, special file, unsafe name),
            ``limit``, ``corrupt`` (damaged), ``version`` (newer format), ``schema`` (unknown or
            ill-typed field, or no delta file), ``nonfinite``.
    """
    where = expanded(path)
    with open_regular(path, limits) as (file, size):
        stamp = stamp_of(file.fileno())
        header = read_header(file, size, limits, where)
        manifest = manifest_in(header, where)
        digests = {record.name: record.digest for record in manifest.tensors}
        tensors = {}
        for entry in header.entries:
            tensor = _read_tensor(file, entry, where)
            if digest(tensor) != digests[entry.name]:
                raise damaged_tensor(entry.name, where)
            require_finite(entry.name, tensor, where=where)
            tensors[entry.name] = tensor
        verified = Verified(stamp, header.entries, header.start) if stamp_of(file.fileno()) == stamp else None
    return DeltaFile(manifest, {name: tensors[name] for name in sorted(tensors)}, verified)


def stamp_of(file: str | os.PathLike[str] | int) -> Stamp:
    """The stamp of a file, by path or descriptor.

    Raises:
        OSError: if there is none.
    """
    status = os.stat(file)
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_again(path: str | os.PathLike[str], known: Verified) -> dict[str, Tensor] | None:
    """The values of a file that was verified, without looking at each of its bytes once more.

    Returns:
        ``None`` if it is no longer that file: :func:`read_delta` then.

    Raises:
        DeltaFileError: ``io``, or ``corrupt`` if it becomes shorter while it is read.
    """
    where, size = expanded(path), known.stamp.size - known.start
    with open_regular(path, DEFAULT) as (file, _):
        if stamp_of(file.fileno()) != known.stamp:
            return None
        whole = torch.empty(size, dtype=torch.uint8)
        file.seek(known.start)
        fill(file, byte_view(whole), where)
        if stamp_of(file.fileno()) != known.stamp:
            return None
    found = {}
    for entry in sorted(known.entries):
        part, dtype = whole[entry.begin : entry.end], DTYPES[entry.dtype]
        part = part.clone() if entry.begin % dtype.itemsize else part  # as others may lay out a file
        found[entry.name] = part.view(dtype).view(entry.shape)
    return found


def read_tensors(path: str | os.PathLike[str], *, limits: Limits = DEFAULT) -> dict[str, Tensor]:
    """Read a safetensors file that somebody else has written, by copy; there are no digests to compare.

    Raises:
        DeltaFileError: as :func:`read_delta`, but for the manifest.
    """
    where, tensors = expanded(path), {}
    with open_regular(path, limits) as (file, size):
        for entry in read_header(file, size, limits, where).entries:
            tensors[entry.name] = _read_tensor(file, entry, where)
            require_finite(entry.name, tensors[entry.name], where=where)
    return {name: tensors[name] for name in sorted(tensors)}


def _encode_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, tuple[str, ...]]:
    """Return the bytes that precede the values, and the order in which the values follow."""
    # Widest elements first keeps every tensor aligned; the name makes the order unique.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = canonical(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, tuple(order)


def _read_tensor(file: BinaryIO, entry: Entry, where: str) -> Tensor:
    """Copy the next tensor of the file into fresh memory."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    buffer = byte_view(tensor)
    fill(file, buffer, f"{where}: tensor {entry.name!r}")
    return tensor


def _storable(name: str, tensor: Tensor, where: str) -> Tensor:
    here = f"{where}: tensor {check_name(name, f'{where}: a tensor name')!r}"
    if tensor.dtype not in CODES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in CODES)
        raise fault(here, f"found dtype {tensor.dtype}, expected one of {known}. Convert it before saving.")
    try:
        value = to_host(tensor)
    except DeltaFileError as error:
        raise fault(here, str(error), error.code) from None
    require_finite(name, value, where=where)
    return value
