"""What of a checkpoint is plain: hyper-parameters that have an exact plain form; what has none is sealed beside it."""

import argparse
import io
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.entry import KEY

# --- hyper-parameters: what has an exact plain form is written, and nothing else ------------------

# A checkpoint is read without running code, so it can hold no class, function or module. A module would also carry the
# base and the delta into it a second time.


AS_IT_IS: Final = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
"""Exact types of what needs no other form."""
_MAX_DEPTH: Final = 64
OMEGACONF: Final = "omegaconf"


class NotPlainError(TypeError):
    """A value without an exact plain form; ``str`` says where it is and of which type."""


def plain(value: Any, where: str = "it", depth: int = 0) -> Any:
    """The form of a value that ``torch.load(weights_only=True)`` reads.

    Paths become text, members of an enum their values, numbers of numpy those of Python, arrays tensors,
    namespaces and configurations dictionaries.

    Raises:
        NotPlainError: naming the part that has no such form.

    >>> from pathlib import Path
    >>> plain({"root": Path("data"), "sizes": (1, 2)})
    {'root': 'data', 'sizes': (1, 2)}
    """
    if type(value) in AS_IT_IS or isinstance(value, Tensor):
        return value
    if isinstance(value, Enum):
        return plain(value.value, where, depth)
    if isinstance(value, PurePath):
        return os.fspath(value)
    if isinstance(value, np.ndarray | np.generic):
        return _of_numpy(value, where, depth)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return _collection(value, where, depth)


def _of_numpy(value: Any, where: str, depth: int) -> Any:
    if isinstance(value, np.generic):
        item = value.item()
        if type(item) in AS_IT_IS:
            return item
    elif value.dtype.kind in "biufc":
        try:
            return torch.from_numpy(value.copy())
        except TypeError:  # a dtype that torch does not have
            pass
    raise _not_plain(value, where)


