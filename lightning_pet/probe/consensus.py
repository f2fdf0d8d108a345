"""One structure out of three opinions: the probe, the names, and the tensor-parallel plan."""

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lightning_pet.model.named_roles import (
    NamedRoles,
    declared_rows,
    is_cross,
    is_linear,
    multihead_targets,
    named_places,
    roles_by_name,
    tensor_parallel_plan,
    without_numbers,
)
from lightning_pet.model.structure import Role, Structure, Target

Host = tuple[str, str]
_COLUMNWISE: frozenset[Role] = frozenset(("attention.q", "attention.k", "attention.v", "ffn.up", "ffn.gate"))


def merge(model: nn.Module, seen: Structure | None) -> Structure:
    """Complete what a probe saw by what the names say; ``None`` for names alone.

    A role comes from the probe where it found one, else from names. Places that did not run (an
    expert without tokens) take the roles of the same place in other layers.
    """
    base = seen if seen is not None else Structure()
    found = _by_host(target for target in base.targets if target.role != "embedding")
    unresolved = _by_host(base.unresolved)
    notes: list[str] = []
    _use_multihead(model, base, found, unresolved)
    _use_siblings(model, base, found)
    places = named_places(model)
    for named in roles_by_name(model):
        notes.extend(_use_name(places, base, named, found, unresolved))
    notes.extend(_check_plan(model, found))
    embeddings = [target for target in base.targets if target.role == "embedding"]
    return replace(
        base,
        targets=(*embeddings, *(target for targets in found.values() for target in targets)),
        unresolved=tuple(target for targets in unresolved.values() for target in targets),
        disagreements=(*base.disagreements, *notes),
    )


def _by_host(targets: Iterable[Target]) -> dict[Host, list[Target]]:
    hosts: dict[Host, list[Target]] = defaultdict(list)
    for target in targets:
        hosts[target.module, target.parameter].append(target)
    return hosts


def _use_multihead(
    model: nn.Module, base: Structure, found: dict[Host, list[Target]], unresolved: dict[Host, list[Target]]
) -> None:
    """The attention of torch itself is known by its class, whatever the graph says."""
    seen_cross = {core.owner: core.cross for core in base.attention}
    modules = named_places(model)
    for path, module in modules.items():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        for table in (found, unresolved):
            for host in [host for host in table if host[0] in (path, f"{path}.out_proj".lstrip("."))]:
                del table[host]
        for target in multihead_targets(path, module, seen_cross.get(path, is_cross(modules, path))):
            found[target.module, target.parameter].append(target)


def _use_siblings(model: nn.Module, base: Structure, found: dict[Host, list[Target]]) -> None:
    """Give a place that never ran the roles of the same place in the layers that did run."""
    if base.called is None:
        return
    patterns: dict[Host, set[tuple[Target, ...]]] = defaultdict(set)
    for (host, parameter), targets in found.items():
        anonymous = tuple(replace(target, module="") for target in targets)
        patterns[without_numbers(host), parameter].add(anonymous)
    for path, module in named_places(model).items():
        if path in base.called or not is_linear(module) or (path, "weight") in found:
            continue
        known = patterns.get((without_numbers(path), "weight"), set())
        if len(known) == 1:
            found[path, "weight"] = [replace(target, module=path) for target in next(iter(known))]


def _use_name(
    places: Mapping[str, nn.Module],
    base: Structure,
    named: NamedRoles,
    found: dict[Host, list[Target]],
    unresolved: dict[Host, list[Target]],
) -> list[str]:
    host = (named.module, named.parameter)
    known = [*found.get(host, ()), *unresolved.get(host, ())]
    if known:
        roles = {target.role for target in known}
        rows = declared_rows(places[named.module], named) if host in unresolved else None
        if rows is not None and roles == set(named.roles):
            found[host] = [replace(target, rows=rows[target.role]) for target in unresolved.pop(host) if target.role]
        if roles == set(named.roles):
            return []
        return [f"{named.module}: the forward shows {_list(roles)}, its name suggests {_list(named.roles)}"]
    rival = _rival(base, named)
    if rival is not None:
        return [f"{named.module}: its name suggests {_list(named.roles)}, but the forward shows that in {rival}"]
    if len(named.roles) == 1:
        found[host].append(Target(*host, role=named.roles[0], cross=named.cross))
        return []
    rows = declared_rows(places[named.module], named)
    table = unresolved if rows is None else found
    table[host] = [Target(*host, role=role, cross=named.cross, rows=(rows or {}).get(role)) for role in named.roles]
    return []


def _rival(base: Structure, named: NamedRoles) -> str | None:
    """Another module of the same block in which the forward showed one of these roles."""
    place = _block(named.module)
    for target in base.targets:
        if target.role in named.roles and target.cross == named.cross and place and _block(target.module) == place:
            return target.module
    return None


def _block(path: str) -> str:
    """The path up to the last index above the module itself, empty without one."""
    parts = path.split(".")[:-1]
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _check_plan(model: nn.Module, found: Mapping[Host, Sequence[Target]]) -> list[str]:
    """Projections whose role contradicts the direction in which the model's own plan shards them."""
    plan = tensor_parallel_plan(model)
    notes: list[str] = []
    for (module, parameter), targets in found.items():
        name = module if parameter == "weight" else f"{module}.{parameter}"
        style = next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), "")
        for target in targets:
            wide = target.role in _COLUMNWISE
            if (wide and style.startswith("rowwise")) or (not wide and style.startswith("colwise")):
                notes.append(f"{name}: found to be {target.role}, but the model's plan shards it {style}")
    return notes


def _list(roles: Iterable[Role | None]) -> str:
    return " and ".join(sorted(str(role) for role in roles))
