"""Parameters that are read through the weight deltas of their host: properties in the place of a look-up."""

from typing import Any

from torch import Tensor, nn


def held(host: nn.Module, name: str) -> Tensor | None:
    """The parameter without deltas, or what an engine has put in its place."""
    values = host._parameters if name in host._parameters else host.__dict__
    if name not in values:
        raise AttributeError(name)  # nn.Module words it
    value: Tensor | None = values[name]
    return value


def effective(name: str) -> property:
    """A property that reads through ``_pet_weight`` of its host.

    An engine may put something else than a parameter there while it computes: FSDP1 deletes the parameter, and sets
    a view of its flat tensor.
    """

    def read(self: Any) -> Tensor | None:
        weight: Tensor | None = self._pet_weight(name)
        return weight

    def write(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: Any) -> None:
        if self.__dict__.pop(name, None) is None:
            raise AttributeError(name)

    return property(read, write, delete)
