"""The safetensors container, read strictly and by copy, written as a stream.

The layout is 8 bytes of header length, a JSON header, then the tensors without holes. The reader
accepts a subset of what safetensors does, and bounds each step by the one before it. It never maps
the file: a mapping turns a file that shrinks under it into a crash of the process. Torch is not needed to
read it, nor to read the manifest, and is not waited for.
"""

import contextlib
import io
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple, cast

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.files import expanded
from lightning_pet.store.strict_json import check_fields, check_int, check_name, check_type, fault, parse

DIGEST_BYTES: Final = 16
TYPES: Final[Mapping[str, tuple[str, int]]] = {
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
}
"""Of each code: torch's name of the type, and the bytes of one number."""
_MAX_DIMS: Final = 8
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Limits:
    """What a reader puts up with; the caller may raise it, a file may not.

    Attributes:
        file_bytes: size of the file.
        header_bytes: size of its JSON header.
        tensors: number of tensors.
    """

    file_bytes: int = 8 << 30
    header_bytes: int = 4 << 20
    tensors: int = 20_000


DEFAULT: Final = Limits()


class TensorRecord(NamedTuple):
    """One stored tensor.

    Attributes:
        name: canonical name in the state dict.
        dtype: code of the element type; in delta files F64, F32, F16, BF16, I64 or I32.
        shape: the extents.
        digest: see :func:`~lightning_pet.store.fingerprint.digest`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


class Entry(NamedTuple):
    """Where one tensor lies: ``begin`` and ``end`` count bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What stands before the values: text metadata, tensors in file order, and where their bytes start."""

    metadata: Mapping[str, str]
    entries: tuple[Entry, ...]
    start: int


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str], limits: Limits) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file (or a link to one) of bounded size; yield it with its size.

    Raises:
        DeltaFileError: ``io`` if it cannot be opened, ``unsafe`` if it is a folder, pipe, socket or
            device, ``limit`` if it is too large.
    """
    where = expanded(path)
    try:
        # Without O_NONBLOCK a named pipe would block the open until somebody writes to it.
        descriptor = os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise fault(ascii(where)[1:-1], f"cannot be opened ({error}). Check the path.", "io") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
            raise fault(where, f"found {kind}, expected a delta file. Give the path of the file itself.", "unsafe")
        if status.st_size > limits.file_bytes:
            text = f"found {status.st_size} bytes, expected at most {limits.file_bytes}. Raise Limits.file_bytes."
            raise fault(where, text, "limit")
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            yield cast(BinaryIO, file), status.st_size
    finally:
        os.close(descriptor)


