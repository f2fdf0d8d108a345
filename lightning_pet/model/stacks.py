"""Where a model's layers are: the numbered modules that its residual stream runs through."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_pet.model.named_roles import is_norm
from lightning_pet.model.naming import CHILD, canonical, is_below, join, named_modules
from lightning_pet.model.structure import Structure


@dataclass(frozen=True)
class Stack:
    """Layers that follow each other.

    Attributes:
        path: module that holds them (``"encoder.layer"``), ``""`` for the root.
        layers: paths of those that have parameters, in order.
    """

    path: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Outside:
    """Parameters outside of all layers, by what they belong to.

    Attributes:
        embeddings: embeddings of any kind, with the norms among them.
        norms: the other norms (after the last layer).
    """

    embeddings: tuple[str, ...]
    norms: tuple[str, ...]


def layer_stacks(model: nn.Module, structure: Structure) -> tuple[Stack, ...]:
    """All stacks of a model: one for most, two for an encoder with a decoder, one per stage of a staged model.

    Stacks are outermost modules with numbered children. Where it is known which of them the residual stream
    runs through, or else which hold projections of a transformer, the others (lists of embeddings or heads)
    are left out.
    """
    stacks = []
    for path, module in named_modules(model).items():
        if any(part.isdigit() or part == CHILD for part in path.split(".")):
            continue
        numbered = [(n, m) for n, m in module.named_children() if canonical(n).isdigit()]
        layers = [join(path, canonical(n)) for n, m in numbered if any(True for _ in m.parameters())]
        if layers:
            stacks.append(Stack(path, tuple(layers)))
    sites = [branch for site in structure.sites for branch in site.branch]
    for places in (sites, [target.module for target in structure.targets]):
        holding = [s for s in stacks if any(is_below(place, layer) for place in places for layer in s.layers)]
        if holding:
            return tuple(holding)
    return tuple(stacks)


def outside(model: nn.Module, stacks: Sequence[Stack], heads: Sequence[str]) -> Outside:
    """What is outside of all layers and is no head."""
    modules = named_modules(model)
    layers = [layer for stack in stacks for layer in stack.layers]
    found: dict[str, list[str]] = {"embeddings": [], "norms": []}
    for name in names_of_base(model):
        owner = name.rpartition(".")[0]
        if name in heads or any(is_below(name, layer) for layer in layers):
            continue
        if isinstance(modules[owner], nn.Embedding) or re.search("embed|token", name, re.I):
            found["embeddings"].append(name)
        elif is_norm(modules[owner]):
            found["norms"].append(name)
    return Outside(tuple(found["embeddings"]), tuple(found["norms"]))


def norms_inside(model: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
    """Parameters of all norms in the given layers."""
    modules = named_modules(model)
    return tuple(
        name
        for name in names_of_base(model)
        if is_norm(modules[name.rpartition(".")[0]]) and any(is_below(name, layer) for layer in layers)
    )


def names_of_base(model: nn.Module, path: str = "") -> tuple[str, ...]:
    """Parameters in a module, without deltas; a tied one under its first name."""
    return tuple(
        canonical(name)
        for name, _ in model.named_parameters()
        if is_below(canonical(name), path) and CHILD not in canonical(name).split(".")
    )
