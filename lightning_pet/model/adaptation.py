"""The record of what was applied to a model.

It lives on the adapted root, so it is copied, pickled and sent to other processes with the model. All
names in it are canonical and relative to the root, and are fixed when the deltas are inserted: under
sharding engines and compilers they could not be recovered later.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_pet.errors import PETError
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.sharding import is_sharded, ordinary_parts
from lightning_pet.model.call import Selection, Switch
from lightning_pet.model.naming import (
    DEFAULT,
    canonical,
    delta_of,
    delta_path,
    host_at,
    host_key,
    named_tensors,
    names_below,
    unwrapped,
)
from lightning_pet.model.structure import Target

# --- marks: what tensors held at one moment, remembered without keeping them ----------------------

# A version counter would be free, but writes through ``.data``, as averages of weights are usually kept, do not count.
# So the values are read: once, at the speed of memory.


_ROW: Final = 8192  # bytes that are summed into one number
_SMALL: Final = 2 * _ROW  # bytes up to which a tensor is kept as it is

Form = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class Mark:
    """What one tensor held: its bytes if they are few, else their sums row by row, as whole numbers.

    Of a tensor that an engine has split, it is about the part that this process holds.
    """

    forms: tuple[Form, ...]
    sums: tuple[Tensor, ...]


def mark(tensor: Tensor) -> Mark | None:
    """Remember what a tensor holds; ``None`` if its values cannot be read."""
    parts = _parts(tensor)
    return Mark(tuple(map(_form, parts)), tuple(map(_sums, parts))) if parts else None


def compare(pairs: Iterable[tuple[Tensor, Mark | None]]) -> list[bool | None]:
    """Whether each tensor holds something else than when it was marked.

    ``None`` where that cannot be told: it was not marked, or has another form now (an engine has split or gathered
    it, it was cast).
    """
    answers: list[bool | None] = []
    found: list[Tensor] = []
    places: list[int] = []
    for tensor, before in pairs:
        parts = _parts(tensor)
        comparable = before is not None and bool(parts) and before.forms == tuple(map(_form, parts))
        answers.append(False if comparable else None)
        if comparable and before is not None:
            for part, sums in zip(parts, before.sums, strict=True):
                found.append((_sums(part) != sums.to(part.device)).any())
                places.append(len(answers) - 1)
    # All at once: reading one answer of a GPU waits for it.
    devices = {flag.device for flag in found}
    for device in devices:
        here = [i for i, flag in enumerate(found) if flag.device == device]
        for i, flag in zip(here, torch.stack([found[i] for i in here]).tolist(), strict=True):
            answers[places[i]] = bool(answers[places[i]]) or flag
    return answers


def _parts(tensor: Tensor) -> list[Tensor]:
    # ZeRO-3 keeps a process's part beside the parameter, which is empty or whole as the engine needs it.
    held: Tensor = getattr(tensor, "ds_tensor", tensor)
    return ordinary_parts(held.detach().to_local() if is_sharded(held) else held)  # type: ignore[attr-defined]


def _form(part: Tensor) -> Form:
    return part.shape, part.dtype


@torch.no_grad()
def _sums(part: Tensor) -> Tensor:
    data = part.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() <= _SMALL:
        return data.clone()
    if data.storage_offset() % 8:
        data = data.clone()
    rows, words = data.numel() // _ROW, data.numel() // 8
    numbers = data[: words * 8].view(torch.int64)
    whole = rows * (_ROW // 8)
    return torch.cat([numbers[:whole].view(rows, -1).sum(1), numbers[whole:], data[words * 8 :].to(torch.int64)])


# --- the record -----------------------------------------------------------------------------------


RECORD = "_pet"  # attribute of the adapted root


@dataclass
class Applied:
    """One method as it was applied.

    Attributes:
        method: short name of the method.
        name: the user's name for the instance.
        config: constructor arguments.
        targets: the resolved places: those of the deltas, in the order of ``hosts``, then those without one.
        hosts: (host path, key) of every inserted delta.
        readers: reader path of every inserted delta, or ``None``.
        trained: base parameters that it trains as they are.
        readings: those of them of which it is known who reads them, with the path of the module in whose call they
            are read if it is not their own: they may be kept in a wider precision than they are read in.
        delta: name of the delta that it is a part of.
    """

    method: str
    name: str
    config: dict[str, Any]
    targets: tuple[Target, ...]
    hosts: list[tuple[str, str]] = field(default_factory=list)
    readers: list[str | None] = field(default_factory=list)
    trained: tuple[str, ...] = ()
    readings: dict[str, str | None] = field(default_factory=dict)
    delta: str = DEFAULT

    @property
    def key(self) -> str:
        """Name of this method's deltas among those of a host."""
        return host_key(f"{self.method}_{self.name}", self.delta)

    @property
    def paths(self) -> list[str]:
        """Paths of its deltas from the root, in the order of ``hosts``: what the names of their tensors begin with."""
        return [delta_path(host, key) for host, key in self.hosts]

    @property
    def label(self) -> str:
        """What people call it: its short name, with the user's name and the delta's if there are such."""
        own = self.method if self.name == "default" else f"{self.method}:{self.name}"
        return own if self.delta == DEFAULT else f"{own}@{self.delta}"


