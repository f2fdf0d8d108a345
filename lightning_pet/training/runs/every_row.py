"""Every row of a batch goes to every run: one forward for all of them, and each is what it would be alone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, PETError, TargetError, UnsupportedStrategyError
from lightning_pet.model.naming import delta_of
from lightning_pet.strategies import private
from lightning_pet.training.runs.losses import check_apart, loss_in, measured_factor, scaled, unnoticed
from lightning_pet.training.runs.repeat import repeated, rows_of
from lightning_pet.training.runs.streams import Streams, state_of
from lightning_pet.training.tasks.routing import size_of
from lightning_pet.training.watch import Run

# --- gradients of each run are clipped by its own norm --------------------------------------------


def clip_each(runs: Mapping[str, Sequence[nn.Parameter]], clip: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Clip as often as there are runs, each time with the gradients of one run only.

    Args:
        runs: the parameters of each.
        clip: the module's own ``configure_gradient_clipping``.
        args: its own.
        kwargs: its own.
    """
    hidden: dict[str, list[tuple[nn.Parameter, Any]]] = {
        name: [(p, p.grad) for p in own if p.grad is not None] for name, own in runs.items()
    }
    for own in hidden.values():
        for parameter, _ in own:
            parameter.grad = None
    try:
        for own in hidden.values():
            for parameter, gradient in own:
                parameter.grad = gradient
            try:
                clip(*args, **kwargs)
            finally:
                for place, (parameter, _) in enumerate(own):
                    own[place] = (parameter, parameter.grad)
                    parameter.grad = None
    finally:
        for own in hidden.values():
            for parameter, gradient in own:
                parameter.grad = gradient


# --- the step -------------------------------------------------------------------------------------


_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ONE_BY_ONE: Final = "split=True runs them one after the other in each step, which takes as long as running them apart."


