"""Deltas that train fewer numbers than their parameters have, and files and optimizer states that hold these only.

An engine that shards keeps every parameter it was given until the run ends. A delta that needs fewer entries from
some step on says which (:attr:`~lightning_pet.layers.delta.Delta.excerpts`), and files hold what they would hold
if the parameters had been exchanged.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.layers.delta import Delta, Excerpt
from lightning_pet.model.adaptation import record_of
from lightning_pet.model.naming import by_delta, join
from lightning_pet.strategies.parameter_groups import LR_LISTS

# --- parameters -----------------------------------------------------------------------------------


def excerpts_of(root: nn.Module, prefix: str = "") -> dict[str, Excerpt | None]:
    """The parameters of which files hold an excerpt, or nothing, by name.

    Args:
        root: the adapted root.
        prefix: put before every name.
    """
    return {
        join(prefix, path, name): excerpt and excerpt._replace(name=join(prefix, path, excerpt.name))
        for path, own in [(path, delta.excerpts) for path, delta in _deltas(root)]
        for name, excerpt in own.items()
    }


def as_stored(
    named: Iterable[tuple[str, Tensor]], excerpts: Mapping[str, Excerpt | None]
) -> Iterator[tuple[str, Tensor]]:
    """Take the excerpts of whole tensors, under the names that they have in files."""
    for name, tensor in named:
        excerpt = excerpts.get(name)
        if excerpt is not None:
            yield excerpt.name, tensor.detach().reshape(-1)[excerpt.places.to(tensor.device).long()]
        elif name not in excerpts:
            yield name, tensor


def as_held(root: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite: what the parameters are when a file holds these tensors, by name from the root."""
    groups = by_delta(tensors)
    for path, delta in _deltas(root):
        if delta.excerpts:
            groups[path] = dict(delta.spread(groups.get(path, {})))
    return {join(path, name): tensor for path, own in groups.items() for name, tensor in own.items()}


def _deltas(root: nn.Module) -> list[tuple[str, Delta]]:
    record = record_of(root)
    return [(found.path, found.delta) for found in record.deltas(root, pass_over_gone=True)] if record else []


# --- states of optimizers and schedulers ----------------------------------------------------------

# In memory they belong to the parameters that an engine holds; in files to what those would have been exchanged
# for, as one device does it. So every engine resumes what another one wrote.


Excerpts = Mapping[str, Excerpt | None]
Names = Sequence[Sequence[Sequence[str]]]


def stored_names(names: Names, excerpts: Excerpts) -> list[list[list[str]]]:
    """Names of parameters by optimizer and group, as files have them; a group of which nothing is left is dropped."""
    return [[_renamed(groups[i], excerpts) for i in _kept(groups, excerpts)] for groups in names]