class Inserted(NamedTuple):
    """One delta where it sits.

    Attributes:
        method: what it belongs to, as it was applied.
        target: its place, as it was resolved.
        host: the module that holds it.
        delta: the delta.
        path: what the names of its tensors begin with, seen from the root.
    """

    method: Applied
    target: Target
    host: nn.Module
    delta: Delta
    path: str

    @property
    def key(self) -> str:
        """Name of the delta among those of its host."""
        return self.path.rpartition(".")[2]


@dataclass
class Adaptation:
    """Everything that was done to one adapted root.

    Attributes:
        applied: methods in the order in which they were applied.
        delta_names: parameters and persistent buffers of all deltas.
        trainable_names: delta parameters that train, then base parameters that do.
        scopes: submodules whose other parameters are frozen (``""``: everything).
        apart: parts of them that are left to the user, as all outside of them is.
        left: what was planned, and is in a part that the user gave to no optimizer.
        originals: copies of the base tensors that training may change (trained parameters,
            persistent buffers), to restore them exactly.
        flags: ``requires_grad`` of every base parameter before the first delta came.
        marks: what parameters beside the base held when the first delta came; ``None``: they have changed since.
        sizes: declared sizes of modules that host a delta or train, when that was decided.
        resizable: they may change at the moment, because the deltas are inserted anew afterwards.
        switch: stands for this root where a thread chooses what acts, and holds what acts where none does.
        active: the deltas that act unless a thread has chosen others, in the order in which they do.
        waiting: names that would train, by delta, of those that do not train at present.
        values: of every delta that is not active, what it has in place of tensors of the base, by name.
        claims: tensors beside those that it trains of which a delta has values of its own (buffers, copies).
        beside: of each delta, the others that acted when it was trained, with digests of their values.
        together: deltas that train in one run, each on rows of its own. Nothing acts on rows that no block has given to
            one of them. What changes beside the plan (buffers, what the user trains outside of the base) is shared.
        combined: of each delta that was made of others, how.
    """

    applied: list[Applied] = field(default_factory=list)
    delta_names: tuple[str, ...] = ()
    trainable_names: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    marks: dict[str, Mark | None] = field(default_factory=dict)
    sizes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    resizable: bool = False
    switch: Switch = field(default_factory=Switch)
    active: tuple[str, ...] = ()
    waiting: dict[str, tuple[str, ...]] = field(default_factory=dict)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    claims: dict[str, frozenset[str]] = field(default_factory=dict)
    beside: dict[str, dict[str, str]] = field(default_factory=dict)
    together: tuple[str, ...] = ()
    combined: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The deltas in the order in which they came."""
        return tuple(dict.fromkeys(applied.delta for applied in self.applied))

    @property
    def keeper(self) -> str | None:
        """The active delta to which belongs what changes beside the plan: the last one that trains, else the last."""
        awake = [name for name in self.active if name not in self.waiting]
        return next(reversed([*self.active, *awake]), None)

    def trained_by(self, delta: str) -> dict[str, None]:
        """Base parameters that a delta trains as they are."""
        return dict.fromkeys(name for applied in self.applied if applied.delta == delta for name in applied.trained)

    def of(self, *deltas: str) -> "Adaptation":
        """The same, as if these deltas were all there are."""
        if set(self.names) <= set(deltas):
            return self
        applied = [one for one in self.applied if one.delta in deltas]
        names = {name for name in self.delta_names if delta_of(name) in deltas}
        claims = {name for delta in deltas for name in self.claims.get(delta, ())}
        mine = {name for delta in deltas for name in self.trained_by(delta)} | names | claims
        others = {name for delta in self.names if delta not in deltas for name in self.trained_by(delta)}
        others |= {name for delta, own in self.claims.items() if delta not in deltas for name in own}
        asleep = [name for delta in deltas for name in self.waiting.get(delta, ())]
        user = self.keeper in deltas or not set(self.together).isdisjoint(deltas)
        return replace(
            self,
            applied=applied,
            delta_names=tuple(name for name in self.delta_names if name in names),
            trainable_names=tuple(
                name
                for name in dict.fromkeys((*self.trainable_names, *asleep))
                if name in mine or (user and delta_of(name) is None and name not in others)
            ),
        )

    def held_by(self, deltas: Iterable[str]) -> dict[str, list[str]]:
        """Tensors of the base of which these deltas have values of their own, with the deltas that do."""
        found: dict[str, list[str]] = {}
        trained: dict[str, list[str]] = {}
        for applied in self.applied:
            trained.setdefault(applied.delta, []).extend(applied.trained)
        for delta in deltas:
            own = (*trained.get(delta, ()), *self.values.get(delta, ()), *self.claims.get(delta, ()))
            for name in dict.fromkeys(own):
                found.setdefault(name, []).append(delta)
        return found

    def rest(self, delta: str) -> None:
        """A delta does not train from now on; :func:`~lightning_pet.insertion.commit.freeze` tells the parameters."""
        if delta in self.waiting:
            return
        others = {n for other in self.names if other not in (delta, *self.waiting) for n in self.trained_by(other)}
        trained = self.trained_by(delta).keys()
        own = [name for name in self.trainable_names if delta_of(name) == delta or name in trained]
        self.waiting[delta] = tuple(own)
        self.trainable_names = tuple(n for n in self.trainable_names if n not in own or n in others)

    def wake(self, delta: str) -> None:
        """It does again."""
        own = self.waiting.pop(delta, ())
        if own:
            place = {name: index for index, name in enumerate(self.delta_names)}
            present = dict.fromkeys((*self.trainable_names, *own))
            self.trainable_names = tuple(sorted(present, key=lambda name: place.get(name, len(place))))

    def act(self, deltas: tuple[str, ...]) -> None:
        """These deltas act where a thread has chosen nothing, in this order."""
        self.active = deltas
        if self.together:
            self.switch.selection = self.selection(())
        else:
            self.switch.selection = None if deltas == self.names else self.selection(deltas)

    def selection(self, deltas: tuple[str, ...]) -> Selection:
        """What acts where these deltas do."""
        keys = (key for applied in self.applied if applied.delta in deltas for _, key in applied.hosts)
        return Selection(frozenset(keys), {}, deltas)

    @property
    def trained_names(self) -> tuple[str, ...]:
        """Base parameters that train as they are."""
        own = set(self.delta_names)
        return tuple(name for name in self.trainable_names if name not in own)

    @property
    def trained_in_place(self) -> frozenset[str]:
        """Base parameters of which some delta has values of its own, whether it acts or not, and trains or not."""
        return frozenset(name for applied in self.applied for name in applied.trained)

    @property
    def planned_names(self) -> tuple[str, ...]:
        """What the methods train: deltas, heads and other base parameters; not what the user trains beside them."""
        trained = self.trained_in_place
        own = set(self.delta_names)
        return tuple(name for name in self.trainable_names if name in own or name in trained)

    def in_base(self, name: str) -> bool:
        """Whether a base parameter belongs to what is adapted, and is frozen unless a method trains it."""
        return bool(self.of_base((name,)))

    def of_base(self, names: Iterable[str]) -> set[str]:
        """Those of the names that :meth:`in_base` is true of."""
        return names_below(names, self.scopes, self.apart)

    def deltas(self, root: nn.Module, *, pass_over_gone: bool = False) -> Iterator[Inserted]:
        """Every inserted delta with the module that holds it, in the order in which they came.

        The one place where names become modules: what follows passes the modules on.

        Args:
            root: the adapted root.
            pass_over_gone: leave out deltas whose hosts user code has replaced meanwhile.

        Raises:
            KeyError: with the path of a delta that is gone.
        """
        hosts: dict[str, tuple[nn.Module, nn.Module] | None] = {}  # many deltas have the same
        for applied in self.applied:
            for target, (host, key) in zip(applied.targets, applied.hosts, strict=False):
                if host not in hosts:
                    hosts[host] = host_at(root, host)
                found = hosts[host]
                delta = found[1]._modules.get(key) if found is not None else None
                if found is not None and delta is not None:
                    inner = cast(Delta, unwrapped(delta))
                    yield Inserted(applied, target, found[0], inner, delta_path(host, key))
                elif not pass_over_gone:
                    raise KeyError(delta_path(host, key))

    def keys(self) -> dict[str, list[str]]:
        """Of every module that holds deltas, by its path, the keys of these."""
        found: dict[str, list[str]] = {}
        for applied in self.applied:
            for host, key in applied.hosts:
                found.setdefault(host, []).append(key)
        return found

    def places(self) -> Iterator[tuple[Applied, Target, str]]:
        """The same by name: (method, target, path of the delta), whether the modules are there or not."""
        for applied in self.applied:
            for target, path in zip(applied.targets, applied.paths, strict=False):
                yield applied, target, path

    def host_paths(self) -> set[str]:
        """Paths of the modules that hold deltas."""
        return {path for applied in self.applied for path, _ in applied.hosts}


def deltas_in(root: nn.Module) -> Iterator[Inserted]:
    """Every delta of an adapted root; none if nothing was applied to it."""
    record = record_of(root)
    yield from record.deltas(root) if record is not None else ()


def record_of(root: nn.Module) -> Adaptation | None:
    """The record on this very module, or ``None``."""
    return root.__dict__.get(RECORD)


def record_at(root: nn.Module) -> Adaptation:
    """The record of an adapted root."""
    record = record_of(root)
    if record is None:
        raise PETError("the deltas of this model were merged or removed; apply or load them again.")
    return record


def adapted_root(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of the adapted root inside a model, or ``None`` if nothing was applied."""
    for path, module in model.named_modules():
        if RECORD in module.__dict__:
            return canonical(path), module
    return None


def adapted_roots(model: nn.Module) -> dict[str, nn.Module]:
    """Every adapted root inside a model, by path."""
    return {canonical(path): module for path, module in model.named_modules() if RECORD in module.__dict__}


def described(root: nn.Module) -> list[str]:
    """What was applied to a root: options, places and tensors, one text each, in a fixed order."""
    record = record_of(root)
    if record is None:
        return []
    own = set(record.delta_names)
    return [
        *(f"{a.key}: {option}={value!r}" for a in record.applied for option, value in sorted(a.config.items())),
        *(f"{a.key} on {target.path} ({target.role})" for a in record.applied for target in a.targets),
        *(f"{name} of shape {tuple(tensor.shape)}" for name, tensor in named_tensors(root) if name in own),
        *(f"{name}, trained" for name in record.trained_names),
    ]
