"""Modules that LightningCLI built: again, from what it noted, without importing anything by a name in a file."""

import argparse
import importlib.abc
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

import lightning.pytorch as pl

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.reader import PathLike

_INSTANTIATOR: Final = "lightning.pytorch.cli.instantiate_module"


def instantiate(cls: type[Any], instantiator: object, config: Mapping[str, Any], path: PathLike) -> Any:
    """Build a class as LightningCLI does, nested classes included.

    Args:
        cls: the class that the caller asks for; with ``_class_path`` in the configuration a subclass of it is built,
            if it was imported here, else this very class.
        instantiator: what the file says built it.
        config: the arguments as the command line had them; objects of the caller among them.
        path: the file, for errors.

    Raises:
        DeltaFileError: ``unsafe`` if it names another instantiator, or something that is no class known here.
    """
    if instantiator != _INSTANTIATOR:
        raise DeltaFileError(
            f"{path}: its hyper-parameters ask for {ascii(instantiator)[:80]} to build the module, expected "
            f"{_INSTANTIATOR}. Nothing in a file is imported; build the module yourself and pass the instance.",
            "unsafe",
        )
    from lightning.pytorch.cli import instantiate_module

    options = dict(config)
    if (named := options.get("_class_path")) is not None and _is_elsewhere(named) and cls is not pl.LightningModule:
        del options["_class_path"]  # a class of the caller's own is what is asked for, wherever it was when it trained
    elif named is not None:
        found = _known_class(named, path)
        if not issubclass(found, cls):
            raise DeltaFileError(f"{path}: {named!r} is no subclass of {cls.__name__}, which was asked for.", "unsafe")
    for nested in _class_paths(options):
        _known_class(nested, path)
    with _no_import_of(options) as refusal:
        try:
            return instantiate_module(cls, options)
        except Exception as error:
            if refusal.refused is not None:
                raise DeltaFileError(
                    f"{path}: its hyper-parameters name the module {refusal.refused!r}, which was not imported here. "
                    "If you trust the file, import it first; nothing is imported because a file names it.",
                    "unsafe",
                ) from error
            if isinstance(error, argparse.ArgumentError):
                raise DeltaFileError(
                    f"{path}: {cls.__name__} does not take its hyper-parameters: {error}. Pass other values as keyword "
                    "arguments, or an instance of the module.",
                    "schema",
                ) from error
            raise


def _is_elsewhere(name: object) -> bool:
    """Whether a name is of a module that was not imported here."""
    return isinstance(name, str) and name.rpartition(".")[0] not in sys.modules


def _known_class(name: object, path: PathLike) -> type[Any]:
    """The class of this name, if its module was imported before."""
    module, _, own = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    found = getattr(sys.modules.get(module), own, None)
    if not inspect.isclass(found):
        raise DeltaFileError(
            f"{path}: its hyper-parameters name {ascii(name)[:80]}, which is no class that was imported here. If you "
            "trust the file, import that class first; nothing is imported because a file names it.",
            "unsafe",
        )
    return found


def _class_paths(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield value["class_path"]
        for item in value.values():
            yield from _class_paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _class_paths(item)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*_texts(key), *_texts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


class _Refusal(importlib.abc.MetaPathFinder):
    """Finds no module of these names; what is imported already is never asked for.

    Attributes:
        refused: the first one that was asked for.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.refused: str | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuse to find a module that the file names."""
        if fullname in self.names:
            self.refused = self.refused or fullname
            raise ModuleNotFoundError(f"{fullname} is not imported because a file names it", name=fullname)
        return None


@contextmanager
def _no_import_of(config: Mapping[str, Any]) -> Iterator[_Refusal]:
    """Within the block no module is imported that a text of the configuration names.

    The parser takes a text for an import path wherever the constructor's annotation allows for a class or function.
    """
    parts = [text.split(".") for text in _texts(config) if len(text) < 1024]
    names = frozenset(".".join(part[:end]) for part in parts for end in range(1, min(len(part), 16) + 1))
    finder = _Refusal(names)
    sys.meta_path.insert(0, finder)
    try:
        yield finder
    finally:
        sys.meta_path.remove(finder)
