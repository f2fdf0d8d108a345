"""Objects that others put into a checkpoint: kept beside it, closed, so that the rest stays readable without them.

The state of a callback may hold anything that pickles. A file with such an object in it is read by nobody who does not
run its code. Here it is one text of bytes, which only a run opens that was told to trust the file.
"""

import io
from collections import OrderedDict
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.entry import KEY
from lightning_pet.strategies.hyper_parameters import AS_IT_IS, NotPlainError, not_plain

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


def readable(value: Any, where: str = "it") -> Any:
    """The value with numbers of Python for those of numpy.

    Raises:
        NotPlainError: naming a part that ``torch.load(weights_only=True)`` does not read.
    """
    if type(value) in AS_IT_IS or isinstance(value, Tensor):
        return value
    if isinstance(value, np.generic) and type(value.item()) in AS_IT_IS:
        return value.item()
    if type(value) in (dict, OrderedDict):
        return type(value)((readable(key, where), readable(item, f"{where}[{key!r}]")) for key, item in value.items())
    if type(value) in (list, tuple, set):
        return type(value)(readable(item, where) for item in value)
    raise not_plain(value, where)


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
            kept[key] = readable(value, str(key))
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
