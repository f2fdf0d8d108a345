"""JSON from untrusted files: every deviation is a :class:`DeltaFileError` that names the field.

Texts are bounded before they are parsed, types are checked before anything is sorted or compared, and
nothing in a file can choose a class, a path or a regular expression.
"""

import base64
import binascii
import json
import math
import string
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lightning_pet.errors import DeltaFileError, FileErrorCode

MAX_DEPTH: Final = 8
MAX_NAME: Final = 256
MAX_TEXT: Final = 65_536
MAX_ITEMS: Final = 20_000
MAX_CONTAINERS: Final = 150_000
MAX_UNPACKED: Final = 8 << 20
_MAX_INT: Final = 2**63 - 1
_LABEL: Final = frozenset(string.ascii_letters + string.digits + "_-")
_Types = tuple[type, ...]


def fault(where: str, message: str, code: FileErrorCode = "schema") -> DeltaFileError:
    """Return the error for ``where`` (file, then field) with a message of found, expected and remedy."""
    return DeltaFileError(f"{where}: {message}", code)


def damaged_tensor(name: str, where: str) -> DeltaFileError:
    """The error for a tensor of which a bit has flipped."""
    text = "its bytes do not match their SHA-256. Copy the file again, or use an earlier save."
    return fault(f"{where}: tensor {name!r}", text, "corrupt")


def not_finite(name: str, bad: int, count: int, where: str) -> DeltaFileError:
    """The error for a tensor that holds NaN or infinity."""
    return fault(
        where,
        f"tensor {name!r}: found {bad} of {count} values NaN or infinite, expected finite ones. "
        "The training diverged before this save; use an earlier one, or lower the learning rate.",
        "nonfinite",
    )


