"""Recognise the base model that a delta was trained on, in milliseconds and without keeping it.

Four layers, each finding what the one before misses: ``structure`` (names and shapes), ``sample``
(256 values per tensor, compared bit by bit), ``sketch`` (12 of them in bfloat16, which tells a cast of
the same base from another base) and, on request, ``exact`` (every byte). A change in a share p of one
tensor escapes the sample with probability (1-p)²⁵⁶: for 1 % of the values that is 8 %.
"""

import enum
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lightning_pet.errors import DeltaFileError
from lightning_pet.layers.delta import apart
from lightning_pet.layers.sharding import ordinary_parts, whole
from lightning_pet.store.container import DIGEST_BYTES, TYPES, TensorRecord
from lightning_pet.store.manifest import (
    FLOATS,
    LEAF,
    OPAQUE,
    SKETCHED,
    Fingerprint,
    Remembered,
    remembered,
    structure_digest,
)
from lightning_pet.store.strict_json import canonical, encode64, fault, not_finite, pack

# --- what is known of tensors: codes of dtypes, digests, finiteness, exact sets of names ----------


DTYPES: Final[Mapping[str, torch.dtype]] = {code: getattr(torch, name) for code, (name, _) in TYPES.items()}
CODES: Final[Mapping[torch.dtype, str]] = {dtype: code for code, dtype in DTYPES.items()}


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


_SUMMED: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def require_finite(name: str, tensor: Tensor, *, where: str) -> None:
    """Check that a tensor holds neither NaN nor infinity.

    Raises:
        DeltaFileError: code ``nonfinite``, naming the tensor and counting the values.
    """
    if not tensor.is_floating_point():
        return
    if tensor.dtype in _SUMMED and math.isfinite(tensor.sum().item()):  # nothing in a sum takes them away again
        return
    bad = int(torch.isfinite(tensor).logical_not_().sum())
    if bad:
        raise not_finite(name, bad, tensor.numel(), where)


def _differences(**groups: list[str]) -> str:
    return "; ".join(f"{len(names)} {kind} tensors: {_preview(names)}" for kind, names in groups.items() if names)


