"""Between forwards and not during one: when values that other threads compute with are exchanged in place."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

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


def gate_of(root: nn.Module) -> Gate | None:
    """The gate of a root, if it has one."""
    return root.__dict__.get(_GATE)


def set_gate(root: nn.Module) -> None:
    """Let a root have one."""
    if gate_of(root) is None:
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
    gate = gate_of(root)
    if gate is None:
        yield
        return
    with gate.closed():
        yield
