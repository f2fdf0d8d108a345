"""How names are matched by what users write: suffixes, globs, regular expressions, roles.

Which of them hit what in a model is decided in :mod:`lightning_pet.targets.targets`.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.model.naming import join
from lightning_pet.model.structure import Role, Target

V = TypeVar("V")

GROUPS: dict[str, tuple[Role, ...]] = {
    "attention": ("attention.q", "attention.k", "attention.v", "attention.o"),
    "ffn": ("ffn.gate", "ffn.up", "ffn.down"),
    "embedding": ("embedding",),
}
KINDS = {"all-linear": "linear layer", "all-conv": "convolution"}
"""Words for every layer of a kind."""
_ROLE = re.compile(r"(attention)(?:\.(self|cross))?(?:\.([qkvo]))?|ffn(?:\.(up|gate|down))?|embedding")
_COMMA = re.compile(r"\s*,(?![^\[]*\])\s*")  # not in the brackets of a glob
_GLOB = "*?["
_EXPRESSION = "re:"
_PLACE = "="


# -- what a constructor is given ----------------------------------------------------------------------


def listed(patterns: Sequence[str] | str) -> list[str]:
    r"""Names or patterns as a list; one string may hold several, separated by commas.

    >>> listed("query, value"), listed("layers.[0,1].mlp"), listed(r"wi,re:.*\.\d{1,2}")
    (['query', 'value'], ['layers.[0,1].mlp'], ['wi', 're:.*\\.\\d{1,2}'])

    Raises:
        ArgumentError: if it is neither a string nor several.
    """
    if isinstance(patterns, str):
        head, mark, expression = patterns.partition("re:")  # the commas of an expression are its own
        return [name for name in _COMMA.split(head.strip()) if name] + ([mark + expression] if mark else [])
    if isinstance(patterns, Mapping) or not hasattr(patterns, "__iter__"):
        raise ArgumentError(
            f"{patterns!r} names nothing: give a list of names or patterns, or a string with commas between them."
        )
    found = list(patterns)
    if odd := [name for name in found if not isinstance(name, str)]:
        raise ArgumentError(f"{odd[0]!r} names nothing: names and patterns are text.")
    return found


def listed_if_given(patterns: Sequence[str] | str | None) -> list[str] | None:
    """The same for an option that may be ``None``."""
    return None if patterns is None else listed(patterns)


def listed_layers(layers: Sequence[int] | int | None) -> list[int] | None:
    """Indices of layers as a list; one index need not be in one.

    >>> listed_layers(3), listed_layers(range(2)), listed_layers(None)
    ([3], [0, 1], None)

    Raises:
        ArgumentError: if something else than whole numbers is among them, or there is none.
    """
    if layers is None:
        return None
    found = list(layers) if hasattr(layers, "__iter__") else [layers]
    if not found or any(not isinstance(index, int) or isinstance(index, bool) for index in found):
        raise ArgumentError(
            f"layers_to_transform={layers!r}: give the index of a layer or a list of them, e.g. [0, 1]; None means all."
        )
    return found


# -- one pattern and one name -------------------------------------------------------------------------


def name_matcher(pattern: str) -> Callable[[str], bool]:
    """What a pattern that is no role says of a dotted name.

    Raises:
        TargetError: if it is no regular expression, but should be.
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise TargetError(f"target pattern {pattern!r} is not a regular expression: {error}.") from error
        return lambda name: expression.fullmatch(name) is not None
    if any(sign in pattern for sign in _GLOB):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    return lambda name: name == pattern or name.endswith(f".{pattern}")


def names_from_above(path: str, prefix: str = "") -> set[str]:
    """A module's path and those of all modules around it, from the root and from what the user handed over.

    >>> sorted(names_from_above("layer.0", "net"))
    ['layer', 'layer.0', 'net', 'net.layer', 'net.layer.0']
    """
    parts, cut = join(prefix, path).split("."), len(prefix.split(".")) if prefix else 0
    return {".".join(parts[start:end]) for start in {0, cut} for end in range(start + 1, len(parts) + 1)}


