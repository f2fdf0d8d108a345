"""Plan, build, then mutate: what is applied to a model, and the record of it.

The record lives on the adapted root, so it is copied, pickled and sent to other processes with the
model. All names in it are canonical and relative to the root, and are fixed when the deltas are
inserted: under sharding engines and compilers they could not be recovered later.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.core.insertion import CHILD, attach, check_attachable, detach, reader_of
from lightning_pet.core.method import Insertion, Method, key_of
from lightning_pet.core.naming import canonical, join, named_modules, named_tensors
from lightning_pet.core.structure import Structure, Target
from lightning_pet.errors import ArgumentError

_RECORD = "_pet"


@dataclass
class Applied:
    """One method as it was applied.

    Attributes:
        method: short name of the method.
        name: the user's name for the instance.
        config: constructor arguments.
        targets: the resolved places.
        hosts: (host path, key) of every inserted delta.
        readers: reader path of every inserted delta, or ``None``.
        trained: base parameters that it trains as they are.
    """

    method: str
    name: str
    config: dict[str, Any]
    targets: tuple[Target, ...]
    hosts: list[tuple[str, str]] = field(default_factory=list)
    readers: list[str | None] = field(default_factory=list)
    trained: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of this method's deltas among those of a host."""
        return f"{self.method}_{self.name}"


@dataclass
class Adaptation:
    """Everything that was done to one adapted root.

    Attributes:
        applied: methods in the order in which they were applied.
        delta_names: parameters and persistent buffers of all deltas.
        trainable_names: delta parameters that train, then base parameters that do.
        scopes: submodules whose other parameters are frozen (``""``: everything).
        originals: copies of the base tensors that training may change (trained parameters,
            persistent buffers), to restore them exactly.
        flags: ``requires_grad`` of every base parameter before the first delta came.
        muted: whether the deltas are switched off at the moment.
    """

    applied: list[Applied] = field(default_factory=list)
    delta_names: tuple[str, ...] = ()
    trainable_names: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    muted: bool = False

    @property
    def trained_names(self) -> tuple[str, ...]:
        """Base parameters that train as they are."""
        own = set(self.delta_names)
        return tuple(name for name in self.trainable_names if name not in own)

    def hosts(self) -> Iterable[tuple[Applied, Target, str, str]]:
        """Every inserted delta as (method, target, host path, key)."""
        for applied in self.applied:
            for target, (path, key) in zip(applied.targets, applied.hosts, strict=True):
                yield applied, target, path, key


@dataclass(frozen=True)
class Prepared:
    """A planned and built method: all that could fail has been done, and nothing was changed yet."""

    method: Method
    targets: tuple[Target, ...]
    insertions: tuple[Insertion, ...]
    readers: tuple[str | None, ...]
    trained: tuple[str, ...]
    scope: str

    @property
    def key(self) -> str:
        """Name of this method's deltas among those of a host."""
        return key_of(self.method)


def record_of(root: nn.Module) -> Adaptation | None:
    """The record on this very module, or ``None``."""
    return root.__dict__.get(_RECORD)