def _preview(names: list[str] | tuple[str, ...], count: int = 5) -> str:
    """The first ``count`` names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


# --- fingerprints ---------------------------------------------------------------------------------


SAMPLES: Final = 256
_SHOWN: Final = 5
_PACKED: Final = "packed:"  # kind of a tensor subclass that names the ordinary tensors it is made of
# bfloat16 rounds by at most 2⁻⁸ of the value, a float16 cast adds 2⁻¹¹, and near zero its fixed step.
_RELATIVE: Final = 2.0**-8 + 2.0**-10
_ABSOLUTE: Final = 2.0**-24


Ranges = Sequence[Sequence[int]]
"""Ranges of rows in ascending order, each from its first to behind its last."""


class Verdict(enum.Enum):
    """How a model relates to the base that a fingerprint was taken of."""

    EXACT = "exact"
    SAMPLED_EQUAL = "sampled-equal"
    CAST = "cast"
    UNVERIFIED = "unverified"
    DIFFERENT = "different"


class Comparison(NamedTuple):
    """A verdict and its reason.

    Attributes:
        verdict: the weakest verdict over all tensors.
        tensors: the first five names that it is about; empty when all agree.
        explanation: one sentence for a person.
    """

    verdict: Verdict
    tensors: tuple[str, ...]
    explanation: str


class _Facts(NamedTuple):
    """One base tensor as it is now: a full leaf, and values as they are."""

    kind: str
    shape: tuple[int, ...]
    leaf: bytes
    sketch: Tensor | None


def fingerprint(
    named: Iterable[tuple[str, Tensor]], exact: bool = False, without: Mapping[str, Ranges] | None = None
) -> Fingerprint:
    """Take the fingerprint of a base model.

    Args:
        named: canonical name and tensor of every base parameter, each once (a tied one too). Any device,
            any strides; one after the other, so that sharded ones may be gathered in turn.
        exact: also hash every byte (about 1 GB/s); left out if a tensor has no readable values.
        without: rows of tensors that are no part of the base, by name.

    Returns:
        The same fingerprint for the same values, whatever the device and the order.
    """
    without = dict(without or {})
    seen, digest = _look(named, exact, without)
    sketches = [fact.sketch.to(torch.bfloat16) for fact in seen.values() if fact.sketch is not None]
    return Fingerprint(
        structure=structure_digest({name: fact.shape for name, fact in seen.items()}),
        sample=_sample(seen),
        dtypes=dict(sorted(Counter(fact.kind for fact in seen.values()).items())),
        layout=pack(canonical([[name, fact.kind, list(fact.shape)] for name, fact in seen.items()]).encode()),
        leaves=encode64(b"".join(fact.leaf[:LEAF] for fact in seen.values())),
        sketch=_pack_sketch(torch.cat(sketches) if sketches else torch.empty(0, dtype=torch.bfloat16)),
        exact=digest,
        without=without,
    )


def _look(
    named: Iterable[tuple[str, Tensor]], exact: bool, without: Mapping[str, Ranges]
) -> tuple[dict[str, _Facts], str | None]:
    """Facts of each tensor in the order of the names; if asked for, SHA-256 over name, dtype, shape and every byte.

    The digest is ``None`` if a tensor has no readable values.
    """
    seen: dict[str, _Facts] = {}
    leaves: dict[str, str] = {}
    for name, tensor in named:
        tensor = _rest(whole(tensor.detach()), without.get(name, ()))
        seen[name] = _observe(name, tensor)
        if exact and (parts := ordinary_parts(tensor)):
            leaves[name] = "".join(f"{name}\0{digest(part)}\n" for part in parts)
    seen = dict(sorted(seen.items()))
    if not exact or leaves.keys() != seen.keys():
        return seen, None
    return seen, hashlib.sha256("".join(leaves[name] for name in seen).encode()).hexdigest()


def _rest(tensor: Tensor, ranges: Ranges) -> Tensor:
    """The rows outside of the ranges: where these are the last ones, what the tensor was before it had them."""
    if not ranges or tensor.dim() < 2 or type(tensor.data) is not Tensor:
        return tensor
    ends = [0, *(end for _, end in ranges)]
    starts = [*(start for start, _ in ranges), tensor.shape[0]]
    pieces = [tensor[end:start] for end, start in zip(ends, starts, strict=True) if end < min(start, tensor.shape[0])]
    return pieces[0] if len(pieces) == 1 else torch.cat([tensor[:0], *pieces])


def compare(expected: Fingerprint, named: Iterable[tuple[str, Tensor]], *, exact: bool = False) -> Comparison:
    """Compare a model with the base that ``expected`` was taken of.

    Args:
        expected: the remembered fingerprint.
        named: as for :func:`fingerprint`.
        exact: compare every byte, where ``expected`` has the digest for it.

    Returns:
        ``EXACT`` or ``SAMPLED_EQUAL`` if the values agree bit by bit; ``CAST`` if some tensors have
        another floating dtype and agree within its rounding; ``UNVERIFIED`` if some are quantised (to
        other numbers than then) or on the meta device, so that nothing can be said; ``DIFFERENT`` if names,
        shapes or values differ. Values of one dtype that differ at all are different, however close.
    """
    base = remembered(expected, "fingerprint")
    seen, digest = _look(named, exact and expected.exact is not None, expected.without)
    misfits = _misfits(base, seen)
    if misfits is not None:
        return misfits
    judged: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    for name, fact in seen.items():
        judged[_judge(base[name], fact)].append(name)
    if judged[Verdict.DIFFERENT]:
        return _values_differ(judged[Verdict.DIFFERENT], len(seen))
    if names := judged[Verdict.UNVERIFIED]:
        kinds = ", ".join(sorted({f"{base[name].kind} then, {seen[name].kind} now" for name in names}))
        text = f"{len(names)} of {len(seen)} base tensors have no comparable values ({kinds}): {_preview(names)}."
        return Comparison(Verdict.UNVERIFIED, tuple(names[:_SHOWN]), text)
    if names := judged[Verdict.CAST]:
        kinds = ", ".join(sorted({f"{base[name].kind} then, {seen[name].kind} now" for name in names}))
        text = f"{len(names)} of {len(seen)} base tensors were cast ({kinds}) and agree within rounding."
        return Comparison(Verdict.CAST, tuple(names[:_SHOWN]), text)
    return _equal(expected, digest, seen, exact)


def _equal(expected: Fingerprint, digest: str | None, seen: dict[str, _Facts], exact: bool) -> Comparison:
    count = len(seen)
    if _sample(seen) != expected.sample:
        return Comparison(Verdict.DIFFERENT, (), f"the sampled values of {count} base tensors differ.")
    if exact and expected.exact is not None:
        if digest != expected.exact:
            text = f"some of {count} base tensors differ in values that were not sampled."
            return Comparison(Verdict.DIFFERENT, (), text)
        return Comparison(Verdict.EXACT, (), f"all {count} base tensors are the same in every byte.")
    without = " (the file holds no digest of every byte)" if exact else ""
    return Comparison(Verdict.SAMPLED_EQUAL, (), f"all {count} base tensors agree in their samples{without}.")


def _values_differ(names: list[str], count: int) -> Comparison:
    text = f"the values of {len(names)} of {count} base tensors differ: {_preview(names, _SHOWN)}."
    return Comparison(Verdict.DIFFERENT, tuple(names[:_SHOWN]), text)


def _misfits(base: Mapping[str, Remembered], seen: Mapping[str, _Facts]) -> Comparison | None:
    """Differences of names and shapes; a quantised tensor may be packed into another shape."""
    missing, extra = apart(base.keys(), seen.keys())
    misshapen = [
        f"{name} ({list(base[name].shape)} then, {list(seen[name].shape)} now)"
        for name in sorted(base.keys() & seen.keys())
        if base[name].shape != seen[name].shape and (_has_shape(base[name]) and _has_shape(seen[name]))
    ]
    if not (missing or extra or misshapen):
        return None
    groups = {"missing": missing, "extra": extra, "of another shape": misshapen}
    parts = [f"{len(names)} {kind}: {_preview(names, 3)}" for kind, names in groups.items() if names]
    names = (missing + extra + [text.split(" ")[0] for text in misshapen])[:_SHOWN]
    return Comparison(Verdict.DIFFERENT, tuple(names), f"the base has other parameters ({'; '.join(parts)}).")


def _has_shape(fact: _Facts | Remembered) -> bool:
    return fact.kind in FLOATS or fact.kind == f"{OPAQUE}meta"


def _judge(then: Remembered, now: _Facts) -> Verdict:
    if then.kind == now.kind and then.leaf and then.leaf == now.leaf[:LEAF]:
        return Verdict.SAMPLED_EQUAL
    if then.sketch is None or now.sketch is None:
        return Verdict.UNVERIFIED
    if then.kind == now.kind:
        return Verdict.DIFFERENT
    kept = torch.frombuffer(bytearray(then.sketch), dtype=torch.bfloat16) if then.sketch else now.sketch[:0]
    old, new = kept.double(), now.sketch.double()
    near = (old - new).abs() <= _RELATIVE * torch.maximum(old.abs(), new.abs()) + _ABSOLUTE
    return Verdict.CAST if bool((near | (old == new) | (old.isnan() & new.isnan())).all()) else Verdict.DIFFERENT


def _kind(tensor: Tensor, parts: list[Tensor]) -> str:
    if not parts:
        return f"{OPAQUE}{'meta' if tensor.is_meta else type(tensor.data).__name__}"
    return code(tensor.dtype) if parts[0] is tensor else f"{_PACKED}{type(tensor.data).__name__}"


def _observe(name: str, tensor: Tensor) -> _Facts:
    parts, shape = ordinary_parts(tensor), tuple(tensor.shape)
    kind = _kind(tensor, parts)
    if not parts:
        return _Facts(kind, shape, b"", None)
    leaf = hashlib.sha256(f"{name}\0{kind}\0".encode())
    for part in parts:
        part = part.detach().view(torch.uint8) if part.dtype.itemsize == 1 else part.detach()
        values = torch.take(part, _positions(name, part.numel()).to(part.device)).cpu()
        leaf.update(byte_view(values))
    return _Facts(kind, shape, leaf.digest(), values[:SKETCHED] if kind in FLOATS else None)


def _positions(name: str, count: int) -> Tensor:
    """Which values stand for a tensor: all of a small one, else 256 drawn from a hash of its name."""
    if count <= SAMPLES:
        return torch.arange(count)
    # A hash and not a generator: the same on every version and device, and no random state is touched.
    seed = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    drawn = bytearray(hashlib.shake_128(seed).digest(8 * SAMPLES))
    return torch.frombuffer(drawn, dtype=torch.int64).bitwise_and_(2**63 - 1).remainder_(count)


def _sample(seen: Mapping[str, _Facts]) -> str:
    return hashlib.sha256(b"".join(fact.leaf for fact in seen.values())).hexdigest()


def _pack_sketch(values: Tensor) -> str:
    """Sign and exponent bytes first, then mantissa bytes: apart they compress, mixed they do not."""
    mixed = bytes(byte_view(values))
    return pack(mixed[1::2] + mixed[::2])
