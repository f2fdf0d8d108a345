"""Measures, in every micro-step of a fit, how the user's loss is scaled, for penalties that methods add beside it."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_pet.layers.side_loss import Penalty, forget_scale, measure
from lightning_pet.strategies import private


def measure_losses(module: pl.LightningModule, root: nn.Module) -> Callable[[], None]:
    """Look at what ``training_step`` returns and ``manual_backward`` is given; nothing if no delta has a penalty.

    A loss that is passed to ``torch``'s own ``backward`` is not scaled by anyone, and needs no measuring.

    Args:
        module: the LightningModule.
        root: the adapted root in it.

    Returns:
        A function that undoes it.
    """
    if not any(isinstance(value, Penalty) for part in root.modules() for value in vars(part).values()):
        return lambda: None
    undo = [private.replace_method(module, "manual_backward", _measured_argument)]
    original = module.training_step
    undo.append(private.replace_method(module, "training_step", _measured_result))
    module.training_step.__wrapped__ = original  # type: ignore[attr-defined]  # Lightning reads the signature

    def back() -> None:
        for undone in undo:
            undone()
        forget_scale()

    return back


def _measured_result(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = original(*args, **kwargs)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        measure(loss)
    return output


def _measured_argument(original: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any) -> None:
    measure(loss)
    original(loss, *args, **kwargs)
