"""Types of what a constructor is given: said by the option's name, before anything is computed with it."""

import inspect
from collections.abc import Callable
from functools import wraps
from numbers import Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, Final, get_args

from lightning_pet.errors import ArgumentError

_KINDS: Final = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def checked(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a callback, which refuses switches and numbers of another type.

    Python takes any text for true (``use_dora="no"``), and what it says of text beside a number names no option.

    Args:
        init: an ``__init__`` with annotated arguments.

    Returns:
        The same, with the same signature.
    """
    signature = inspect.signature(init)

    @wraps(init)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind_partial(self, *args, **kwargs).arguments
        except TypeError:  # too many arguments: Python says so itself
            given = {}
        for option, value in given.items():
            kind = _plain(signature.parameters[option].annotation, value)
            if kind in _KINDS and not _fits(value, kind):
                raise ArgumentError(
                    f"{option}={value!r}: {type(self).__name__} takes {_KINDS[kind]} here, and this is of type "
                    f"{type(value).__name__}."
                )
        init(self, *args, **kwargs)

    return constructor


def _plain(annotation: Any, value: object) -> Any:
    """The one kind that an option takes besides ``None``."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 and value is not None and isinstance(annotation, UnionType) else annotation


def _fits(value: object, kind: type) -> bool:
    # What is a number, but none that the option takes, is told by the option's own check.
    if kind is str:
        return isinstance(value, str | PathLike)
    return isinstance(value, bool if kind is bool else Real)
