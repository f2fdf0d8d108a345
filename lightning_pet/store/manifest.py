"""The manifest: all that a delta says of itself, as one closed JSON object.

Nothing in it is ever imported, evaluated or matched as a pattern: it holds numbers, enumerated words
and exact names. The bulky parts (targets, digests, the base's sketch) are packed, the rest is readable.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, get_args

from lightning_pet.model.structure import Role, Target
from lightning_pet.store.container import DEFAULT, DIGEST_BYTES, Header, Limits, TensorRecord, open_regular, read_header
from lightning_pet.store.files import expanded
from lightning_pet.store.strict_json import (
    canonical,
    check_digest,
    check_fields,
    check_int,
    check_label,
    check_name,
    check_plain,
    check_range,
    check_text,
    check_type,
    decode64,
    encode64,
    fault,
    pack,
    parse,
    parse_packed,
    unpack,
)

# --- what a file remembers of a base; :mod:`lightning_pet.store.fingerprint` takes and compares it ---


SKETCHED: Final = 12
LEAF: Final = 4  # bytes kept of each tensor's sample digest: they only name the tensor that differs
OPAQUE: Final = "opaque:"  # kind of a tensor without readable values
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_DIMS: Final = 16
_MAX_BESIDE: Final = 64
_LATER: Final = ("beside", "without")  # fields that earlier files do not have


# Thousands of deltas of one base repeat its fingerprint and their places letter by letter: what was found sound is so
# wherever it stands again.
_KNOWN: Final = 16
_SOUND: Final[dict[tuple[Any, ...], None]] = {}
_TARGETS: Final[dict[str, tuple[Target, ...]]] = {}


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
        without: of tensors, the ranges of rows that the delta replaces: they are no part of the base.
    """

    structure: str
    sample: str
    dtypes: Mapping[str, int]
    layout: str
    leaves: str
    sketch: str
    exact: str | None = None
    beside: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)


class Remembered(NamedTuple):
    """One base tensor as a file remembers it: the first bytes of its leaf, and its sketch as bytes of bfloat16."""

    kind: str
    shape: tuple[int, ...]
    leaf: bytes
    sketch: bytes | None


def to_plain(found: Fingerprint) -> dict[str, Any]:
    """A fingerprint as a plain JSON object; :func:`from_plain` reverses it."""
    without = {name: [list(pair) for pair in ranges] for name, ranges in found.without.items()}
    plain = {**vars(found), "dtypes": dict(found.dtypes), "beside": dict(found.beside), "without": without}
    return {key: value for key, value in plain.items() if key not in _LATER or value}  # as before there were any


def from_plain(value: object, where: str) -> Fingerprint:
    """Read a fingerprint from untrusted JSON.

    Raises:
        DeltaFileError: ``schema`` or ``limit``, naming the field, if anything is ill-typed or inconsistent.
    """
    text = (str,)
    kinds = {"structure": text, "sample": text, "dtypes": (dict,), "layout": text, "leaves": text, "sketch": text}
    later = {key: (dict,) for key in _LATER if isinstance(value, dict) and key in value}
    fields = check_fields(value, where, {**kinds, "exact": (str, type(None)), **later})
    for key in ("structure", "sample", "exact"):
        if fields[key] is not None:
            check_digest(fields[key], f"{where}.{key}")
    beside = fields.get("beside", {})
    if len(beside) > _MAX_BESIDE:
        raise fault(f"{where}.beside", f"found {len(beside)} deltas, expected at most {_MAX_BESIDE}.", "limit")
    for name, digest in beside.items():
        check_digest(digest, f"{where}.beside.{check_label(name, f'{where}.beside: a name')}")
    for name, ranges in fields.get("without", {}).items():
        own = f"{where}.without.{check_name(name, f'{where}.without')}"
        for pair in check_type(ranges, own, (list,)):
            check_range(pair, own)
    for kind, count in fields["dtypes"].items():
        check_int(count, f"{where}.dtypes.{check_text(kind, f'{where}.dtypes: a key', 64)!r}", 1)
    found = Fingerprint(**fields)
    text_of = (found.structure, found.layout, found.leaves, found.sketch, tuple(sorted(found.dtypes.items())))
    if text_of in _SOUND:
        return found
    base = remembered(found, where)
    if dict(found.dtypes) != dict(Counter(fact.kind for fact in base.values())):
        raise fault(f"{where}.dtypes", "does not count the kinds listed in the layout.")
    _keep(_SOUND, text_of, None)
    return found


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= _KNOWN:
        known.clear()
    known[key] = value


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


