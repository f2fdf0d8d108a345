"""Other deltas in place of those that act, or none, for one thread: their values in place of what was trained."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.insertion.choice import LOCK, owned, shared
from lightning_pet.insertion.commit import changed_buffers, copy_in
from lightning_pet.insertion.host import conceal, deltas_of, expose, is_swapped_by_others
from lightning_pet.insertion.widening import read_precisions
from lightning_pet.layers.sharding import holds_parts
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.call import Switch
from lightning_pet.model.fast_paths import set_aside
from lightning_pet.model.naming import join, named_modules, named_tensors

_Places = list[tuple[nn.Module, dict[str, str]]]


@contextmanager
def using(root: nn.Module, record: Adaptation, deltas: tuple[str, ...]) -> Iterator[None]:
    """Within the block these deltas act in this thread, in this order; none of them: it computes what the base did.

    What is trained in place keeps its values: this thread reads others. Only where an engine holds parts of the
    parameters are the values exchanged, for all threads: there every process runs one forward at a time.
    """
    for inserted in record.deltas(root):  # user code may have put a copy of a host in its place
        deltas_of(inserted.host).belong(inserted.key, record.switch)
    selection = record.selection(deltas)
    with ExitStack() as stack, ExitStack() as exposed:
        with LOCK:
            wanted = wanted_by(root, record, deltas)
            # What other deltas have of their own is read through this selection as well: they may be activated.
            names = {*wanted, *record.held_by(record.names)}
            modules = named_modules(root) if names or not deltas else {}
            places, values = places_of(modules, names, aside=not deltas)
            if wanted and (holds_parts(root) or any(is_swapped_by_others(module) for module, _ in places)):
                stack.callback(copy_in, root, _exchange(root, wanted))
                places, values = places_of(modules, set(), aside=not deltas)
            else:
                values |= placed_values(root, wanted)
            selection.values.update(values)
            for module, attributes in places:
                expose(module, attributes, record.switch)
            block = exposed.enter_context(record.switch.using(selection))
        try:
            with exposed:
                yield
        finally:
            for module, attributes in places:
                close(module, attributes, record.switch, block.made_a_graph)


def wanted_by(root: nn.Module, record: Adaptation, deltas: tuple[str, ...]) -> dict[str, Tensor]:
    """What the model would hold in place of what it holds, if these deltas acted for all."""
    found = {name: record.originals[name] for name in leaving_for(root, record, deltas)}
    for delta in deltas:
        found |= record.values.get(delta, {})
    return found


def leaving_for(root: nn.Module, record: Adaptation, deltas: tuple[str, ...]) -> set[str]:
    """Tensors that would hold no longer what they do, if these deltas acted; the same for all that do not act now."""
    leaving = {name for delta in record.active if delta not in deltas for name in owned(root, record, delta)}
    if not deltas or not record.active:
        leaving |= changed_buffers(root).keys()
    if record.together and set(record.together).isdisjoint(deltas):
        leaving |= set(shared(root, record))
    return leaving


def close(module: nn.Module, names: Iterable[str], switch: Switch, made_a_graph: bool) -> None:
    """Undo one :func:`expose`, unless gradient checkpointing could read these attributes again for the block."""
    known = switch.exposed.setdefault(module, set()) if made_a_graph else set()
    conceal(module, known & set(names) if made_a_graph else names)
    known |= set(names)


def places_of(modules: dict[str, nn.Module], changed: set[str], aside: bool) -> tuple[_Places, dict[str, Any]]:
    """Modules with the attributes that are others in the base, by name from the root; values of what is no tensor.

    Args:
        modules: of the root.
        changed: names of tensors.
        aside: fast paths that were set aside are taken.
    """
    own = {join(path, name): t for path, module in modules.items() for name, t in _tensors(module).items()}
    names = {id(own[name]): name for name in changed}  # by identity: a tied tensor is read under other names, too
    places: _Places = []
    values: dict[str, Any] = {}
    for module, path in {module: path for path, module in modules.items()}.items():
        read = {name: names[id(t)] for name, t in _tensors(module).items() if id(t) in names}
        for name, value in set_aside(module).items() if aside else ():
            read[name] = join(path, name)
            values[join(path, name)] = value
        if read:
            places.append((module, read))
    return places, values


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def placed_values(root: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of values, placed as the present ones: the base may write into its buffers."""
    found, precisions = {}, read_precisions(root)
    with torch.no_grad():
        for name, tensor in named_tensors(root):
            if name in values and not values[name].is_meta:
                dtype = precisions.get(id(tensor), tensor.dtype)
                found[name] = values[name].detach().to(tensor.device, dtype, copy=True)
    return found


def _exchange(root: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put these values in, and return the present ones."""
    present = {name: tensor.detach().clone() for name, tensor in named_tensors(root) if name in values}
    copy_in(root, values)
    return present
