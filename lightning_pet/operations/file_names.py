"""The border between files and a model: what a file names is given the names that it has in this model."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_pet.errors import ArgumentError
from lightning_pet.insertion.method import Method
from lightning_pet.model.delta_names import DEFAULT, in_model, is_delta_name
from lightning_pet.model.naming import CHILD, is_below
from lightning_pet.model.structure import Target
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import Stored
from lightning_pet.targets.heads import HEAD, find_heads, parameters_below

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
