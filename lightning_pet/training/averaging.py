"""Averaged weights (EMA, SWA) beside a delta: only what trains is averaged."""

from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_pet.errors import UnsupportedStrategyError
from lightning_pet.strategies import private

_AVERAGING = (WeightAveraging, StochasticWeightAveraging)


def refuse_averaging_first(callbacks: Sequence[pl.Callback], first: object) -> None:
    """Averaging callbacks copy the model in ``setup``, so the delta must be in it by then.

    Raises:
        UnsupportedStrategyError: if one is listed before the first PET callback.
    """
    for callback in callbacks:
        if callback is first:
            return
        if isinstance(callback, _AVERAGING):
            raise UnsupportedStrategyError(
                f"{type(callback).__name__} is listed before {type(first).__name__}: it would copy the model before "
                "the delta is in it. List the PET callbacks first."
            )


def refuse_averages(callbacks: Iterable[pl.Callback], method: str) -> None:
    """A method that exchanges parameters during the fit leaves nothing that could be averaged over it.

    Raises:
        UnsupportedStrategyError: if a callback averages.
    """
    for callback in callbacks:
        if isinstance(callback, _AVERAGING):
            raise UnsupportedStrategyError(
                f"{type(callback).__name__} averages over steps, and {method} exchanges parameters between them. "
                "Leave one of the two out."
            )


def refuse_outdated_averages(callbacks: Iterable[pl.Callback], module: nn.Module) -> None:
    """The copies must have the delta.

    Raises:
        UnsupportedStrategyError: if a callback copied the model before the delta came.
    """
    names = {name for name, _ in module.named_parameters()}
    for callback in callbacks:
        average = private.average_of(callback) if isinstance(callback, _AVERAGING) else None
        if average is not None and {name for name, _ in average.named_parameters()} != names:
            raise UnsupportedStrategyError(
                f"{type(callback).__name__} copied {type(module).__name__} before the delta was in it, because the "
                "module builds or changes its model in setup or configure_model, or a precision plug-in replaces "
                f"layers. Build the model in __init__, or leave {type(callback).__name__} out."
            )


def share_frozen(callbacks: Iterable[pl.Callback], module: nn.Module) -> None:
    """Let the averages use the very tensors of the frozen base.

    The average of a constant is that constant, but not in floating point: an EMA would move the base a
    little at every step. Sharing it also spares its copy in memory.
    """
    for callback in callbacks:
        if not isinstance(callback, _AVERAGING):
            continue
        average = private.average_of(callback)
        if average is None:
            continue
        for mean, parameter in zip(average.parameters(), module.parameters(), strict=True):
            if not parameter.requires_grad:
                mean.data = parameter.data
        private.wrap_average(callback, _skip_shared)


def _skip_shared(original: Any, mean: Tensor, parameter: Tensor, count: Any) -> Tensor:
    averaged: Tensor = mean if mean.data_ptr() == parameter.data_ptr() else original(mean, parameter, count)
    return averaged
