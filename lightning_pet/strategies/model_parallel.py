"""FSDP2: the user's ``configure_model`` calls ``fully_shard``; a delta is sharded as its host is."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_pet.errors import UnsupportedStrategyError
from lightning_pet.layers.sharding import is_sharded
from lightning_pet.model.adaptation import deltas_in
from lightning_pet.model.naming import canonical, join, named_modules
from lightning_pet.strategies import private
from lightning_pet.strategies.parameter_groups import trainable_of
from lightning_pet.strategies.sharded import ShardedAdapter, own_units
from lightning_pet.strategies.strategy import CheckpointRules


class ModelParallelAdapter(ShardedAdapter[ModelParallelStrategy]):
    """Deltas that were there before ``fully_shard`` are sharded by it; those that came later, here."""

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse tensor parallelism."""
        super().check(trainer)
        size = self.strategy.device_mesh["tensor_parallel"].size()
        if size > 1:
            raise UnsupportedStrategyError(
                f"ModelParallelStrategy(tensor_parallel_size={size}): a delta cannot follow a weight that is split "
                "over devices within a layer. Use tensor_parallel_size=1 and data_parallel_size=the number of devices."
            )

    def after_insertion(self, root: nn.Module, *, complete: bool) -> None:
        """Shard the deltas whose hosts are sharded already; otherwise every rank would train its own."""
        super().after_insertion(root, complete=complete)
        if not complete:
            return
        from torch.distributed.fsdp import fully_shard

        self.settle()
        modules = named_modules(root)
        alone = {path for path, _ in own_units(root)}
        for _, target, _, delta, path in deltas_in(root):
            mesh = _mesh_around(modules, target.module)
            if mesh is None or not any(not is_sharded(p) for p in delta.parameters()):
                continue
            if path not in alone:
                raise UnsupportedStrategyError(
                    f"{path} is used by several deltas, so it must be sharded with the model around it: build the "
                    "model in __init__ and call fully_shard in configure_model, after the delta is in."
                )
            fully_shard(delta, mesh=mesh)

    def check_wrapped(self, module: pl.LightningModule) -> None:
        """What trains must be sharded, or its gradients would stay in their process."""
        super().check_wrapped(module)
        plain = [name for name, parameter in trainable_of(module).items() if not is_sharded(parameter)]
        if plain and self.strategy.world_size > 1:
            raise UnsupportedStrategyError(
                f"{len(plain)} parameters train but are not sharded, so every process would train its own: "
                f"{', '.join(plain[:4])}. Let configure_model call fully_shard on the whole model at the end."
            )
        _refuse_mixed_groups(module)

    def has_run(self, root: nn.Module) -> bool:
        """Whether a forward ran: when deltas came to a sharded model, its structure was looked at."""
        return any(private.has_run(module) for module in root.modules())

    # --- in place of the strategy's methods -------------------------------------------------------

    def lightning_module_state_dict(self, rules: CheckpointRules, original: Callable[..., Any]) -> dict[str, Any]:
        """The delta, gathered from what the optimizer holds."""
        self.settle()
        return super().lightning_module_state_dict(rules, original)

    def load_model_state_dict(
        self, rules: CheckpointRules, original: Callable[..., Any], checkpoint: dict[str, Any], strict: bool = True
    ) -> None:
        """Copy the delta into what the optimizer holds."""
        self.settle()
        super().load_model_state_dict(rules, original, checkpoint, strict)

    def settle(self) -> None:
        """Give back what a forward left whole: validation, or the look at the structure.

        Outermost units stay whole, and all of them with ``reshard_after_forward=False``; their parameters are then
        others than those that train.
        """
        from torch.distributed.fsdp import FSDPModule

        for module in self.strategy.lightning_module.modules() if self.strategy.lightning_module else ():
            if isinstance(module, FSDPModule):
                module.reshard()


def _refuse_mixed_groups(module: nn.Module) -> None:
    """What trains within one call of ``fully_shard`` must have one precision."""
    from torch.distributed.fsdp import FSDPModule

    for path, unit in named_modules(module).items():
        if not isinstance(unit, FSDPModule):
            continue
        within = [part for part in cast(nn.Module, unit).modules() if part is not unit and isinstance(part, FSDPModule)]
        inner = {id(p) for part in within for p in cast(nn.Module, part).parameters()}
        trained = {name: p for name, p in trainable_of(cast(nn.Module, unit)).items() if id(p) not in inner}
        examples = {p.dtype: name for name, p in trained.items()}
        if len(examples) > 1:
            found = " and ".join(f"{join(path, name)} ({dtype})" for dtype, name in examples.items())
            raise UnsupportedStrategyError(
                f"{found} train within one fully_shard, whose gradients must have one precision. Call fully_shard on "
                "the module that trains in low precision (a head) by itself, or use precision='bf16-mixed'."
            )


def _mesh_around(modules: Mapping[str, nn.Module], path: str) -> Any:
    """The mesh of a host, or, if it has no tensors (a dropout), of the nearest module around it that is sharded."""
    while (mesh := _mesh_of(modules[path])) is None and path:
        path = path.rpartition(".")[0]
    return mesh


def _mesh_of(host: nn.Module) -> Any:
    """The mesh of a host's own tensors, else of those below it; ``None`` if it is not sharded."""
    below = (p for name, p in host.named_parameters() if "pet" not in canonical(name).split("."))
    tensors: chain[Tensor] = chain((p for p in host._parameters.values() if p is not None), below)
    return next((t.device_mesh for t in tensors if is_sharded(t)), None)  # type: ignore[attr-defined]
