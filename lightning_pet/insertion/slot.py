"""What lies in a host: its deltas, which of them act in a call, and how its parameters are read through them.

Also how the input of another module reaches one of them.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_pet.errors import DeadSiteError, TargetError
from lightning_pet.layers.delta import Delta, Path
from lightning_pet.model.call import HERE, Chosen, Rows, Switch, note_compiled
from lightning_pet.model.naming import CHILD, delta_in

# --- parameters, read through the weight deltas of their host: properties in the place of a look-up ---


KEPT = "_pet_kept"
"""Attribute of a module: its :class:`Kept`."""

READ_AS = "_pet_read_as"
"""Attribute of a module: the precision in which its forward reads parameters that are kept in a wider one."""

REPLICA = "_pet_chosen"
"""Attribute of a copy that ``nn.DataParallel`` runs in a thread of its own: what the thread that made it had chosen."""


class Kept(NamedTuple):
    """For which attributes of a module a thread may have chosen other values.

    Attributes:
        switch: of the root.
        names: attribute to canonical name from the root.
        blocks: attribute to the number of blocks that want it.
        extra: attributes that have no weight deltas, and are read through the module's class for this alone.
    """

    switch: Switch
    names: dict[str, str]
    blocks: dict[str, int]
    extra: set[str]


def held(host: nn.Module, name: str) -> Any:
    """An attribute without deltas: what this thread has chosen, else the parameter, or what an engine put there."""
    own: dict[str, Any] = host.__dict__
    values: Any = host._parameters
    if name not in values:
        values = host._buffers if name in host._buffers else own
    if name not in values:
        raise AttributeError(name)  # nn.Module words it
    value: Any = values[name]
    kept: Kept | None = own.get(KEPT)
    if kept is None:
        return value
    selection = of_host(host).get(kept.switch.number)
    if selection is None:
        return value
    if selection.rows is not None and kept.names.get(name) in selection.rows.differing:
        return differing(value, kept.names[name])
    if kept.names.get(name) not in selection.values:
        return value
    other = selection.values[kept.names[name]]
    same = not isinstance(other, Tensor) or not isinstance(value, Tensor) or other.device == value.device
    return other if same else other.to(value.device)


def of_host(host: nn.Module) -> Chosen:
    """What is chosen where this module runs."""
    own: dict[str, Any] = host.__dict__
    if REPLICA in own:
        chosen: Chosen = own[REPLICA]
        return chosen
    call = HERE.call
    # In this order: a compiler would guard `plain`, and compile once more where it differs.
    return call.chosen if torch.compiler.is_dynamo_compiling() or call.plain else call.repeated()


class Differing(Tensor):
    """Stands for a tensor that is not the same for all rows of a batch: it shows its form, and nothing can use it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__" or name in _FORM:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise TargetError(
            f"{getattr(args[0], 'called', 'a tensor') if args else 'a tensor'} is not the same for all rows, and is "
            "read by another module than its own, which takes no rows apart. Use these deltas one after the other: "
            "`adapted.using(name)`."
        )


_FORM = ("size", "dim", "numel", "is_floating_point", "is_complex", "stride", "__repr__")


def differing(value: Any, name: str) -> Any:
    """What is read of an attribute that is not the same for all rows, outside of a call that has taken them apart."""
    if not isinstance(value, Tensor):
        return value
    shown: Any = value.detach().as_subclass(Differing)
    shown.called = repr(name)
    return shown


def effective(name: str) -> property:
    """A property that reads through ``_pet_weight`` of its host.

    An engine may put something else than a parameter there while it computes: FSDP1 deletes the parameter, and sets
    a view of its flat tensor.
    """

    def read(self: Any) -> Any:
        return self._pet_weight(name)

    def write(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: Any) -> None:
        if self.__dict__.pop(name, None) is None:
            raise AttributeError(name)

    return property(read, write, delete)


def repeats_itself(host: nn.Module) -> bool:
    """Whether gradient checkpointing repeats a part of this module's own forward, which reads a property of it.

    The forward itself is over then. A module around it may read its parameters as well, without meaning their values.
    Called from ``_pet_weight``.
    """
    if torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
        return False
    frame = inspect.currentframe()
    for _ in ("here", "_pet_weight", "read"):
        frame = frame and frame.f_back
    return frame is not None and frame.f_locals.get("self") is host


# --- deltas ---------------------------------------------------------------------------------------


_KNOWN = 256  # selections of which a host remembers what acts in them


class Acting(NamedTuple):
    """What a host runs in one call: the keys of its deltas that act, by their path.

    Keys and not deltas: a sharding engine may wrap a delta at any time, and what it wraps stays under its key.

    Attributes:
        activation: those that change what a call returns, in the order in which they apply.
        around: those that run in the place of a call.
        weight: those that change what is read from a parameter.
        generate: those around the host's ``generate``.
        fusing: the one that may compute the host's product itself: it alone acts on what the call returns.
        groups: where rows of a batch use different deltas, what acts on each group of them, and nothing above.
    """

    activation: tuple[str, ...]
    around: tuple[str, ...]
    weight: tuple[str, ...]
    generate: tuple[str, ...]
    fusing: str | None
    groups: tuple["Acting", ...] | None = None


