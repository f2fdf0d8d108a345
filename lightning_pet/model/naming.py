"""Parameter names as the user knows them, whatever wrapped the modules since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # names of files are read without torch
    from torch import Tensor, nn

T = TypeVar("T")

CHILD = "pet"
"""Name under which a host holds its deltas."""

# torch.compile, FSDP1 and activation checkpointing each put a level into the names of what they wrap.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical(name: str) -> str:
    """Strip the levels that compilers, shards and checkpointing put into a dotted name.

    >>> canonical("net._orig_mod.layer.0._checkpoint_wrapped_module.weight")
    'net.layer.0.weight'
    """
    if not name.startswith("_") and "._" not in name:  # as almost all are, and this is asked for every tensor
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def join(*parts: str) -> str:
    """Join dotted names, leaving out empty ones.

    >>> join("", "layer", "weight")
    'layer.weight'
    """
    return ".".join(filter(None, parts))


def walk(root: nn.Module, *, of_base: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its canonical name, in the order of ``nn.Module.named_modules``, each under all of its names.

    Torch's own walk hands each module on through every level above it, and this is done whenever deltas are switched.

    Args:
        root: where to begin; its name is ``""``.
        of_base: pass over deltas, of which there may be many times as many.
    """
    todo = [("", root)]
    while todo:
        path, module = todo.pop()
        yield path, module
        if module._modules:
            dotted = f"{path}." if path else ""
            below = [
                (path if name in _WRAPPERS else dotted + name, child)
                for name, child in module._modules.items()
                if child is not None and not (of_base and name == CHILD)
            ]
            todo += reversed(below)


def named_modules(root: nn.Module, *, of_base: bool = False) -> dict[str, nn.Module]:
    """Every module under its canonical name; a shared module appears under each of its names."""
    return dict(walk(root, of_base=of_base))


def modules_on_the_way(root: nn.Module, path: str) -> Iterator[nn.Module]:
    """The root and every module on the way to a canonical name, the named one last; ends where there is none.

    Takes as many steps as the name has parts: looking one name up in all names makes set-up quadratic.
    """
    module = unwrapped(root)
    yield module
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            return
        module = unwrapped(child)
        yield module


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module of a canonical name.

    Raises:
        KeyError: if there is none.
    """
    *above, module = modules_on_the_way(root, path)
    if len(above) != (path.count(".") + 1 if path else 0):
        raise KeyError(path)
    return module


def has_module(root: nn.Module, path: str) -> bool:
    """Whether a canonical name is a module's."""
    return sum(1 for _ in modules_on_the_way(root, path)) == (path.count(".") + 2 if path else 1)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of what a compiler, shards or checkpointing put around it."""
    while not _WRAPPERS.isdisjoint(module._modules):
        inner = next((module._modules[name] for name in _WRAPPERS if name in module._modules), None)
        if inner is None:
            return module
        module = inner
    return module


def is_below(place: str, path: str) -> bool:
    """Whether a dotted name is a path itself or lies below it; ``""`` is the root.

    >>> is_below("layer.0", "layer"), is_below("layer", "layer"), is_below("layers", "layer"), is_below("layer", "")
    (True, True, False, True)
    """
    return not path or f"{place}.".startswith(f"{path}.")


def is_inside(place: str, path: str) -> bool:
    """Whether a dotted name lies below a path and is not the path itself."""
    return place != path and is_below(place, path)


def names_below(names: Iterable[str], paths: Sequence[str], apart: Sequence[str] = ()) -> set[str]:
    """Those of the names that lie below one of some paths, and below none of others.

    >>> sorted(names_below(["a.b", "a", "ab.c", "a.d.e"], ["a"], ["a.d"])), names_below(["a"], [])
    (['a', 'a.b'], set())
    """
    inside, outside = (tuple([f"{path}." if path else "" for path in some]) for some in (paths, apart))
    return {name for name in names if f"{name}.".startswith(inside) and not f"{name}.".startswith(outside)}


def split_below(named: Mapping[str, T], path: str) -> tuple[dict[str, T], dict[str, T]]:
    """What lies below a path, under its names from there, and the rest.

    >>> split_below({"net.fc.weight": 1, "scale": 2}, "net")
    ({'fc.weight': 1}, {'scale': 2})
    """
    inside = {name[len(path) + 1 if path else 0 :]: value for name, value in named.items() if is_inside(name, path)}
    return inside, {name: value for name, value in named.items() if not is_inside(name, path)}


def delta_path(host: str, key: str) -> str:
    """Path of a delta: what the names of its tensors begin with.

    >>> delta_path("layer.0", "lora_default")
    'layer.0.pet.lora_default'
    """
    return join(host, CHILD, key)


def delta_prefix(name: str) -> str:
    """Path of the delta that a tensor belongs to, as its canonical name says; ``""`` if to none.

    >>> delta_prefix("layer.0.pet.lora_default.a")
    'layer.0.pet.lora_default'
    """
    parts = name.split(".")
    return ".".join(parts[: parts.index(CHILD) + 2]) if CHILD in parts else ""


def by_delta(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Group tensors by the path of the delta that they belong to, under their names from there.

    >>> by_delta({"fc.pet.lora_default.a": 1, "fc.weight": 2})
    {'fc.pet.lora_default': {'a': 1}, '': {'fc.weight': 2}}
    """
    groups: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        prefix = delta_prefix(name)
        groups.setdefault(prefix, {})[name.removeprefix(f"{prefix}.")] = tensor
    return groups


def named_parameters(root: nn.Module, *, every_name: bool = False) -> list[tuple[str, nn.Parameter]]:
    """Parameters under canonical names.

    Args:
        root: the module.
        every_name: a tied parameter comes under each of its names, not under its first one alone.
    """
    return [(canonical(name), p) for name, p in root.named_parameters(remove_duplicate=not every_name)]


def named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and *persistent* buffers under canonical names, each tensor under each of its names."""
    for path, module in walk(root):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer


def tensors_at(root: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Parameters and buffers of these canonical names, each followed part by part; what is not there is left out."""
    found: dict[str, Tensor] = {}
    for name in names:
        path, _, own = name.rpartition(".")
        *above, module = modules_on_the_way(root, path)
        if len(above) == (path.count(".") + 1 if path else 0):
            tensor = module._parameters.get(own, module._buffers.get(own))
            if tensor is not None:
                found[name] = tensor
    return found
