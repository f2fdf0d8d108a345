"""How a delta gets into a module, and out again.

A host keeps its name, identity, parameters and ties. Its deltas become its child ``pet`` and its
class is swapped for a subclass of itself that runs them. Why a class swap and not forward hooks:
a hook sees the output only after the base product is done, so it cannot share one autograd node
with it, and it costs more per call; and the weight path needs the swap anyway. Unlike a patched
``forward``, a swapped class pickles, deep-copies and compiles.

Paths (see :class:`~lightning_pet.layers.delta.Delta`): *activation* deltas change what a call
returns; *around* deltas run in its place and call it; *weight* deltas change what is read from a
parameter while its reader's forward runs. Outside that scope the parameter is the base's, so sharding
engines never see an effective weight. *Generate* deltas wrap the host's ``generate``. *Shared* deltas
belong to others of their method and are never called by their host.
"""

import inspect
import threading
from collections.abc import Container, Iterable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.remade import may_remake, remaking
from lightning_pet.insertion.rows import apart, around_form, changed_rows, differing_at, generating
from lightning_pet.insertion.slot import (
    KEPT,
    READ_AS,
    SEQUENCES,
    Acting,
    Deltas,
    Kept,
    Slot,
    WithoutDeltas,
    differing,
    effective,
    held,
    repeats_itself,
    replica_of,
)
from lightning_pet.layers.delta import Delta
from lightning_pet.model.call import HERE, Switch
from lightning_pet.model.layer_kinds import base_class, has_plain_forward
from lightning_pet.model.naming import CHILD, module_at, modules_on_the_way
from lightning_pet.model.quantised import DENSE, dense_values, is_quantised
from lightning_pet.model.structure import Target
from lightning_pet.model.undisturbed import forbid, restore

_READS = "_pet_reads"  # modules whose weights this one reads without calling them
_TAPS = "_pet_taps"  # slots that take this module's input to deltas elsewhere
_LOCK = threading.Lock()  # blocks of several threads may begin and end at once


class _Reader(nn.Module):
    """Mixed in before the own class of a module some of whose attributes are not the same in all threads."""

    __pet_base__: ClassVar[type[nn.Module]]
    __pet_mixin__: ClassVar[type["_Reader"]]
    __pet_parameters__: ClassVar[tuple[str, ...]]
    __pet_fusable__: ClassVar[bool]

    def _pet_weight(self, name: str) -> Any:
        return held(self, name)

    def _replicate_for_data_parallel(self) -> Any:
        return replica_of(self, super()._replicate_for_data_parallel())  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The swapped class cannot be imported by name: rebuild it from the module's own.
        _, _, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        cls = type(self)
        kept: Kept | None = self.__dict__.get(KEPT)
        parameters = tuple(n for n in cls.__pet_parameters__ if kept is None or n not in kept.extra)
        if kept is not None and rest:  # a copy is in no block of the original's
            rest[0] = {name: value for name, value in rest[0].items() if name != KEPT}
        return (_rebuild, (cls.__pet_base__, cls.__pet_mixin__, parameters), *rest)


