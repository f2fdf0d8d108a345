"""Names of deltas: how several of them tell their tensors apart in one model. No file knows of it.

A delta is all that one file holds. In a model it has a name; of a delta that is not called ``"default"`` the name is a
part of its keys on the hosts, and so of the names of its tensors. Files are the same whatever a delta is called where
it is: :func:`in_model` puts the name in when one is read, :func:`in_file` takes it out when one is written.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Final, TypeVar

from lightning_pet.errors import ArgumentError
from lightning_pet.model.naming import CHILD

T = TypeVar("T")

DEFAULT: Final = "default"
"""The name of a delta that was given none."""

_SIGN: Final = "@"
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_delta_name(name: object) -> bool:
    """Whether a delta may be called so."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_delta_name(name: object, what: str = "name") -> None:
    """Refuse what a delta cannot be called.

    Args:
        name: any.
        what: the argument, for the message.

    Raises:
        ArgumentError: naming the rule.
    """
    if not is_delta_name(name):
        raise ArgumentError(
            f"{what}={name!r}: the name of a delta becomes part of names of tensors; use 1 to 64 letters, digits, "
            "underscores and hyphens."
        )


def host_key(own: str, delta: str) -> str:
    """Key among the deltas of a host.

    Args:
        own: as the file has it.
        delta: name of the delta in the model.

    >>> host_key("lora_default", "default"), host_key("lora_default_q", "tone")
    ('lora_default', 'lora_default_q@tone')
    """
    return own if delta == DEFAULT else f"{own}{_SIGN}{delta}"


def delta_in(key: str) -> str:
    """The delta that a key belongs to.

    >>> delta_in("lora_default"), delta_in("lora_default_q@tone")
    ('default', 'tone')
    """
    return key.partition(_SIGN)[2] or DEFAULT


def own_key(key: str) -> str:
    """The key as files have it."""
    return key.partition(_SIGN)[0]


def delta_of(name: str) -> str | None:
    """The delta that a tensor of this canonical name belongs to; ``None`` if it is one of the base.

    >>> delta_of("layer.0.pet.lora_default@tone.a"), delta_of("head.weight")
    ('tone', None)
    """
    _, found, rest = f".{name}".partition(f".{CHILD}.")
    return delta_in(rest.partition(".")[0]) if found else None


def in_model(tensors: Mapping[str, T], delta: str) -> dict[str, T]:
    """What a file holds, under the names that it has in a model.

    >>> in_model({"fc.pet.lora_default.a": 1, "head.weight": 2}, "tone")
    {'fc.pet.lora_default@tone.a': 1, 'head.weight': 2}
    """
    return {_renamed(name, delta): value for name, value in tensors.items()}


def in_file(tensors: Mapping[str, T]) -> dict[str, T]:
    """What a model holds of a delta, under the names that it has in files.

    >>> in_file({"fc.pet.lora_default@tone.a": 1, "head.weight": 2})
    {'fc.pet.lora_default.a': 1, 'head.weight': 2}
    """
    return in_model(tensors, DEFAULT)


def _renamed(name: str, delta: str) -> str:
    parts = name.split(".")
    if CHILD in parts[:-1]:
        place = parts.index(CHILD) + 1
        parts[place] = host_key(own_key(parts[place]), delta)
    return ".".join(parts)


def check_known(names: Iterable[str], known: Collection[str]) -> None:
    """Refuse names that no delta of a model has, and a name that is given twice.

    Raises:
        ArgumentError: with the nearest name there is.
    """
    seen: set[str] = set()
    for name in names:
        if name not in known:
            near = get_close_matches(str(name), known, 1, 0.5)
            there = ", ".join(map(repr, known)) or "none"
            raise ArgumentError(
                f"there is no delta {name!r} in this model, it has {there}."
                + (f" Did you mean {near[0]!r}?" if near else " load_delta(model, path, name=…) loads one.")
            )
        if name in seen:
            raise ArgumentError(f"the delta {name!r} is named twice; name each once, in the order in which they act.")
        seen.add(name)
