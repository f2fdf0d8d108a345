"""What lives for one call, and which deltas act in it: state of the calling thread, never of a module.

Threads may run one adapted model at the same time. What a forward notes for itself is in the :class:`CallState` of its
thread: there is nothing on modules that another thread could change. A compiler traces through it, and its guards look
at the thread that calls, so one compiled model serves threads with different deltas.

Gradient checkpointing runs parts of a forward again in the backward pass: maybe after the block that chose the deltas
was left, and on a GPU in a thread of the autograd engine. Deltas are then chosen as in the forward that is repeated:
nodes of the graph have numbers that rise, and a thread remembers in which of its blocks which numbers were given.
"""

import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_pet.errors import PETError

_numbers = count()
_REMEMBERED = 4096  # blocks whose graphs may still go backward
_PASSED = 256  # calls likewise, of which something is held

Chosen = Mapping[int, "Selection"]
"""What blocks have chosen, by :attr:`Switch.number`."""


@dataclass(frozen=True, eq=False)
class Selection:
    """What acts on one adapted root.

    Attributes:
        keys: of the deltas that act, as hosts name them.
        values: what is read in place of attributes of modules, by canonical name from the root.
        deltas: names of the deltas that act, in the order in which they do; empty: in the order in which they came.
        rows: what acts on which row of a batch; ``None``: all of it on every row.
    """

    keys: frozenset[str] = frozenset()
    values: dict[str, Any] = field(default_factory=dict)
    deltas: tuple[str, ...] = ()
    rows: "Rows | None" = None

    @property
    def holds_values(self) -> bool:
        """Whether there are values in it, of which there may be as many as the model has."""
        return bool(self.values) or (self.rows is not None and any(part.values for part in self.rows.parts))


@dataclass(frozen=True, eq=False)
class Rows:
    """Which row of a batch uses which delta: rows that use the same are a group.

    Attributes:
        names: of each group; ``None`` is the base.
        ids: of each row, the number of its group.
        parts: of each group, what acts on its rows.
        differing: canonical names of what is not read alike by all groups.
        places: paths of modules, by their identity.
        manners: what is known of how modules treat rows.
        known: what was worked out for a size and a device.
        steady: every process has the same groups in the same order, some of them without rows, and calls what acts on
            them alike; otherwise groups are numbered in the order of their first rows.
    """

    names: tuple[str | None, ...]
    ids: tuple[int, ...]
    parts: tuple[Selection, ...]
    differing: frozenset[str] = frozenset()
    places: Mapping[int, str] = field(default_factory=dict)
    manners: Any = None
    known: dict[Any, Any] = field(default_factory=dict)
    steady: bool = False


class Switch:
    """Stands for one adapted root in the choice of a thread; all hosts of the root hold it.

    Attributes:
        number: tells it from those of other roots, and of copies.
        exposed: modules, and attributes of them, that stay such that a thread may read other values there.
        selection: what acts where a thread has chosen nothing; ``None``: every delta, in the order in which they came.
            It is never changed, but exchanged for another.
        open: the selections of all blocks that threads are in now.
        manners: what is known of how modules treat the rows of a batch.
    """

    def __init__(self, selection: Selection | None = None) -> None:
        self.number = next(_numbers)
        self.exposed: dict[nn.Module, set[str]] = {}
        self.selection = selection
        self.open: list[Selection] = []
        self.manners: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Switch, (self.selection,)

    def chosen(self) -> Selection | None:
        """What acts in this thread; ``None``: every delta."""
        return chosen().get(self.number, self.selection)

    def is_off(self) -> bool:
        """Whether no delta of the root acts in this thread."""
        selection = self.chosen()
        return selection is not None and not selection.keys

    @contextmanager
    def using(self, selection: Selection) -> Iterator["Block"]:
        """Within the block this thread uses this selection on the root; other threads do not notice.

        Raises:
            PETError: if blocks of one thread are left in another order than they were entered, as by tasks that wait
                for something inside of them: they would have taken each other's deltas.
        """
        call = HERE.call
        block = call.enter(self.number, selection)
        parts = selection.rows.parts if selection.rows is not None else ()
        self.open += [selection, *parts]
        try:
            yield block
        finally:
            for gone in (selection, *parts):
                self.open.remove(gone)
            if not call.leave(block):
                raise PETError(
                    "blocks that choose deltas (`disabled()`) were left in another order than they were entered, so "
                    "calls in between used the wrong deltas. Do not await inside of such a block, and leave it in the "
                    "thread that entered it."
                )


@dataclass(eq=False)
class Block:
    """One block that chose for one root.

    Attributes:
        chosen: in it, for all roots. It is forgotten with the block (``None``) if there are values in it: there may be
            as many as the model has.
        begin: the first number that an autograd node could have got in it.
        end: the first that none could.
        task: the backward pass in which the block was entered, or -1.
        own: what it chose itself.
    """

    chosen: Chosen | None
    begin: int
    task: int
    own: Chosen
    end: int | None = None

    @property
    def made_a_graph(self) -> bool:
        """Whether something may go backward through what was computed in it."""
        return self.end != self.begin


