"""Which of several deltas act: where a thread has chosen nothing, in a block of one thread, and for single rows.

Heads, biases and whole weights that a delta trains in place are the model's own parameters, of which it can hold one
value each. Those of the deltas that act are there; those of the others lie in the record, and the base's own among the
originals. A parameter keeps its identity: it gets other memory (a pointer is set), or is written into where somebody
else may hold its memory (an engine, other processes).
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, PETError, TargetError
from lightning_pet.insertion.checks import check_acting, sizes_of
from lightning_pet.insertion.commit import check_sum, copy_in, keys_of, take_out, undo
from lightning_pet.insertion.host import belong, conceal, expose, is_swapped_by_others
from lightning_pet.insertion.row_guard import Manners
from lightning_pet.insertion.tasks.together import part, shared
from lightning_pet.insertion.widening import read_precisions
from lightning_pet.layers.sharding import has_master, holds_parts, is_flattened, is_partition, settled, whole_shape
from lightning_pet.model.adaptation import Adaptation, record_at
from lightning_pet.model.call import Rows, Switch, between_forwards
from lightning_pet.model.naming import (
    CHILD,
    check_known,
    delta_of,
    join,
    named_modules,
    named_tensors,
    tensors_at,
)
from lightning_pet.model.outside import changed_buffers
from lightning_pet.model.undisturbed import set_aside

LOCK: Final = threading.RLock()
"""Held while values are exchanged, and while a block notes which ones it reads."""

_SIZES: Final = ("out_features", "num_embeddings", "out_channels")
"""What modules say of the first dimension of their parameters."""


def activate(root: nn.Module, deltas: tuple[str, ...]) -> None:
    """Let these deltas act in this order, and no others, wherever no thread has chosen; they train, where any does.

    The model is as it was before if that cannot be.

    Raises:
        ArgumentError: if there is no such delta, or two have their own values for one tensor.
        KeyError: if a module that one of them lies in was replaced.
        TargetError: if two cannot act on one layer.
    """
    record = record_at(root)
    check_known(deltas, record.names)
    coming = {name for name in deltas if name not in record.active}
    for _ in record.of(*coming).deltas(root) if coming else ():
        pass  # raises before anything is changed
    place(root, deltas)
    let_train(root, deltas)


def place(root: nn.Module, deltas: tuple[str, ...]) -> None:
    """The same, but what rests goes on to rest."""
    record = record_at(root)
    check_known(deltas, record.names)
    check_sum(record, deltas)
    if len(deltas) > 1:
        check_acting(root, deltas)
    if record.together:
        with between_forwards(root), LOCK:
            part(root, record, next((name for name in deltas if name in record.together), record.together[-1]))
        check_sum(record, deltas)
    with between_forwards(root), LOCK:
        leaving = {name: owned(root, record, name) for name in record.active if name not in deltas}
        coming = [name for name in deltas if name not in record.active]
        wanted = {name: record.originals[name] for own in leaving.values() for name in own}
        if not record.active:  # forwards of the base alone may have written into its buffers
            wanted |= {name: record.originals[name] for name in changed_buffers(root)}
        for name in coming:
            wanted |= record.values[name]
        before = exchange(root, record, wanted)
        for name, own in leaving.items():
            record.values[name] = {n: before[n] for n in own}
            record.claims[name] = frozenset(own) - record.trained_by(name).keys()
        for name in coming:
            del record.values[name]
        record.act(deltas)
    let_train(root, [name for name in deltas if name not in record.waiting])


def let_train(root: nn.Module, deltas: Iterable[str]) -> None:
    """Let these deltas train, and no others."""
    record, wanted = record_at(root), set(deltas)
    before = set(record.trainable_names)
    woken = wanted & record.waiting.keys()
    for name in record.names:
        record.wake(name) if name in wanted else record.rest(name)
    for inserted in record.of(*woken).deltas(root) if woken else ():
        if inserted.delta.training != inserted.host.training:  # it was let rest in a run
            inserted.delta.train(inserted.host.training)
    after = set(record.trainable_names)
    for name, tensor in tensors_at(root, before ^ after).items():
        if isinstance(tensor, nn.Parameter) and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.requires_grad_(name in after)


def remove(root: nn.Module, delta: str) -> None:
    """Take one delta out, with its values.

    Raises:
        PETError: if a thread is in a block that uses it.
    """
    record = record_at(root)
    check_known((delta,), record.names)
    refuse_in_use(record, delta, "removed")
    if delta in record.active and len(record.names) > 1 and delta not in record.together:
        place(root, tuple(name for name in record.active if name != delta))
    take_out(root, keys_of(root, (delta,)))


def remove_all(root: nn.Module) -> None:
    """Take every delta out: the model is what it was before the first came."""
    record = record_at(root)
    own = tensors_at(root, record.originals)
    if len(record.names) > 1 or any(whole_shape(t) != record.originals[name].shape for name, t in own.items()):
        place(root, ())
    with between_forwards(root):
        undo(root)


def refuse_in_use(record: Adaptation, delta: str, what: str) -> None:
    """Refuse to take a delta away from a block that uses it.

    Raises:
        PETError: naming it.
    """
    selections = record.switch.open
    parts = {part for selection in selections if selection.rows is not None for part in selection.rows.parts}
    using = [selection for selection in selections if delta in selection.deltas and selection not in parts]
    users, by_rows = len(using), any(selection.rows is not None for selection in using)
    if users:
        raise PETError(
            f"the delta {delta!r} cannot be {what} now: {users} block{'s' * (users > 1)} of `using({delta!r})`"
            f"{' or `rows([...])`' if by_rows else ''}, maybe of other threads, are open. Leave them first."
        )


def owned(root: nn.Module, record: Adaptation, delta: str) -> tuple[str, ...]:
    """Tensors of the base of which a delta has values of its own, whether it acts or not."""
    if delta in record.values:
        return tuple(record.values[delta])
    own = dict.fromkeys((*record.trained_by(delta), *record.claims.get(delta, ())))
    if delta == record.keeper and not record.together:
        others = record.held_by(name for name in record.active if name != delta)
        beside = (name for name in record.trained_names if name not in record.trained_in_place)
        own |= dict.fromkeys(name for name in (*beside, *changed_buffers(root)) if name not in others)
    return tuple(name for name in own if name in record.originals)


# --- deltas that train together ---------------------------------------------------------------------------


def gather(root: nn.Module, deltas: tuple[str, ...], *, train: bool = True) -> None:
    """Let these deltas train together: each acts on the rows that a block gives it, and none elsewhere.

    Raises:
        ArgumentError: if another delta acts.
    """
    record = record_at(root)
    check_known(deltas, record.names)
    if record.together != deltas and (held := record.held_by(deltas)):
        if not train:
            return  # blocks read them side by side
        name, (owner, *_) = next(iter(held.items()))
        raise ArgumentError(
            f"the delta {owner!r} of this model has values of its own for {name}, as one that was loaded or trained "
            "alone has, and deltas that train together need a parameter each. Start from its file instead, in a model "
            f"without it: TasksCallback(tasks={{{owner!r}: {{'start_from': path}}, …}})."
        )
    if others := [name for name in record.active if name not in deltas]:
        raise ArgumentError(
            f"the delta {others[0]!r} acts, and each row of this run uses the delta of its task alone: "
            f"{', '.join(map(repr, deltas))}. Let none act before: adapted.activate()."
        )
    record.together = deltas
    record.act(deltas)
    if train:
        let_train(root, deltas)


# --- exchanging values ----------------------------------------------------------------------------------


def exchange(root: nn.Module, record: Adaptation, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put these values into the model, and return those that were there; blocks that are open go on reading them.

    Values on the meta device are passed over: nobody knows them.
    """
    values = {name: value for name, value in values.items() if not value.is_meta}
    if not values:
        return {}
    settled(root)
    present = tensors_at(root, values)
    if held := [name for name, tensor in present.items() if is_flattened(tensor) or is_partition(tensor)]:
        raise PETError(
            f"{', '.join(held[:4])} cannot get the values of another delta for all threads: the engine (FSDP1 or "
            "ZeRO-3) holds a piece in each process. Choose before the fit, or for a block: `with adapted.using(name)`."
        )
    by_copy = any(_is_held(tensor) for tensor in present.values()) or holds_parts(root, without=CHILD)
    if other := [n for n, t in present.items() if by_copy and whole_shape(t) != whole_shape(values[n])]:
        raise PETError(
            f"{', '.join(other[:4])} would get another shape, and others hold its memory (an engine that shards, or "
            "other processes). Heads of different sizes are exchanged in a model that one process holds."
        )
    with torch.inference_mode(False), torch.no_grad():
        if by_copy:
            before = {name: tensor.detach().clone() for name, tensor in present.items()}
        else:
            before = {name: tensor.data for name, tensor in present.items()}
            new = {name: _like(values[name], tensor) for name, tensor in present.items()}
        for selection in list(record.switch.open):
            for name, tensor in before.items():
                selection.values.setdefault(name, tensor)
        if by_copy:
            copy_in(root, values)
            return before
        for name, tensor in present.items():
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None
            tensor.data = new[name]
    _resize(root, record, {name for name in new if new[name].shape != before[name].shape})
    return before