def read_header(file: BinaryIO, size: int, limits: Limits, where: str) -> Header:
    """Read and check everything before the values; the file must be covered without hole or rest.

    Raises:
        DeltaFileError: ``unsafe`` for a pickle or zip archive; ``limit``, ``schema`` or ``corrupt``.
    """
    start = read_exact(file, min(size, 9), where)
    length = int.from_bytes(start[:8], "little")
    if size < 10 or not 2 <= length <= size - 8 or start[8:] != b"{":
        raise _foreign(start, size, length, where)
    if length > limits.header_bytes:
        text = f"found a header of {length} bytes, expected at most {limits.header_bytes}. Raise Limits.header_bytes."
        raise fault(where, text, "limit")
    try:
        text = (b"{" + read_exact(file, length - 1, where)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise fault(f"{where}: header", f"found no UTF-8 ({error.reason}). Copy the file again.", "corrupt") from None
    fields = check_type(parse(text, f"{where}: header"), f"{where}: header", (dict,))
    metadata = _metadata(fields.pop("__metadata__", None), f"{where}: __metadata__")
    if len(fields) > limits.tensors:
        text = f"found {len(fields)} tensors, expected at most {limits.tensors}. Raise Limits.tensors."
        raise fault(where, text, "limit")
    entries = sorted((_entry(name, item, where) for name, item in fields.items()), key=lambda entry: entry[3:])
    _check_cover(entries, size - 8 - length, where)
    return Header(metadata, tuple(entries), 8 + length)


def read_exact(file: BinaryIO, count: int, where: str) -> bytes:
    """Read ``count`` bytes; fewer mean that somebody shortened the file after it was opened."""
    buffer = bytearray(count)
    fill(file, memoryview(buffer), where)
    return bytes(buffer)


def fill(file: BinaryIO, buffer: memoryview, where: str) -> None:
    """Read as many bytes as a buffer holds.

    Raises:
        DeltaFileError: ``io`` if the disk refuses, ``corrupt`` if the file ends before.
    """
    done = 0
    while done < len(buffer):
        try:
            got = cast(io.RawIOBase, file).readinto(buffer[done:])
        except OSError as error:
            raise fault(where, f"reading failed ({error}). Check the disk, then copy the file again.", "io") from error
        if not got:
            text = f"the file ended after {done} of {len(buffer)} bytes. Copy the file again."
            raise fault(where, text, "corrupt")
        done += got


def _foreign(start: bytes, size: int, length: int, where: str) -> DeltaFileError:
    if start.startswith(_PICKLES):
        return fault(
            where,
            "found a pickle or a zip archive (as torch.save writes), expected a safetensors file. A pickle can run "
            "code; delta files never are one. Ask for the delta as saved by save_delta.",
            "unsafe",
        )
    if start.startswith((b"{", b"[")):
        return fault(
            where,
            "found text, such as JSON, expected a safetensors file. Give the delta itself: the *.pet.safetensors "
            "beside a record of runs, or the folder of an adapter_config.json.",
            "schema",
        )
    text = f"found {size} bytes that begin with a header length of {length}, expected a whole safetensors file."
    return fault(where, f"{text} It is cut short or damaged: copy it again.", "corrupt")


def _metadata(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    fields: dict[str, str] = check_type(value, where, (dict,))
    for key, text in fields.items():
        check_type(text, f"{where}.{key[:64]!r}", (str,))
    return fields


def _entry(name: str, value: object, where: str) -> Entry:
    here = f"{where}: tensor {check_name(name, f'{where}: a tensor name')!r}"
    fields = check_fields(value, here, {"dtype": (str,), "shape": (list,), "data_offsets": (list,)})
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if dtype not in TYPES:
        raise fault(here, f"found dtype {dtype[:64]!r}, expected one of {', '.join(TYPES)}.")
    if len(shape) > _MAX_DIMS or len(offsets) != 2:
        text = f"found {len(shape)} dimensions and {len(offsets)} offsets, expected at most {_MAX_DIMS} and 2."
        raise fault(here, text, "limit")
    extents = tuple(check_int(extent, f"{here}.shape") for extent in shape)
    begin, end = (check_int(offset, f"{here}.data_offsets") for offset in offsets)
    # Strides of an empty tensor are products of its other extents, which must fit 64 bits too.
    if math.prod(max(extent, 1) for extent in extents) >= 2**60:
        raise fault(here, f"found the shape {list(extents)}, expected fewer than 2**60 values.", "limit")
    count = math.prod(extents) * TYPES[dtype][1]
    if end - begin != count:
        raise fault(here, f"found {end - begin} bytes, expected {count} for {dtype} {list(extents)}.", "corrupt")
    return Entry(name, dtype, extents, begin, end)


def _check_cover(entries: list[Entry], size: int, where: str) -> None:
    position = 0
    for entry in entries:
        if entry.begin != position:
            text = f"starts at byte {entry.begin}, expected {position}: holes and overlaps are not allowed."
            raise fault(f"{where}: tensor {entry.name!r}", text, "corrupt")
        position = entry.end
    if position != size:
        text = f"found {size} bytes of values, expected {position}. The file is cut short or has a tail: copy it again."
        raise fault(where, text, "corrupt")
