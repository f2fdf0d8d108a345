"""The options of a method in a file: a closed schema, read off the method's own constructor."""

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

from lightning_pet.errors import DeltaFileError
from lightning_pet.insertion.method import METHODS, Method
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.strict_json import shown
from lightning_pet.targets.patterns import is_expression, is_place

_MAX_PATTERNS: Final = 4096  # every pattern is compared with every place


def method_of(record: MethodRecord, where: object) -> Method:
    """Build the method that a file describes. Nothing in it is looked up by name but the method itself.

    Args:
        record: what the file says.
        where: the file, for errors.

    Raises:
        DeltaFileError: ``version`` if this release does not know the method, ``limit`` or ``schema`` if an option is
            unknown, of another type, or out of range.
    """
    label = f"{where}: the options of {record.method}:{record.name}"
    cls = METHODS.get(record.method)
    if cls is None:
        raise DeltaFileError(
            f"{where} holds a delta of method {record.method!r}; this release knows {', '.join(sorted(METHODS))}.",
            "version",
        )
    expected = _types_of(cls)
    for option, value in record.config.items():
        if option in cls.of_the_run and value is not None:
            raise DeltaFileError(f"{label} are not valid: {option} is for the caller to choose, no file's.", "unsafe")
        if option not in expected:
            raise DeltaFileError(f"{label} are not valid: {option!r} is none of {', '.join(expected)}.", "schema")
        if not _is_a(value, expected[option]):
            raise DeltaFileError(
                f"{label} are not valid: {option}={shown(value)}, expected {_spelled(expected[option])}.", "schema"
            )
        if isinstance(value, Mapping):
            _check_patterns(value, f"{label}: {option}")
    if record.config.get("name", record.name) != record.name:
        raise DeltaFileError(f"{label} are not valid: they call it {shown(record.config['name'])}.", "mismatch")
    try:
        return cast(Method, cls(**{**record.config, "name": record.name}))
    except Exception as error:  # whatever a constructor does with the numbers of a stranger
        raise DeltaFileError(f"{label} are not valid: {error}", "schema") from error


def _check_patterns(patterns: Mapping[str, Any], where: str) -> None:
    """They are compared with every place, so they must be few, and none may take its own time."""
    count = sum(not is_place(pattern) for pattern in patterns)
    if count > _MAX_PATTERNS:
        raise DeltaFileError(f"{where} has {count} entries, more than {_MAX_PATTERNS}.", "limit")
    for pattern in filter(is_expression, patterns):
        raise DeltaFileError(
            f"{where} holds the regular expression {shown(pattern)}, expected names of places: a file that this "
            "release writes has none. Save the delta again where it was trained.",
            "unsafe",
        )


def _types_of(cls: type[Any]) -> dict[str, Any]:
    """Option → type, from the signatures of the constructors of a class and its bases."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            hints = get_type_hints(vars(base)["__init__"])
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            named = (p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
            found |= {name: hints.get(name, Any) for name in named if name != "self" and name not in found}
    return found


def _is_a(value: object, expected: Any) -> bool:
    """Whether a JSON value is one of a type; a list may stand for a tuple, an integer for a fraction."""
    origin, inner = get_origin(expected), get_args(expected)
    if expected is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is_a(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in inner)
    if origin in (list, tuple, Sequence):
        kinds = inner if origin is tuple and Ellipsis not in inner else None
        if not isinstance(value, list | tuple) or (kinds is not None and len(kinds) != len(value)):
            return False
        return all(_is_a(item, kinds[i] if kinds else inner[0]) for i, item in enumerate(value))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_is_a(k, inner[0]) and _is_a(v, inner[1]) for k, v in value.items())
    if expected is float:
        return type(value) in (int, float)
    return type(value) is (type(None) if expected is None else expected)


def _spelled(expected: Any) -> str:
    return str(expected).replace("typing.", "") if get_origin(expected) else getattr(expected, "__name__", "None")
