"""A method with a penalty of its own, and modules that add the same penalty by hand: what the side loss must equal."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from models import Data, Module, Net, fit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pet.callbacks.base import PETCallback
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.side_loss import Penalty, with_penalty
from lightning_pet.model.structure import Structure, Target

WEIGHT = 0.3


def spread(*values: Tensor) -> Tensor:
    """Some penalty whose gradient is not linear."""
    return sum(((value - 0.5).square() + value.cos()).sum() for value in values)


class Scaling(Delta):
    """Scales and shifts what a layer returns; both numbers carry the penalty."""

    def __init__(self, width: int, weight: float) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.penalty = Penalty(spread, weight=weight)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        scale = with_penalty(self.scale, [self.scale, self.shift], self.penalty)
        return output * scale + self.shift


class PenalisedCallback(PETCallback):
    """Inserts :class:`Scaling` at both linears."""

    method = "penalised"

    def __init__(self, weight: float = WEIGHT, **kwargs: Any) -> None:
        super().__init__(verbose=False, **kwargs)
        self.weight = weight

    def resolve(self, root: nn.Module, structure: Structure) -> Sequence[Target]:
        return Target("fc1"), Target("fc2")

    def build(self, root: nn.Module, target: Target) -> Delta:
        return Scaling(8, self.weight)


class Gradients(Callback):
    """Every gradient of every optimizer step, after unscaling, and the reported losses."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        # The value of a delta is in the list too: the next forward depends on it.
        self.steps.append([p.grad.clone() for p in pl_module.parameters() if p.requires_grad])


def by_hand(module: LightningModule) -> Tensor:
    return WEIGHT * sum(spread(delta.scale, delta.shift) for delta in module.modules() if isinstance(delta, Scaling))


class Adding(Module):
    """Adds the penalty itself, if told so; in any form in which a step may give its loss."""

    def __init__(self, add: bool, kind: str = "tensor", reentrant: bool | None = None) -> None:
        super().__init__(Net(dropout=0.0), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        self.add, self.kind, self.reentrant = add, kind, reentrant
        self.automatic_optimization = kind != "manual"

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        if self.reentrant is not None:
            x = checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)
        else:
            x = self.net(x)
        return nn.functional.cross_entropy(x.float(), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        loss = loss.exp() if self.kind == "manual" else loss  # an in-place addition of the penalty would fail
        self.losses.append(loss.item())
        loss = loss + by_hand(self) if self.add else loss
        if self.kind == "manual":
            optimizer = self.optimizers()
            self.manual_backward(loss)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()
            return None
        return {"loss": loss, "other": 1} if self.kind == "dict" else loss


def train(add: bool, kind: str = "tensor", reentrant: bool | None = None, **options: Any) -> tuple[Adding, Gradients]:
    """The truth (``add``: the penalty is part of the loss), or the side loss."""
    module, seen = Adding(add, kind, reentrant), Gradients()
    fit(module, PenalisedCallback(0.0 if add else WEIGHT), seen, data=Data(shuffle=False), **options)
    return module, seen
