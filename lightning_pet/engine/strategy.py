"""The seam between a delta and the Trainer's strategy: the only place that knows strategies.

A :class:`StrategyAdapter` replaces methods on the strategy *instance*, once, and reads everything
else from the controller at call time, so that it serves every later run of the same Trainer. These
methods are the last stop before the disk: they also serve ``save_weights_only=True``, where no
callback hook runs.
"""

import gc
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.xla import XLAStrategy

from lightning_pet.errors import UnsupportedStrategyError
from lightning_pet.store.archive import read_checkpoint


class CheckpointRules(Protocol):
    """What a strategy adapter asks of the controller."""

    def keep(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Only the delta of a full state dict, under canonical names."""
        ...

    def before_save(self, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint that is about to be written; runs on every rank."""
        ...

    def after_load(self, checkpoint: dict[str, Any], path: object) -> None:
        """Check a checkpoint that was just read, before anything of it is used."""
        ...

    def load_model(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy the delta of a checked checkpoint into the model."""
        ...

    def before_optimizers(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """Bring saved optimizer states into the order of the present optimizers."""
        ...


class StrategyAdapter:
    """Single device and DDP: full state dicts in every process."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def install(self, rules: Callable[[], CheckpointRules | None]) -> None:
        """Wrap the strategy's methods.

        Args:
            rules: gives the rules in force at call time; ``None`` while no delta is in the model.
        """
        strategy = self.strategy
        if "_pet_adapter" in strategy.__dict__:
            return
        strategy.__dict__["_pet_adapter"] = self
        module_state, save, load = (
            strategy.lightning_module_state_dict,
            strategy.save_checkpoint,
            strategy.load_checkpoint,
        )
        load_model, load_optimizers = strategy.load_model_state_dict, strategy.load_optimizer_state_dict

        def lightning_module_state_dict() -> dict[str, Any]:
            active, state = rules(), module_state()
            return active.keep(state) if active else state

        def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            if active := rules():
                active.before_save(checkpoint)
            save(checkpoint, filepath, storage_options=storage_options)

        def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            checkpoint = read_checkpoint(checkpoint_path, lambda: load(checkpoint_path, weights_only=weights_only))
            if active := rules():
                active.after_load(checkpoint, checkpoint_path)
            return checkpoint

        def load_model_state_dict(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
            if active := rules():
                active.load_model(checkpoint)
            else:
                load_model(checkpoint, strict=strict)

        def load_optimizer_state_dict(checkpoint: Mapping[str, Any]) -> None:
            active = rules()
            load_optimizers(active.before_optimizers(checkpoint) if active else checkpoint)

        for method in (
            lightning_module_state_dict,
            save_checkpoint,
            load_checkpoint,
            load_model_state_dict,
            load_optimizer_state_dict,
        ):
            setattr(strategy, method.__name__, method)

    def wrap_again(self) -> None:
        """Parameters of the model have been exchanged during a fit: let the strategy know the new ones."""
        strategy = self.strategy
        if isinstance(strategy, DDPStrategy):
            # The old reducer's hooks go with it: nothing else may hold it when the new one is made.
            strategy.model = strategy.lightning_module
            gc.collect()
            strategy.configure_ddp()


# Subclasses of DDPStrategy that keep and write parameters in their own ways.
_OTHERS = (DeepSpeedStrategy, XLAStrategy)

ADAPTERS: list[tuple[type[Strategy], type[StrategyAdapter]]] = [
    (SingleDeviceStrategy, StrategyAdapter),
    (DDPStrategy, StrategyAdapter),
]
"""Strategy class → adapter; the first match by ``isinstance`` wins."""


def adapter_for(trainer: pl.Trainer) -> StrategyAdapter:
    """The adapter of the Trainer's strategy.

    Raises:
        UnsupportedStrategyError: if there is none.
    """
    for kind, adapter in ADAPTERS:
        if isinstance(trainer.strategy, kind) and not isinstance(trainer.strategy, _OTHERS):
            return adapter(trainer.strategy)
    supported = ", ".join(kind.__name__ for kind, _ in ADAPTERS)
    raise UnsupportedStrategyError(
        f"{type(trainer.strategy).__name__} cannot train a delta yet: its checkpoints would not hold it. "
        f"Supported: {supported} (strategy='auto' or 'ddp')."
    )