def stored_states(
    states: Sequence[Mapping[str, Any]], names: Names, excerpts: Excerpts, shapes: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Optimizer states as files have them.

    Args:
        states: of the optimizers, in the order of ``names``; tensors may be on the meta device.
        names: of the parameters, by optimizer and group.
        excerpts: by name of the parameter.
        shapes: tensors of the parameters' whole shapes, by name.
    """
    stored = []
    for state, groups in zip(states, names, strict=True):
        flat = [name for group in groups for name in group]
        positions = {name: i for i, name in enumerate(name for name in flat if _trains(name, excerpts))}
        entries = {
            positions[flat[at]]: {key: _taken(v, excerpts.get(flat[at]), shapes[flat[at]]) for key, v in entry.items()}
            for at, entry in state["state"].items()
            if flat[at] in positions
        }
        options = [state["param_groups"][i] for i in _kept(groups, excerpts)]
        renamed = [_renamed(groups[i], excerpts) for i in _kept(groups, excerpts)]
        stored.append({**state, "state": entries, "param_groups": _regrouped(options, renamed)})
    return stored


def held_states(
    states: Sequence[Mapping[str, Any]], names: Names, excerpts: Excerpts, shapes: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """The opposite of :func:`stored_states`; parameters of which files hold nothing have no state."""
    held = []
    for state, groups in zip(states, names, strict=True):
        flat = [name for group in groups for name in group]
        trained = [name for name in flat if _trains(name, excerpts)]
        positions = {name: i for i, name in enumerate(flat)}
        entries = {
            positions[trained[at]]: {
                key: _spread(v, excerpts.get(trained[at]), shapes[trained[at]]) for key, v in entry.items()
            }
            for at, entry in state["state"].items()
        }
        saved = dict(zip(_kept(groups, excerpts), state["param_groups"], strict=True))
        options = [saved.get(i, state["param_groups"][0]) for i in range(len(groups))]  # idle ones have no effect
        held.append({**state, "state": entries, "param_groups": _regrouped(options, groups)})
    return held


def stored_schedule(state: Any, groups: Sequence[Sequence[str]], excerpts: Excerpts) -> Any:
    """The state of a scheduler without what belongs to groups that files do not have."""
    kept = _kept(groups, excerpts)
    return _mapped(state, lambda key, values: [values[i] for i in kept] if len(values) == len(groups) else values)


def held_schedule(state: Any, present: Any, groups: Sequence[Sequence[str]], excerpts: Excerpts) -> Any:
    """The opposite: groups that a file does not have keep what they have at present."""
    kept, own = _kept(groups, excerpts), list(_lists(present))

    def filled(key: str, values: list[Any]) -> list[Any]:
        there = next((v for k, v in own if k == key and len(v) == len(groups)), None)
        if there is None or len(values) != len(kept):
            return values
        saved = dict(zip(kept, values, strict=True))
        return [saved.get(i, value) for i, value in enumerate(there)]

    return _mapped(state, filled)


def _trains(name: str, excerpts: Excerpts) -> bool:
    excerpt = excerpts.get(name)
    return name not in excerpts or (excerpt is not None and excerpt.places.numel() > 0)


def _renamed(group: Sequence[str], excerpts: Excerpts) -> list[str]:
    kept = (name for name in group if _trains(name, excerpts))
    return [excerpt.name if (excerpt := excerpts.get(name)) is not None else name for name in kept]


def _kept(groups: Sequence[Sequence[str]], excerpts: Excerpts) -> list[int]:
    return [i for i, group in enumerate(groups) if not group or any(_trains(name, excerpts) for name in group)]


def _regrouped(options: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    counter = count()
    groups = [{**own, "params": [next(counter) for _ in group]} for own, group in zip(options, names, strict=True)]
    return [
        g | ({"param_names": list(own)} if "param_names" in g else {}) for g, own in zip(groups, names, strict=True)
    ]


def _taken(value: Any, excerpt: Excerpt | None, like: Tensor) -> Any:
    if excerpt is None or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return value.reshape(-1)[excerpt.places.to(value.device).long()]


def _spread(value: Any, excerpt: Excerpt | None, like: Tensor) -> Any:
    if excerpt is None or not isinstance(value, Tensor) or value.shape != excerpt.places.shape:
        return value
    places = excerpt.places.to(value.device).long()
    return value.new_zeros(like.numel()).index_copy(0, places, value).view(torch.Size(like.shape))


def _mapped(state: Any, change: Any) -> Any:
    if isinstance(state, dict):
        return {
            key: change(key, value) if key in LR_LISTS and isinstance(value, list) else _mapped(value, change)
            for key, value in state.items()
        }
    return [_mapped(item, change) for item in state] if isinstance(state, list) else state


def _lists(state: Any) -> Iterator[tuple[str, list[Any]]]:
    if isinstance(state, dict):
        for key, value in state.items():
            if key in LR_LISTS and isinstance(value, list):
                yield key, value
            else:
                yield from _lists(value)
    elif isinstance(state, list):
        for item in state:
            yield from _lists(item)
