"""A LightningModule from a checkpoint: built from its hyper-parameters, and what lies beside the delta."""

import argparse
import importlib.abc
import inspect
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, Final, TypeVar, Union, cast, get_args, get_origin

import lightning.pytorch as pl
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.model.naming import canonical, named_tensors
from lightning_pet.operations.roots import root_of
from lightning_pet.store.entry import KEY
from lightning_pet.store.files import expanded
from lightning_pet.store.reader import PathLike
from lightning_pet.strategies.plain import OMEGACONF

# --- modules that LightningCLI built: from what it noted, without importing anything by a name in a file ---


_INSTANTIATOR: Final = "lightning.pytorch.cli.instantiate_module"


def _instantiate(cls: type[Any], instantiator: object, config: Mapping[str, Any], path: PathLike) -> Any:
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


# --- from hyper-parameters, and what lies beside the delta ----------------------------------------


Module = TypeVar("Module", bound=nn.Module)
_KEY, _NAME, _TYPE = (
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY,
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_NAME,
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE,
)


def _from_file(path: PathLike) -> dict[str, Any]:
    suffix = Path(path).suffix
    if suffix not in (".csv", ".yaml", ".yml"):
        raise ArgumentError(f"hparams_file={str(path)!r}: use a .yaml or .csv file, as Lightning's loggers write it.")
    file = expanded(path)
    found: Any = load_hparams_from_tags_csv(file) if suffix == ".csv" else load_hparams_from_yaml(file, False)
    return dict(found or {})


# --- building ------------------------------------------------------------------------------------


def build(
    cls: type[Module],
    checkpoint: Mapping[str, Any],
    path: PathLike,
    kwargs: Mapping[str, Any],
    hparams_file: PathLike | None = None,
) -> Module:
    """Build a module from the hyper-parameters in a checkpoint.

    Args:
        cls: its class.
        checkpoint: the contents of the checkpoint.
        path: of the checkpoint, for errors.
        kwargs: arguments that override what was saved.
        hparams_file: hyper-parameters to use instead.

    Raises:
        ArgumentError: if a hyper-parameter that the checkpoint could not hold is not given.
        DeltaFileError: ``unsafe`` if a class is named that was not imported, ``schema`` if they are none.
    """
    if hparams_file is not None:
        checkpoint = {**checkpoint, _KEY: _from_file(hparams_file)}
    saved = checkpoint.get(_KEY) or {}
    if not isinstance(saved, Mapping):
        raise DeltaFileError(f"{path}: {_KEY} are {type(saved).__name__}, expected a dictionary.", "schema")
    if unnamed := [key for key in saved if not isinstance(key, str)]:
        saved = {key: value for key, value in saved.items() if key not in unnamed}
    _require_given(cls, checkpoint, kwargs, path)
    name = checkpoint.get(_NAME)
    instantiator = saved.get("_instantiator")
    if instantiator is not None:
        options = {key: value for key, value in saved.items() if key != "_instantiator"}
        return cast(Module, _instantiate(cls, instantiator, {**options, **kwargs}, path))
    parameters = inspect.signature(cls).parameters
    if isinstance(name, str) and name in parameters:
        one = {**(checkpoint.get(_KEY) or {}), **{key: value for key, value in kwargs.items() if key not in parameters}}
        return cls(**{name: _as_saved(one, checkpoint.get(_TYPE)), **_own(parameters, kwargs)})
    return cls(**{**_accepted(parameters, saved), **kwargs})


def _require_given(cls: type[Any], checkpoint: Mapping[str, Any], kwargs: Mapping[str, Any], path: PathLike) -> None:
    entry = checkpoint.get(KEY)
    left_out = entry.get("left_out", {}) if isinstance(entry, Mapping) else {}
    parameters = inspect.signature(cls).parameters
    absent = [name for name in left_out if name not in kwargs and name in parameters]
    if isinstance(checkpoint.get(_NAME), str) and left_out and checkpoint[_NAME] not in kwargs:
        absent = absent or [name for name in left_out if name not in kwargs]
    if absent:
        options = ", ".join(f"{name}=…" for name in absent)
        raise ArgumentError(
            f"{path} could not hold what is no plain data: {'; '.join(left_out[name] for name in absent)}. Give it: "
            f"load_from_checkpoint({cls.__name__}, path, {options}); or pass an instance of {cls.__name__}."
        )


def _own(parameters: Iterable[str], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key in parameters}


def _as_saved(one: dict[str, Any], kind: object) -> Any:
    if kind == OMEGACONF and OMEGACONF in sys.modules:
        return sys.modules[OMEGACONF].OmegaConf.create(one)
    return AttributeDict(one)  # a dictionary that also answers as a namespace, which it may have been


def _accepted(parameters: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the constructor takes: a module may save more hyper-parameters than it has arguments."""
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        named = {name: value for name, value in options.items() if not name.startswith("_")}
    else:
        named = {name: value for name, value in options.items() if name in parameters}
    return {name: _typed(value, parameters.get(name)) for name, value in named.items()}


def _typed(value: Any, parameter: inspect.Parameter | None) -> Any:
    """A path or a member of an enum again, where the constructor says that it takes one."""
    for kind in _kinds(parameter):
        if issubclass(kind, Enum) and not isinstance(value, kind) and value in [member.value for member in kind]:
            return kind(value)
        if issubclass(kind, PurePath) and isinstance(value, str):
            return kind(value)
    return value


def _kinds(parameter: inspect.Parameter | None) -> list[type]:
    if parameter is None:
        return []
    annotation: Any = parameter.annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kinds = (*kinds, type(parameter.default))
    return [] if str in kinds and annotation is not parameter.empty else [k for k in kinds if isinstance(k, type)]


# --- what lies beside the delta -------------------------------------------------------------------


def beside(module: nn.Module, content: Mapping[str, Any], strict: bool | None, path: PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint that lie outside of the adapted root, by their names in the module.

    Args:
        module: where they are to go.
        content: of the checkpoint.
        strict: whether each has to fit; ``None``: as the module's ``strict_loading``.
        path: of the checkpoint, for errors.

    Raises:
        DeltaFileError: ``mismatch`` if one does not fit and has to.
    """
    own_choice = getattr(module, "strict_loading", True)
    prefix = content[KEY]["root"]
    if not prefix or root_of(module)[0] != prefix:
        return {}  # it is all of the module, or this is the bare model that the root was
    tensors = {canonical(name): value for name, value in content["state_dict"].items() if isinstance(value, Tensor)}
    outside = {name: value for name, value in tensors.items() if not name.startswith(f"{prefix}.")}
    own = dict(named_tensors(module))
    unfit = [name for name, value in outside.items() if name not in own or own[name].shape != value.shape]
    if unfit and (own_choice if strict is None else strict):
        raise DeltaFileError(
            f"{path}: {', '.join(unfit[:4])} beside the delta are no tensors of this {type(module).__name__}. Load it "
            "into the module that wrote it, or pass strict=False to leave them out.",
            "mismatch",
        )
    return {name: value for name, value in outside.items() if name not in unfit}