def adapted_root(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of the adapted root inside a model, or ``None`` if nothing was applied."""
    for path, module in model.named_modules():
        if _RECORD in module.__dict__:
            return canonical(path), module
    return None


def prepare(
    root: nn.Module,
    methods: Sequence[Method],
    structure: Structure | None,
    *,
    resolved: Sequence[tuple[Target, ...]] | None = None,
    scopes: Sequence[str] | None = None,
) -> list[Prepared]:
    """Plan and build methods for a model, which stays untouched.

    Args:
        root: the adapted root.
        methods: what to apply, in order.
        structure: what is known about the model; only needed where ``resolved`` is not given.
        resolved: places found earlier (from a file), one tuple per method.
        scopes: the submodule of the root that each method is confined to; default: the whole root.

    Raises:
        ArgumentError: if a method of this name is applied already.
        TargetError: if a place does not exist or cannot host the method.
    """
    record = record_of(root)
    taken = {applied.key for applied in record.applied} if record else set()
    prepared: list[Prepared] = []
    for index, method in enumerate(methods):
        key = key_of(method)
        if key in taken:
            raise ArgumentError(
                f"two {type(method).__name__} are called {method.name!r}; give each its own, e.g. name='second'."
            )
        taken.add(key)
        scope = scopes[index] if scopes else ""
        if resolved is not None:
            targets = resolved[index]  # from a file, whose options hold the width that was picked
        else:
            targets = _resolve(root, method, structure or Structure(), scope)
            method.spend_budget(root, targets)
        prepared.append(_build(root, method, targets, scope, structure))
    return prepared


def _resolve(root: nn.Module, method: Method, structure: Structure, scope: str) -> tuple[Target, ...]:
    found = method.resolve(named_modules(root)[scope], structure.within(scope))
    return tuple(replace(target, module=join(scope, target.module)) for target in found)


def _build(
    root: nn.Module, method: Method, targets: tuple[Target, ...], scope: str, structure: Structure | None
) -> Prepared:
    insertions = tuple(method.insertions(root, targets))
    modules = named_modules(root)
    for insertion in insertions:
        check_attachable(modules[insertion.target.module], insertion.target, delta_key(method, insertion))
    called = structure.called if structure else None
    return Prepared(
        method=method,
        targets=tuple(insertion.target for insertion in insertions),
        insertions=insertions,
        readers=tuple(reader_of(root, insertion.target, called) for insertion in insertions),
        trained=method.trained(root, targets),
        scope=scope,
    )


def delta_key(method: Method, insertion: Insertion) -> str:
    """Name of a delta among those of its host."""
    return "_".join(part for part in (method.method, method.name, insertion.suffix) if part)


def commit(root: nn.Module, prepared: Sequence[Prepared]) -> Adaptation:
    """Insert what was built, and freeze the rest. The model is as before if anything fails."""
    created = record_of(root) is None
    before = {canonical(name): parameter.requires_grad for name, parameter in root.named_parameters()}
    record = root.__dict__.setdefault(_RECORD, Adaptation(flags=before))
    done: list[tuple[str, str]] = []
    try:
        for item in prepared:
            applied = Applied(item.method.method, item.method.name, item.method.config(), item.targets)
            applied.trained, applied.readers = item.trained, list(item.readers)
            for insertion, reader in zip(item.insertions, item.readers, strict=True):
                key = delta_key(item.method, insertion)
                attach(root, insertion.target, key, insertion.delta, reader)
                done.append((insertion.target.module, key))
            applied.hosts = done[len(done) - len(item.insertions) :]
            record.applied.append(applied)
        _register(root, record, prepared)
    except BaseException:
        for path, key in reversed(done):
            detach(root, path, key)
        restore_flags(root, before)
        record.applied[:] = [a for a in record.applied if not any(a.key == item.key for item in prepared)]
        if created:
            del root.__dict__[_RECORD]
        raise
    return record  # type: ignore[no-any-return]


def _register(root: nn.Module, record: Adaptation, prepared: Sequence[Prepared]) -> None:
    modules = named_modules(root)
    names, trainable = dict.fromkeys(record.delta_names), dict.fromkeys(record.trainable_names)
    for applied in record.applied:
        for path, key in applied.hosts:
            for name, tensor in named_tensors(modules[join(path, CHILD, key)]):
                full = join(path, CHILD, key, name)
                if full not in names and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                    trainable[full] = None
                names[full] = None
        trainable |= dict.fromkeys(applied.trained)
    record.delta_names, record.trainable_names = tuple(names), tuple(trainable)
    record.scopes = tuple(sorted({*record.scopes, *(item.scope for item in prepared)}))
    freeze(root)


def _keep_originals(root: nn.Module, record: Adaptation) -> None:
    trained, own = set(record.trained_names), set(record.delta_names)
    for name, tensor in named_tensors(root):
        mutable = name in trained or not isinstance(tensor, nn.Parameter)
        if mutable and name not in own and name not in record.originals:
            record.originals[name] = tensor.detach().clone()


def _in_scope(record: Adaptation, name: str) -> bool:
    return any(not scope or name.startswith(f"{scope}.") for scope in record.scopes)


def freeze(root: nn.Module) -> None:
    """Set ``requires_grad`` of every parameter in scope to what the record says.

    It never looks at the flags as they are: a ``LightningModule.setup`` may have reset them all. Outside
    of the scope it is the other way round: what the user lets train is noted, to be saved with the delta.
    """
    record = record_of(root)
    if record is None:
        return
    own = set(record.delta_names)
    # By identity: a tied tensor has several names, of which the record holds one.
    named = [(canonical(name), p) for name, p in root.named_parameters(remove_duplicate=False)]
    inside = {id(p) for name, p in named if name in own or _in_scope(record, name)}
    outside = {id(p): name for name, p in reversed(named) if p.requires_grad and id(p) not in inside}
    record.trainable_names = tuple(dict.fromkeys((*record.trainable_names, *reversed(outside.values()))))
    _keep_originals(root, record)
    trainable = set(record.trainable_names)
    wanted = {id(p) for name, p in named if name in trainable}
    for _, parameter in named:
        if id(parameter) in inside and (parameter.is_floating_point() or parameter.is_complex()):
            parameter.requires_grad_(id(parameter) in wanted)


def outgrown(root: nn.Module) -> bool:
    """Whether the model is no longer the one that was planned for: parameters came, or hosts were replaced."""
    record = record_of(root)
    if record is None:
        return False
    tensors, own = dict(named_tensors(root)), set(record.delta_names)
    parameters = {canonical(name) for name, _ in root.named_parameters()} - own
    return not own <= tensors.keys() or not parameters <= record.flags.keys()


def refresh(root: nn.Module) -> None:
    """Look at the base again, after code that ran since the insertion may have loaded other weights into it."""
    record = record_of(root)
    if record is None:
        return
    own = set(record.delta_names)
    record.trainable_names = tuple(n for n in record.trainable_names if n in own or _in_scope(record, n))
    record.originals.clear()
    freeze(root)
    modules = named_modules(root)
    for _, target, path, key in record.hosts():
        weight = modules[path]._parameters[target.parameter]
        if weight is not None and not weight.is_meta:
            modules[join(path, CHILD, key)].initialize_from(weight.detach())  # type: ignore[operator]


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
    gone: set[str] = set()
    for path, key in (host for applied in leaving for host in applied.hosts):
        prefix = join(path, CHILD, key)
        gone |= {name for name in record.delta_names if name.startswith(f"{prefix}.")}
        if prefix in named_modules(root):
            detach(root, path, key)
    record.applied[:] = [applied for applied in record.applied if applied not in leaving]
    still = {name for applied in record.applied for name in applied.trained}
    gone |= {name for applied in leaving for name in applied.trained if name not in still}
    record.delta_names = tuple(name for name in record.delta_names if name not in gone)
    record.trainable_names = tuple(name for name in record.trainable_names if name not in gone)
    if record.applied:
        freeze(root)
        return
    restore_flags(root, record.flags)
    del root.__dict__[_RECORD]


def undo(root: nn.Module, keys: Collection[str] | None = None) -> None:
    """Take methods out and put back what they trained besides, as far as its original was in memory."""
    record = record_of(root)
    if record is None:
        return
    before = {*record.trained_names, *changed_buffers(root)}
    take_out(root, keys)
    after = record_of(root)
    copy_in(root, {n: record.originals[n] for n in before - set(after.trained_names if after else ())})


def copy_in(root: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of these names; what is on the meta device is passed over."""
    with torch.no_grad():
        for name, tensor in named_tensors(root):
            if name in values and not values[name].is_meta:
                tensor.copy_(values[name])


def restore_flags(root: nn.Module, flags: dict[str, bool]) -> None:
    """Set ``requires_grad`` back to what it was."""
    for name, parameter in root.named_parameters():
        if canonical(name) in flags:
            parameter.requires_grad_(flags[canonical(name)])


def changed_buffers(root: nn.Module) -> dict[str, Tensor]:
    """Persistent base buffers that differ from what they were when the first delta was inserted."""
    record = record_of(root)
    if record is None:
        return {}
    trained = set(record.trained_names)
    return {
        name: tensor
        for name, tensor in named_tensors(root)
        if name in record.originals and name not in trained and not _same(tensor, record.originals[name])
    }


def _same(tensor: Tensor, original: Tensor) -> bool:
    if tensor.is_meta or original.is_meta:
        return True
    return torch.equal(tensor.detach(), original.to(tensor.device))
