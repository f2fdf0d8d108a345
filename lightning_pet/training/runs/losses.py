"""How the loss of a batch that has the rows of all runs hangs together with the losses of the runs alone.

It is measured, not asked for: with the deltas moved apart, the loss of all is compared with those of each run. It may
be their mean (cross-entropy, also over tokens that are not padding) or their sum; anything else, in which the gradient
of one run would depend on the others, is refused.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_pet.errors import PETError
from lightning_pet.strategies import private

_NOISE = (0.01, 0.03, 0.1, 0.3)
_ROUNDING = 8  # units in the last place
_APART = 30  # times the tolerance: what losses have to differ by


def measured_factor(
    together: Callable[[], Tensor],
    alone: Callable[[str], Tensor],
    runs: Mapping[str, Sequence[nn.Parameter]],
) -> float:
    """What the loss of all is multiplied by, so that every run gets the gradient that it gets alone.

    Args:
        together: the loss of a batch that has the rows of all.
        alone: the loss of a run.
        runs: their names, with what they train; it is moved for the time, and put back.

    Raises:
        PETError: if the loss is neither the mean nor the sum of those of the runs, or that of a run depends on others.
    """
    if len(runs) == 1:
        return 1.0
    own: list[float] = []
    total = tolerance = 0.0
    for noise in _NOISE:
        with torch.no_grad(), _moved(runs.values(), noise):
            losses = [alone(name) for name in runs]
            all_of_them = together()
        own, total = [float(loss) for loss in losses], float(all_of_them)
        tolerance = _tolerance([*losses, all_of_them])
        if not all(map(math.isfinite, [*own, total])):
            break
        if max(own) - min(own) > _APART * tolerance:
            break
    _check_apart(alone, runs, noise, own[0], tolerance)
    mean = sum(own) / len(own)
    fits = {len(runs): abs(total - mean) <= tolerance, 1: abs(total - sum(own)) <= tolerance}
    if not math.isfinite(total) or sum(fits.values()) != 1:
        shown = ", ".join(f"{loss:.6g}" for loss in own[:4])
        raise PETError(
            f"the loss of a batch with the rows of {len(runs)} runs is {total:.6g}, those of the runs alone are {shown}"
            f"{' …' if len(own) > 4 else ''}: neither their mean nor their sum, so one run's gradient would depend on "
            "the others. Something in the module mixes the rows of a batch (negatives from the batch, batch norm, a "
            "penalty on parameters, a capacity of experts). Take it out, or give split=True, which runs"
            " them one after the other in each step, and is as slow as that."
        )
    return float(next(factor for factor, fit in fits.items() if fit))


def check_apart(alone: Callable[[str], Tensor], runs: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Refuse a loss of one run that depends on what others train.

    Raises:
        PETError: saying so.
    """
    if len(runs) > 1:
        noise = _NOISE[-2]
        with torch.no_grad(), _moved(runs.values(), noise):
            loss = alone(next(iter(runs)))
        _check_apart(alone, runs, noise, float(loss), _tolerance([loss]))


def _check_apart(
    alone: Callable[[str], Tensor],
    runs: Mapping[str, Sequence[nn.Parameter]],
    noise: float,
    expected: float,
    tolerance: float,
) -> None:
    first = next(iter(runs))
    with torch.no_grad(), _moved([runs[first]], noise):
        loss = float(alone(first))
    if abs(loss - expected) > tolerance:
        raise PETError(
            f"the loss of {first!r} alone is {loss:.6g}, and {expected:.6g} when what the other runs train has other "
            "values: a penalty on all that trains, for example. Let it go by what acts (weight_decay of the optimizer "
            "does), or train these runs one by one."
        )


def _tolerance(losses: Sequence[Tensor]) -> float:
    steps = [torch.finfo(loss.dtype).eps for loss in losses]
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        steps.append(torch.finfo(torch.bfloat16).eps)
    size = max(1.0, *(abs(float(loss)) for loss in losses))
    return _ROUNDING * max(steps) * size


@contextmanager
def _moved(runs: Iterable[Sequence[nn.Parameter]], noise: float) -> Iterator[None]:
    parameters = [parameter for own in runs for parameter in own]
    before = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.add_(drawn.to(parameter.device, parameter.dtype), alpha=noise)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


@contextmanager
def unnoticed(module: pl.LightningModule) -> Iterator[None]:
    """Within the block steps of the module log nothing, and leave no trace in buffers and metrics."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    metrics = [(part, _state(part)) for part in module.modules() if isinstance(part, Metric)]
    undo = [private.replace_method(module, name, _nothing) for name in ("log", "log_dict")]
    try:
        yield
    finally:
        for undone in undo:
            undone()
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for part, state in metrics:
            vars(part).update(state)


def _state(metric: Metric) -> dict[str, Any]:
    """What a metric has counted."""
    own = {*metric._defaults, "_computed", "_update_count", "_forward_cache"}
    return {name: deepcopy(value) for name, value in vars(metric).items() if name in own}


def _nothing(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    return None


def scaled(output: Any, factor: float) -> Any:
    """What a ``training_step`` returned, with its loss multiplied.

    Raises:
        PETError: if there is no loss in it.
    """
    if isinstance(output, Tensor):
        return output * factor
    if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"] * factor}
    raise PETError(
        f"training_step returned {type(output).__name__}; several runs in one Trainer need a loss: return a tensor, or "
        "a dict with the key 'loss'."
    )


def loss_in(output: Any) -> Tensor:
    """The loss of what a ``training_step`` returned."""
    loss = scaled(output, 1.0)
    found: Tensor = loss["loss"] if isinstance(loss, dict) else loss
    return found.detach()
