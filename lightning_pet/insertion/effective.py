"""Parameters that are read through the weight deltas of their host: properties in the place of a look-up."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_pet.errors import TargetError
from lightning_pet.model.call import HERE, Chosen, Switch

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
