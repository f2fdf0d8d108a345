"""What fails in one process fails in all of them: a survivor would wait for the others for ever."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import torch.distributed
from lightning.fabric.utilities import move_data_to_device

from lightning_pet.errors import PETError
from lightning_pet.strategies import private

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds that a process waits for the others before a common action."""

_SAID: Final = 10.0  # seconds after which it says that it waits
_POLL: Final = 0.02

_log = logging.getLogger(__name__)


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


def from_all(what: str, action: Callable[[], T]) -> list[T]:
    """Run something in every process, and give all of them what came out in each, in their order; tensors by the CPU.

    Raises:
        PETError: if it failed elsewhere. Where it failed, its own error.
    """
    own = agreed(what, action)
    if not _distributed():
        return [own]
    found: list[T] = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, move_data_to_device(own, torch.device("cpu")))
    return found


def _everywhere(text: str) -> list[str]:
    if not _distributed():
        return [text]
    found: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, text)
    return found


def same(what: str, own: Sequence[str]) -> None:
    """Every process must have the same.

    Args:
        what: names it in the error, e.g. ``"the methods"``.
        own: one text for each part of it.

    Raises:
        PETError: in every process, naming the first difference.
    """
    if not _distributed():
        return
    found: list[Sequence[str]] = [()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, list(own))
    for rank, other in enumerate(found):
        if list(other) == list(found[0]):
            continue
        pairs = zip([*found[0], *[""] * len(other)], [*other, *[""] * len(found[0])], strict=False)
        first, second = next((a, b) for a, b in pairs if a != b)
        raise PETError(
            f"{what} differ between processes: process 0 has {first or 'no more'}, process {rank} has "
            f"{second or 'no more'}. Every process must be given the same configuration."
        )


def together(what: str) -> None:
    """Wait until every process is here, before an action in which all take part.

    A process that comes alone would wait within the action without a word, and perhaps for ever. Here it says so,
    and gives up in the end.

    Raises:
        PETError: if the others have not come after :data:`PATIENCE` seconds.
    """
    if not _distributed():
        return
    store, world = private.rendezvous_store(), torch.distributed.get_world_size()
    arrived = store.add("lightning_pet/together", 1)
    awaited = -(-arrived // world) * world  # every process counts, in every round
    began, said = time.monotonic(), False
    while store.add("lightning_pet/together", 0) < awaited:
        waited = time.monotonic() - began
        if waited > _SAID and not said:
            said = True
            _log.warning("%s waits for the other processes: each of them has to call it.", what)
        if waited > PATIENCE:
            store.add("lightning_pet/together", -1)
            raise PETError(
                f"{what} was called in some processes only, and has waited {PATIENCE:.0f} s for the others. An engine "
                "that shards leaves each of them a part, so call it in every process."
            )
        time.sleep(_POLL)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
