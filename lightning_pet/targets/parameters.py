"""Every parameter of a model, tied ones together: the places of methods that change all of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.model.layer_kinds import is_raw
from lightning_pet.model.named_roles import is_norm, named_places
from lightning_pet.model.naming import is_below, join, named_modules
from lightning_pet.model.quantised import format_of, is_quantised
from lightning_pet.model.structure import Role, Structure, Target
from lightning_pet.targets.heads import find_heads
from lightning_pet.targets.patterns import name_matcher
from lightning_pet.targets.targets import resolve_targets, seen_reader

_Place = tuple[str, str]  # module path, parameter name


def every_parameter(
    root: nn.Module,
    structure: Structure,
    *,
    embeddings: bool = True,
    norms: bool = True,
    heads: bool = False,
    exclude: Sequence[str] = (),
) -> tuple[Target, ...]:
    """Find every place from which a parameter of the model is read.

    A tied parameter has one target for each of its hosts; they follow each other, and :func:`tied` groups
    them again. Since tied places hold one tensor, they are left out together if any of them is left out.

    Args:
        root: the model.
        structure: what is known about it.
        embeddings: include lookup tables (``nn.Embedding`` and ``nn.EmbeddingBag``).
        norms: include normalisation layers.
        heads: include fresh task heads, which otherwise train as they are; a language model's output layer
            is no such head, and is always included.
        exclude: names of modules (with all below them) or parameters, in the forms of
            :func:`~lightning_pet.targets.targets.resolve_targets`, or roles. Every one must hit.

    Returns:
        Targets in module order of the first host of each parameter.

    Raises:
        TargetError: if a pattern hits nothing, a parameter is stored in an integer type, or nothing is left.
    """
    places = {
        (path, name): parameter
        for path, module in named_places(root).items()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.numel()
    }
    dropped = {place for pattern in exclude for place in _named(root, structure, places, pattern)}
    unwanted = () if heads else find_heads(root, ())
    modules = named_modules(root)
    for path, name in places:
        module = modules[path]
        head = any(is_below(path, above) for above in unwanted)
        table = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if head or (table and not embeddings) or (is_norm(module) and not norms):
            dropped.add((path, name))
    groups: dict[int, list[_Place]] = {}
    for place, parameter in places.items():
        groups.setdefault(id(parameter), []).append(place)
    kept = [place for group in groups.values() if not dropped.intersection(group) for place in group]
    _check(modules, places, kept)
    targets = [Target(path, name, *_role(structure, path, name)) for path, name in kept]
    # Stored with the target: whoever loads a file has seen no forward.
    return tuple(replace(target, reads=seen_reader(root, target, structure)) for target in targets)


class Choice(Protocol):
    """Options by which methods that change every parameter leave some out; see :func:`every_parameter`."""

    embeddings: bool
    norms: bool
    heads: bool
    exclude_modules: list[str] | None
    modules_to_save: list[str] | None


def chosen_parameters(root: nn.Module, structure: Structure, choice: Choice) -> tuple[Target, ...]:
    """The targets of :func:`every_parameter` that a method's options leave; modules to save train as they are."""
    return every_parameter(
        root,
        structure,
        embeddings=choice.embeddings,
        norms=choice.norms,
        heads=choice.heads,
        exclude=(*(choice.exclude_modules or ()), *(choice.modules_to_save or ())),
    )


def suffix_of(target: Target) -> str:
    """Tells the deltas of one method on several parameters of a module apart."""
    return "" if target.parameter == "weight" else target.parameter


def tied(root: nn.Module, targets: Sequence[Target]) -> list[tuple[Target, ...]]:
    """Group the targets of one parameter each, in their order.

    Args:
        root: the adapted root: the targets are named from it.
        targets: from :func:`every_parameter`, or from a file.

    Raises:
        TargetError: if one of the tensors is also read from a place that is not among the targets.
    """
    modules = named_modules(root)
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(id(modules[target.module]._parameters[target.parameter]), []).append(target)
    chosen = {(id(modules[target.module]), target.parameter) for target in targets}
    for path, module in named_places(root).items():
        for name, parameter in module._parameters.items():
            if id(parameter) in groups and (id(module), name) not in chosen:
                first = groups[id(parameter)][0].path
                raise TargetError(
                    f"{first!r} and {join(path, name)!r} are one tensor, but only the first lies in what this method "
                    f"is applied to, so the two would come apart. Exclude it (exclude_modules=[{first!r}]), or adapt "
                    "the model that holds both."
                )
    return [tuple(group) for group in groups.values()]


def _named(root: nn.Module, structure: Structure, places: dict[_Place, nn.Parameter], pattern: str) -> list[_Place]:
    """The places that a pattern names: by parameter, by module, by anything above it, or by role."""
    matches = name_matcher(pattern)
    aliases: dict[int, list[str]] = {}
    for path, module in named_modules(root).items():
        aliases.setdefault(id(module), []).extend(dict.fromkeys((path, join(structure.prefix, path))))
    modules = named_modules(root)
    found = []
    for path, name in places:
        above = [prefix for alias in aliases[id(modules[path])] for prefix in _prefixes(alias)]
        full = [join(alias, name) for alias in aliases[id(modules[path])]]
        if any(map(matches, (*above, *full))):
            found.append((path, name))
    if found:
        return found
    targets = resolve_targets(root, pattern, structure, hosts=lambda module, parameter: True)
    return [(target.module, target.parameter) for target in targets]


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def norm_parameters(root: nn.Module, scope: str | None = None) -> tuple[str, ...]:
    """Names of the parameters of all norms, for methods that train them as they are.

    Args:
        root: the adapted root.
        scope: submodule to look in, as the user names it, maybe from above the root; ``None``: everywhere.

    Raises:
        TargetError: if there is no norm.
    """
    places = named_places(root)
    parts = scope.split(".") if scope else []
    below = next((path for i in range(len(parts)) if (path := ".".join(parts[i:])) in places), "")
    names = [
        join(path, name)
        for path, module in places.items()
        if is_norm(module) and is_below(path, below)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    if not names:
        raise TargetError(
            f"layer_norms=True: {type(root).__name__} has no norm with parameters. Set layer_norms=False."
        )
    return tuple(names)


def _role(structure: Structure, path: str, name: str) -> tuple[Role | None, bool]:
    known = [target for target in structure.targets if (target.module, target.parameter) == (path, name)]
    role = known[0].role if len({target.role for target in known}) == 1 else None
    return role, any(target.cross for target in known)


def _check(modules: Mapping[str, nn.Module], places: dict[_Place, nn.Parameter], kept: Sequence[_Place]) -> None:
    if not kept:
        raise TargetError(
            "no parameter is left to change: everything is excluded. Allow embeddings, norms or heads, or shorten "
            "exclude_modules."
        )
    for path, name in kept:
        if is_raw(modules[path], name):
            raise TargetError(
                f"{join(path, name)}: a hook makes the weight of it before each call, where no delta is seen. "
                "Use torch.nn.utils.parametrizations instead of torch.nn.utils.weight_norm or spectral_norm, or "
                f"exclude it (exclude_modules=[{join(path, name)!r}])."
            )
        if is_quantised(places[path, name]):
            raise TargetError(
                f"{join(path, name)} is stored as {format_of(places[path, name])}, and this method adds to every "
                f"weight. Load the base in floating point, or exclude it (exclude_modules=[{join(path, name)!r}])."
            )
