"""What the store has to know about tensors: codes of dtypes, digests, finiteness, exact sets of names."""

import hashlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lightning_pet.errors import DeltaFileError
from lightning_pet.layers.delta import apart
from lightning_pet.store.container import DIGEST_BYTES, TYPES, TensorRecord
from lightning_pet.store.strict_json import fault, not_finite

DTYPES: Final[Mapping[str, torch.dtype]] = {code: getattr(torch, name) for code, (name, _) in TYPES.items()}
CODES: Final[Mapping[torch.dtype, str]] = {dtype: code for code, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """What is known of a tensor before its values are read.

    Attributes:
        dtype: the element type.
        shape: the extents.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, without a copy."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def to_host(tensor: Tensor) -> Tensor:
    """The tensor contiguous in main memory; itself if it already is.

    Raises:
        DeltaFileError: code ``schema``, if it is sparse, quantised or on the meta device.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        found = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        raise DeltaFileError(f"found a tensor that is {found}, expected a dense one with values.", "schema")
    return tensor.detach().cpu().contiguous()


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a dense tensor: its first 128 bits as 32 hexadecimal digits.

    It finds damage (``torch.load`` verifies none of its bytes); it does not prove who wrote them.

    Raises:
        DeltaFileError: code ``schema``, if the tensor is sparse, quantised or on the meta device.
    """
    found = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    found.update(byte_view(to_host(tensor)))
    return found.hexdigest()[: 2 * DIGEST_BYTES]


def verify_digests(tensors: Mapping[str, Tensor], digests: Mapping[str, str], *, where: str = "the file") -> None:
    """Check that ``tensors`` are the ones that ``digests`` were taken of.

    Args:
        tensors: what was read.
        digests: :func:`digest` of each tensor when it was written.
        where: what was read, for the error.

    Raises:
        DeltaFileError: ``mismatch`` if the names differ, ``corrupt`` if the values do.
    """
    missing, extra = apart(digests.keys(), tensors.keys())
    if missing or extra:
        raise fault(where, f"{_differences(missing=missing, extra=extra)}. Copy the file again.", "mismatch")
    damaged = [name for name in sorted(tensors) if digest(tensors[name]) != digests[name]]
    if damaged:
        raise fault(
            where,
            f"{_differences(damaged=damaged)}: the bytes do not match the SHA-256 taken when they were written. "
            "Copy the file again, or use an earlier save.",
            "corrupt",
        )


def describe(tensors: Mapping[str, Tensor]) -> tuple[TensorRecord, ...]:
    """The records of some dense tensors, sorted by name, for :class:`~lightning_pet.store.manifest.Manifest`."""
    return tuple(
        TensorRecord(name, code(tensors[name].dtype), tuple(tensors[name].shape), digest(tensors[name]))
        for name in sorted(tensors)
    )


def code(dtype: torch.dtype) -> str:
    """The safetensors code of a storable dtype, else the name that torch gives it."""
    return CODES.get(dtype, str(dtype).removeprefix("torch."))


def require_finite(name: str, tensor: Tensor, *, where: str) -> None:
    """Check that a tensor holds neither NaN nor infinity.

    Raises:
        DeltaFileError: code ``nonfinite``, naming the tensor and counting the values.
    """
    if not tensor.is_floating_point():
        return
    bad = int(torch.isfinite(tensor).logical_not_().sum())
    if bad:
        raise not_finite(name, bad, tensor.numel(), where)


def specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """The dtype and shape of each tensor; meta tensors are welcome."""
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def require_exact_keys(
    found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec], *, where: str = "the file"
) -> None:
    """Check that exactly the expected tensors were found.

    A floating dtype may stand for another one (a float32 delta enters a bfloat16 model); an integer
    dtype never stands for a floating one.

    Args:
        found: what the file holds.
        expected: what the method builds on this base, best taken on the meta device.
        where: what was read, for the error.

    Raises:
        DeltaFileError: code ``mismatch``, naming the missing, extra and misshapen tensors.
    """
    misfits = []
    for name in sorted(found.keys() & expected.keys()):
        have, want = found[name], expected[name]
        same_kind = have.dtype == want.dtype or (have.dtype.is_floating_point and want.dtype.is_floating_point)
        if not same_kind or have.shape != want.shape:
            misfits.append(f"{name} (found {_spec(have)}, expected {_spec(want)})")
    missing, extra = apart(expected.keys(), found.keys())
    if misfits or missing or extra:
        differences = _differences(missing=missing, extra=extra, misshapen=misfits)
        raise fault(
            where, f"{differences}. Load it onto the base it was trained on, with the method it names.", "mismatch"
        )


def _spec(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


def _differences(**groups: list[str]) -> str:
    return "; ".join(f"{len(names)} {kind} tensors: {preview(names)}" for kind, names in groups.items() if names)


def preview(names: list[str] | tuple[str, ...], count: int = 5) -> str:
    """The first ``count`` names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
