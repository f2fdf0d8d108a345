"""Which module of what the user hands over is adapted, and how it is fed for a look at its structure."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.model.adaptation import adapted_root
from lightning_pet.model.naming import canonical, named_modules
from lightning_pet.operations.trial_step import LOGS, nothing, on_trial, replaced
from lightning_pet.strategies import private
from lightning_pet.targets.targets import suggest


def default_root(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the adapted root.

    A LightningModule that holds its parameters in one child is a shell around that child, and the
    child is the root; so a delta trained in one LightningModule loads into another, or into the
    bare model. Everything else is its own root.
    """
    if not isinstance(model, pl.LightningModule) or any(True for _ in model.parameters(recurse=False)):
        return "", unwrapped(model)
    children = [(n, c) for n, c in model.named_children() if any(True for _ in c.parameters())]
    if len(children) != 1 or not any(True for _ in children[0][1].children()):
        return "", model  # a single layer is no model of its own
    return canonical(children[0][0]), unwrapped(children[0][1])


def root_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the root that is adapted already, else of the one that would be.

    Raises:
        ArgumentError: if this is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"expected a model, a torch.nn.Module, and got {model!r} of type {type(model).__name__}; build it first."
        )
    return adapted_root(model) or default_root(model)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper."""
    inner = module._modules.get("_orig_mod")
    return inner if inner is not None else module


def scope_in(model: nn.Module, prefix: str, module: str | None) -> str | None:
    """Path from the root of a submodule that the user named from the LightningModule; ``None`` if none was named.

    Raises:
        TargetError: if there is no such submodule, or it is outside of the root.
    """
    if module is None:
        return None
    paths = named_modules(model)
    if module not in paths:
        raise TargetError(f"module={module!r}: there is no such submodule.{suggest(module, paths)}")
    if not prefix:
        return module
    if module == prefix:
        return ""
    return module.removeprefix(f"{prefix}.")


def example_forward(model: nn.Module) -> Callable[[], Any] | None:
    """A forward on the LightningModule's ``example_input_array``, if it has one."""
    example = getattr(model, "example_input_array", None)
    if not isinstance(model, pl.LightningModule) or example is None:
        return None
    if isinstance(example, dict):
        return lambda: model(**example)
    if isinstance(example, tuple):
        return lambda: model(*example)
    return lambda: model(example)


def batch_forward(trainer: pl.Trainer, module: pl.LightningModule, configure: Callable[[], Any]) -> Callable[[], Any]:
    """A silent ``training_step`` (or ``predict_step``) on a few rows of the run's first batch.

    The last resort, for models that have neither dummy inputs nor familiar names: it calls user code.

    Args:
        trainer: the Trainer of the run.
        module: its LightningModule.
        configure: the user's own ``configure_optimizers``, for a step that asks for optimizers.
    """

    def forward() -> Any:
        batch = _first_batch(private.loader_of_run(trainer))
        step = module.predict_step if trainer.state.fn == TrainerFn.PREDICTING else module.training_step
        with on_trial(module, configure) as losses:
            return step(_first_rows(batch, 2), 0), losses

    return forward


def silenced(module: pl.LightningModule) -> AbstractContextManager[None]:
    """Within the block ``module.log`` does nothing."""
    return replaced(module, dict.fromkeys(LOGS, nothing))


def _first_batch(loader: Any) -> Any:
    iterator = iter(loader)
    if iterator is loader:
        raise TypeError("the data is an iterator, which cannot give its first batch twice")
    return next(iterator)


def _first_rows(batch: Any, rows: int) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[:rows]
    if isinstance(batch, dict):
        return {key: _first_rows(value, rows) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        values = [_first_rows(value, rows) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
