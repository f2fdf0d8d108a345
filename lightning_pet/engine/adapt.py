"""Applying methods to a model, with or without a Trainer: one code path."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_pet.core.adaptation import commit, prepare, record_of
from lightning_pet.core.adapted import Adapted
from lightning_pet.core.method import Method
from lightning_pet.core.probe import analyse
from lightning_pet.engine.roots import default_root, example_forward, scope_in
from lightning_pet.errors import ArgumentError


def apply(model: nn.Module, callbacks: Sequence[Method], *, forward: Callable[[], Any] | None = None) -> Adapted:
    """Apply methods to any model, without a Trainer.

    The model object stays the same; its layers get deltas, and everything else is frozen. Apply
    before ``Trainer.fit`` where the Trainer starts new processes that only hand weights back
    (``ddp_spawn``, notebooks).

    Args:
        model: any module; for a LightningModule that is a shell around one child, the child is adapted.
        callbacks: the methods, in the order in which they act.
        forward: runs the model once on a small batch, to read its structure. Not needed for
            transformers models, models with an ``example_input_array``, or targets given by name.

    Returns:
        A handle to switch the deltas off, merge, remove or save them.

    Raises:
        ArgumentError: if two methods have one name, or nothing is given.
        TargetError: if a target does not exist. The model is untouched then.
    """
    if not callbacks:
        raise ArgumentError("no method was given: pass at least one callback, e.g. [LoRACallback()].")
    prefix, root = default_root(model)
    pending = [method for method in callbacks if not is_applied(root, method)]
    if pending:
        scopes = [scope_in(model, prefix, method.module) for method in pending]
        structure = analyse(root, forward or example_forward(model))
        commit(root, prepare(root, pending, structure, scopes=scopes))
    return Adapted(root)


def is_applied(root: nn.Module, method: Method) -> bool:
    """Whether this very method was applied already (eagerly, or in an earlier run).

    Raises:
        ArgumentError: if one of this name was applied with other options.
    """
    record = record_of(root)
    for applied in record.applied if record else ():
        if (applied.method, applied.name) == (method.method, method.name):
            if applied.config == method.config():
                return True
            differing = [k for k, v in method.config().items() if applied.config.get(k) != v]
            raise ArgumentError(
                f"{method.method}:{method.name} was applied to this model with other options ({', '.join(differing)}). "
                "Call remove() first, or give the new one another name."
            )
    return False