class _Host(_Reader):
    """Mixed in before the host's own class."""

    pet: Deltas

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pet: Any = self._modules[CHILD]
        own, acting = pet._modules, pet.acting()
        weight: Any
        if acting.fusing is not None and not kwargs and type(self).__pet_fusable__:
            weight = self.weight
            if type(weight) in DENSE or not is_quantised(weight):
                return own[acting.fusing](args[0], None, weight, self.bias)
        if acting.groups is not None:
            return self._pet_rows(acting.groups, args, kwargs)
        output = self._pet_base_forward(*args, **kwargs)
        if not acting.activation:
            return output
        value = args[0] if args else next(iter(kwargs.values()), None)
        several = isinstance(output, tuple | list)
        tensor = output[0] if several else output
        for key in acting.activation:
            delta = own[key]
            x = value if delta.slot is None else delta.slot.take()
            tensor = delta(x, tensor, *_weight_and_bias(self)) if delta.reads_weight else delta(x, tensor)
        if not several:
            return tensor
        return (tensor, *output[1:]) if isinstance(output, tuple) else [tensor, *output[1:]]

    def _pet_rows(self, groups: tuple[Acting, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Rows use different deltas: the base's product once, then what each group's deltas make of its rows."""
        if _reads_apart(self, groups):
            return apart(self, self.pet, partial(_Host.forward, self), args, kwargs)
        output = self._pet_base_forward(*args, **kwargs)
        return changed_rows(self, groups, args, kwargs, output, partial(_weight_and_bias, self))

    def _pet_base_forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class _AroundHost(_Host):
    """A host whose call is wrapped, or whose input is wanted elsewhere."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for slot in self.__dict__.get(_TAPS, ()):
            slot.put(args, kwargs)
        pet: Any = self._modules[CHILD]
        acting = pet.acting()
        call: Any = super().forward
        if (groups := acting.groups) is None:
            if not acting.activation and acting.fusing is None:
                call = self._pet_base_forward  # what that comes to
            for key in acting.around:
                call = partial(pet._modules[key], call)
            return call(*args, **kwargs)
        if not _runs_apart(self, groups):
            return call(*args, **kwargs)
        if (form := around_form(self, groups)) is not None and not _reads_apart(self, groups):
            return form(call, args, kwargs)
        return apart(self, self.pet, self._pet_around, args, kwargs)

    def _pet_around(self, *args: Any, **kwargs: Any) -> Any:
        call: Any = super().forward
        pet: Any = self._modules[CHILD]
        for key in pet.acting().around:
            call = partial(pet._modules[key], call)
        return call(*args, **kwargs)


class WeightHost(_AroundHost):
    """A host some of whose parameters are read through weight deltas, or that reads such a host's."""

    def _pet_base_forward(self, *args: Any, **kwargs: Any) -> Any:
        call = HERE.call
        before = call.scope  # a reader may be inside another
        call.scope = (*before, self, *self.__dict__.get(_READS, ()))
        try:
            if not self._pet_remakes():
                return super()._pet_base_forward(*args, **kwargs)
            with remaking(call):
                return super()._pet_base_forward(*args, **kwargs)
        finally:
            call.scope = before

    def _pet_remakes(self) -> bool:
        pet: Any = self._modules[CHILD]
        return may_remake() and any(pet._modules[key].remakes for key in pet.acting().weight)

    def _pet_weight(self, name: str) -> Any:
        weight = held(self, name)
        if weight is None or not (self in HERE.call.scope or repeats_itself(self)):
            return weight
        return self._pet_effective(name, weight)

    def _pet_effective(self, name: str, weight: Any) -> Any:
        pet: Any = self._modules[CHILD]
        acting = pet.acting()
        if acting.groups is not None and any(group.weight for group in acting.groups):
            return differing(weight, name)
        deltas = [pet._modules[key] for key in acting.weight if pet._modules[key].parameter == name]
        base = weight
        for delta in deltas:
            weight = delta(weight)
        remade = HERE.call.remade
        if remade is not None and len(deltas) == 1 and (remake := deltas[0].remaker(base)) is not None:
            remade.note(weight, remake)
        return weight


class RowsReader(_Reader):
    """Mixed in where the attributes are not the same for all rows of a batch: each group has a call of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, once for each group of rows if they read different values."""
        base: Any = type(self).__pet_base__
        call = partial(base.forward, self)
        found = differing_at(self)
        return call(*args, **kwargs) if found is None else apart(self, found, call, args, kwargs)


def _runs_apart(host: nn.Module, groups: tuple[Acting, ...]) -> bool:
    """Whether each group of rows needs a call of the host of its own."""
    return any(group.around for group in groups) or _reads_apart(host, groups)


def _reads_apart(host: nn.Module, groups: tuple[Acting, ...]) -> bool:
    """Whether the groups of rows do not read the same parameters."""
    if any(group.weight for group in groups) or differing_at(host) is not None:
        return True
    reads = [module._modules[CHILD].acting().groups or () for module in host.__dict__.get(_READS, ())]
    return any(group.weight for other in reads for group in other)


_SWAPPED: dict[tuple[type[nn.Module], type[_Reader], tuple[str, ...]], type[nn.Module]] = {}


def _swapped(base: type[nn.Module], mixin: type[_Reader], parameters: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``base`` that runs deltas; one object per key, so that class comparisons hold."""
    if mixin in (_Reader, RowsReader) and not parameters:
        return base
    key = (base, mixin, parameters)
    if key not in _SWAPPED:
        _SWAPPED.setdefault(key, _make_class(base, mixin, parameters))
    return _SWAPPED[key]


def _make_class(base: type[nn.Module], mixin: type[_Reader], parameters: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: effective(name) for name in parameters}
    if parameters and issubclass(base, nn.RNNBase):
        members["_flat_weights"] = property(_flat_weights, _set_flat_weights)
    # The host's own name: code that prints or compares class names must not notice.
    members |= {
        "__pet_base__": base,
        "__pet_mixin__": mixin,
        "__pet_parameters__": parameters,
        # Computing the product itself, a delta would read the weight past the weight deltas.
        "__pet_fusable__": has_plain_forward(base) and not issubclass(mixin, WeightHost),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    host = issubclass(mixin, _Host)
    if host or mixin is RowsReader:
        members["forward"] = _with_signature(mixin.forward, base.forward)
    if host and callable(getattr(base, "generate", None)):
        members["generate"] = _generate
    bases = (mixin, WithoutDeltas, base) if host and issubclass(base, SEQUENCES) else (mixin, base)
    return type(base.__name__, bases, members)


def _flat_weights(self: Any) -> list[Any]:
    """LSTM, GRU and RNN read their weights from a list of their own: what a thread reads there is its own."""
    if self in HERE.call.scope or KEPT in self.__dict__:
        return [getattr(self, name) for name in self._flat_weights_names]
    flat: list[Any] = self.__dict__["_flat_weights"]
    return flat


def _set_flat_weights(self: Any, value: list[Any]) -> None:
    self.__dict__["_flat_weights"] = value


def _with_signature(function: Any, like: Any) -> Any:
    """The same function, showing another one's signature: transformers looks at it to choose arguments."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return copy


def _generate(self: _Host, *args: Any, **kwargs: Any) -> Any:
    call: Any = partial(cast(Any, type(self).__pet_base__).generate, self)
    acting = self.pet.acting()
    if acting.groups is not None:
        return generating(self, acting.groups, call, args, kwargs)
    for key in acting.generate:
        call = partial(self.pet[key], call)
    return call(*args, **kwargs)


def _weight_and_bias(host: Any) -> tuple[Tensor, Tensor | None]:
    weight = host.weight
    return dense_values(host, "weight") if is_quantised(weight) else weight, getattr(host, "bias", None)


def _rebuild(base: type[nn.Module], mixin: type[_Reader], parameters: tuple[str, ...]) -> nn.Module:
    cls = _swapped(base, mixin, parameters)
    return cls.__new__(cls)


def deltas_of(host: nn.Module) -> Deltas:
    """The deltas of a host."""
    return cast(Deltas, host._modules[CHILD])


def belong(root: nn.Module, keys: Mapping[str, Iterable[str]], switch: Switch) -> None:
    """Let hosts (paths, and keys of their deltas) listen to a switch: user code may have put a copy of one there."""
    for path, own in keys.items():
        deltas = deltas_of(module_at(root, path))
        for key in own:
            deltas.belong(key, switch)


def attach(
    root: nn.Module, target: Target, key: str, delta: Delta, reader: str | None = None, switch: Switch | None = None
) -> None:
    """Insert a delta into its host.

    Args:
        root: the adapted root, from which ``target.module`` and ``reader`` are named.
        target: where.
        key: name of the delta among those of the host.
        delta: what.
        reader: path of the module that reads the weight, if it is not the host.
        switch: the root's.

    Raises:
        ArgumentError: if the host has a delta of this key already.
        TargetError: if the host's ``forward`` was replaced on the instance, so that a delta would never run.
    """
    *around, host = modules_on_the_way(root, target.module)
    check_attachable(host, target, key)
    delta.parameter = target.parameter
    if delta.path == "shared":
        swap(host, _Host) if isinstance(host, SEQUENCES) else _adopt(host)
    elif delta.path == "weight":
        swap(host, WeightHost, target.parameter)
        reader = reader if target.reads is None else target.reads
        if reader is not None:
            let_read(module_at(root, reader), host)
    else:
        swap(host, _AroundHost if delta.path == "around" else _Host)
    pet = deltas_of(host)
    if switch is not None:
        pet.belong(key, switch)  # before it is there: other threads run the host, and it is not to act in them yet
    pet[key] = delta
    delta.train(host.training)
    if target.reads is not None and delta.path != "weight":
        delta.slot = Slot(pet, key)
        source = module_at(root, target.reads)
        swap(source, _AroundHost)
        source.__dict__.setdefault(_TAPS, []).append(delta.slot)
    for module in (*around, host):
        forbid(module)


def let_read(reader: nn.Module, host: nn.Module) -> None:
    """While a module's forward runs, let parameters of a host be what they are in the host's own."""
    swap(reader, WeightHost)
    reads = reader.__dict__.setdefault(_READS, [])
    reads += [] if host in reads else [host]


def let_read_no_more(root: nn.Module, hosts: Container[nn.Module]) -> None:
    """Undo :func:`let_read` for these hosts."""
    for module in list(root.modules()):
        if reads := module.__dict__.get(_READS):
            reads[:] = [host for host in reads if host not in hosts]
            give_class_back(module)


def check_attachable(host: nn.Module, target: Target, key: str) -> None:
    """Raise what :func:`attach` would raise, without touching the host."""
    if "forward" in vars(host):
        raise TargetError(
            f"{target.module!r}: its forward was replaced on the instance (by accelerate's device_map, for example), "
            "so a delta inserted there would never run. Load the model without device_map."
        )
    pet = getattr(host, CHILD, None)
    if pet is not None and not isinstance(pet, Deltas):
        raise TargetError(f"{target.module!r} has an attribute {CHILD!r} of its own ({type(pet).__name__}).")
    if pet is not None and key in pet:
        raise ArgumentError(
            f"{target.module!r} has a delta {key!r} already. Give the second callback another name, e.g. name='second'."
        )


def detach(root: nn.Module, places: Iterable[tuple[str, str]]) -> None:
    """Take deltas out; the last one to leave a host gives it its own class back.

    Args:
        root: the adapted root.
        places: host path and key of each.
    """
    slots: list[Slot] = []
    emptied: list[nn.Module] = []
    for path, key in places:
        host = module_at(root, path)
        pet = deltas_of(host)
        slots += [slot] if (slot := cast(Delta, pet[key]).slot) is not None else []
        del pet[key]
        emptied += [] if pet else [host]
    gone = {id(item) for item in (*slots, *emptied)}
    for module in list(root.modules()):
        for name in (_TAPS, _READS):
            if module.__dict__.get(name):
                module.__dict__[name][:] = [item for item in module.__dict__[name] if id(item) not in gone]
        if isinstance(module._modules.get(CHILD), Deltas):
            give_class_back(module)
    give_fast_paths_back(root)


def give_fast_paths_back(module: nn.Module) -> bool:
    """Let what has no delta below it take the fast path again; whether this has one."""
    below = [give_fast_paths_back(child) for child in module.children()]
    if isinstance(module, Deltas) or any(below):
        return True
    restore(module)
    return False


def swap(module: nn.Module, mixin: type[_Host], parameter: str | None = None) -> None:
    """Make a module a host of this kind, unless it is one of a wider kind, that reads a parameter through its class."""
    cls = type(module)
    present: type[_Reader] = getattr(cls, "__pet_mixin__", _Reader)
    parameters = {*getattr(cls, "__pet_parameters__", ()), *([parameter] if parameter else [])}
    widest = present if issubclass(present, mixin) else mixin
    _adopt(module)
    module.__class__ = _swapped(base_class(module), widest, tuple(sorted(parameters)))


def _adopt(module: nn.Module) -> None:
    if not hasattr(module, CHILD):
        module.add_module(CHILD, Deltas())


def give_class_back(module: nn.Module) -> None:
    """Give a host its own class back, if nothing is left in it."""
    kinds = (_READS, _TAPS, READ_AS)
    if CHILD not in module._modules or deltas_of(module) or any(module.__dict__.get(name) for name in kinds):
        return
    for name in kinds:
        module.__dict__.pop(name, None)
    del module._modules[CHILD]
    kept: Kept | None = module.__dict__.get(KEPT)
    module.__class__ = _swapped(base_class(module), _Reader, tuple(sorted(kept.extra)) if kept else ())


def is_swapped_by_others(module: nn.Module) -> bool:
    """Whether somebody else has swapped the class of a host once more, so that it cannot be swapped again."""
    return hasattr(type(module), "__pet_base__") and "__pet_base__" not in vars(type(module))


def expose(module: nn.Module, names: Mapping[str, str], switch: Switch, *, by_rows: bool = False) -> None:
    """From now on let every thread read the values that it has chosen.

    Args:
        module: any.
        names: its attributes, and their canonical names from the root.
        switch: the root's.
        by_rows: rows of one batch may read different ones.
    """
    with _LOCK:
        kept: Kept = module.__dict__.setdefault(KEPT, Kept(switch, {}, {}, set()))
        for name in names:
            kept.blocks[name] = kept.blocks.get(name, 0) + 1
        kept.names.update(names)
        present = set(getattr(type(module), "__pet_parameters__", ()))
        kept.extra.update(set(names) - present)
        _read_through(module, present | set(names), by_rows)


def conceal(module: nn.Module, names: Iterable[str]) -> None:
    """Undo one :func:`expose`; the last to leave gives the module its own attributes back."""
    with _LOCK:
        kept: Kept = module.__dict__[KEPT]
        for name in names:
            kept.blocks[name] -= 1
        done = {name for name, blocks in kept.blocks.items() if not blocks}
        present = set(getattr(type(module), "__pet_parameters__", ()))
        _read_through(module, present - (done & kept.extra))
        for name in done:
            del kept.blocks[name], kept.names[name]
        kept.extra.difference_update(done)
        if not kept.blocks:
            del module.__dict__[KEPT]


def _read_through(module: nn.Module, names: set[str], by_rows: bool = False) -> None:
    mixin: type[_Reader] = getattr(type(module), "__pet_mixin__", _Reader)
    mixin = RowsReader if by_rows and mixin is _Reader else mixin
    module.__class__ = _swapped(base_class(module), mixin, tuple(sorted(names)))
