"""Which of several deltas act where a thread has chosen nothing: their values go into the model, and out again.

Heads, biases and whole weights that a delta trains in place are the model's own parameters, of which it can hold one
value each. Those of the deltas that act are there; those of the others lie in the record, and the base's own among the
originals. A parameter keeps its identity: it gets other memory (a pointer is set), or is written into where somebody
else may hold its memory (an engine, other processes).
"""

import threading
from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, PETError
from lightning_pet.insertion.commit import changed_buffers, check_sum, copy_in, keys_of, take_out, undo
from lightning_pet.insertion.intact import sizes_of
from lightning_pet.insertion.together import check_acting
from lightning_pet.layers.sharding import holds_parts, whole_shape
from lightning_pet.model.adaptation import Adaptation, record_of
from lightning_pet.model.delta_names import check_known, delta_of
from lightning_pet.model.gate import between_forwards
from lightning_pet.model.naming import modules_on_the_way, named_tensors

LOCK: Final = threading.RLock()
"""Held while values are exchanged, and while a block notes which ones it reads."""

_SIZES: Final = ("out_features", "num_embeddings", "out_channels")
"""What modules say of the first dimension of their parameters."""


def record_at(root: nn.Module) -> Adaptation:
    """The record of an adapted root."""
    record = record_of(root)
    if record is None:
        raise PETError("the deltas of this model were merged or removed; apply or load them again.")
    return record


def activate(root: nn.Module, deltas: tuple[str, ...]) -> None:
    """Let these deltas act in this order, and no others, wherever no thread has chosen; they train, where any does.

    The model is as it was before if that cannot be.

    Raises:
        ArgumentError: if there is no such delta, or two have their own values for one tensor.
        KeyError: if a module that one of them lies in was replaced.
        TargetError: if two cannot act on one layer.
    """
    record = record_at(root)
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
        part(root, next((name for name in deltas if name in record.together), record.together[-1]))
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
    if others := [name for name in record.active if name not in deltas]:
        raise ArgumentError(
            f"the delta {others[0]!r} acts, and each row of this run uses the delta of its task alone: "
            f"{', '.join(map(repr, deltas))}. Let none act before: adapted.activate()."
        )
    record.together = deltas
    record.act(deltas)
    if train:
        let_train(root, deltas)


def shared(root: nn.Module, record: Adaptation) -> tuple[str, ...]:
    """What changes beside the plan of deltas that train together, and belongs to each of them."""
    others = record.held_by(name for name in record.names if name not in record.together)
    beside = [name for name in record.trained_names if name not in record.trained_in_place]
    return tuple(n for n in dict.fromkeys((*beside, *changed_buffers(root))) if n not in others)


def part(root: nn.Module, stays: str) -> None:
    """Deltas that have trained together are ordinary ones from now on, of which one acts."""
    record = record_at(root)
    with between_forwards(root), LOCK:
        names = shared(root, record)
        present = tensors_at(root, names)
        for name in record.together:
            record.claims[name] = record.claims.get(name, frozenset()) | frozenset(present)
            if name != stays:
                record.values[name] = {n: tensor.detach().clone() for n, tensor in present.items()}
        record.together = ()
        record.act((stays,))


# --- exchanging values ----------------------------------------------------------------------------------


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


def exchange(root: nn.Module, record: Adaptation, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put these values into the model, and return those that were there; blocks that are open go on reading them.

    Values on the meta device are passed over: nobody knows them.
    """
    values = {name: value for name, value in values.items() if not value.is_meta}
    if not values:
        return {}
    present = tensors_at(root, values)
    by_copy = any(_is_held(tensor) for tensor in present.values()) or holds_parts(root)
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
    return type(tensor.data) is not Tensor or (tensor.device.type == "cpu" and tensor.is_shared())  # type: ignore[no-untyped-call]


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