def show_in_blocks(root: nn.Module, record: Adaptation, delta: str, values: Mapping[str, Tensor]) -> None:
    """Let blocks that use a delta read other values of it from now on."""
    present = tensors_at(root, values)
    for selection in list(record.switch.open):
        if delta in selection.deltas:
            selection.values.update({name: _like(values[name], tensor) for name, tensor in present.items()})


def _is_held(tensor: Tensor) -> bool:
    """Whether others may hold the memory of a tensor, or it is of a kind whose memory is not to be exchanged."""
    shared = tensor.device.type == "cpu" and tensor.is_shared()  # type: ignore[no-untyped-call]
    return shared or type(tensor.data) is not Tensor or has_master(tensor)


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """A value of its own for a tensor of a model, which may have been moved or cast meanwhile."""
    return value.detach().to(tensor.device, tensor.dtype, copy=True)


def _resize(root: nn.Module, record: Adaptation, names: set[str]) -> None:
    """Let modules say what size they have, where a head of another size came in."""
    if not names:
        return
    numbers = {id(tensor) for tensor in tensors_at(root, names).values()}
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) in numbers:
                for size in _SIZES:
                    if isinstance(module.__dict__.get(size), int):
                        module.__dict__[size] = parameter.shape[0]
    record.sizes |= sizes_of(root, {name.rpartition(".")[0] for name in names} & record.sizes.keys())


