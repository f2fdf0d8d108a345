"""Hyper-parameters in checkpoints: what has an exact plain form is written in it, and nothing else.

A checkpoint is read without running code, so it can hold no class, function or module. A module would also carry
the base and the delta into it a second time.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

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
    raise not_plain(value, where)


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
    raise not_plain(value, where)


def _is_omegaconf(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == OMEGACONF


def not_plain(value: object, where: str) -> NotPlainError:
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
