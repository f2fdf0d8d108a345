"""FSDP1: the strategy wraps the model after the deltas are in; each delta is a unit of its own.

A unit keeps its parameters in one flat tensor, whose gradient has room for all of them, frozen or not: a
delta in one unit with its host would bring back the memory that freezing spared.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from lightning_pet.errors import UnsupportedStrategyError
from lightning_pet.insertion.slot import Deltas
from lightning_pet.layers.delta import Delta, Part
from lightning_pet.model.adaptation import deltas_in
from lightning_pet.model.naming import canonical, named_tensors
from lightning_pet.strategies import private
from lightning_pet.strategies.parameter_groups import scaled_norm
from lightning_pet.strategies.sharded import ShardedAdapter, own_units
from lightning_pet.strategies.strategy import CheckpointRules, Named, flat_names


class FSDPAdapter(ShardedAdapter[FSDPStrategy]):
    """Wraps deltas as units, and gathers one unit at a time: the base is never whole in one process."""

    widens = False

    def __init__(self, strategy: FSDPStrategy) -> None:
        super().__init__(strategy)
        self._units: set[int] = set()
        self._shapes: dict[str, torch.Size] = {}

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse options under which FSDP1 cannot train or save a part of the parameters."""
        super().check(trainer)
        if self.strategy.kwargs.get("use_orig_params") is False:
            raise UnsupportedStrategyError(
                "FSDPStrategy(use_orig_params=False) melts frozen and trained parameters into one, and the state of "
                "its optimizer cannot be saved. Leave the option out: Lightning's default is True."
            )
        if self.strategy.sharding_strategy is ShardingStrategy.NO_SHARD:
            raise UnsupportedStrategyError(
                "FSDPStrategy(sharding_strategy='NO_SHARD') cannot save units within units, and shards nothing. Use "
                "strategy='ddp', which does the same."
            )
        module = self.strategy.lightning_module
        if module is not None and not module.automatic_optimization:
            raise UnsupportedStrategyError(
                f"{type(module).__name__} optimizes manually (automatic_optimization=False): its "
                "backward pass would run within FSDP1's forward, before the units have been made ready for it, and "
                "train wrong values. Use ModelParallelStrategy (FSDP2), strategy='ddp', or automatic optimization."
            )
        if self._copies():
            raise UnsupportedStrategyError(
                "FSDPStrategy would shard over one process only (one device, or HYBRID_SHARD with a device_mesh whose "
                "last size is 1). torch turns this into NO_SHARD: units within units cannot be saved, and the copies "
                "exchange no gradients. Use strategy='auto' or 'ddp', or a mesh that shards."
            )

    def expect_gaps(self, trainer: pl.Trainer, what: str) -> None:
        """Refuse accumulation with them: a unit that the last of several batches passes over loses its gradient."""
        super().expect_gaps(trainer, what)
        if trainer.accumulate_grad_batches != 1:
            raise UnsupportedStrategyError(
                f"{what} with accumulate_grad_batches={trainer.accumulate_grad_batches}: FSDP1 cannot accumulate the "
                "gradient of a unit that takes no part in the last batch. Use ModelParallelStrategy (FSDP2) or "
                "strategy='ddp', or accumulate_grad_batches=1."
            )

    def _copies(self) -> bool:
        """Whether each process would hold all of the model."""
        if self.strategy.world_size == 1:
            return True
        groups, mesh = (self.strategy.kwargs.get(name) for name in ("process_group", "device_mesh"))
        if isinstance(groups, tuple):
            return bool(torch.distributed.get_world_size(groups[0]) == 1)
        return mesh is not None and mesh.size(mesh.ndim - 1) == 1

    def after_insertion(self, root: nn.Module, *, complete: bool) -> None:
        """Extend the policy that decides what becomes a unit, and keep the shapes: flat tensors have none."""
        super().after_insertion(root, complete=complete)
        if any(isinstance(module, FSDP) for module in root.modules()):
            raise UnsupportedStrategyError(
                f"This {type(root).__name__} is wrapped by FSDP already, by configure_model or in an earlier run, and "
                "a delta cannot be made a unit then. Let the strategy wrap it (auto_wrap_policy=…), and build the "
                "module anew for every run; or use ModelParallelStrategy (FSDP2)."
            )
        if not complete:
            return
        self._units = {id(unit) for unit in (*(delta for _, delta in own_units(root)), *_trained_modules(root))}
        self._refuse_mixed_units(root)
        module = self.strategy.lightning_module
        self._shapes = {name: tensor.shape for name, tensor in named_tensors(module)} if module is not None else {}
        if not isinstance(policy := self.strategy.kwargs.get("auto_wrap_policy"), _WithDeltas):
            self.strategy.kwargs["auto_wrap_policy"] = _WithDeltas(policy, lambda m: id(m) in self._units)
        initialize = self.strategy.kwargs.get("param_init_fn")
        if initialize is not None and not isinstance(initialize, _InitialDeltas):
            self.strategy.kwargs["param_init_fn"] = _InitialDeltas(initialize, self.strategy)
        self.materialized_late = False  # units are filled while they are wrapped; check_start refuses files

    def check_start(self, root: nn.Module) -> None:
        """Refuse a file for deltas that get their memory while they are wrapped, unless one process sends its own."""
        found: list[bool] = [False] * self.strategy.world_size
        torch.distributed.all_gather_object(found, bool(self._on_meta))
        if all(found):
            raise UnsupportedStrategyError(
                "start_from: FSDP1 would fill deltas on the meta device with start values after the file was read. "
                "Build the model on the CPU in one process at least (sync_module_states=True sends it to the others), "
                "or use ModelParallelStrategy (FSDP2)."
            )

    def _refuse_mixed_units(self, root: nn.Module) -> None:
        """A delta that others use is no unit of its own, and a unit has one precision."""
        deltas = [(delta, path) for _, _, _, delta, path in deltas_in(root)]
        own = {id(p) for delta, _ in deltas for p in delta.parameters()}
        cast = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(self.strategy.precision_plugin.precision)
        base = next((cast or p.dtype for p in root.parameters() if id(p) not in own and p.is_floating_point()), None)
        for delta, path in deltas:
            if id(delta) not in self._units and base and any(p.dtype != base for p in delta.parameters()):
                raise UnsupportedStrategyError(
                    f"{path} is used by several modules, so that on FSDP1 it has a unit together with base weights. "
                    f"They will be {base} there, and a unit has one precision. Use precision='bf16-mixed' or "
                    "'32-true' with a float32 base, or ModelParallelStrategy (FSDP2)."
                )

    def is_wrapped(self, root: nn.Module) -> bool:
        """Whether units were made of the model, or of a part of it before an error."""
        return super().is_wrapped(root) or any(isinstance(module, FSDP) for module in root.modules())

    # --- gathering ----------------------------------------------------------------------------------

    def whole(self, named: Named) -> Iterator[tuple[str, Tensor]]:
        """Copies of the tensors, unit by unit."""
        for unit, items in self._by_unit(named):
            with _summoned(unit, writeback=False):
                for name, tensor in items:
                    yield name, tensor.detach() if unit is None else tensor.detach().clone()

    def fill(self, named: Named, values: Mapping[str, Tensor]) -> None:
        """Copy whole values in, unit by unit."""
        with torch.no_grad():
            for unit, items in self._by_unit((name, tensor) for name, tensor in named if name in values):
                with _summoned(unit, writeback=True):
                    for name, tensor in items:
                        tensor.copy_(values[name])

    def gradients(self, named: Named) -> Iterator[tuple[str, Tensor | None]]:
        """Copies of the gradients, unit by unit."""
        for unit, items in self._by_unit(named):
            with _summoned(unit, writeback=False, with_grads=True):
                for name, tensor in items:
                    yield name, None if tensor.grad is None else tensor.grad.detach().clone()

    def shaped(self, named: Named) -> dict[str, Tensor]:
        """Tensors without values, in the shapes from before the wrapping."""
        return {
            name: torch.empty(self._shapes.get(name, tensor.shape), dtype=tensor.dtype, device="meta")
            for name, tensor in named
        }

    def without_gradient(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> list[str]:
        """Without gradient in every process; one that holds nothing of a parameter cannot tell."""
        silent = {name for name, parameter in parameters.items() if parameter.numel() == 0}
        own = silent | set(super().without_gradient(parameters, optimizer))
        found: list[set[str]] = [set()] * self.strategy.world_size
        torch.distributed.all_gather_object(found, own)
        return sorted(set.intersection(*found))

    def clip(self, trainer: pl.Trainer, optimizer: Any, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Clip to a norm of all processes together: each has parts of the gradients."""
        held = [parameter for parameter in parameters if parameter.grad is not None]
        total = torch.zeros((), device=self.strategy.root_device)
        for parameter in held:
            total += parameter.grad.float().square().sum()  # type: ignore[union-attr]
        torch.distributed.all_reduce(total, group=self.strategy.model.process_group)  # type: ignore[union-attr]
        nn.utils.clip_grads_with_norm_(held, scaled_norm(trainer, optimizer, norm), total.sqrt())

    def _by_unit(self, named: Named) -> Iterable[tuple[FSDP | None, list[tuple[str, Tensor]]]]:
        root = self.strategy.model
        assert root is not None
        if not private.knows_outermost(root):
            with _summoned(root, writeback=False):
                pass  # the outermost unit must be the first that is used, or it would not be taken as such
        unit_of = {id(p): unit for unit in FSDP.fsdp_modules(root) for p in _own_parameters(unit)}
        found: dict[int, tuple[FSDP | None, list[tuple[str, Tensor]]]] = {}
        for name, tensor in named:
            unit = unit_of.get(id(tensor))
            found.setdefault(id(unit), (unit, []))[1].append((name, tensor))
        return found.values()  # in the order of the names

    # --- optimizers -----------------------------------------------------------------------------------

    def optimizer_state(self, rules: CheckpointRules, original: Callable[..., Any], optimizer: Any) -> dict[str, Any]:
        """Gather the state by name, and store it by position as a single device does."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        with self._full_states(rank0_only=True):
            gathered = FSDP.optim_state_dict(self.strategy.model, optimizer)  # type: ignore[arg-type]
        names = {canonical(name): values for name, values in gathered.get("state", {}).items()}
        index = next(i for i, own in enumerate(self.optimizers()) if own is optimizer)
        positions = flat_names(self.parameter_names(self.strategy.lightning_module)[index])  # type: ignore[arg-type]
        state = {i: self._kept(names[name].items()) for i, name in enumerate(positions) if name in names}
        return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}

    def load_optimizers(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Load whole states by name; each process takes its part."""
        module = self.strategy.lightning_module
        assert module is not None
        own = {canonical(name): private.unwrapped_name(name) for name, _ in module.named_parameters()}
        for optimizer, names, state in zip(self.optimizers(), self.parameter_names(module), states, strict=True):
            flat = [own[name] for name in flat_names(names)]
            groups = [
                {**group, "params": [own[name] for name in group_names]}
                for group, group_names in zip(state["param_groups"], names, strict=True)
            ]
            by_name = {"state": {flat[i]: dict(v) for i, v in state["state"].items()}, "param_groups": groups}
            with self._full_states(rank0_only=False):
                local = FSDP.optim_state_dict_to_load(self.strategy.model, optimizer, by_name)  # type: ignore[arg-type]
            optimizer.load_state_dict(local)

    def _full_states(self, *, rank0_only: bool) -> AbstractContextManager[Any]:
        offload = self.strategy.root_device.type != "cpu"
        return FSDP.state_dict_type(
            self.strategy.model,  # type: ignore[arg-type]
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only),
            FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only),
        )


class _WithDeltas:
    """A wrap policy that also makes units of what trains.

    Args:
        policy: the user's: a function of torch's old kind, a ``ModuleWrapPolicy`` or ``CustomPolicy``, or none.
        is_unit: whether a module is one of ours that becomes a unit.
    """

    def __init__(self, policy: Any, is_unit: Callable[[nn.Module], bool]) -> None:
        self.policy = private.module_policy(policy)
        self.is_unit = is_unit

    def __call__(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        """Whether to look below this module, or to wrap it."""
        if recurse or self.is_unit(module):
            return True
        return bool(self.policy is not None and self.policy(module, recurse, nonwrapped_numel))


class _InitialDeltas:
    """A ``param_init_fn`` that gives deltas their start values, and leaves the base to the user's.

    Args:
        function: the user's.
        strategy: says on which device.
    """

    def __init__(self, function: Callable[[nn.Module], None], strategy: FSDPStrategy) -> None:
        self.function = function
        self.strategy = strategy

    def __call__(self, module: nn.Module) -> None:
        """Fill one module, and all that is below it if it is a delta."""
        if not isinstance(module, Part):
            self.function(module)
        elif isinstance(module, Delta) and any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device=self.strategy.root_device)
            module.reset_parameters()


def _trained_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The largest modules that train as a whole (heads): in one unit with frozen ones they would cost their memory."""
    counts = Counter(id(p) for _, p in root.named_parameters(remove_duplicate=False))

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            parameters = [] if isinstance(child, Deltas) else list(child.parameters())
            alone = all(p.requires_grad and counts[id(p)] == 1 for p in parameters)
            if parameters and alone and not isinstance(child, nn.ModuleList | nn.ModuleDict):  # these are not called
                yield child
            elif parameters:
                yield from walk(child)

    return walk(root)


def _summoned(unit: Any, *, writeback: bool, with_grads: bool = False) -> AbstractContextManager[Any]:
    if not isinstance(unit, FSDP):
        return nullcontext()
    return FSDP.summon_full_params(unit, recurse=False, writeback=writeback, with_grads=with_grads)


def _own_parameters(unit: FSDP) -> list[nn.Parameter]:
    """Parameters of a unit that are in no unit within it."""
    inner = {id(p) for m in unit.modules() if isinstance(m, FSDP) and m is not unit for p in m.parameters()}
    return [p for p in unit.parameters() if id(p) not in inner]
