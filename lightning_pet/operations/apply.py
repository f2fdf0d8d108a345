"""Applying methods to a model, with or without a Trainer: one code path."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.exchange.source import read_source
from lightning_pet.insertion.checks import check_fires, lack_of_gradient
from lightning_pet.insertion.commit import commit, undo
from lightning_pet.insertion.method import Method, delta_name, key_of
from lightning_pet.insertion.prepare import prepare
from lightning_pet.insertion.widening import widen
from lightning_pet.model.adaptation import record_of
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.delta import Fill, start_from
from lightning_pet.operations.roots import base_of, example_forward, root_of, scope_in
from lightning_pet.operations.saved import Whole
from lightning_pet.probe.host_inputs import Batches
from lightning_pet.probe.probe import analyse
from lightning_pet.store.reader import Stored
from lightning_pet.strategies.strategy import accompany_runs

_log = logging.getLogger(__name__)
_OTHER_LOOK = (
    " This was a step of the module on two rows of the first batch, before the run. Set an example_input_array, so "
    "that its forward is looked at instead, or call lightning_pet.apply(module, callbacks, forward=…) before the run."
)

M = TypeVar("M", bound="Method")


def apply(
    model: nn.Module,
    callbacks: Method | Sequence[Method],
    *,
    forward: Callable[[], Any] | None = None,
) -> Adapted:
    """Apply methods to any model, without a Trainer.

    The model object stays the same; its layers get deltas, and everything else is frozen. Apply
    before ``Trainer.fit`` where the Trainer starts new processes that only hand weights back
    (``ddp_spawn``, notebooks).

    Args:
        model: any module; for a LightningModule that is a shell around one child, the child is adapted.
        callbacks: the method, or several in the order in which they act.
        forward: runs the model once on a small batch, to read its structure. Not needed for
            transformers models, models with an ``example_input_array``, or targets given by name.

    Returns:
        A handle to switch the deltas off, merge, remove or save them.

    Raises:
        ArgumentError: if two methods have one name, or nothing is given.
        TargetError: if a target does not exist, or ``forward`` raises.
        DeadSiteError: if no target is called or read in ``forward``.
        DeltaFileError: if a file that a method starts from does not fit. In all cases the model is untouched.
    """
    new = insert_methods(model, _methods_in(callbacks), forward, strict=True)
    root = root_of(model)[1]
    try:
        widen(root, model=model)
        start(model, new)
    except BaseException:
        undo(root, [key_of(method) for method in new])
        raise
    if (reason := lack_of_gradient(root)) is not None:
        rank_zero_warn(f"the deltas can be used, but not trained: {reason}")
    return Adapted(root)


def _methods_in(callbacks: Method | Sequence[Method]) -> list[Method]:
    """One method or several as a list.

    Raises:
        ArgumentError: if there is none, or something else is among them.
    """
    several: list[Any] = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    if not several:
        raise ArgumentError("no method was given: pass at least one callback, e.g. LoRACallback().")
    for method in several:
        if isinstance(method, type) or not isinstance(method, Method):
            name = method.__name__ if isinstance(method, type) else type(method).__name__
            made = f"{name}()" if isinstance(method, type) else "LoRACallback(), or a list of several"
            raise ArgumentError(f"{name} is not a method: pass a PET callback, e.g. {made}.")
    return several


def insert_methods(
    model: nn.Module,
    methods: Sequence[M],
    forward: Callable[[], Any] | None = None,
    *,
    strict: bool = False,
    of_loss: bool = False,
    batches: Batches | None = None,
) -> list[M]:
    """Insert the methods that the model does not have yet, all or none, and return them.

    Args:
        model: the model, or what holds it.
        methods: what to apply.
        forward: runs the model once; ``None``: the ``example_input_array`` does, if there is one.
        strict: a forward that raises is an error, not only one opinion less.
        of_loss: that computes the loss.
        batches: the training data of the run, for methods that start from them.
    """
    prefix, root = root_of(model)
    pending = [method for method in methods if not is_applied(root, method)]
    if pending:
        scopes = [scope_in(model, prefix, method.module) for method in pending]
        with torch.compiler.set_stance("force_eager"):  # a look at compiled parts must not trace its own hooks
            look = forward or example_forward(model)
            seen = analyse(root, look, strict=strict and forward is not None)
            structure = replace(seen, prefix=prefix, of_loss=of_loss)
        for difference in structure.disagreements:
            _log.debug("structure of %s: %s", type(root).__name__, difference)
        if structure.failure and forward is None and any(True for _ in root.parameters()):  # else it is built later
            rank_zero_warn(f"the structure was read without the example_input_array: {structure.failure}")
        try:
            prepared = prepare(root, pending, structure, scopes=scopes, batches=batches)
        except TargetError as error:
            if structure.failure and structure.source == "names":
                way = _OTHER_LOOK if of_loss else ""
                raise type(error)(f"{error} (There are only names to go by: {structure.failure}{way})") from error
            raise
        if forward is not None and not of_loss and not structure.failure:
            check_fires([insertion for item in prepared for insertion in item.insertions], structure)
        accompany_runs()
        commit(root, prepared)
    return pending


def start(
    model: nn.Module,
    methods: Sequence[Method],
    files: Mapping[tuple[str, str], Stored] | None = None,
    whole: Whole = iter,
    fill: Fill | None = None,
) -> None:
    """Load the files that newly inserted methods start from.

    Args:
        model: the adapted model.
        methods: those that were just inserted.
        files: what was read before, by path and delta.
        whole: gathers base tensors of which an engine left this process parts only.
        fill: writes whole values into such tensors.
    """
    adapted = Adapted(root_of(model)[1])
    for method in methods:
        if (path := method.start_from) is not None:
            key = (path, delta_name(method))
            stored = files[key] if files else read_source(path, base_of(model), method.base_check, delta=key[1])
            start_from(adapted, method, stored, method.base_check, whole, fill)


def read_starts(model: nn.Module, methods: Sequence[Method]) -> dict[tuple[str, str], Stored]:
    """What the files hold that methods start from, by path and delta."""
    base = base_of(model)
    keys = {(method.start_from, delta_name(method)) for method in methods if method.start_from is not None}
    return {(path, delta): read_source(path, base, delta=delta) for path, delta in keys}


def is_applied(root: nn.Module, method: Method) -> bool:
    """Whether this very method was applied already (eagerly, or in an earlier run).

    Raises:
        ArgumentError: if one of this name was applied with other options.
    """
    record = record_of(root)
    for applied in record.applied if record else ():
        if applied.key == key_of(method):
            method.adopt(applied.config)
            config = method.config_at(applied.targets)
            if applied.config == config:
                return True
            differing = [k for k, v in config.items() if applied.config.get(k) != v]
            raise ArgumentError(
                f"{method.method}:{method.name} was applied to this model with other options ({', '.join(differing)}). "
                "Call remove() first, or give the new one another name."
            )
    return False
