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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lightning_pet.layers.sharding import ordinary_parts, whole
from lightning_pet.store import tensors as facts
from lightning_pet.store.strict_json import (
    canonical,
    check_digest,
    check_fields,
    check_int,
    check_label,
    check_text,
    check_type,
    decode64,
    encode64,
    fault,
    pack,
    parse_packed,
    unpack,
)

SAMPLES: Final = 256
SKETCHED: Final = 12
_LEAF: Final = 4  # bytes kept of each tensor's sample digest: they only name the tensor that differs
_SHOWN: Final = 5
_MAX_DIMS: Final = 16
_MAX_BESIDE: Final = 64
_OPAQUE: Final = "opaque:"  # kind of a tensor without readable values
_PACKED: Final = "packed:"  # kind of a tensor subclass that names the ordinary tensors it is made of
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
# bfloat16 rounds by at most 2⁻⁸ of the value, a float16 cast adds 2⁻¹¹, and near zero its fixed step.
_RELATIVE: Final = 2.0**-8 + 2.0**-10
_ABSOLUTE: Final = 2.0**-24


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
    """One base tensor: seen now (a full leaf, values as they are), or remembered (4 bytes, in bfloat16)."""

    kind: str
    shape: tuple[int, ...]
    leaf: bytes
    sketch: Tensor | None


def fingerprint(named: Iterable[tuple[str, Tensor]], exact: bool = False) -> Fingerprint:
    """Take the fingerprint of a base model.

    Args:
        named: canonical name and tensor of every base parameter, each once (a tied one too). Any device,
            any strides; one after the other, so that sharded ones may be gathered in turn.
        exact: also hash every byte (about 1 GB/s); left out if a tensor has no readable values.

    Returns:
        The same fingerprint for the same values, whatever the device and the order.
    """
    seen, digest = _look(named, exact)
    sketches = [fact.sketch.to(torch.bfloat16) for fact in seen.values() if fact.sketch is not None]
    return Fingerprint(
        structure=_structure({name: fact.shape for name, fact in seen.items()}),
        sample=_sample(seen),
        dtypes=dict(sorted(Counter(fact.kind for fact in seen.values()).items())),
        layout=pack(canonical([[name, fact.kind, list(fact.shape)] for name, fact in seen.items()]).encode()),
        leaves=encode64(b"".join(fact.leaf[:_LEAF] for fact in seen.values())),
        sketch=_pack_sketch(torch.cat(sketches) if sketches else torch.empty(0, dtype=torch.bfloat16)),
        exact=digest,
    )


def _look(named: Iterable[tuple[str, Tensor]], exact: bool) -> tuple[dict[str, _Facts], str | None]:
    """Facts of each tensor in the order of the names; if asked for, SHA-256 over name, dtype, shape and every byte.

    The digest is ``None`` if a tensor has no readable values.
    """
    seen: dict[str, _Facts] = {}
    leaves: dict[str, str] = {}
    for name, tensor in named:
        tensor = whole(tensor.detach())
        seen[name] = _observe(name, tensor)
        if exact and (parts := ordinary_parts(tensor)):
            leaves[name] = "".join(f"{name}\0{facts.digest(part)}\n" for part in parts)
    seen = dict(sorted(seen.items()))
    if not exact or leaves.keys() != seen.keys():
        return seen, None
    return seen, hashlib.sha256("".join(leaves[name] for name in seen).encode()).hexdigest()


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
    base = _remember(expected, "fingerprint")
    seen, digest = _look(named, exact and expected.exact is not None)
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
        text = f"{len(names)} of {len(seen)} base tensors have no comparable values ({kinds}): {facts.preview(names)}."
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
    text = f"the values of {len(names)} of {count} base tensors differ: {facts.preview(names, _SHOWN)}."
    return Comparison(Verdict.DIFFERENT, tuple(names[:_SHOWN]), text)


def _misfits(base: Mapping[str, _Facts], seen: Mapping[str, _Facts]) -> Comparison | None:
    """Differences of names and shapes; a quantised tensor may be packed into another shape."""
    missing, extra = sorted(base.keys() - seen.keys()), sorted(seen.keys() - base.keys())
    misshapen = [
        f"{name} ({list(base[name].shape)} then, {list(seen[name].shape)} now)"
        for name in sorted(base.keys() & seen.keys())
        if base[name].shape != seen[name].shape and (_has_shape(base[name]) and _has_shape(seen[name]))
    ]
    if not (missing or extra or misshapen):
        return None
    groups = {"missing": missing, "extra": extra, "of another shape": misshapen}
    parts = [f"{len(names)} {kind}: {facts.preview(names, 3)}" for kind, names in groups.items() if names]
    names = (missing + extra + [text.split(" ")[0] for text in misshapen])[:_SHOWN]
    return Comparison(Verdict.DIFFERENT, tuple(names), f"the base has other parameters ({'; '.join(parts)}).")


def _has_shape(fact: _Facts) -> bool:
    return fact.kind in _FLOATS or fact.kind == f"{_OPAQUE}meta"