class CallState:
    """What one thread notes while it runs adapted models.

    Attributes:
        chosen: in the present blocks.
        plain: :attr:`chosen` holds whatever runs: the thread is no autograd engine's, and remembers no blocks.
        blocks: the present blocks, innermost last.
        remembered: these, and the last ones in which a graph was made.
        scope: modules whose weight deltas are visible.
        handed: inputs on the way from one module to a delta on another.
        around: what deltas around a running module hold for the time, as pairs of delta and value, innermost last.
        before: what they held in the last calls that made a graph, each with the numbers of its nodes.
        observer: sees the attentions that this thread runs.
        part: chosen while some of the rows of a batch run alone.
        remade: effective weights of the running host that backward makes again.
    """

    def __init__(self) -> None:
        self.chosen: Chosen = {}
        self.blocks: list[Block] = []
        self.remembered: list[Block] = []
        # A thread that was not started by Python may be one in which autograd goes backward.
        self.foreign = isinstance(threading.current_thread(), threading._DummyThread)
        self.plain = not self.foreign
        self.scope: tuple[nn.Module, ...] = ()
        self.handed: dict[Any, Tensor] = {}
        self.around: tuple[tuple[nn.Module, Any], ...] = ()
        self.before: deque[tuple[tuple[ReferenceType[nn.Module], ...], Any, int, int]] = deque(maxlen=_PASSED)
        self.observer: Any = None
        self.part: Chosen | None = None
        self.remade: Any = None

    @contextmanager
    def only(self, number: int, part: Selection) -> Iterator[None]:
        """Within the block some rows run alone, with this chosen for the root of this number.

        It is not remembered for backward: who repeats a forward repeats the call that has taken the rows apart.
        """
        before, chosen = self.part, self.chosen
        self.part = self.chosen = {**(self.repeated() if not self.plain else chosen), number: part}
        try:
            yield
        finally:
            self.part, self.chosen = before, chosen

    def enter(self, number: int, selection: Selection) -> Block:
        """A block begins that chooses this for the root of this number."""
        _CALLER.set(self)
        own = {number: selection}
        begin, task = torch._C._autograd._get_sequence_nr(), torch._C._current_graph_task_id()
        block = Block({**self.chosen, **own}, begin, task, own)
        self.blocks.append(block)
        self.remembered.append(block)
        self._choose()
        return block

    def leave(self, block: Block) -> bool:
        """A block ends; returns whether it was the innermost one of this thread."""
        orderly = bool(self.blocks) and self.blocks[-1] is block
        block.end = torch._C._autograd._get_sequence_nr()
        self.blocks.remove(block)
        self._choose()
        if not block.made_a_graph:
            self.remembered.remove(block)
        elif block.chosen and any(selection.holds_values for selection in block.chosen.values()):
            block.chosen = None
        del self.remembered[: max(len(self.remembered) - _REMEMBERED, 0)]
        self.plain = not (self.foreign or self.remembered)
        return orderly

    def _choose(self) -> None:
        self.chosen, self.plain = {}, False
        for block in self.blocks:
            self.chosen = {**self.chosen, **block.own}

    def repeated(self) -> Chosen:
        """What was chosen in the forward that is repeated in the present backward pass, if one runs."""
        if self.part is not None:
            return self.part
        task = torch._C._current_graph_task_id()
        if task == -1 or any(block.task == task for block in self.blocks):
            return self.chosen
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return self.chosen
        number = node._sequence_nr()
        for block in reversed(_calling(self).remembered):
            if block.begin <= number and (block.end is None or number < block.end):
                if block.chosen is None:
                    raise PETError(
                        "gradient checkpointing repeats a forward that ran in a block of `disabled()`, with original "
                        "values of trained parameters that were let go at its end. Call backward inside of the block."
                    )
                return block.chosen
        return {}

    def held_by(self, delta: nn.Module) -> Any:
        """What a delta around a running module holds; ``None`` if it does not run."""
        for owner, value in reversed(self.around):
            if owner is delta:
                return value
        return None

    @staticmethod
    def number() -> int:
        """The number that the next node of a graph would get in this thread."""
        return 0 if torch.compiler.is_compiling() else torch._C._autograd._get_sequence_nr()

    def passed(self, owners: Sequence[nn.Module], value: Any, begin: int) -> None:
        """A call ends around which deltas held a value; its first node had this number. Backward may repeat parts."""
        end = self.number()
        if end == begin or torch.compiler.is_compiling():
            return
        _CALLER.set(self)
        self.before.append((tuple([ref(owner) for owner in owners]), value, begin, end))

    def held_before(self, delta: nn.Module) -> Any:
        """What a delta held in the forward that the present backward pass repeats; ``None`` if none does."""
        if torch._C._current_graph_task_id() == -1:
            return None
        node: Any = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        for owners, value, begin, end in reversed(_calling(self).before):
            if begin <= number < end and any(owner() is delta for owner in owners):
                return value
        return None


