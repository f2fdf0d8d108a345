"""Many deltas in a folder for one model: by name, a few of them in memory, the least recently used leave."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_pet.arguments import whole
from lightning_pet.errors import ArgumentError, PETError
from lightning_pet.model.adaptation import Adaptation, record_of
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.library.base import Base
from lightning_pet.operations.library.folder import SUFFIX, Changes, Folder, Volume
from lightning_pet.operations.library.slots import Slot, Slots
from lightning_pet.operations.roots import root_of
from lightning_pet.operations.saved import POLICIES


class LibraryInfo(NamedTuple):
    """What a library has done, in the words of :func:`functools.lru_cache`.

    Attributes:
        hits: deltas that were in memory when they were wanted.
        misses: those that were not.
        maxsize: how many may be.
        currsize: how many are.
        verified: files of which every byte was verified; the other reads were of files verified before.
        slots: places in the model.
    """

    hits: int
    misses: int
    maxsize: int
    currsize: int
    verified: int
    slots: int


@dataclass(eq=False)
class _Resident:
    """A delta in memory.

    Attributes:
        name: of its file.
        volume: what was read.
        users: blocks that use it, and threads on the way into one.
        slot: where it lies in the model, if it does.
        stale: its file is another one now.
    """

    name: str
    volume: Volume
    users: int = 0
    slot: Slot | None = None
    stale: bool = False


_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
"""One for each model: several libraries of one put their slots into it one after the other."""


def _lock_of(root: nn.Module) -> threading.Lock:
    return _LOCKS.setdefault(root, threading.Lock())


class DeltaLibrary(Mapping[str, Path]):
    """Delta files in a folder, used by name: read when they are wanted, and let go when others are.

    A mapping from names (``"u7"`` for ``u7.pet.safetensors``) to paths. At most ``resident`` deltas are in memory; the
    least recently used one leaves, but none that a block or a running call uses, and none that is pinned. They are
    written into slots of the model: deltas that act nowhere but in the blocks of this library. As many slots are there
    as deltas are used at the same time; to write into one changes no module, so nothing is compiled anew. Deltas of
    one form (methods, options, places, shapes) take turns in a slot, a LoRA of a smaller rank with zeros behind it;
    one of another form gets a slot of its own.

    Every byte of a file is verified when it is first read, and again when the file is another one (by inode, size and
    time of change). The base's fingerprint is taken once, and again when a parameter of the base has changed in a way
    that torch counts. May be used from any number of threads.

    Args:
        adapted: the model, adapted or not.
        folder: where the files are.
        resident: how many deltas may be in memory.
        base_check: what to do about files of another base; see :func:`lightning_pet.load_delta`.

    Raises:
        ArgumentError: if this is no model, or no such number.
        DeltaFileError: if there is no such folder.

    >>> import tempfile, torch
    >>> from lightning_pet import DeltaLibrary, LoRACallback, apply
    >>> net, folder = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), tempfile.mkdtemp()
    >>> adapted = apply(net, LoRACallback(r=2, target_modules=["0"]))
    >>> written = [adapted.save(f"{folder}/{user}.pet.safetensors") for user in ("ann", "bob")]
    >>> library = DeltaLibrary(adapted, folder, resident=1)
    >>> list(library), "cid" in library
    (['ann', 'bob'], False)
    >>> with library.using("ann"):
    ...     _ = net(torch.ones(1, 4))
    >>> library.resident, library.info().misses
    (('ann',), 1)
    """

    def __init__(
        self,
        adapted: Adapted | nn.Module,
        folder: str | os.PathLike[str],
        resident: int = 64,
        *,
        base_check: str = "error",
    ) -> None:
        if base_check not in POLICIES:
            raise ArgumentError(f"base_check={base_check!r}: use one of {', '.join(map(repr, POLICIES))}.")
        whole("resident", resident, 1)
        self.root: nn.Module = adapted.root if isinstance(adapted, Adapted) else root_of(adapted)[1]
        self._folder = Folder(folder)
        self._most = resident
        self._base = Base(self.root, base_check)
        self._slots = Slots(self.root, resident)
        self._lock = threading.Condition(_lock_of(self.root))
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # the least recently used one first
        self._left: list[_Resident] = []  # in use, though their files are others now
        self._reading: set[str] = set()
        self._pinned: dict[str, None] = {}
        self._hits = self._misses = self._verified = 0

    # --- a mapping from names to files --------------------------------------------------------------

    def __getitem__(self, name: str) -> Path:
        self._check((name,))
        return self._folder.file(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._folder)

    def __contains__(self, name: object) -> bool:
        return self._folder.has(name)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        info = self.info()
        return (
            f"DeltaLibrary({len(self)} deltas in {self._folder.path}, {info.currsize} of at most {info.maxsize} in "
            f"memory, {info.slots} slot{'s' * (info.slots != 1)} in {type(self.root).__name__})"
        )

    def names(self) -> tuple[str, ...]:
        """Names of the files, in order, as of the last look at the folder."""
        return self._folder.names

    # --- what is in memory --------------------------------------------------------------------------

    @property
    def resident(self) -> tuple[str, ...]:
        """The deltas in memory, the least recently used one first."""
        with self._lock:
            return tuple(self._residents)

    @property
    def pinned(self) -> tuple[str, ...]:
        """Those of them that never leave."""
        with self._lock:
            return tuple(self._pinned)

    def info(self) -> LibraryInfo:
        """Counts of hits and misses, and how many deltas are in memory."""
        with self._lock:
            size = len(self._residents) + len(self._left)
            return LibraryInfo(self._hits, self._misses, self._most, size, self._verified, len(self._slots.own))

    def pin(self, *names: str) -> None:
        """Read these deltas and keep them in memory, whatever others are used.

        Raises:
            ArgumentError: if there is no such file.
            DeltaFileError: as :func:`lightning_pet.load_delta`. Nothing is pinned then.
            PETError: if as many as may be in memory are pinned or in use.
        """
        with self._held(names, False) as held, self._lock:
            self._pinned |= dict.fromkeys(one.name for one in held)

    def unpin(self, *names: str) -> None:
        """Let these leave again when their time comes; without names: all.

        Raises:
            ArgumentError: if one of them is not pinned.
        """
        with self._lock:
            if absent := [name for name in names if name not in self._pinned]:
                raise ArgumentError(f"{absent[0]!r} is not pinned; {', '.join(map(repr, self._pinned)) or 'none'} is.")
            for name in names or tuple(self._pinned):
                del self._pinned[name]

    def refresh(self) -> Changes:
        """Look at the folder and at the model again.

        Files that came are known from now on, those that have changed are read and verified again when they are wanted
        next, and those that are gone leave memory. Blocks that are open go on with what they have. The fingerprint of
        the base is taken anew.

        Returns:
            The names of these files.
        """
        changes = self._folder.look()
        with self._lock:
            self._base.forget()
            for name in (*changes.changed, *changes.gone):
                self._retire(name, keep=name in changes.changed)
            for name in changes.gone:
                self._pinned.pop(name, None)
        return changes

    def clear(self) -> None:
        """Let go of all deltas that are neither in use nor pinned, and take their slots out of the model."""
        with self._lock:
            for name in [n for n, one in self._residents.items() if not one.users and n not in self._pinned]:
                self._drop(name)
            held = [*self._residents.values(), *self._left]
            for one in held:
                one.slot = None if one.slot is not None and not one.users else one.slot
            self._slots.clear(self._busy())

    # --- using them ---------------------------------------------------------------------------------

    @contextmanager
    def using(self, *names: str, refresh: bool = False) -> Iterator[None]:
        """Within the block these deltas act in this order, and no others, for the calling thread; see `Adapted.using`.

        Args:
            *names: of files, or of deltas that were loaded into the model by other means.
            refresh: look whether their files have changed, and read these again.

        Raises:
            ArgumentError: if there is no such delta, or two have their own values for one tensor.
            DeltaFileError: if a file is damaged, does not fit the model, or was trained on another base. What is in
                memory and in the model is as it was then.
            PETError: if as many as may be in memory are pinned or in use.
        """
        own = [name for name in dict.fromkeys(names) if self._is_own(name)]
        with self._in_slots(own, refresh) as slots, ExitStack() as stack:
            if names or record_of(self.root) is not None:  # else it is the base, of a model without any delta
                stack.enter_context(Adapted(self.root).using(*(slots.get(name, name) for name in names)))
            yield

    @contextmanager
    def rows(self, names: Sequence[str | None], *, refresh: bool = False) -> Iterator[None]:
        """Within the block each row of a batch uses its own delta; see :meth:`Adapted.rows`.

        Args:
            names: one for each row: of files, or of deltas of the model; ``None``: the base.
            refresh: look whether files have changed, and read these again.

        Raises:
            ArgumentError: if there is no such delta, or the names are no list.
            DeltaFileError: as :meth:`using`.
            PETError: as :meth:`using`.
            TargetError: as :meth:`Adapted.rows`.
        """
        known = isinstance(names, list | tuple) and all(name is None or isinstance(name, str) for name in names)
        if not known or not names:
            raise ArgumentError(f"rows({names!r}): expected a list with the name of a delta, or None, for each row.")
        own = [name for name in dict.fromkeys(names) if name is not None and self._is_own(name)]
        with self._in_slots(own, refresh) as slots, ExitStack() as stack:
            if record_of(self.root) is not None:  # else all rows are the base's, of a model without any delta
                chosen = [None if name is None else slots.get(name, name) for name in names]
                stack.enter_context(Adapted(self.root).rows(chosen))
            yield

    # --- in and out ---------------------------------------------------------------------------------

    def _is_own(self, name: str) -> bool:
        """Whether a name is a file's, and not that of another delta of the model."""
        if self._folder.has(name):
            return True
        record = record_of(self.root)
        slots = {slot.name for slot in self._slots.own}
        if record is None or name not in record.names or name in slots:
            self._check((name,))
        return False

    def _check(self, names: Sequence[Any]) -> None:
        for name in names:
            if not self._folder.has(name):
                alike = [other for other in self._folder.names if abs(len(other) - len(str(name))) < 3]
                near = get_close_matches(str(name), alike[:1000], 1, 0.5)  # it takes its time for each
                raise ArgumentError(
                    f"there is no delta {name!r} in {self._folder.path}: no file {str(name)[:80]}{SUFFIX} is there."
                    + (f" Did you mean {near[0]!r}?" if near else " refresh() looks at the folder again.")
                )

    @contextmanager
    def _in_slots(self, names: Sequence[str], refresh: bool) -> Iterator[dict[str, str]]:
        """Within the block these deltas are in slots; gives the names of these."""
        with self._held(names, refresh) as held:
            with self._lock, torch.inference_mode(False):
                for one in held:
                    try:
                        self._place(one)
                    except BaseException:  # what cannot be placed is not to be found in memory either
                        if self._residents.get(one.name) is one:
                            del self._residents[one.name]
                            self._left.append(one)
                        raise
                slots = {one.name: one.slot.name for one in held if one.slot is not None}
            yield slots

    @contextmanager
    def _held(self, names: Sequence[str], refresh: bool) -> Iterator[list[_Resident]]:
        """Within the block these deltas are in memory, and do not leave."""
        names = tuple(dict.fromkeys(names))
        self._check(names)
        if len(names) > self._most:
            raise PETError(
                f"resident={self._most}: {len(names)} deltas were asked for at once. Ask for fewer, or make a "
                "DeltaLibrary with a larger number."
            )
        held: list[_Resident] = []
        try:
            for name in names:
                held.append(self._hold(name, refresh))
            yield held
        finally:
            with self._lock:
                for one in held:
                    one.users -= 1
                self._left = [one for one in self._left if one.users]
                self._lock.notify_all()

    def _hold(self, name: str, refresh: bool) -> _Resident:
        """A delta that is in memory, or is read now; it is in use."""
        with self._lock:
            while True:
                one = self._residents.get(name)
                if one is not None and refresh and self._folder.stamp(name) != one.volume.stamp:
                    one.stale = True
                if one is not None and not one.stale and self._base.is_known(one.volume):
                    self._hits += 1
                    self._residents.move_to_end(name)
                    one.users += 1
                    return one
                if name not in self._reading:
                    break
                self._lock.wait()  # another thread reads it
            self._reading.add(name)
        try:
            with torch.inference_mode(False):  # or what is read in a block of that kind would be of use in such only
                volume, verified = self._folder.read(name)  # others may use what is in memory meanwhile
            with self._lock:
                self._verified += verified
                self._base.check(volume)
                with torch.inference_mode(False):
                    volume.form.places_in(self.root, volume.stored)  # a form that is new has to fit the model
                return self._admit(name, volume)
        finally:
            with self._lock:
                self._reading.discard(name)
                self._lock.notify_all()

    def _admit(self, name: str, volume: Volume) -> _Resident:
        """A delta comes into memory, and another leaves if there is no room."""
        stale = self._residents.get(name)
        size = len(self._residents) + len(self._left) - (stale is not None and not stale.users)
        if size >= self._most:
            leaving = next((n for n, one in self._residents.items() if self._may_leave(n, one) and n != name), None)
            if leaving is None:
                raise PETError(
                    f"resident={self._most}: all deltas in memory are in use or pinned, so {name!r} cannot be read. "
                    "Leave a block, unpin one, or make a DeltaLibrary with a larger number."
                )
            self._drop(leaving)
        if stale is not None:
            self._retire(name)
        self._misses += 1
        one = self._residents[name] = _Resident(name, volume, users=1)
        return one

    def _may_leave(self, name: str, one: _Resident) -> bool:
        return not one.users and name not in self._pinned

    def _drop(self, name: str) -> None:
        one = self._residents.pop(name)
        if one.slot is not None:
            one.slot.holds = None
            one.slot = None

    def _retire(self, name: str, keep: bool = False) -> None:
        """The file of a delta is another one, or gone: blocks that use what was read go on with it."""
        one = self._residents.get(name)
        if one is None:
            return
        if keep:
            one.stale = True  # and it stays until the new one is there
        elif one.users:
            self._left.append(self._residents.pop(name))
        else:
            self._drop(name)

    def _place(self, one: _Resident) -> None:
        """Put a delta that is in use into a slot, unless it is in one."""
        slot = one.slot
        if slot is None or slot.holds is not one or not self._slots.is_there(slot):
            before = len(self._slots.own)
            slot = self._slots.place(one.volume.stored, one.volume.form, self._busy())
            slot.holds, one.slot = one, slot
            if len(self._slots.own) != before:
                self._base.note()
        self._slots.used(slot)

    def _busy(self) -> Any:
        """Tells whether a slot is used by a block of this library, or of whoever else knows its name."""
        record = record_of(self.root) or Adaptation()
        elsewhere = {name for selection in record.switch.open for name in selection.deltas} | set(record.active)
        used = {id(one.slot) for one in (*self._residents.values(), *self._left) if one.users and one.slot is not None}
        return lambda slot: id(slot) in used or slot.name in elsewhere
