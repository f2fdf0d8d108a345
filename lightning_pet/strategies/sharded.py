"""Checkpoints of engines that shard: what trains is gathered into one file, like that of a single device.

A delta is small, whatever the size of its base, so no folder of shards is written: the file resumes
under every strategy and loads without one. Tensors are gathered one after the other, and only the
process that writes keeps them.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_pet.errors import UnsupportedStrategyError
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.sharding import is_sharded, placed, whole
from lightning_pet.model.adaptation import deltas_in
from lightning_pet.model.naming import named_parameters
from lightning_pet.model.quantised import format_of, is_quantised
from lightning_pet.strategies.strategy import CheckpointRules, Named, StrategyAdapter

P = TypeVar("P", bound=ParallelStrategy)


class ShardedAdapter(StrategyAdapter[P]):
    """What the sharding engines have in common; as it is, it serves engines whose tensors are ``DTensor``."""

    shards = True
    replaced = (
        "lightning_module_state_dict",
        "optimizer_state",
        "save_checkpoint",
        "load_checkpoint",
        "load_model_state_dict",
    )

    def __init__(self, strategy: P) -> None:
        super().__init__(strategy)
        self._on_meta: set[str] = set()

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse callbacks that copy the model."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise UnsupportedStrategyError(
                    f"{type(callback).__name__} keeps a copy of the whole model, which {type(self.strategy).__name__} "
                    "shards: leave it out, or use strategy='ddp'."
                )

    def after_insertion(self, root: nn.Module, *, complete: bool) -> None:
        """Give values to deltas that the user's ``to_empty`` took from the meta device since.

        Raises:
            UnsupportedStrategyError: if a weight is quantised.
        """
        self._refuse_quantised(root)
        deltas = list(deltas_in(root))
        on_meta = {path for _, _, _, delta, path in deltas if any(p.is_meta for p in delta.parameters())}
        if complete:
            for _, _, _, delta, path in deltas:
                if path in self._on_meta - on_meta:
                    delta.reset_parameters()
        self._on_meta, self.materialized_late = on_meta, complete and bool(on_meta)

    def _refuse_quantised(self, root: nn.Module) -> None:
        found = [(name, parameter) for name, parameter in named_parameters(root) if is_quantised(parameter)]
        if found:
            name, parameter = found[0]
            raise UnsupportedStrategyError(
                f"{name} is stored as {format_of(parameter)}, which {type(self.strategy).__name__} cannot split over "
                "processes: torchao's tensors lack the operations, and bitsandbytes' lose their scales. Use "
                "strategy='ddp', or a base in floating point (bf16-true)."
            )

    def is_wrapped(self, root: nn.Module) -> bool:
        """Whether units or shards were made of the model."""
        wrapped = self.strategy.model is not self.strategy.lightning_module
        return wrapped or any(is_sharded(parameter) for parameter in root.parameters())

    def anywhere(self, names: set[str]) -> set[str]:
        """Names that were found in any process: each of them gathers the same tensors."""
        return names.union(*self._from_all(names))

    def everywhere(self, names: set[str]) -> set[str]:
        """Names that were found in all processes."""
        return names.intersection(*self._from_all(names))

    def _from_all(self, names: set[str]) -> list[set[str]]:
        found = [names] * self.strategy.world_size
        if self.strategy.world_size > 1:
            torch.distributed.all_gather_object(found, names)
        return found

    # --- in place of the strategy's methods -------------------------------------------------------

    def lightning_module_state_dict(self, rules: CheckpointRules, original: Callable[..., Any]) -> dict[str, Any]:
        """The delta, gathered; outside of the writing process its values are on the meta device."""
        return self._kept(rules.stored(self.whole(rules.parts().items())))

    def optimizer_state(self, rules: CheckpointRules, original: Callable[..., Any], optimizer: Any) -> dict[str, Any]:
        """The state of an optimizer in the form of a single device, gathered likewise."""
        state = _unwrapped(optimizer).state_dict()
        return {**state, "state": {key: self._kept(_wholes(values.items())) for key, values in state["state"].items()}}

    def single_file(self, path: Any, original: Callable[..., Any], name: str) -> tuple[Any, Callable[..., Any]]:
        """One file for all, in the way of a single device; every process reads it."""
        return self.strategy.broadcast(path), partial(getattr(Strategy, name), self.strategy)

    def load_model_state_dict(
        self, rules: CheckpointRules, original: Callable[..., Any], checkpoint: dict[str, Any], strict: bool = True
    ) -> None:
        """Copy the delta in, and load the optimizer states: the engines leave no later hook for them."""
        rules.load_model(checkpoint)
        module = self.strategy.lightning_module
        if module is not None and module.trainer.state.fn == TrainerFn.FITTING and "optimizer_states" in checkpoint:
            found = rules.before_optimizers(checkpoint)
            self.load_optimizers(found["optimizer_states"])
            checkpoint["lr_schedulers"] = found["lr_schedulers"]  # Lightning loads them next

    # --- what differs between engines -------------------------------------------------------------

    def load_optimizers(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Load whole optimizer states, which are in the order of the present optimizers."""
        for optimizer, state in zip(self.optimizers(), states, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            own = {key: _parts(values, parameters[key]) for key, values in state["state"].items()}
            optimizer.load_state_dict({**state, "state": own})

    # --- details ----------------------------------------------------------------------------------

    def _kept(self, named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """Values on the CPU of the writing process; elsewhere only their shapes are kept."""
        device = "cpu" if self.strategy.is_global_zero else "meta"
        return {
            name: value.detach().to(device) if isinstance(value, Tensor) and value.ndim else value
            for name, value in named
        }


def own_units(root: nn.Module) -> list[tuple[str, Delta]]:
    """Path and delta of those that only their hosts call, so that they may be units of their own."""
    deltas = [(delta, path) for _, _, _, delta, path in deltas_in(root)]
    used = {id(value) for delta, _ in deltas for value in vars(delta).values() if isinstance(value, Delta)}
    return [(path, delta) for delta, path in deltas if delta.path != "shared" and id(delta) not in used]


def _wholes(named: Named) -> Named:
    return ((name, whole(value) if isinstance(value, Tensor) else value) for name, value in named)


def _parts(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    return {
        key: placed(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for key, value in values.items()
    }


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