# --- the manifest ---------------------------------------------------------------------------------


FORMAT: Final = 1
MANIFEST_NAME: Final = "pet.manifest"
DIGEST_NAME: Final = "pet.sha256"
MAX_METHODS: Final = 64
MAX_TARGETS: Final = 20_000
MAX_ROW_RANGES: Final = 256  # an interleaved projection has one per head
MAX_SIZES: Final = 16
MAX_NOTES: Final = 4096
_ROLES: Final = (None, *get_args(Role))
_NONE: Final = type(None)


@dataclass(frozen=True)
class MethodRecord:
    """One method of a delta.

    Attributes:
        method: the method's key, e.g. ``"lora"``: 1 to 64 of ``A-Z a-z 0-9 _ -``.
        name: the delta's name, e.g. ``"default"``, of the same characters.
        config: the method's arguments as plain JSON values. Ranges are the method's to check.
        targets: where it was inserted, resolved, as paths from the adapted root.
    """

    method: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything about a delta except its values.

    Attributes:
        methods: the methods, in the order in which they were inserted.
        tensors: the stored tensors sorted by name; the writer fills them in.
        base: fingerprint of the base that the delta was trained on.
        root: path of the adapted module inside the LightningModule; for information.
        step: optimizer steps taken.
        notes: free text, at most 4 KB in all, never interpreted.
        written_by: the writing program and version; for information.
        format: major version of the format.
    """

    methods: tuple[MethodRecord, ...]
    tensors: tuple[TensorRecord, ...] = ()
    base: Fingerprint | None = None
    root: str = ""
    step: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    written_by: str = "lightning_pet"
    format: int = FORMAT


def read_manifest(path: str | os.PathLike[str], *, limits: Limits = DEFAULT) -> Manifest:
    """Read what a delta file says of itself, without its values.

    Raises:
        DeltaFileError: see :func:`~lightning_pet.store.delta_file.read_delta`; damage of the values is not looked for.
    """
    where = expanded(path)
    with open_regular(path, limits) as (file, size):
        return manifest_in(read_header(file, size, limits, where), where)


def manifest_in(header: Header, where: str) -> Manifest:
    """The manifest in the header of a delta file.

    Raises:
        DeltaFileError: ``schema`` if it is no delta file; else see :func:`decode_manifest`.
    """
    metadata = header.metadata
    if metadata.keys() != {"format", MANIFEST_NAME, DIGEST_NAME} or metadata["format"] != "pt":
        found = ", ".join(sorted(key[:40] for key in metadata)[:5]) or "none"
        raise fault(
            where,
            f"found a safetensors file with the metadata {found!a}, expected 'format', {MANIFEST_NAME!r} and "
            f"{DIGEST_NAME!r}. It was not written by save_delta; a folder of HF PEFT is imported, not loaded.",
        )
    text = metadata[MANIFEST_NAME]
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != metadata[DIGEST_NAME]:
        raise fault(where, "the manifest does not match its SHA-256. Copy the file again.", "corrupt")
    layout = [(entry.name, entry.dtype, entry.shape) for entry in header.entries]
    return decode_manifest(text, layout, where=f"{where}: manifest")


def encode_manifest(manifest: Manifest, *, where: str = "the manifest") -> str:
    """The canonical JSON text of a manifest; whatever it returns, :func:`decode_manifest` accepts.

    Raises:
        DeltaFileError: ``schema``, ``limit`` or ``unsafe``, naming the field that cannot be stored.
    """
    records = sorted(manifest.tensors)
    layout = [(record.name, record.dtype, record.shape) for record in records]
    plain = {
        "format": manifest.format,
        "written_by": manifest.written_by,
        "root": manifest.root,
        "step": manifest.step,
        "notes": check_plain(manifest.notes, f"{where}.notes"),
        "methods": [_method_to_plain(record, f"{where}.methods.{record.name}") for record in manifest.methods],
        "tensors": {
            "count": len(records),
            "layout": _layout_digest(layout),
            "digests": encode64(b"".join(bytes.fromhex(record.digest) for record in records)),
        },
        "base": None if manifest.base is None else to_plain(manifest.base),
    }
    _from_plain(plain, layout, where)
    return canonical(plain)


def decode_manifest(
    text: str, layout: Iterable[tuple[str, str, tuple[int, ...]]] = (), *, where: str = "the manifest"
) -> Manifest:
    """Read a manifest from untrusted text.

    Args:
        text: what :func:`encode_manifest` returned.
        layout: name, dtype code and shape of every tensor that the manifest came with; they are not
            repeated in it, but it holds their digest.
        where: what is being read, for errors.

    Raises:
        DeltaFileError: ``version`` if a newer release wrote it; ``corrupt`` if the tensors are not the
            ones it was written with; ``schema``, ``limit`` or ``unsafe`` for a field, which is named.
    """
    plain = check_type(parse(text, where), where, (dict,))
    found = plain.get("format")
    if type(found) is int and found > FORMAT:
        writer = ascii(plain.get("written_by"))[:80]
        raise fault(
            where,
            f"found format {found if found < 2**63 else 'beyond 64 bits'} (written by {writer}), expected at most "
            f"{FORMAT}. Upgrade lightning-pet to the release that wrote it.",
            "version",
        )
    return _from_plain(plain, sorted(layout), where)


def _from_plain(plain: object, layout: list[tuple[str, str, tuple[int, ...]]], where: str) -> Manifest:
    schema = {"format": (int,), "written_by": (str,), "root": (str,), "step": (int, _NONE), "notes": (dict,)}
    fields = check_fields(plain, where, {**schema, "methods": (list,), "tensors": (dict,), "base": (dict, _NONE)})
    check_int(fields["format"], f"{where}.format", FORMAT, FORMAT)
    if fields["root"]:
        check_name(fields["root"], f"{where}.root")
    if fields["step"] is not None:
        check_int(fields["step"], f"{where}.step")
    methods = checked_methods(fields["methods"], f"{where}.methods", _unpacked_rows)
    return Manifest(
        methods=methods,
        tensors=_records(fields["tensors"], layout, f"{where}.tensors"),
        base=None if fields["base"] is None else from_plain(fields["base"], f"{where}.base"),
        root=fields["root"],
        step=fields["step"],
        notes=_notes(fields["notes"], f"{where}.notes"),
        written_by=check_text(fields["written_by"], f"{where}.written_by", 256),
    )


def checked_methods(
    items: list[object], where: str, rows_of: Callable[[Any, str], list[object]]
) -> tuple[MethodRecord, ...]:
    """The methods of a file, every field checked.

    Args:
        items: an object per method.
        where: what is read, for errors.
        rows_of: gives the targets of a method as lists of seven fields, from what the file holds of them.

    Raises:
        DeltaFileError: ``schema``, ``limit`` or ``unsafe``, naming the field.
    """
    if not 0 < len(items) <= MAX_METHODS:
        raise fault(where, f"found {len(items)} methods, expected 1 to {MAX_METHODS}.", "limit")
    methods: list[MethodRecord] = []
    room = MAX_TARGETS
    for index, item in enumerate(items):
        methods.append(_checked_method(item, f"{where}[{index}]", room, rows_of))
        room -= len(methods[-1].targets)
    (method, name), count = Counter((record.method, record.name) for record in methods).most_common(1)[0]
    if count > 1:
        raise fault(where, f"found {method!r} named {name!r} twice, expected each name once per method.")
    return tuple(methods)


def _method_to_plain(record: MethodRecord, where: str) -> dict[str, Any]:
    rows = [
        [
            target.module,
            target.parameter,
            target.role,
            target.cross,
            target.rows and [list(pair) for pair in target.rows],
            target.reads,
            list(target.sizes),
        ]
        for target in record.targets
    ]
    return {
        "method": record.method,
        "name": record.name,
        "config": check_plain(record.config, f"{where}.config", depth=4),
        "targets": pack(canonical(check_plain(rows, f"{where}.targets")).encode()),
    }


def _unpacked_rows(targets: Any, where: str) -> list[object]:
    rows: list[object] = check_type(parse_packed(targets, where), where, (list,))
    return rows


def _checked_method(value: object, where: str, room: int, rows_of: Callable[[Any, str], list[object]]) -> MethodRecord:
    fields = check_fields(value, where, {"method": (str,), "name": (str,), "config": (dict,), "targets": (str, list)})
    packed = fields["targets"]
    known = _TARGETS.get(packed) if isinstance(packed, str) else None
    rows = rows_of(packed, f"{where}.targets") if known is None else known
    if len(rows) > room:
        text = f"found {len(rows)} targets, expected at most {room} of {MAX_TARGETS} for all methods."
        raise fault(f"{where}.targets", text, "limit")
    method, name = (check_label(fields[key], f"{where}.{key}") for key in ("method", "name"))
    config = check_plain(fields["config"], f"{where}.config", depth=4)
    if known is None:
        known = tuple(_target(row, f"{where}.targets[{index}]") for index, row in enumerate(rows))
        if isinstance(packed, str):
            _keep(_TARGETS, packed, known)
    return MethodRecord(method, name, config, known)


def _target(row: object, where: str) -> Target:
    fields = check_type(row, where, (list,))
    if len(fields) != 7:
        expected = "module, parameter, role, cross, rows, reads and sizes"
        raise fault(where, f"found {len(fields)} fields, expected {expected}.")
    module, parameter, role, cross, rows, reads, sizes = fields
    if type(role) not in (str, _NONE) or role not in _ROLES:
        known = ", ".join(str(known) for known in _ROLES)
        raise fault(where, f"found the role {ascii(role)[:80]}, expected one of {known}.")
    return Target(
        module=check_name(module, f"{where}.module") if module != "" else "",
        parameter=check_name(parameter, f"{where}.parameter") if parameter != "" else "",
        role=role,
        cross=check_type(cross, f"{where}.cross", (bool,)),
        rows=None if rows is None else tuple(check_range(pair, f"{where}.rows") for pair in _bounded(rows, where)),
        reads=reads if reads is None or reads == "" else check_name(reads, f"{where}.reads"),
        sizes=_sizes(sizes, f"{where}.sizes"),
    )


def _sizes(value: object, where: str) -> tuple[int, ...]:
    sizes = check_type(value, where, (list,))
    if len(sizes) > MAX_SIZES:
        raise fault(where, f"found {len(sizes)} sizes, expected at most {MAX_SIZES}.", "limit")
    return tuple(check_int(size, where) for size in sizes)


def _bounded(rows: object, where: str) -> list[object]:
    ranges: list[object] = check_type(rows, f"{where}.rows", (list,))
    if not 0 < len(ranges) <= MAX_ROW_RANGES:
        raise fault(f"{where}.rows", f"found {len(ranges)} ranges, expected 1 to {MAX_ROW_RANGES}.", "limit")
    return ranges


def _notes(value: Mapping[str, object], where: str) -> dict[str, str]:
    notes = {check_text(key, f"{where}: a key", 256): check_text(text, where, MAX_NOTES) for key, text in value.items()}
    size = sum(len(part.encode()) for item in notes.items() for part in item)
    if size > MAX_NOTES:
        raise fault(where, f"found {size} bytes, expected at most {MAX_NOTES}.", "limit")
    return notes


def _layout_digest(layout: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    rows = [[name, dtype, list(shape)] for name, dtype, shape in layout]
    return hashlib.sha256(canonical(rows).encode()).hexdigest()


def _records(value: object, layout: list[tuple[str, str, tuple[int, ...]]], where: str) -> tuple[TensorRecord, ...]:
    """Join the digests with the names, dtypes and shapes of the tensors that came with them."""
    fields = check_fields(value, where, {"count": (int,), "layout": (str,), "digests": (str,)})
    stated, digests = check_digest(fields["layout"], f"{where}.layout"), decode64(fields["digests"], f"{where}.digests")
    if fields["count"] != len(layout) or stated != _layout_digest(layout):
        raise fault(
            where,
            f"found {len(layout)} tensors that are not the {fields['count']} the manifest was written with "
            "(a name, dtype or shape differs). Copy the file again.",
            "corrupt",
        )
    if len(digests) != DIGEST_BYTES * len(layout):
        raise fault(
            f"{where}.digests", f"found {len(digests)} bytes, expected {DIGEST_BYTES} for each of {len(layout)}."
        )
    hashes = (digests[start : start + DIGEST_BYTES].hex() for start in range(0, len(digests), DIGEST_BYTES))
    return tuple(
        TensorRecord(check_name(name, f"{where}: a name"), dtype, shape, digest)
        for (name, dtype, shape), digest in zip(layout, hashes, strict=True)
    )
