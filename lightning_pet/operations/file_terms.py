"""The border between files and a model: options that a file names, and names that it uses, in terms of this model."""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

from torch import nn

from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.insertion.method import METHODS, Method
from lightning_pet.model.naming import CHILD, DEFAULT, in_model, is_below, is_delta_name
from lightning_pet.model.structure import Target
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import Stored
from lightning_pet.store.strict_json import shown
from lightning_pet.targets.heads import HEAD, find_heads, parameters_below
from lightning_pet.targets.patterns import is_expression, is_place

# --- options of a method: a closed schema, read off the method's own constructor ------------------


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


# --- names ----------------------------------------------------------------------------------------


Rename = Mapping[str, str]
"""Prefixes of paths in a file, and what stands for them in the model."""


def for_model(stored: Stored, delta: str, rename: Rename | None = None) -> Stored:
    """A stored delta under the names that it has in a model.

    Args:
        stored: what a file holds.
        delta: what it is called in the model.
        rename: prefixes that are others there.
    """
    if rename:
        move = _mover(rename)
        stored = replace(
            stored,
            methods=tuple(_moved_method(record, move) for record in stored.methods),
            tensors={move(name): tensor for name, tensor in stored.tensors.items()},
        )
    return replace(stored, tensors=in_model(stored.tensors, delta))


def note_of(stored: Stored) -> str:
    """What a file calls its delta: its note of that name, if a delta can be called so."""
    name = stored.notes.get("name")
    return name if name is not None and is_delta_name(name) else DEFAULT


def check_rename(rename: Rename | None, stored: Stored) -> None:
    """Refuse prefixes of other types, and those that nothing in the file has.

    Raises:
        ArgumentError: naming the prefix and what the file has.
    """
    if rename is None:
        return
    if not isinstance(rename, Mapping) or not all(isinstance(p, str) for pair in rename.items() for p in pair):
        raise ArgumentError(
            f"rename={rename!r}: give prefixes of the file and of the model, {{'model.': 'net.model.'}}."
        )
    paths = [*stored.tensors, *(target.module for record in stored.methods for target in record.targets)]
    for old in rename:
        if not any(_dotted(path).startswith(old) for path in paths):
            raise ArgumentError(
                f"rename: nothing in {stored.path} begins with {old!r}; it has {', '.join(sorted(set(paths))[:3])} …"
            )


def back(rename: Rename | None) -> Callable[[str], str | None]:
    """From a name in the model to that in the file; ``None`` for what the model of the file did not have."""
    pairs = sorted((rename or {}).items(), key=lambda pair: -len(pair[1]))

    def moved(name: str) -> str | None:
        for old, new in pairs:
            if _dotted(name).startswith(new):
                return (old + _dotted(name)[len(new) :]).removesuffix(".")
        return None if "" in (rename or {}) else name

    return moved


def _mover(rename: Rename) -> Callable[[str], str]:
    pairs = sorted(rename.items(), key=lambda pair: -len(pair[0]))

    def moved(path: str) -> str:
        for old, new in pairs:
            if _dotted(path).startswith(old):
                return (new + _dotted(path)[len(old) :]).removesuffix(".")
        return path

    return moved


def _dotted(path: str) -> str:
    return f"{path}." if path else ""


def _moved_method(record: MethodRecord, move: Callable[[str], str]) -> MethodRecord:
    def moved(target: Target) -> Target:
        return replace(target, module=move(target.module), reads=None if target.reads is None else move(target.reads))

    config = dict(record.config)
    if isinstance(config.get("module"), str):
        config["module"] = move(config["module"])
    return replace(record, config=config, targets=tuple(moved(target) for target in record.targets))


def without_heads(root: nn.Module, stored: Stored, methods: tuple[Method, ...]) -> tuple[Stored, frozenset[str]]:
    """A stored delta less the heads that it trained, and the names of these.

    Args:
        root: the model that it is for.
        stored: under the names of this model.
        methods: those of the file.
    """
    plain = [name for name in stored.tensors if CHILD not in name.split(".")]
    heads: set[str] = set()
    for record, method in zip(stored.methods, methods, strict=True):
        named: Any = getattr(method, "modules_to_save", None)
        paths = [target.module for target in record.targets if target.role == HEAD]
        if named is None and not paths:
            paths = list(find_heads(root, () if getattr(method, "in_place", False) else record.targets))
        below = set(parameters_below(root, named, "modules_to_save")) if named else set()
        heads |= {name for name in plain if name in below or any(is_below(name, path) for path in paths)}
    records = tuple(_headless(record) for record in stored.methods)
    tensors = {name: tensor for name, tensor in stored.tensors.items() if name not in heads}
    return replace(stored, methods=records, tensors=tensors), frozenset(heads)


def _headless(record: MethodRecord) -> MethodRecord:
    config = dict(record.config)
    if config.get("modules_to_save") is not None:
        config["modules_to_save"] = []
    return replace(record, config=config, targets=tuple(t for t in record.targets if t.role != HEAD))