def _collection(value: Any, where: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise NotPlainError(f"{where} is nested more than {_MAX_DEPTH} levels deep")
    if _is_omegaconf(value):
        value = sys.modules[OMEGACONF].OmegaConf.to_container(value, resolve=False)
    elif isinstance(value, argparse.Namespace) or type(value).__name__ == "Namespace":
        value = dict(vars(value))
    if isinstance(value, Mapping):
        return {
            plain(key, where, depth + 1): plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()
        }
    if isinstance(value, list | range):
        return [plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if type(value) is tuple:
        return tuple(plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value))
    if isinstance(value, set | frozenset):
        return {plain(item, where, depth + 1) for item in value}
    raise _not_plain(value, where)


def _is_omegaconf(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == OMEGACONF


def _not_plain(value: object, where: str) -> NotPlainError:
    """The error that names a value and its type."""
    kind = value if isinstance(value, type) else type(value)
    text = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return NotPlainError(f"{where} is {'the class' if kind is value else 'of'} {text}")


def split(hyper_parameters: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, str]]:
    """The hyper-parameters in their plain form, and why each of the others has none."""
    if _is_omegaconf(hyper_parameters):
        hyper_parameters = sys.modules[OMEGACONF].OmegaConf.to_container(hyper_parameters, resolve=False)
    kept: dict[Any, Any] = {}
    left_out: dict[str, str] = {}
    for name, value in hyper_parameters.items():
        try:
            kept[plain(name)] = plain(value, str(name))
        except Exception as error:  # whatever a stranger's object does when it is looked at
            left_out[str(name)] = str(error)
    return kept, left_out


def make_plain(checkpoint: dict[str, Any]) -> dict[str, str]:
    """Give the hyper-parameters in a checkpoint their plain form; return those of the module that have none."""
    left_out: dict[str, str] = {}
    for owner in (pl.LightningDataModule, pl.LightningModule):
        found = checkpoint.get(owner.CHECKPOINT_HYPER_PARAMS_KEY)
        if not isinstance(found, Mapping):
            continue
        checkpoint[owner.CHECKPOINT_HYPER_PARAMS_KEY], left_out = split(found)
        if owner.CHECKPOINT_HYPER_PARAMS_TYPE in checkpoint:  # a class
            checkpoint[owner.CHECKPOINT_HYPER_PARAMS_TYPE] = OMEGACONF
    return left_out


def warn_left_out(module: pl.LightningModule, datamodule: Any) -> None:
    """Say at the start of a run which hyper-parameters its checkpoints will not hold."""
    for owner in (module, datamodule):
        left_out = split(owner.hparams)[1] if isinstance(getattr(owner, "hparams", None), Mapping) else {}
        if left_out:
            name = type(owner).__name__
            options = ", ".join(f"{option}=…" for option in left_out)
            rank_zero_warn(
                f"hyper-parameters of {name} that are not plain data are left out of checkpoints: "
                f"{'; '.join(left_out.values())}. Give them when you load one, "
                f"load_from_checkpoint({name}, path, {options}), or leave them out yourself: "
                f"save_hyperparameters(ignore={sorted(left_out)})."
            )


# --- objects that others put into a checkpoint: kept beside it, closed ----------------------------

# The state of a callback may hold anything that pickles. A file with such an object in it is read by nobody who does
# not run its code. Here it is one text of bytes, which only a run opens that was told to trust the file.


SEALED: Final = "lightning_pet_sealed"
_PLAIN: Final = frozenset(
    {
        "state_dict",
        "current_model_state",
        KEY,
        *(
            key
            for owner in (pl.LightningModule, pl.LightningDataModule)
            for key in (owner.CHECKPOINT_HYPER_PARAMS_KEY, owner.CHECKPOINT_HYPER_PARAMS_TYPE)
        ),
    }
)
_NESTED: Final = ("callbacks",)
_NEEDED: Final = ("optimizer_states", "lr_schedulers", "loops")  # what a run cannot go on without stays as it is


def _readable(value: Any, where: str = "it") -> Any:
    """The value with numbers of Python for those of numpy.

    Raises:
        NotPlainError: naming a part that ``torch.load(weights_only=True)`` does not read.
    """
    if type(value) in AS_IT_IS or isinstance(value, Tensor):
        return value
    if isinstance(value, np.generic) and type(value.item()) in AS_IT_IS:
        return value.item()
    if type(value) in (dict, OrderedDict):
        return type(value)((_readable(key, where), _readable(item, f"{where}[{key!r}]")) for key, item in value.items())
    if type(value) in (list, tuple, set):
        return type(value)(_readable(item, where) for item in value)
    raise _not_plain(value, where)


def seal(checkpoint: dict[str, Any]) -> None:
    """Close what is not plain data in a checkpoint, callback by callback and entry by entry."""
    sealed: dict[str, Any] = {}
    for key in [key for key in checkpoint if key not in _PLAIN]:
        if key in _NESTED and isinstance(checkpoint[key], dict):
            checkpoint[key], closed = _split(checkpoint[key])
            if closed:
                sealed[key] = closed
            continue
        kept, closed = _split({key: checkpoint[key]})
        if closed and key in _NEEDED:
            continue
        if closed:
            sealed[key] = closed[key]
            del checkpoint[key]
        else:
            checkpoint[key] = kept[key]
    if sealed:
        checkpoint[SEALED] = sealed


def _split(entries: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    kept: dict[str, Any] = {}
    closed: dict[str, bytes] = {}
    for key, value in entries.items():
        try:
            kept[key] = _readable(value, str(key))
        except (NotPlainError, RecursionError):
            buffer = io.BytesIO()
            torch.save(value, buffer)
            closed[key] = buffer.getvalue()
    return kept, closed


def unseal(checkpoint: dict[str, Any], path: object, weights_only: bool | None) -> None:
    """Open what was closed, and put it back in its place, if the caller trusts the file.

    Args:
        checkpoint: what was read; changed in place.
        path: of the file.
        weights_only: the choice of whoever called ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        DeltaFileError: ``unsafe`` if the caller did not say so.
    """
    sealed = checkpoint.pop(SEALED, None)
    if not isinstance(sealed, dict) or not sealed:
        return
    names = [name for key, part in sealed.items() for name in (part if isinstance(part, dict) else [key])]
    if weights_only is not False:
        raise DeltaFileError(
            f"{path}: the state of {', '.join(map(str, names[:4]))} holds objects, which only the file's code can make "
            "again. If you trust the file, pass weights_only=False to fit (or validate, test, predict); load_delta and "
            "load_from_checkpoint need nothing of it.",
            "unsafe",
        )
    for key, part in sealed.items():
        if isinstance(part, dict):
            checkpoint.setdefault(key, {}).update({name: _open(data, weights_only) for name, data in part.items()})
        else:
            checkpoint[key] = _open(part, weights_only)


def _open(data: bytes, weights_only: bool) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=weights_only)