def misshapen(root: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """Values whose shape a tensor of the model cannot take on: more than the number of outputs differs.

    A head may have another number of outputs, if nothing but modules that say their own size holds it.
    """
    own: dict[str, Tensor] = {}
    holders: dict[int, list[nn.Module]] = {}
    for name, tensor in named_tensors(root):
        if delta_of(name) is None:
            own[name] = tensor
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)
    return [
        name
        for name, value in values.items()
        if name in own and own[name].shape != value.shape and not _fits(own[name], value, holders)
    ]


def _fits(tensor: Tensor, value: Tensor, holders: Mapping[int, list[nn.Module]]) -> bool:
    if not value.dim() or tensor.shape[1:] != value.shape[1:] or tensor.dim() != value.dim():
        return False
    modules = holders.get(id(tensor), [])
    sizes = [[module.__dict__.get(size) for size in _SIZES] for module in modules]
    return bool(modules) and all(tensor.shape[0] in size for size in sizes)


# --- in a block of one thread ---------------------------------------------------------------------


_Places = list[tuple[nn.Module, dict[str, str]]]


@contextmanager
def using(root: nn.Module, record: Adaptation, deltas: tuple[str, ...]) -> Iterator[None]:
    """Within the block these deltas act in this thread, in this order; none of them: it computes what the base did.

    What is trained in place keeps its values: this thread reads others. Only where an engine holds parts of the
    parameters are the values exchanged, for all threads: there every process runs one forward at a time.
    """
    belong(root, record.keys(), record.switch)
    selection = record.selection(deltas)
    with ExitStack() as stack, ExitStack() as exposed:
        with LOCK:
            wanted = wanted_by(root, record, deltas)
            # What other deltas have of their own is read through this selection as well: they may be activated.
            names = {*wanted, *record.held_by(record.names)}
            modules = named_modules(root, of_base=True) if names or not deltas else {}
            places, values = places_of(modules, names, aside=not deltas)
            if wanted and _is_exchanged(root, wanted, places):
                stack.callback(_exchange, root, _exchange(root, wanted))
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


