"""Checkpoints are written when the module has finished its part of a step: after its own hook, not before it.

Lightning calls a hook of all callbacks, then that of the LightningModule. A checkpoint of the end of a batch would lack
what the module does there (moving an average of its weights), and a run that resumes from it does not do it again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_pet.strategies import private

_HOOKS: Final = ("on_train_batch_end", "on_validation_end")  # at an epoch's end Lightning keeps this order itself


def save_after_module(trainer: pl.Trainer, module: pl.LightningModule) -> Callable[[], None]:
    """Let the checkpoint callbacks wait for those hooks that the module has; returns what undoes it."""
    undo: list[Callable[[], None]] = []
    for hook in _HOOKS:
        if not is_overridden(hook, module):
            continue
        waiting: list[Callable[[], None]] = []
        for callback in trainer.checkpoint_callbacks:
            undo.append(private.replace_method(callback, hook, partial(_wait, waiting)))
        undo.append(private.replace_method(module, hook, partial(_then_save, waiting)))

    def back() -> None:
        for undone in reversed(undo):
            undone()

    return back


def _wait(waiting: list[Callable[[], None]], original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    waiting.append(partial(original, *args, **kwargs))


def _then_save(waiting: list[Callable[[], None]], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = original(*args, **kwargs)
    due, waiting[:] = list(waiting), []
    for save in due:
        save()
    return out
