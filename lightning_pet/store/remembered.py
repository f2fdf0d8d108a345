"""What a file remembers of a base model, read strictly and without torch; :mod:`.fingerprint` takes and compares it."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from lightning_pet.store.strict_json import (
    canonical,
    check_digest,
    check_fields,
    check_int,
    check_label,
    check_text,
    check_type,
    decode64,
    fault,
    parse_packed,
    unpack,
)

SKETCHED: Final = 12
LEAF: Final = 4  # bytes kept of each tensor's sample digest: they only name the tensor that differs
OPAQUE: Final = "opaque:"  # kind of a tensor without readable values
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_DIMS: Final = 16
_MAX_BESIDE: Final = 64


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of a base model; plain text throughout.

    Attributes:
        structure: SHA-256 of the sorted names and shapes.
        sample: SHA-256 over the sampled values of all tensors that have readable ones.
        dtypes: number of tensors per kind: a dtype code such as ``"F32"``, ``"packed:…"`` for quantised tensors
            that show the ordinary ones they are made of, or ``"opaque:…"`` for those without readable values.
        layout: packed names, kinds and shapes, so that a difference can be named.
        leaves: four bytes of each tensor's sample digest, base64.
        sketch: the first 12 sampled values of each floating tensor in bfloat16, packed.
        exact: SHA-256 over every byte, if it was asked for.
        beside: other deltas that acted when this one was trained, with a digest of their values.
    """

    structure: str
    sample: str
    dtypes: Mapping[str, int]
    layout: str
    leaves: str
    sketch: str
    exact: str | None = None
    beside: Mapping[str, str] = field(default_factory=dict)


class Remembered(NamedTuple):
    """One base tensor as a file remembers it: the first bytes of its leaf, and its sketch as bytes of bfloat16."""

    kind: str
    shape: tuple[int, ...]
    leaf: bytes
    sketch: bytes | None


def to_plain(found: Fingerprint) -> dict[str, Any]:
    """A fingerprint as a plain JSON object; :func:`from_plain` reverses it."""
    plain = {**vars(found), "dtypes": dict(found.dtypes), "beside": dict(found.beside)}
    return {key: value for key, value in plain.items() if key != "beside" or value}  # as it was before there were any


def from_plain(value: object, where: str) -> Fingerprint:
    """Read a fingerprint from untrusted JSON.

    Raises:
        DeltaFileError: ``schema`` or ``limit``, naming the field, if anything is ill-typed or inconsistent.
    """
    text = (str,)
    kinds = {"structure": text, "sample": text, "dtypes": (dict,), "layout": text, "leaves": text, "sketch": text}
    several = {"beside": (dict,)} if isinstance(value, dict) and "beside" in value else {}
    fields = check_fields(value, where, {**kinds, "exact": (str, type(None)), **several})
    for key in ("structure", "sample", "exact"):
        if fields[key] is not None:
            check_digest(fields[key], f"{where}.{key}")
    beside = fields.get("beside", {})
    if len(beside) > _MAX_BESIDE:
        raise fault(f"{where}.beside", f"found {len(beside)} deltas, expected at most {_MAX_BESIDE}.", "limit")
    for name, digest in beside.items():
        check_digest(digest, f"{where}.beside.{check_label(name, f'{where}.beside: a name')}")
    for kind, count in fields["dtypes"].items():
        check_int(count, f"{where}.dtypes.{check_text(kind, f'{where}.dtypes: a key', 64)!r}", 1)
    found = Fingerprint(**fields)
    base = remembered(found, where)
    if dict(found.dtypes) != dict(Counter(fact.kind for fact in base.values())):
        raise fault(f"{where}.dtypes", "does not count the kinds listed in the layout.")
    return found


def remembered(found: Fingerprint, where: str) -> dict[str, Remembered]:
    """Unpack a fingerprint per tensor, checking that its parts fit each other."""
    layout = _check_layout(parse_packed(found.layout, f"{where}.layout"), f"{where}.layout")
    if found.structure != structure_digest({name: shape for name, (_, shape) in layout.items()}):
        raise fault(f"{where}.structure", "is not the digest of the names and shapes in the layout.")
    leaves, sketch = decode64(found.leaves, f"{where}.leaves"), _unpack_sketch(found.sketch, f"{where}.sketch")
    readable = {name for name, (kind, _) in layout.items() if not kind.startswith(OPAQUE)}
    if len(leaves) != LEAF * len(readable):
        raise fault(f"{where}.leaves", f"found {len(leaves)} bytes, expected {LEAF * len(readable)}.")
    base, leaf_at, value_at = {}, 0, 0
    for name, (kind, shape) in layout.items():
        leaf, values = b"", None
        if name in readable:
            leaf, leaf_at = leaves[leaf_at : leaf_at + LEAF], leaf_at + LEAF
        if kind in FLOATS:
            count = min(SKETCHED, math.prod(shape))
            values, value_at = sketch[2 * value_at : 2 * (value_at + count)], value_at + count
        base[name] = Remembered(kind, shape, leaf, values)
    if value_at != len(sketch) // 2:
        raise fault(f"{where}.sketch", f"found {len(sketch) // 2} values, expected {value_at}.")
    return base


def _check_layout(rows: object, where: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for row in check_type(rows, where, (list,)):
        if len(check_type(row, where, (list,))) != 3:
            raise fault(where, f"found a row of {len(row)} fields, expected name, kind and shape.")
        name, kind = check_text(row[0], where, 1024), check_text(row[1], where, 64)
        if len(check_type(row[2], where, (list,))) > _MAX_DIMS:
            raise fault(where, f"{name!r}: found {len(row[2])} dimensions, expected at most {_MAX_DIMS}.", "limit")
        shape = tuple(check_int(extent, where) for extent in row[2])
        if layout and name <= next(reversed(layout)):
            raise fault(where, f"found {name!r} out of order, expected sorted names, each once.")
        layout[name] = (kind, shape)
    return layout


def structure_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """SHA-256 of names and shapes."""
    return hashlib.sha256(canonical([[name, list(shape)] for name, shape in shapes.items()]).encode()).hexdigest()


def _unpack_sketch(text: str, where: str) -> bytes:
    data = unpack(text, where)
    if len(data) % 2:
        raise fault(where, f"found {len(data)} bytes, expected an even number.")
    mixed = bytearray(len(data))
    mixed[1::2], mixed[::2] = data[: len(data) // 2], data[len(data) // 2 :]
    return bytes(mixed)