class Deltas(nn.ModuleDict):
    """The deltas of one host, in the order in which they apply.

    What acts is looked up once for every selection that threads use, and kept until a delta comes or goes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.switches: dict[str, Switch] = {}
        self._forget()

    def _forget(self) -> None:
        self._roots = tuple(dict.fromkeys(self.switches.values()))
        self._known: dict[tuple[Any, ...], Acting] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()  # a copy has switches of its own, with other numbers

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a delta; see :class:`torch.nn.Module`."""
        super().add_module(name, module)
        self.switches.setdefault(name, Switch())
        self._forget()

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        del self.switches[key]
        self._forget()

    def belong(self, key: str, switch: Switch) -> None:
        """A delta acts where this switch says so: that of the adapted root that it belongs to."""
        if self.switches.get(key) is not switch:
            self.switches[key] = switch
            self._forget()

    def acting(self) -> Acting:
        """What acts in this call."""
        chosen = of_host(self)
        if torch.compiler.is_dynamo_compiling():
            for root in self._roots:
                selection = chosen.get(root.number, root.selection)
                if selection is not None:
                    note_compiled(root.number, selection.deltas)
            return self._look(chosen)  # a compiler guards what is read, and would have to repeat what is written
        chosen_keys: tuple[Any, ...] = ()
        for root in self._roots:  # one, almost always
            selection = chosen.get(root.number, root.selection) if chosen else root.selection
            if selection is not None:
                chosen_keys = (*chosen_keys, root.number, selection.deltas, selection.keys)
                if selection.rows is not None:
                    chosen_keys = (*chosen_keys, selection.rows.names)
        acting = self._known.get(chosen_keys)
        if acting is None:
            acting = self._look(chosen)
            if len(self._known) >= _KNOWN:
                self._known = {}
            self._known[chosen_keys] = acting
        return acting

    def active(self, path: Path) -> list[Delta]:
        """The deltas of one path that act in this call."""
        own = cast(dict[str, Delta], self._modules)
        return [own[key] for key in getattr(self.acting(), path)]

    def acts(self, key: str) -> bool:
        """Whether a delta acts in this call."""
        return self._acts(key, of_host(self))

    def rows(self) -> tuple[int, Rows] | None:
        """Which rows use which deltas in this call, with the number of the root that it was chosen for."""
        return self._rows_in(of_host(self))

    def _rows_in(self, chosen: Chosen) -> tuple[int, Rows] | None:
        for root in self._roots:
            selection = chosen.get(root.number, root.selection)
            if selection is not None and selection.rows is not None:
                return root.number, selection.rows
        return None

    def _look(self, chosen: Chosen) -> Acting:
        if (found := self._rows_in(chosen)) is not None:
            number, rows = found
            groups = tuple([self._look({**chosen, number: part}) for part in rows.parts])
            return Acting((), (), (), (), None, groups)
        # Not isinstance: a sharding engine passes the attributes of what it has wrapped through.
        own = cast(dict[str, Delta], self._modules)
        keys = [key for key in tuple(own) if self._acts(key, chosen)]  # another thread may attach one
        for root in self._roots:
            selection = chosen.get(root.number, root.selection) if chosen else root.selection
            if len(keys) > 1 and selection is not None and len(selection.deltas) > 1:
                keys = self._in_order(keys, root, selection.deltas)
        activation, around, weight, generate = (
            tuple([key for key in keys if own[key].path == path])
            for path in ("activation", "around", "weight", "generate")
        )
        fuses = len(activation) == 1 and own[activation[0]].fuses_linear
        return Acting(activation, around, weight, generate, activation[0] if fuses else None)

    def _acts(self, key: str, chosen: Chosen) -> bool:
        switch = self.switches[key]
        selection = chosen.get(switch.number, switch.selection) if chosen else switch.selection
        return selection is None or key in selection.keys

    def _in_order(self, keys: list[str], root: Switch, deltas: tuple[str, ...]) -> list[str]:
        """Those of a root in the order of its deltas, in the places that they have among those of other roots."""
        places = [place for place, key in enumerate(keys) if self.switches[key] is root]
        ordered = [key for name in deltas for key in (keys[place] for place in places) if delta_in(key) == name]
        found = dict(zip(places, ordered, strict=True))
        return [found.get(place, key) for place, key in enumerate(keys)]

    def _replicate_for_data_parallel(self) -> Any:
        return replica_of(self, super()._replicate_for_data_parallel())  # type: ignore[no-untyped-call]


def replica_of(module: nn.Module, replica: Any) -> Any:
    """A copy that ``nn.DataParallel`` has made: it runs in a thread of its own, in which nothing is chosen."""
    if chosen := of_host(module):
        replica.__dict__[REPLICA] = chosen
    return replica


class Slot:
    """Carries the input of one module to a delta on another, within one forward of one thread."""

    def __init__(self, pet: Deltas, key: str) -> None:
        self.pet = pet
        self.key = key

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the first tensor of a call, unless the delta that wants it is switched off."""
        if not self.pet.acts(self.key):
            return
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                HERE.call.handed[self] = x
                return

    def take(self) -> Tensor:
        """Give the tensor away: a slot keeps no activation alive."""
        value = HERE.call.handed.pop(self, None)
        if value is None:
            raise DeadSiteError(
                f"the delta {self.key!r} reads the input of another module, which was not called before it in this "
                "forward. Exclude this place."
            )
        return value


SEQUENCES = (nn.Sequential, nn.ModuleList)


class WithoutDeltas(nn.Module):
    """Mixed into such a host: its deltas are none of the children that it goes through."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for name, module in self._modules.items() if name != CHILD and module is not None])

    def __len__(self) -> int:
        return len(self._modules) - (CHILD in self._modules)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return list(self)[index]
        own = [(name, module) for name, module in self._modules.items() if name != CHILD][index]
        cls: Any = type(self).__pet_base__  # type: ignore[attr-defined]  # every host has it
        return cls(OrderedDict(own)) if isinstance(self, nn.Sequential) else cls(module for _, module in own)
