"""What fails in one process fails in all of them: a survivor would wait for the others for ever."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed

from lightning_pet.errors import PETError

T = TypeVar("T")


def agreed(what: str, action: Callable[[], T]) -> T:
    """Run something in every process that may fail in some.

    Args:
        what: names it in the error of the processes in which it did not fail, e.g. ``"saving last.ckpt"``.
        action: must not wait for other processes after it may have failed.

    Raises:
        PETError: if it failed elsewhere. Where it failed, its own error.
    """
    own: Exception | None = None
    try:
        result = action()
    except Exception as error:
        own = error
    found = _everywhere("" if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    for rank, text in enumerate(found):
        if text:
            raise PETError(f"{what} failed in process {rank}, so that this one stops as well: {text}")
    return result


def _everywhere(text: str) -> list[str]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [text]
    found: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, text)
    return found