def canonical(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse(text: str, where: str) -> object:
    """Parse JSON, refusing duplicate keys, NaN, infinities, and nesting or masses that exhaust the parser.

    Raises:
        DeltaFileError: ``corrupt`` if it is no JSON, ``limit`` if too deep or too full, else ``schema``.
    """
    # Each list and object costs memory and the collector's time, a hundred times that of its two characters.
    containers = text.count("[") + text.count("{")
    if containers > MAX_CONTAINERS:
        raise fault(where, f"found {containers} lists and objects, expected at most {MAX_CONTAINERS}.", "limit")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise fault(where, f"found the key {shown(twice)} twice in one object, expected each key once.")
        return found

    def constant(name: str) -> object:
        raise fault(where, f"found the number {name}, expected a finite one.")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except DeltaFileError:
        raise
    except RecursionError:
        raise fault(where, f"nested deeper than {MAX_DEPTH} levels.", "limit") from None
    except ValueError as error:
        raise fault(where, f"found no valid JSON ({error}). Copy the file again.", "corrupt") from None


def check_fields(value: object, where: str, schema: Mapping[str, _Types]) -> dict[str, Any]:
    """Return ``value`` if it is an object with exactly the fields of ``schema``, each of a listed type.

    Raises:
        DeltaFileError: ``schema``, naming the missing, unknown or ill-typed field.
    """
    found = check_type(value, where, (dict,))
    missing = [key for key in schema if key not in found]
    unknown = [key for key in found if key not in schema]
    if missing or unknown:
        others = ", ".join(shown(key) for key in unknown[:5]) or "none"
        raise fault(where, f"missing fields: {', '.join(missing) or 'none'}; unknown fields: {others}.")
    for key, types in schema.items():
        check_type(found[key], f"{where}.{key}", types)
    return dict(found)


def check_type(value: object, where: str, types: _Types) -> Any:
    """Return ``value`` if its type is exactly one of ``types`` (``True`` is no int)."""
    if type(value) not in types:
        expected = " or ".join(kind.__name__ for kind in types)
        raise fault(where, f"found {shown(value)} ({type(value).__name__}), expected {expected}.")
    return value


def check_text(value: object, where: str, limit: int = MAX_TEXT) -> str:
    """Return ``value`` if it is text of at most ``limit`` characters without control characters."""
    text: str = check_type(value, where, (str,))
    if len(text) > limit:
        raise fault(where, f"found {len(text)} characters, expected at most {limit}.", "limit")
    if not text.isprintable() and not all(char.isprintable() or char in "\n\t" for char in text):
        raise fault(where, f"found control characters in {shown(text)}, expected printable text.")
    return text


def check_label(value: object, where: str) -> str:
    """Return ``value`` if it is a method or delta name: 1 to 64 of ``A-Z a-z 0-9 _ -``."""
    label = check_text(value, where, MAX_TEXT)
    if not 0 < len(label) <= 64 or not _LABEL.issuperset(label):
        raise fault(where, f"found {shown(label)}, expected 1 to 64 letters, digits, '_' or '-'.", "unsafe")
    return label


def check_name(value: object, where: str) -> str:
    """Return ``value`` if it is a dotted parameter or module name of at most 256 characters."""
    name = check_text(value, where, MAX_NAME)
    if not name.isprintable() or name.startswith(("/", "\\")) or not all(name.split(".")):
        raise fault(where, f"found {shown(name)}, expected a dotted name such as 'encoder.layer.0.weight'.", "unsafe")
    return name


def check_digest(value: object, where: str) -> str:
    """Return ``value`` if it is the hexadecimal text of a SHA-256."""
    text: str = check_type(value, where, (str,))
    if len(text) != 64 or not frozenset("0123456789abcdef").issuperset(text):
        raise fault(where, f"found {shown(text)}, expected 64 hexadecimal digits.")
    return text


def check_int(value: object, where: str, low: int = 0, high: int = _MAX_INT) -> int:
    """Return ``value`` if it is an int within ``low`` and ``high``, both included."""
    number: int = check_type(value, where, (int,))
    if not low <= number <= high:
        raise fault(where, f"found {shown(number)}, expected {low} to {high}.", "limit")
    return number


def check_range(pair: object, where: str) -> tuple[int, int]:
    """Return a range of rows, from its first to behind its last."""
    if len(check_type(pair, where, (list,))) != 2:
        raise fault(where, "found a range that is no pair of first row and end.")
    first, end = (check_int(bound, where) for bound in pair)  # type: ignore[attr-defined]
    if first >= end:
        raise fault(where, f"found the range {first} to {end}, expected first < end.")
    return first, end


def check_plain(value: object, where: str, depth: int = 2) -> Any:
    """Return a copy of a plain JSON value (tuples as lists), checking types, numbers, sizes and depth.

    Args:
        value: ``None``, bool, int, finite float, text, list, tuple, or mapping with text keys.
        where: what the value is, for the error.
        depth: nesting level at which the value sits.

    Raises:
        DeltaFileError: ``schema`` or ``limit``, naming the field.
    """
    return _check_plain(value, where, depth, [MAX_CONTAINERS])


def _check_plain(value: object, where: str, depth: int, room: list[int]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(str(value), where)
    if isinstance(value, int):
        return check_int(int(value), where, -_MAX_INT)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise fault(where, f"found the number {value}, expected a finite one.")
        return float(value)
    if isinstance(value, (list, tuple, Mapping)):
        return _check_nested(value, where, depth, room)
    raise fault(where, f"found {shown(value)} ({type(value).__name__}), expected a plain JSON value.")


def _check_nested(value: Sequence[object] | Mapping[Any, object], where: str, depth: int, room: list[int]) -> Any:
    if depth >= MAX_DEPTH:
        raise fault(where, f"nested deeper than {MAX_DEPTH} levels.", "limit")
    if len(value) > MAX_ITEMS:
        raise fault(where, f"found {len(value)} items, expected at most {MAX_ITEMS}.", "limit")
    # A pickle may hold one list in many places: few bytes that stand for more items than there is time for.
    room[0] -= len(value)
    if room[0] < 0:
        raise fault(where, f"found more than {MAX_CONTAINERS} items in all.", "limit")
    if not isinstance(value, Mapping):
        return [_check_plain(item, f"{where}[{index}]", depth + 1, room) for index, item in enumerate(value)]
    return {
        check_text(key, f"{where}: a key", MAX_NAME): _check_plain(item, f"{where}.{shown(key)}", depth + 1, room)
        for key, item in value.items()
    }


def pack(data: bytes) -> str:
    """Bulky data as short ASCII text: zlib, then base64."""
    return encode64(zlib.compress(data, 9))


def unpack(text: object, where: str) -> bytes:
    """Reverse :func:`pack`, refusing to inflate beyond 8 MiB."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(decode64(text, where), MAX_UNPACKED)
    except zlib.error as error:
        raise fault(where, f"found no zlib data ({error}).") from None
    if inflater.unconsumed_tail:
        raise fault(where, f"inflates to more than {MAX_UNPACKED} bytes.", "limit")
    if not inflater.eof or inflater.unused_data:
        raise fault(where, "found incomplete zlib data, or data after its end.")
    return data


def encode64(data: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")


def decode64(text: object, where: str) -> bytes:
    """Reverse :func:`encode64`, refusing any other character."""
    try:
        return base64.b64decode(check_type(text, where, (str,)), validate=True)
    except (binascii.Error, ValueError) as error:
        raise fault(where, f"found no base64 text ({error}).") from None


def parse_packed(text: object, where: str) -> object:
    """Parse JSON that was stored through :func:`pack`."""
    try:
        return parse(unpack(text, where).decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise fault(where, f"found no UTF-8 text ({error.reason}).") from None


def shown(value: object) -> str:
    """A value short enough for a message; huge integers have no decimal text."""
    if isinstance(value, int) and abs(value) > _MAX_INT:
        return "an integer beyond 64 bits"
    text = ascii(value) if isinstance(value, (str, int, float)) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