def is_role(pattern: str) -> bool:
    """Whether a pattern has the form of a role or of a group of roles."""
    return _ROLE.fullmatch(pattern) is not None


def has_role(target: Target, pattern: str) -> bool:
    """Whether a place plays the role that a pattern names."""
    parts = pattern.split(".")
    if len(parts) > 1 and parts[1] in ("self", "cross"):
        if target.cross is not (parts[1] == "cross"):
            return False
        del parts[1]
    return target.role == ".".join(parts) or (len(parts) == 1 and target.role in GROUPS.get(parts[0], ()))


# -- options by pattern -------------------------------------------------------------------------------


def value_at(patterns: Mapping[str, V] | None, target: Target, default: V) -> V:
    """The value that the first pattern which names this place gives it."""
    given = patterns or {}
    if (place := exactly(target)) in given:
        return given[place]
    return next((value for key, value in given.items() if _names(key, target)), default)


def settled(patterns: Mapping[str, V] | None, targets: Sequence[Target]) -> Mapping[str, V] | None:
    """The same decisions in a form for files, which keep no order and in which no regular expression is looked up.

    >>> places = [Target("a.q"), Target("b.q")]
    >>> settled({"q": 2}, places), settled({"re:a.*": 4, "q": 2}, places)
    ({'q': 2}, {'=a.q.weight': 4, '=b.q.weight': 2})
    """
    if not patterns:
        return patterns
    found = {exactly(target): value_at(patterns, target, None) for target in targets}
    by_name = dict(sorted(patterns.items()))
    if not any(key.startswith(_EXPRESSION) for key in patterns) and all(
        value_at(by_name, target, None) == found[exactly(target)] for target in targets
    ):
        return patterns
    return {place: value for place, value in found.items() if value is not None}


def check_patterns(option: str, patterns: Mapping[str, V] | None, targets: Sequence[Target]) -> None:
    """Every pattern of an option has to decide for at least one place.

    Raises:
        ArgumentError: if one hits none, or only places for which those before it have decided.
    """
    keys = [key for key in patterns or {} if not is_place(key)]  # a place decides for itself, here or nowhere
    taken: dict[int, str] = {}
    for key in keys:
        hits = [i for i, target in enumerate(targets) if _names(key, target)]
        if not hits:
            raise ArgumentError(
                f"{option}: {key!r} hits none of the {len(targets)} targets, the first of which is "
                f"{targets[0].module!r}. Use a role, or a suffix, a glob or a 're:…' of a target's path."
            )
        if all(i in taken for i in hits):
            first = next(other for other in keys if other in {taken[i] for i in hits})
            raise ArgumentError(
                f"{option}: {key!r} decides nothing, because {first!r} stands before it and hits all of its "
                f"{len(hits)} targets; the first pattern that hits counts. Put {key!r} first, or leave it out."
            )
        taken |= {i: key for i in hits if i not in taken}


def is_place(pattern: str) -> bool:
    """Whether a pattern names one place, in the form of :func:`settled`."""
    return pattern.startswith(_PLACE)


def is_expression(pattern: str) -> bool:
    """Whether a pattern is a regular expression, which may take any time: none is looked up for a stranger."""
    return pattern.startswith(_EXPRESSION)


def exactly(target: Target) -> str:
    """This place and no other: ``=`` and its path, with its role if it is a part of a parameter."""
    return f"{_PLACE}{target.path} {target.role}" if target.rows else f"{_PLACE}{target.path}"


def _names(pattern: str, target: Target) -> bool:
    if is_place(pattern):
        return pattern == exactly(target)
    if is_role(pattern) and has_role(target, pattern):
        return True
    plain = is_expression(pattern) or not any(sign in pattern for sign in _GLOB)
    matchers = [name_matcher(pattern)] if plain else [name_matcher(pattern), name_matcher(f"*.{pattern}")]
    return any(matches(name) for matches in matchers for name in (target.module, target.path))
