"""Mutate: what was planned and built goes into the model, and out again.

What may fail has failed before (:mod:`lightning_pet.insertion.prepare`); if anything does here, the model is
put back as it was.
"""

import warnings
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.insertion.checks import guard, resized, unguard
from lightning_pet.insertion.host import attach, conceal, detach
from lightning_pet.insertion.method import delta_name
from lightning_pet.insertion.prepare import Prepared
from lightning_pet.insertion.tasks.own_values import is_own
from lightning_pet.insertion.widening import narrow, read_precisions
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.sharding import is_partition, placed, without_values
from lightning_pet.model.adaptation import RECORD, Adaptation, Applied, deltas_in, record_of
from lightning_pet.model.call import Switch, take_gate
from lightning_pet.model.naming import (
    by_delta,
    canonical,
    delta_of,
    delta_prefix,
    has_module,
    join,
    named_parameters,
    named_tensors,
)
from lightning_pet.model.outside import changed_buffers, mark_outside
from lightning_pet.model.quantised import check_hosts, initialize
from lightning_pet.model.undisturbed import forbid_repacking, restore_repacking

# --- saves of other libraries, which do not know what a delta is ----------------------------------


_NAME = "save_pretrained"


class WatchedSave:
    """In place of a model's ``save_pretrained`` while it has a delta: says what the folder will not hold, and writes.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Warn, and write as the model's class does."""
        warnings.warn(
            f"{_NAME} of an adapted {type(self.module).__name__}: the folder will hold the base, from which "
            "from_pretrained makes a model without the delta. Keep the delta with lightning_pet.save_delta(model, "
            "path); or call lightning_pet.Adapted(model).merge_() first, to write the sum.",
            stacklevel=2,
        )
        return getattr(type(self.module), _NAME)(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WatchedSave":
        return WatchedSave(deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return WatchedSave, (self.module,)


def watch_saves(root: nn.Module) -> None:
    """Let every model in an adapted root that can write itself say what the delta is to that."""
    for module in root.modules():
        if callable(getattr(type(module), _NAME, None)):
            module.__dict__.setdefault(_NAME, WatchedSave(module))


def leave_saves(root: nn.Module) -> None:
    """Put the models' own methods back."""
    for module in root.modules():
        if isinstance(module.__dict__.get(_NAME), WatchedSave):
            del module.__dict__[_NAME]


def commit(root: nn.Module, prepared: Sequence[Prepared], *, acts: bool = True) -> Adaptation:
    """Insert what was built, and freeze the rest. The model is as before if anything fails.

    Args:
        root: the adapted root.
        prepared: methods of one delta or several.
        acts: a delta that is new to the model acts, beside those that do.
    """
    created = record_of(root) is None
    before = {name: parameter.requires_grad for name, parameter in named_parameters(root)}
    record: Adaptation = root.__dict__.setdefault(RECORD, Adaptation(flags=before))
    forbid_repacking(root)
    known, selection = record.names, record.switch.selection
    state = {name: copy(value) for name, value in vars(record).items() if name != "switch"}
    if known:
        record.switch.selection = record.selection(record.active)  # what comes waits until it is complete
    done: list[tuple[str, str]] = []
    try:
        for item in prepared:
            record.applied.append(_inserted(root, item, record.switch, done))
        _register(root, record, prepared)
        new = tuple(name for name in record.names if name not in known)
        for name in () if acts else new:
            record.rest(name)
            record.values[name] = {}
        check_sum(record, (*record.active, *new) if acts else record.active)
        freeze(root)
    except BaseException:
        detach(root, done)
        restore_flags(root, before)
        vars(record).update(state)
        record.switch.selection = selection
        if created:
            del root.__dict__[RECORD]
            restore_repacking(root)
        raise
    watch_saves(root)
    if replaced := {key for item in prepared for insertion in item.insertions for key in insertion.replaces}:
        take_out(root, replaced)
    guard(root, record)
    record.act((*record.active, *new) if acts else record.active)
    return record


def _inserted(root: nn.Module, item: Prepared, switch: Switch, done: list[tuple[str, str]]) -> Applied:
    """Insert the deltas of one method, and note in ``done`` what is."""
    method = item.method
    applied = Applied(method.method, method.name, method.config_at(item.targets), item.targets)
    applied.trained, applied.readings = item.trained, dict(item.readings)
    applied.readers, applied.delta = list(item.readers), delta_name(method)
    for insertion, reader in zip(item.insertions, item.readers, strict=True):
        key = insertion.key(method)
        attach(root, insertion.target, key, insertion.delta, reader, switch)
        done.append((insertion.target.module, key))
    applied.hosts = done[len(done) - len(item.insertions) :]
    return applied


def check_sum(record: Adaptation, deltas: Sequence[str]) -> None:
    """Refuse to let deltas act together that have different values for one tensor of the base.

    Raises:
        ArgumentError: naming them and the tensor.
    """
    both = {name: owners for name, owners in record.held_by(deltas).items() if len(owners) > 1}
    if both:
        name, (first, second, *_) = next(iter(both.items()))
        raise ArgumentError(
            f"the deltas {first!r} and {second!r} have each its own values for {name}"
            + (f" and {len(both) - 1} more tensors" if len(both) > 1 else "")
            + " (a head, or what else trains in place), and no sum of them is meant. Let one of them act at a time: "
            f"adapted.activate({first!r}) or adapted.activate({second!r}), adapted.activate() for neither; or load one "
            "of them with heads=False."
        )


def _forget(record: Adaptation) -> None:
    """Let go of what was noted of deltas that are gone."""
    names = record.names
    noted: dict[str, Any]
    for noted in (record.waiting, record.values, record.claims, record.beside, record.combined):
        for name in [name for name in noted if name not in names]:
            del noted[name]
    record.active = tuple(name for name in record.active if name in names)
    record.together = tuple(name for name in record.together if name in names)


def _register(root: nn.Module, record: Adaptation, prepared: Sequence[Prepared]) -> None:
    names, trainable = dict.fromkeys(record.delta_names), dict.fromkeys(record.trainable_names)
    for full, tensor in _tensors(root, record):
        if full not in names and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            trainable[full] = None
        names[full] = None
    awake = [applied for applied in record.applied if applied.delta not in record.waiting]
    trainable |= dict.fromkeys(name for applied in awake for name in applied.trained)
    record.delta_names, record.trainable_names = tuple(names), tuple(trainable)
    record.scopes = tuple(sorted({*record.scopes, *(scope for item in prepared for scope in item.scopes)}))
    record.apart = tuple(sorted({*record.apart, *(path for item in prepared for path in item.apart)}))


def _tensors(root: nn.Module, record: Adaptation) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the deltas by their names from the root."""
    for inserted in record.deltas(root):
        for name, tensor in named_tensors(inserted.delta):
            yield join(inserted.path, name), tensor


def renew(root: nn.Module) -> None:
    """Note the tensors of the deltas again, after some have exchanged theirs for others."""
    record = record_of(root)
    if record is None:
        return
    before, trained = set(record.delta_names), record.trained_names
    kept = before & {*record.trainable_names, *(name for own in record.waiting.values() for name in own)}
    names: dict[str, None] = {}
    trainable: dict[str, dict[str, None]] = {delta: {} for delta in record.names}
    for full, tensor in _tensors(root, record):
        names[full] = None
        if full in kept or (full not in before and isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            trainable[str(delta_of(full))][full] = None
    record.delta_names = tuple(names)
    for delta, own in record.waiting.items():
        record.waiting[delta] = (*trainable.pop(delta), *(name for name in own if delta_of(name) is None))
    record.trainable_names = (*(name for own in trainable.values() for name in own), *trained)
    freeze(root)


def take_forms(root: nn.Module, tensors: Mapping[str, Tensor], *, held: bool = False) -> Callable[[], None]:
    """Let the deltas get ready for these tensors (by name from the root); returns what undoes it.

    Args:
        root: the adapted root.
        tensors: of a file.
        held: an engine holds the parameters of the deltas.
    """
    found = by_delta(tensors)
    changed: list[tuple[Delta, dict[str, Any], dict[str, Any]]] = []
    record = record_of(root)
    for applied, _, _, delta, path in deltas_in(root):
        if record is not None and applied.delta in record.waiting:
            continue  # it is in no file of a run
        own = found.get(path, {})
        before = delta, dict(delta._parameters), dict(delta._buffers)
        if delta.take_form(own, held=held):
            changed.append(before)
    if changed:
        renew(root)

    def back() -> None:
        for delta, parameters, buffers in changed:
            for own, tensors in ((delta._parameters, parameters), (delta._buffers, buffers)):
                own.clear()
                own.update(tensors)
        renew(root)

    return back if changed else lambda: None


def _keep_originals(root: nn.Module, record: Adaptation) -> None:
    trained, own = {*record.trained_names, *record.trained_in_place}, set(record.delta_names)
    precisions = read_precisions(root)
    for name, tensor in named_tensors(root):
        mutable = name in trained or not isinstance(tensor, nn.Parameter)
        if mutable and name not in own and name not in record.originals:
            # In host memory: a method may train the whole model.
            here = not (tensor.is_meta or is_partition(tensor))
            dtype = precisions.get(id(tensor), tensor.dtype)
            original = tensor.detach().to("cpu", dtype, copy=True) if here else without_values(tensor)
            record.originals[name] = original


def freeze(root: nn.Module) -> None:
    """Set ``requires_grad`` of every parameter in scope to what the record says.

    It never looks at the flags as they are: a ``LightningModule.setup`` may have reset them all. Outside
    of the base it is the other way round: what the user lets train is noted, to be saved with the delta.
    """
    record = record_of(root)
    if record is None:
        return
    own, planned = set(record.delta_names), {*record.planned_names, *record.trained_in_place}
    # By identity: a tied tensor has several names, of which the record holds one.
    named = named_parameters(root, every_name=True)
    inside_names = {*own, *planned, *record.of_base(dict(named))}
    inside = {id(p) for name, p in named if name in inside_names}
    outside = {id(p): name for name, p in reversed(named) if p.requires_grad and id(p) not in inside}
    base = record.of_base(record.trainable_names)
    kept = [name for name in record.trainable_names if name in planned or name not in base]
    record.trainable_names = tuple(dict.fromkeys((*kept, *reversed(outside.values()))))
    _keep_originals(root, record)
    mark_outside(root)
    trainable = set(record.trainable_names)
    wanted = {id(p) for name, p in named if name in trainable}
    for _, parameter in named:
        if id(parameter) in inside and (parameter.is_floating_point() or parameter.is_complex()):
            parameter.requires_grad_(id(parameter) in wanted)


def leave_out(root: nn.Module, names: Collection[str]) -> None:
    """Deltas of these names do not train, those that were left out before do again; what else is named is noted."""
    record = record_of(root)
    if record is None or (not names and not record.left):
        return
    deltas = set(record.delta_names)
    again = [name for name in record.left if name in deltas and name not in names]
    own = [name for name in record.trainable_names if name in deltas and name not in names]
    record.trainable_names = (*dict.fromkeys((*own, *again)), *record.trained_names)
    record.left = tuple(names)
    freeze(root)


def required_gradients(root: nn.Module) -> set[str]:
    """Delta parameters without which no step may be taken."""
    record = record_of(root)
    exempt = {path for _, _, _, delta, path in deltas_in(root) if getattr(delta, "optional_gradient", False)}
    return {name for name in (record.delta_names if record else ()) if delta_prefix(name) not in exempt}


def outgrown(root: nn.Module) -> bool:
    """Whether the model is no longer the one that was planned for: parameters came, or hosts were replaced."""
    record = record_of(root)
    if record is None:
        return False
    tensors, own = dict(named_tensors(root)), set(record.delta_names)
    parameters = {name for name, _ in named_parameters(root)} - own
    return not own <= tensors.keys() or not parameters <= record.flags.keys() or bool(resized(root, record))


def refresh(root: nn.Module) -> None:
    """Look at the base again, after code that ran since the insertion may have loaded other weights into it."""
    record = record_of(root)
    if record is None:
        return
    planned = set(record.planned_names)
    narrow(root)  # what the base holds now is widened as before, once the model is complete
    forbid_repacking(root)  # layers may have been made anew
    record.trainable_names = tuple(n for n in record.trainable_names if n in planned)
    record.originals.clear()
    record.marks.clear()
    freeze(root)
    for _, target, host, delta, _ in record.deltas(root):
        check_hosts(delta, host, target.path, target.parameter)
        initialize(delta, host, target.parameter)


def take_out(root: nn.Module, keys: Collection[str] | None = None) -> None:
    """Detach methods and forget them; base tensors that they trained keep their values.

    Hosts that user code has replaced meanwhile are passed over.

    Args:
        root: the adapted root.
        keys: :attr:`Applied.key` of the methods; default: all.
    """
    record = record_of(root)
    if record is None:
        return
    leaving = [applied for applied in record.applied if keys is None or applied.key in keys]
    staying = {applied.delta for applied in record.applied if applied not in leaving and not is_own(applied)}
    leaving += [a for a in record.applied if is_own(a) and a.delta not in staying and a not in leaving]
    places = {path: host for applied in leaving for path, host in zip(applied.paths, applied.hosts, strict=True)}
    gone = {name for name in record.delta_names if delta_prefix(name) in places}
    detach(root, [host for path, host in places.items() if has_module(root, path)])
    record.applied[:] = [applied for applied in record.applied if applied not in leaving]
    still = record.trained_in_place
    gone |= {name for applied in leaving for name in applied.trained if name not in still}
    record.delta_names = tuple(name for name in record.delta_names if name not in gone)
    record.trainable_names = tuple(name for name in record.trainable_names if name not in gone)
    record.waiting = {d: tuple(name for name in own if name not in gone) for d, own in record.waiting.items()}
    _forget(record)
    record.act(record.active)
    narrow(root, still)
    if record.applied:
        freeze(root)
        return
    for module, names in record.switch.exposed.items():
        conceal(module, names)
    record.switch.exposed.clear()
    restore_flags(root, record.flags)
    restore_repacking(root)
    unguard(root)
    leave_saves(root)
    take_gate(root)
    del root.__dict__[RECORD]


def keys_of(root: nn.Module, deltas: Container[str]) -> set[str]:
    """:attr:`Applied.key` of the methods of these deltas."""
    record = record_of(root)
    return {applied.key for applied in (record.applied if record else ()) if applied.delta in deltas}


def forget(root: nn.Module, paths: Collection[str]) -> None:
    """Detach some deltas, by their paths, of methods that stay."""
    record, gone = record_of(root), set(paths)
    if record is None or not gone:
        return
    detach(root, [host for a in record.applied for path, host in zip(a.paths, a.hosts, strict=True) if path in gone])
    for applied in record.applied:
        kept = [i for i, path in enumerate(applied.paths) if path not in gone]
        without = applied.targets[len(applied.hosts) :]
        applied.targets = (*(applied.targets[i] for i in kept), *without)
        applied.readers = [applied.readers[i] for i in kept]
        applied.hosts = [applied.hosts[i] for i in kept]
    renew(root)


def undo(root: nn.Module, keys: Collection[str] | None = None) -> None:
    """Take methods out and put back what they trained besides, as far as its original was in memory."""
    record = record_of(root)
    if record is None:
        return
    own = record.originals.keys() & record.held_by(record.active)  # whether they train at present or not
    before = {*record.trained_names, *own, *changed_buffers(root)}
    take_out(root, keys)
    after = record_of(root)
    kept = {*after.trained_names, *after.held_by(after.active)} if after else set()
    copy_in(root, {n: record.originals[n] for n in before - kept})


def copy_in(root: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of these names; what is on the meta device is passed over."""
    with torch.no_grad():
        for name, tensor in named_tensors(root):
            if name in values and not values[name].is_meta:
                tensor.copy_(placed(values[name], tensor))


def restore_flags(root: nn.Module, flags: dict[str, bool]) -> None:
    """Set ``requires_grad`` back to what it was."""
    for name, parameter in root.named_parameters():
        if canonical(name) in flags and (parameter.is_floating_point() or parameter.is_complex()):
            parameter.requires_grad_(flags[canonical(name)])


def show_users_flags(root: nn.Module) -> None:
    """Let user code see which parameters require a gradient as it left them; :func:`freeze` puts the plan back."""
    if (record := record_of(root)) is not None:
        restore_flags(root, record.flags)


def note_users_flags(root: nn.Module) -> bool:
    """Remember which base parameters the user lets train now; whether that is something else than before."""
    record = record_of(root)
    if record is None:
        return False
    now = {name: p.requires_grad for name, p in named_parameters(root)}
    changed = any(record.flags[name] != now[name] for name in record.flags.keys() & now.keys())
    record.flags.update({name: now[name] for name in record.flags.keys() & now.keys()})
    return changed
