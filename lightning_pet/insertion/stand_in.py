"""The base in place of the adapted model, for one thread: deltas off, original values for trained ones."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.insertion.commit import changed_buffers, copy_in
from lightning_pet.insertion.host import conceal, deltas_of, expose, is_swapped_by_others
from lightning_pet.insertion.widening import read_precisions
from lightning_pet.layers.sharding import holds_parts
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.call import Selection, Switch
from lightning_pet.model.fast_paths import set_aside
from lightning_pet.model.naming import join, named_modules, named_tensors

_Places = list[tuple[nn.Module, dict[str, str]]]


@contextmanager
def switched_off(root: nn.Module, record: Adaptation) -> Iterator[None]:
    """Within the block the root computes, in this thread, what the base computed.

    What was trained in place keeps its values: this thread reads others. Only where an engine holds parts of the
    parameters are the values exchanged, for all threads: there every process runs one forward at a time.
    """
    modules = named_modules(root)
    for inserted in record.deltas(root):  # user code may have put a copy of a host in its place
        deltas_of(inserted.host).belong(inserted.key, record.switch)
    changed = {*record.trained_names, *changed_buffers(root)}
    places, values = _places(modules, changed)
    with ExitStack() as stack:
        if changed and (holds_parts(root) or any(is_swapped_by_others(module) for module, _ in places)):
            stack.callback(copy_in, root, _exchange(root, record, changed))
            places, values = _places(modules, set())
        else:
            values |= _originals(root, record, changed)
        for module, names in places:
            expose(module, names, record.switch)
        try:
            with record.switch.using(Selection(values=values)) as block:
                yield
        finally:
            for module, names in places:
                _close(module, names, record.switch, block.made_a_graph)


def _close(module: nn.Module, names: Iterable[str], switch: Switch, made_a_graph: bool) -> None:
    """Undo one :func:`expose`, unless gradient checkpointing could read these attributes again for the block."""
    known = switch.exposed.setdefault(module, set()) if made_a_graph else set()
    conceal(module, known & set(names) if made_a_graph else names)
    known |= set(names)


def _places(modules: dict[str, nn.Module], changed: set[str]) -> tuple[_Places, dict[str, Any]]:
    """Modules with the attributes that are others in the base, by name from the root; values of what is no tensor."""
    own = {join(path, name): t for path, module in modules.items() for name, t in _tensors(module).items()}
    names = {id(own[name]): name for name in changed}  # by identity: a tied tensor is read under other names, too
    places: _Places = []
    values: dict[str, Any] = {}
    for module, path in {module: path for path, module in modules.items()}.items():
        read = {name: names[id(t)] for name, t in _tensors(module).items() if id(t) in names}
        for name, value in set_aside(module).items():
            read[name] = join(path, name)
            values[join(path, name)] = value
        if read:
            places.append((module, read))
    return places, values


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _originals(root: nn.Module, record: Adaptation, changed: set[str]) -> dict[str, Tensor]:
    """Copies of the original values, placed as the present ones: the base may write into its buffers."""
    found, precisions = {}, read_precisions(root)
    with torch.no_grad():
        for name, tensor in named_tensors(root):
            if name in changed and not record.originals[name].is_meta:
                like = torch.empty_like(tensor, dtype=precisions.get(id(tensor)), requires_grad=False)
                found[name] = like.copy_(record.originals[name])
    return found


def _exchange(root: nn.Module, record: Adaptation, changed: set[str]) -> dict[str, Tensor]:
    """Put the original values in, and return the present ones."""
    present = {name: tensor.detach().clone() for name, tensor in named_tensors(root) if name in changed}
    copy_in(root, {name: record.originals[name] for name in changed})
    return present
