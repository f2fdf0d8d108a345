"""Reference points: what a tuned model has to beat."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lightning_pet.errors import ArgumentError
from lightning_pet.model.adaptation import adapted_root
from lightning_pet.model.undisturbed import evaluating


@runtime_checkable
class ReferencePoints(Protocol):
    """A data module that knows how well its task can be done without tuning.

    Attributes:
        metric: name of the logged metric that the points compare with, such as ``"val/accuracy"``.
    """

    metric: str

    def reference_points(self, module: Any) -> dict[str, float]:
        """Measure the reference points; call it before tuning.

        Leaves the module's weights, its training mode and the global random state as they were.

        Args:
            module: the LightningModule as it is before any method changed it.

        Returns:
            Values of ``metric`` by a short description.
        """
        ...


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Evaluate a module without gradients, then restore the modes of its parts and the global random state.

    Raises:
        ArgumentError: a method has changed the module already, so it would not be a reference.
    """
    if adapted_root(module) is not None:
        raise ArgumentError(
            f"{type(module).__name__} is adapted already; reference points describe it before tuning, "
            f"so call reference_points before fit"
        )
    with evaluating(module), torch.random.fork_rng(devices=[]), torch.no_grad():
        yield
