"""Building deltas without memory, and without the values that a file brings anyway."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

_FACTORIES: Final = frozenset(
    {
        torch.empty,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.eye,
        torch.tensor,
        torch.arange,
        torch.linspace,
        torch.rand,
        torch.randn,
        torch.randint,
        torch.randperm,
    }
)
_filled_later: ContextVar[bool] = ContextVar("lightning_pet_filled_later", default=False)


class _OnMeta(TorchFunctionMode):
    """Every new tensor has a shape and no memory, whatever device it is asked for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = {**(kwargs or {}), "device": "meta"} if func in _FACTORIES else kwargs or {}
        return func(*args, **own)


@contextmanager
def without_memory() -> Iterator[None]:
    """Within the block new tensors are on the meta device: numbers of a file choose no allocation."""
    with filled_later(), _OnMeta():
        yield


@contextmanager
def filled_later() -> Iterator[None]:
    """Within the block deltas do not start from the weights of the base: a file brings their values."""
    token = _filled_later.set(True)
    try:
        yield
    finally:
        _filled_later.reset(token)


def is_filled_later() -> bool:
    """Whether the values of the deltas that are being built come from a file."""
    return _filled_later.get()
