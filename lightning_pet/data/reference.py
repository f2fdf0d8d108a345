"""Reference points: what a tuned model has to beat."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class ReferencePoints(Protocol):
    """A data module that knows how well its task can be done without tuning.

    Attributes:
        reference_metric: name of the logged metric that the points compare with, such as ``"val/accuracy"``.
    """

    reference_metric: str

    def reference_points(self, module: Any) -> dict[str, float]:
        """Measure the reference points; call it before tuning.

        Leaves the module's weights, its training mode and the global random state as they were.

        Args:
            module: the LightningModule as it is before any method changed it.

        Returns:
            Values of ``reference_metric`` by a short description.
        """
        ...


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Evaluate a module without gradients, then restore the modes of its parts and the global random state."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