class _Here(threading.local):
    def __init__(self) -> None:
        self.call = CallState()


HERE: Final = _Here()
"""``HERE.call`` is the calling thread's."""

_CALLER: ContextVar[CallState | None] = ContextVar("lightning_pet_call", default=None)


def _calling(call: CallState) -> CallState:
    """The call of the thread that went backward, of which torch shows its engine's threads the context."""
    if not call.foreign or not torch._C._is_key_in_tls("context"):
        return call
    caller = torch._C._get_obj_in_tls("context").get(_CALLER)
    _CALLER.set(caller)  # for a backward pass that is begun inside of this one
    return caller or call


_COMPILED: Final[dict[int, set[tuple[str, ...]]]] = {}
_MANY: Final = 8  # graphs of one function that torch.compile keeps by default, before it runs it as it is


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # run while a compiler traces, not afterwards
def note_compiled(number: int, deltas: tuple[str, ...]) -> bool:
    """A host of the root of this number is compiled for these deltas; warns of as many as a compiler gives up at."""
    known = _COMPILED.setdefault(number, set())
    if deltas not in known:
        known.add(deltas)
        if len(known) == _MANY:
            names = ", ".join(deltas) or "none"
            warnings.warn(
                f"this is the {_MANY}th set of deltas that a model is compiled for ({names}). Each is compiled once, "
                "and torch.compile gives up at torch._dynamo.config.recompile_limit, which is 8 unless you have raised "
                "it. A DeltaLibrary and adapted.replace(name, path) put other deltas into one place, so that nothing "
                "is compiled anew.",
                stacklevel=2,
            )
    return True


def chosen() -> Chosen:
    """What the running call has chosen; empty almost always."""
    call = HERE.call
    if torch.compiler.is_dynamo_compiling() or call.plain:
        return call.chosen
    return call.repeated()


# --- the gate: values that other threads compute with are exchanged between forwards, not during one ---


_GATE: Final = "_pet_gate"  # attribute of an adapted root


class Gate:
    """Counts the forwards of a root that run, and lets none begin while values are exchanged.

    It is on roots with named deltas only, as two hooks. Compiled forwards pass it by.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._running: dict[int, int] = {}  # forwards by thread
        self._closed_by: int | None = None
        self.hooks: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """No forward of a copy runs."""
        return {"hooks": self.hooks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Gate.__init__(self)
        self.hooks = state["hooks"]

    def enter(self, *_: Any) -> None:
        """A forward begins."""
        if torch.compiler.is_dynamo_compiling():
            return
        me = threading.get_ident()
        with self._free:
            while self._closed_by not in (None, me) and me not in self._running:
                self._free.wait()
            self._running[me] = self._running.get(me, 0) + 1

    def leave(self, *_: Any) -> None:
        """It has ended, or failed."""
        if torch.compiler.is_dynamo_compiling():
            return
        me = threading.get_ident()
        with self._free:
            left = self._running.get(me, 1) - 1
            self._running.pop(me, None)
            if left:
                self._running[me] = left
            else:
                self._free.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within the block no forward of another thread runs; one that runs now is waited for.

        A thread that is in a forward itself does not wait: two of them would wait for each other.
        """
        me = threading.get_ident()
        with self._free:
            inside = me in self._running or self._closed_by == me
            while not inside and (self._running or self._closed_by is not None):
                self._free.wait()
            before, self._closed_by = self._closed_by, me
        try:
            yield
        finally:
            with self._free:
                self._closed_by = before
                self._free.notify_all()


def _gate_of(root: nn.Module) -> Gate | None:
    """The gate of a root, if it has one."""
    return root.__dict__.get(_GATE)


def set_gate(root: nn.Module) -> None:
    """Let a root have one."""
    if _gate_of(root) is None:
        gate = root.__dict__[_GATE] = Gate()
        gate.hooks = [
            root.register_forward_pre_hook(gate.enter),
            root.register_forward_hook(gate.leave, always_call=True),
        ]


def take_gate(root: nn.Module) -> None:
    """Take it away."""
    gate: Gate | None = root.__dict__.pop(_GATE, None)
    for hook in gate.hooks if gate is not None else ():
        hook.remove()


@contextmanager
def between_forwards(root: nn.Module) -> Iterator[None]:
    """Within the block no forward of another thread runs, where a gate is there to tell."""
    gate = _gate_of(root)
    if gate is None:
        yield
        return
    with gate.closed():
        yield
