"""A Trainer whose module carries a delta, and that was given no callback for it: the record on the model suffices.

Without this the Trainer would write checkpoints of the whole model, and schedules of the method would stand still.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_pet.insertion.method import METHODS
from lightning_pet.model.adaptation import adapted_root, record_of
from lightning_pet.strategies import private

_READS: Final = "_pet_reads_checkpoint"  # attribute of a Trainer


def accompany_runs() -> None:
    """A model has a delta from here on: let Trainers find its methods, if they are not given them."""
    private.around_runs(_accompanied)


def reads_checkpoint(trainer: pl.Trainer) -> bool:
    """Whether the present run was given a ``ckpt_path``, as far as it is known."""
    return bool(trainer.__dict__.get(_READS, False))


@contextmanager
def _accompanied(trainer: pl.Trainer, module: pl.LightningModule, path: object) -> Iterator[None]:
    trainer.__dict__[_READS] = path is not None
    rebuilt = _missing(trainer, module)
    if not rebuilt:
        yield
        return
    callbacks = cast(Any, trainer)
    callbacks.callbacks = [*rebuilt, *callbacks.callbacks]
    try:
        yield
    finally:
        callbacks.callbacks = [callback for callback in callbacks.callbacks if callback not in rebuilt]


def _missing(trainer: pl.Trainer, module: pl.LightningModule) -> list[Any]:
    """The methods of a model whose Trainer has none, as callbacks, where the run reads or writes checkpoints."""
    found = adapted_root(module)
    record = record_of(found[1]) if found is not None else None
    methods = tuple(cast(type, kind) for kind in METHODS.values())
    if record is None or any(isinstance(callback, methods) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return []
    fitting = trainer.state.fn == TrainerFn.FITTING
    if not fitting and not reads_checkpoint(trainer):
        return []
    applied = [a for a in record.applied if a.delta in record.active and a.delta not in record.waiting]
    if not applied:
        return []
    names = ", ".join(f"{a.method}:{a.name}" for a in applied)
    if not all(a.method in METHODS for a in applied):
        rank_zero_warn(
            f"{type(module).__name__} carries a delta ({names}), and the Trainer was given no callback for it: its "
            "checkpoints will hold the whole model. Pass the callbacks that were applied: Trainer(callbacks=[…])."
        )
        return []
    if fitting:
        rank_zero_warn(
            f"{type(module).__name__} carries a delta ({names}), and the Trainer was given no callback for it: it is "
            "trained with the options it was applied with, and checkpoints are delta checkpoints. Pass the callbacks "
            "to the Trainer to say so yourself; to train the model as a whole, call merge_() or remove() first."
        )
    return [METHODS[a.method](**a.config, delta=a.delta) for a in applied]