class EveryRow:
    """The training steps of several runs in one Trainer.

    Args:
        run: the Trainer and its module.
        names: of the runs: their deltas in the model.
        streams: their random numbers.
        heard: a block in which what is logged is that of one run, with so many rows.
        split: run them one after the other in each step.
    """

    def __init__(
        self,
        run: Run,
        names: Sequence[str],
        streams: Streams,
        heard: Callable[[str, int], AbstractContextManager[None]],
        *,
        split: bool = False,
    ) -> None:
        self._heard = heard
        self._run, self._names, self._streams, self._split = run, tuple(names), streams, split or len(names) == 1
        self._factor: float | None = None
        self._draws = True
        self._rows = 0
        self._parameters: dict[str, list[nn.Parameter]] = {}

    def install(self) -> list[Callable[[], None]]:
        """Put it around clipping and the backward pass; returns what takes it off."""
        module = self._run.module
        return [
            private.replace_method(module, "configure_gradient_clipping", self._clip),
            private.replace_method(module, "backward", self._backward),
        ]

    # --- steps --------------------------------------------------------------------------------------

    def step(self, original: Callable[..., Any], batch: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A ``training_step`` with all runs: the gradient of its loss is, for each, that of its own loss.

        Raises:
            ArgumentError: if the batch cannot be repeated.
            PETError: if the loss does not keep the runs apart.
        """
        self._streams.follow()
        try:
            self._rows = 0 if self._split else rows_of(batch)
            if self._factor is None:
                self._begin()
                self._factor = self._measured(original, batch, rest, kwargs)
            if self._split:
                return self._one_by_one(original, batch, rest, kwargs)
            several = repeated(batch, len(self._names))
            return scaled(self._together(original, several, rest, kwargs), self._factor)
        finally:
            self._streams.look()

    def _together(self, original: Callable[..., Any], several: Any, rest: Any, kwargs: Any) -> Any:
        names = [name for name in self._names for _ in range(self._rows)]
        if self._draws:
            with self._streams.by_rows(self._names, self._rows), self._run.adapted.rows(names):
                return original(several, *rest, **kwargs)
        before = [state_of(device) for device in self._devices()]
        with self._run.adapted.rows(names):
            output = original(several, *rest, **kwargs)
        if not all(map(torch.equal, before, [state_of(device) for device in self._devices()])):
            raise PETError(
                "the module draws random numbers in this step, and drew none in the first one: the runs would have got "
                f"others than alone. Let it draw from the first step on (a dropout above 0), or use {_ONE_BY_ONE}"
            )
        return output

    def _alone(self, name: str, original: Callable[..., Any], batch: Any, rest: Any, kwargs: Any) -> Any:
        with self._streams.alone(name, self._devices()), self._run.adapted.using(name):
            return original(batch, *rest, **kwargs)

    def _one_by_one(self, original: Callable[..., Any], batch: Any, rest: Any, kwargs: Any) -> Any:
        """The sum of the losses: the gradient of each is that of its own."""
        outputs, rows = [], size_of(batch) or 1
        for name in self._names:
            with self._heard(name, rows):
                outputs.append(self._alone(name, original, batch, rest, kwargs))
        losses = [scaled(output, 1.0) for output in outputs]
        total = sum(loss["loss"] if isinstance(loss, dict) else loss for loss in losses)
        return {**outputs[0], "loss": total} if isinstance(outputs[0], dict) else total

    def _measured(self, original: Callable[..., Any], batch: Any, rest: Any, kwargs: Any) -> float:
        """What the loss is multiplied by; also a look whether the runs are apart."""
        streams, before, common = self._streams, self._streams.state(), torch.get_rng_state()

        def together() -> Tensor:
            streams.load_state(before)
            return loss_in(self._together(original, repeated(batch, len(self._names)), rest, kwargs))

        def alone(name: str) -> Tensor:
            streams.load_state(before)
            return loss_in(self._alone(name, original, batch, rest, kwargs))

        streams.drew, factor = False, 1.0
        try:
            with unnoticed(self._run.module):
                if self._split:
                    check_apart(alone, self._parameters)
                else:
                    factor = measured_factor(together, alone, self._parameters)
        finally:
            streams.load_state(before)
            torch.set_rng_state(common)
        self._draws = streams.drew
        return factor

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys((torch.device("cpu"), self._run.module.device)))

    # --- around the steps ---------------------------------------------------------------------------

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._streams.backward(self._names, self._rows):
            return original(*args, **kwargs)

    def _clip(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        clip_each(self._parameters, original, *args, **kwargs)

    def _begin(self) -> None:
        """Look at what trains, and refuse what would let one run have an influence on another."""
        run, module = self._run, self._run.module
        self._parameters = {name: [] for name in self._names}
        names = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and (own := self._parameters.get(delta_of(name) or "")) is not None:
                own.append(parameter)
            elif parameter.requires_grad:
                names.append(name)
        if names and len(self._names) > 1:
            raise ArgumentError(
                f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''} trains beside the deltas, and the runs "
                "would share it. Let it be a part of the base (module=…) and name it in modules_to_save, so that "
                "each run has its own, or freeze it."
            )
        if len(self._names) > 1:
            _refuse_shared(run.trainer, module, run.adapter.shards)


def _refuse_shared(trainer: pl.Trainer, module: pl.LightningModule, shards: bool) -> None:
    if shards:
        raise UnsupportedStrategyError(
            f"every_row with {type(trainer.strategy).__name__}, which shards parameters over processes: not tested. "
            "Use strategy='ddp', or one device."
        )
    if not module.automatic_optimization:
        raise ArgumentError(
            f"{type(module).__name__} optimizes by itself (automatic_optimization=False): what it does with its loss "
            "cannot be done for every run apart. Let Lightning optimize, or train these runs one by one."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ArgumentError(
            "precision '16-mixed' leaves out a step where a gradient overflows, and would leave it out for all runs. "
            "Use 'bf16-mixed' or '32-true'."
        )
    norms = [name for name, part in module.named_modules() if isinstance(part, _NORMS) and part.training]
    if norms:
        raise TargetError(
            f"{norms[0]} ({type(module.get_submodule(norms[0])).__name__}) is in training mode: it mixes the rows of a "
            f"batch, and so the runs. Put it into evaluation (module.{norms[0]}.eval() in on_train_epoch_start), or "
            "train these runs one by one."
        )
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        raise ArgumentError(
            "ReduceLROnPlateau lowers the learning rates of all runs by the metric of one. Use a schedule that goes by "
            "steps or epochs, or train these runs one by one."
        )
    joint = [type(optimizer).__name__ for optimizer in trainer.optimizers if private.uses_first_group_only(optimizer)]
    if joint:
        raise ArgumentError(
            f"{joint[0]} takes one step for all parameters together, so that runs would change each other. Use an "
            "optimizer that goes parameter by parameter (SGD, Adam, AdamW), or train these runs one by one."
        )