def _is_exchanged(root: nn.Module, names: Iterable[str], places: _Places) -> bool:
    """Whether a block has to exchange values: they cannot be read in the place of what an engine holds."""
    parts = holds_parts(root, without=CHILD) and not any(
        is_partition(tensor) for tensor in tensors_at(root, names).values()
    )
    return parts or any(is_swapped_by_others(module) for module, _ in places)


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


def placed_values(
    root: nn.Module,
    values: Mapping[str, Tensor],
    *,
    shared: bool = False,
    precisions: Mapping[int, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """Values placed as the present ones: copies, as the base may write into its buffers; ``shared``: of these only."""
    found: dict[str, Tensor] = {}
    precisions = read_precisions(root) if precisions is None and values else precisions or {}
    with torch.no_grad():
        for name, tensor in tensors_at(root, values).items():
            if not values[name].is_meta:
                dtype, copy = (
                    precisions.get(id(tensor), tensor.dtype),
                    not shared or not isinstance(tensor, nn.Parameter),
                )
                found[name] = values[name].detach().to(tensor.device, dtype, copy=copy)
    return found


def _exchange(root: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put these values in, and return the present ones."""
    settled(root)
    present = {name: tensor.detach().clone() for name, tensor in named_tensors(root) if name in values}
    copy_in(root, values)
    return present


# --- for single rows of a batch, in a block of one thread -----------------------------------------


@contextmanager
def using_rows(
    root: nn.Module,
    record: Adaptation,
    names: Sequence[str | None],
    manners: Manners,
    every: Sequence[str] | None = None,
) -> Iterator[None]:
    """Within the block every row of a batch uses its own delta in this thread; ``None``: none.

    Args:
        root: what is adapted.
        record: its own.
        names: one per row.
        manners: what is known of how modules treat rows.
        every: deltas that are called in this order in any case, if need be on no rows: processes that share parameters
            with an engine have to do the same.

    Raises:
        TargetError: if the values of what was trained in place cannot be read side by side here.
    """
    switch = record.switch
    belong(root, record.keys(), record.switch)
    groups: tuple[str | None, ...] = tuple(dict.fromkeys(names if every is None else (*every, *names)))
    tuples = [() if name is None else (name,) for name in groups]
    with ExitStack() as exposed:
        with LOCK:
            wanted = _wanted_by_each(root, record, groups)
            differing = {name for values in wanted for name in values}
            everything = differing | set(record.held_by(record.names))
            modules = named_modules(root, of_base=True)
            places, _ = places_of(modules, everything, aside=False)
            if differing and _is_exchanged(root, differing, places):
                raise TargetError(
                    f"an engine holds parts of {', '.join(sorted(differing)[:4])}, and every delta has values of its "
                    "own there: rows of one batch cannot read different ones. Use one after the other: `using(name)`."
                )
            parts = [record.selection(deltas) for deltas in tuples]
            precisions = read_precisions(root) if differing else {}
            for part, values in zip(parts, wanted, strict=True):
                part.values.update(placed_values(root, values, shared=True, precisions=precisions))
            paths = {id(module): path for path, module in modules.items()}
            ids = tuple(map(groups.index, names))
            rows = Rows(groups, ids, tuple(parts), frozenset(differing), paths, manners, steady=every is not None)
            union = record.selection(tuple(name for name in groups if name is not None))
            for module, attributes in places:
                expose(module, attributes, switch, by_rows=True)
            block = exposed.enter_context(switch.using(replace(union, rows=rows)))
        try:
            with exposed:
                yield
        finally:
            for module, attributes in places:
                close(module, attributes, switch, block.made_a_graph)


def _wanted_by_each(root: nn.Module, record: Adaptation, groups: Sequence[str | None]) -> list[dict[str, Tensor]]:
    """What each delta would have in place of what the model holds; a look at the model for all that do not act now."""
    leaving: set[str] | None = None
    found = []
    for name in groups:
        if name is None or name in record.active:
            found.append(wanted_by(root, record, () if name is None else (name,)))
            continue
        leaving = leaving_for(root, record, (name,)) if leaving is None else leaving
        found.append({n: record.originals[n] for n in leaving} | record.values.get(name, {}))
    return found