def _judge(then: _Facts, now: _Facts) -> Verdict:
    if then.kind == now.kind and then.leaf and then.leaf == now.leaf[:_LEAF]:
        return Verdict.SAMPLED_EQUAL
    if then.sketch is None or now.sketch is None:
        return Verdict.UNVERIFIED
    if then.kind == now.kind:
        return Verdict.DIFFERENT
    old, new = then.sketch.double(), now.sketch.double()
    near = (old - new).abs() <= _RELATIVE * torch.maximum(old.abs(), new.abs()) + _ABSOLUTE
    return Verdict.CAST if bool((near | (old == new) | (old.isnan() & new.isnan())).all()) else Verdict.DIFFERENT


def _kind(tensor: Tensor, parts: list[Tensor]) -> str:
    if not parts:
        return f"{_OPAQUE}{'meta' if tensor.is_meta else type(tensor.data).__name__}"
    return facts.code(tensor.dtype) if parts[0] is tensor else f"{_PACKED}{type(tensor.data).__name__}"


def _observe(name: str, tensor: Tensor) -> _Facts:
    parts, shape = ordinary_parts(tensor), tuple(tensor.shape)
    kind = _kind(tensor, parts)
    if not parts:
        return _Facts(kind, shape, b"", None)
    leaf = hashlib.sha256(f"{name}\0{kind}\0".encode())
    for part in parts:
        part = part.detach().view(torch.uint8) if part.dtype.itemsize == 1 else part.detach()
        values = torch.take(part, _positions(name, part.numel()).to(part.device)).cpu()
        leaf.update(facts.byte_view(values))
    return _Facts(kind, shape, leaf.digest(), values[:SKETCHED] if kind in _FLOATS else None)


def _positions(name: str, count: int) -> Tensor:
    """Which values stand for a tensor: all of a small one, else 256 drawn from a hash of its name."""
    if count <= SAMPLES:
        return torch.arange(count)
    # A hash and not a generator: the same on every version and device, and no random state is touched.
    seed = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    drawn = bytearray(hashlib.shake_128(seed).digest(8 * SAMPLES))
    return torch.frombuffer(drawn, dtype=torch.int64).bitwise_and_(2**63 - 1).remainder_(count)


def _structure(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return hashlib.sha256(canonical([[name, list(shape)] for name, shape in shapes.items()]).encode()).hexdigest()


def _sample(seen: Mapping[str, _Facts]) -> str:
    return hashlib.sha256(b"".join(fact.leaf for fact in seen.values())).hexdigest()


def _pack_sketch(values: Tensor) -> str:
    """Sign and exponent bytes first, then mantissa bytes: apart they compress, mixed they do not."""
    mixed = bytes(facts.byte_view(values))
    return pack(mixed[1::2] + mixed[::2])


def _unpack_sketch(text: str, where: str) -> Tensor:
    data = unpack(text, where)
    if len(data) % 2:
        raise fault(where, f"found {len(data)} bytes, expected an even number.")
    mixed = bytearray(len(data))
    mixed[1::2], mixed[::2] = data[: len(data) // 2], data[len(data) // 2 :]
    return torch.frombuffer(mixed, dtype=torch.bfloat16) if mixed else torch.empty(0, dtype=torch.bfloat16)


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
    if len(fields.get("beside", {})) > _MAX_BESIDE:
        raise fault(
            f"{where}.beside", f"found {len(fields['beside'])} deltas, expected at most {_MAX_BESIDE}.", "limit"
        )
    for name, digest in fields.get("beside", {}).items():
        check_digest(digest, f"{where}.beside.{check_label(name, f'{where}.beside: a name')}")
    for kind, count in fields["dtypes"].items():
        check_int(count, f"{where}.dtypes.{check_text(kind, f'{where}.dtypes: a key', 64)!r}", 1)
    found = Fingerprint(**fields)
    base = _remember(found, where)
    if dict(found.dtypes) != dict(Counter(fact.kind for fact in base.values())):
        raise fault(f"{where}.dtypes", "does not count the kinds listed in the layout.")
    return found


def _remember(found: Fingerprint, where: str) -> dict[str, _Facts]:
    """Unpack a fingerprint per tensor, checking that its parts fit each other."""
    layout = _check_layout(parse_packed(found.layout, f"{where}.layout"), f"{where}.layout")
    if found.structure != _structure({name: shape for name, (_, shape) in layout.items()}):
        raise fault(f"{where}.structure", "is not the digest of the names and shapes in the layout.")
    leaves, sketch = decode64(found.leaves, f"{where}.leaves"), _unpack_sketch(found.sketch, f"{where}.sketch")
    readable = {name for name, (kind, _) in layout.items() if not kind.startswith(_OPAQUE)}
    if len(leaves) != _LEAF * len(readable):
        raise fault(f"{where}.leaves", f"found {len(leaves)} bytes, expected {_LEAF * len(readable)}.")
    base, leaf_at, value_at = {}, 0, 0
    for name, (kind, shape) in layout.items():
        leaf, values = b"", None
        if name in readable:
            leaf, leaf_at = leaves[leaf_at : leaf_at + _LEAF], leaf_at + _LEAF
        if kind in _FLOATS:
            count = min(SKETCHED, math.prod(shape))
            values, value_at = sketch[value_at : value_at + count], value_at + count
        base[name] = _Facts(kind, shape, leaf, values)
    if value_at != len(sketch):
        raise fault(f"{where}.sketch", f"found {len(sketch)} values, expected {value_at}.")
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
