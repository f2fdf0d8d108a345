"""DeepSpeed ZeRO: parameters, gradients and optimizer states in flat partitions that only its engine knows.

The engine's own folders cannot be read by anything else, and cannot validate under ZeRO-3. Its functions
for single parameters can gather and set everything, so that the checkpoint is the file of a single device.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_pet.errors import UnsupportedStrategyError
from lightning_pet.layers.sharding import is_partition, without_values
from lightning_pet.model.adaptation import deltas_in
from lightning_pet.model.naming import named_tensors
from lightning_pet.strategies import optimizers as optim
from lightning_pet.strategies import private
from lightning_pet.strategies.parameter_groups import trainable_of
from lightning_pet.strategies.sharded import ShardedAdapter
from lightning_pet.strategies.strategy import CheckpointRules, Named, flat_names

_KEY = "deepspeed"
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


class DeepSpeedAdapter(ShardedAdapter[DeepSpeedStrategy]):
    """Reads and writes through DeepSpeed's functions for single parameters; its master copies are float32."""

    passes_over = False
    repacks = True
    keeps_masters = True
    widens = False

    def __init__(self, strategy: DeepSpeedStrategy) -> None:
        super().__init__(strategy)
        self._meta: dict[str, Tensor] = {}
        self._names: list[list[list[str]]] = []
        self._classes: list[str] = []
        self._arrived: set[str] = set()
        self._hooks: dict[str, Any] = {}
        self._gradients: dict[int, Tensor] = {}

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse an optimizer that is not built by the LightningModule."""
        super().check(trainer)
        if isinstance(self.strategy.config, dict) and "optimizer" in self.strategy.config:
            raise UnsupportedStrategyError(
                "The DeepSpeed configuration has an 'optimizer': DeepSpeed would build it without the delta's groups "
                "and rates. Take it out, and return the optimizer from configure_optimizers."
            )

    @contextmanager
    def planning(self, root: nn.Module) -> Iterator[None]:
        """Let a base that ``zero.Init`` has partitioned look as if it were on the meta device.

        Inside of ``zero.Init`` deltas would be partitioned while they are built, too; so it is suspended.
        """
        with self.undisturbed(), _whole_shapes(root):
            yield

    def undisturbed(self) -> AbstractContextManager[None]:
        """Outside of ``zero.Init``, which also casts every tensor that is made, those of a file that is read too."""
        return private.without_zero_init()

    def after_insertion(self, root: nn.Module, *, complete: bool) -> None:
        """Give values to deltas of a partitioned base, and note the shapes: partitions have none."""
        with self.undisturbed():
            self._materialize(root)
        super().after_insertion(root, complete=complete)
        module = self.strategy.lightning_module
        if complete and module is not None:
            self._meta = {name: without_values(tensor) for name, tensor in named_tensors(module)}
            self._narrow(root)

    def _narrow(self, root: nn.Module) -> None:
        """Give deltas of a partitioned base its precision: the engine casts them beside any other base.

        The engine keeps what trains in one buffer, and master copies of it in float32.
        """
        config: Any = self.strategy.config
        names = {"bf16": torch.bfloat16, "fp16": torch.float16}
        enabled = [dtype for name, dtype in names.items() if config.get(name, {}).get("enabled")]
        if enabled and any(is_partition(parameter) for parameter in root.parameters()):
            for _, _, _, delta, _ in deltas_in(root):
                for parameter in delta.parameters():
                    if parameter.is_floating_point():
                        parameter.data = parameter.data.to(enabled[0])

    def _materialize(self, root: nn.Module) -> None:
        for _, target, host, found, _ in deltas_in(root):
            delta: Any = found
            weight = host._parameters.get(target.parameter)
            if not any(p.is_meta for p in delta.parameters()) or (weight is not None and weight.is_meta):
                continue
            delta.to_empty(device=self.strategy.root_device)
            delta.reset_parameters()
            if weight is not None:
                with _gathered(weight, None):
                    delta.initialize_from(weight.detach())

    # --- optimizers -----------------------------------------------------------------------------------

    def optimizers_made(self, optimizers: list[Any], module: pl.LightningModule) -> None:
        """Note whose parameters they hold, before the engine puts partitions in their place."""
        optim.check(optimizers, module)
        self._names = optim.parameter_names(optimizers, module)
        self._classes = [type(optimizer).__name__ for optimizer in optimizers]

    def check_wrapped(self, module: pl.LightningModule) -> None:
        """Listen for gradients: the engine moves them away as soon as they are there."""
        self._arrived.clear()
        self._hooks = {
            name: parameter.register_hook(partial(self._note, name))  # type: ignore[no-untyped-call]
            for name, parameter in trainable_of(module).items()
        }

    def _note(self, name: str, gradient: Tensor) -> None:
        self._arrived.add(name)

    def parameter_names(self, module: nn.Module) -> list[list[list[str]]]:
        """Names of the parameters of each group of the optimizer that ``configure_optimizers`` returned."""
        return self._names

    def class_names(self) -> list[str]:
        """Class of the optimizer that ``configure_optimizers`` returned."""
        return self._classes

    def without_gradient(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> list[str]:
        """Without gradient in every process until now."""
        self.still_silent(parameters)
        found: list[set[str]] = [set()] * self.strategy.world_size
        torch.distributed.all_gather_object(found, parameters.keys() - self._arrived)
        return sorted(set.intersection(*found))

    def still_silent(self, parameters: Mapping[str, nn.Parameter]) -> set[str]:
        """Names of those whose gradient has not arrived in this process; the others are listened to no more."""
        for name in [name for name in self._hooks if name in self._arrived or name not in parameters]:
            self._hooks.pop(name).remove()
        return parameters.keys() - self._arrived

    def optimizer_state(self, rules: CheckpointRules, original: Any, optimizer: Any) -> dict[str, Any]:
        """Gather the state of every parameter, and store it by position as a single device does."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self._inner()
        parameters = self._trained()
        if inner.state:
            private.link_partition_states(self._zero())  # DeepSpeed does after the step of the first group only
        flat: dict[str, Any] = next((state for state in inner.state.values() if state), {})
        tensors = [key for key, value in flat.items() if isinstance(value, Tensor) and value.ndim]
        rest = [key for key in flat if key not in tensors]
        states = {
            i: self._kept((key, safe_get_full_optimizer_state(parameters[name], key)) for key in tensors)
            | {key: _copy(flat[key]) for key in rest}  # one counter for all would count every parameter's step
            for i, name in enumerate(flat_names(self._names[0]) if flat else ())
            if name in parameters  # the engine leaves frozen ones beside the base alone
        }
        positions = iter(range(len(flat_names(self._names[0]))))
        groups = [
            {**_options(group), "params": [next(positions) for _ in names]}
            for group, names in zip(inner.param_groups, self._names[0], strict=True)
        ]
        return {"state": states, "param_groups": groups}

    def load_optimizers(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Make room for the states, then set every parameter's part."""
        (state,) = states
        inner = self._inner()
        for group, saved in zip(inner.param_groups, state["param_groups"], strict=True):
            group.update(_options(saved))
        if not state["state"]:
            return
        parameters, names = self._trained(), flat_names(self._names[0])
        example = state["state"][next(iter(state["state"]))]
        self._make_room(inner, example)
        for position, values in state["state"].items():
            if names[position] not in parameters:
                continue
            for key in (key for key, value in values.items() if isinstance(value, Tensor) and value.ndim):
                self._set(parameters[names[position]], values[key], key)

    def _make_room(self, inner: Any, example: Mapping[str, Any]) -> None:
        groups = chain.from_iterable(group["params"] for group in inner.param_groups)
        for partition in getattr(self._zero(), "fp32_partitioned_groups_flat", groups):  # ZeRO-3 has more than groups
            inner.state[partition] = {
                key: torch.zeros_like(partition) if isinstance(value, Tensor) and value.ndim else _copy(value)
                for key, value in example.items()
            }
        private.link_partition_states(self._zero())

    def groups_of(self, parameters: Sequence[nn.Parameter], module: nn.Module) -> list[dict[str, Any]]:
        """The groups that held them before the engine put partitions in their place."""
        own = {id(parameter) for parameter in parameters}
        wanted = {name for name, parameter in trainable_of(module).items() if id(parameter) in own}
        pairs = zip(self._inner().param_groups, self._names[0], strict=True)
        return [group for group, names in pairs if wanted.intersection(names)]

    def clip(self, trainer: pl.Trainer, optimizer: Any, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Clip what the engine has gathered for its step; each process has parts of it."""
        engine: Any = self.strategy.model
        if not engine.is_gradient_accumulation_boundary():
            return
        parts = [private.partition_gradient(parameter) for parameter in parameters]
        total = torch.zeros((), device=self.strategy.root_device)
        for part in (part for part in parts if part is not None):
            total += part.float().square().sum()
        torch.distributed.all_reduce(total)
        factor = norm * float(self._zero().loss_scale) / (float(total.sqrt()) + 1e-6)
        for part in (part for part in parts if part is not None and factor < 1):
            part.mul_(factor)

    def at_boundary(self) -> bool:
        """Whether the engine's present step is one of its optimizer."""
        return bool(self.strategy.model.is_gradient_accumulation_boundary())  # type: ignore[union-attr,operator]

    def watch_gradients(self, named: Named) -> None:
        """Gather them right before the engine steps: afterwards they are gone."""
        parameters = [parameter for _, parameter in named]
        private.replace_method(self.strategy.model, "step", partial(self._step, parameters))

    def gradients(self, named: Named) -> Iterator[tuple[str, Tensor | None]]:
        """Those of the last step."""
        return ((name, self._gradients.get(id(parameter))) for name, parameter in named)

    def _step(self, parameters: list[Tensor], original: Any, *args: Any, **kwargs: Any) -> None:
        from deepspeed.utils import safe_get_full_grad

        engine: Any = self.strategy.model
        if not engine.is_gradient_accumulation_boundary():
            original(*args, **kwargs)
            return
        found = {id(parameter): safe_get_full_grad(parameter) for parameter in parameters}
        factor = 1 / float(self._zero().loss_scale)
        original(*args, **kwargs)
        if limit := engine.gradient_clipping():  # the engine clips in its step
            factor *= min(1.0, limit / (float(engine.get_global_grad_norm()) + 1e-6))
        self._gradients = {key: gradient.detach() * factor for key, gradient in found.items() if gradient is not None}

    # --- gathering ------------------------------------------------------------------------------------

    def whole(self, named: Named) -> Iterator[tuple[str, Tensor]]:
        """Master copies of what trains, and of other partitioned tensors their values, one after the other."""
        from deepspeed.utils import safe_get_full_fp32_param

        trains = self._is_training()
        for name, tensor in named:
            full = safe_get_full_fp32_param(tensor) if trains and tensor.requires_grad else None
            if full is not None:
                yield name, full.detach()
                continue
            with _gathered(tensor, None):
                yield name, tensor.detach().clone() if hasattr(tensor, "ds_id") else tensor.detach()

    def fill(self, named: Named, values: Mapping[str, Tensor]) -> None:
        """Copy whole values into the parameters, and into the master copies of those that train."""
        trains = self._is_training()
        for name, tensor in ((name, tensor) for name, tensor in named if name in values):
            with torch.no_grad(), _gathered(tensor, 0):
                tensor.copy_(values[name])
            if trains and tensor.requires_grad:
                self._set(tensor, values[name])

    def shaped(self, named: Named) -> dict[str, Tensor]:
        """Tensors without values, in the shapes from before the partitioning."""
        return {name: self._meta.get(name, tensor) for name, tensor in named}

    def _set(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        from deepspeed import utils

        value = value.to(parameter.device, torch.float32).contiguous()
        if not hasattr(parameter, "ds_id"):
            parameter.set_full_hp_param(value, key)
            return
        part = utils.safe_get_local_fp32_param(parameter)
        padded = torch.zeros(part.numel() * self.strategy.world_size, device=value.device)
        padded[: value.numel()] = value.flatten()
        own = padded.view(self.strategy.world_size, -1)[self.strategy.global_rank]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, own)
        else:
            utils.safe_set_local_optimizer_state(parameter, own, key)

    # --- the checkpoint -------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        rules: CheckpointRules,
        original: Any,
        checkpoint: dict[str, Any],
        filepath: Any,
        storage_options: Any = None,
    ) -> None:
        """Add what the engine counts."""
        if self._is_training():
            counters = {name: int(getattr(self.strategy.model, name)) for name in _COUNTERS}
            scaler = getattr(self._zero(), "loss_scaler", None)
            scale = {k: v for k, v in vars(scaler).items() if isinstance(v, bool | int | float)} if scaler else {}
            checkpoint[_KEY] = {"counters": counters, "loss_scaler": scale}
        super().save_checkpoint(rules, original, checkpoint, filepath, storage_options)

    def load_model_state_dict(
        self, rules: CheckpointRules, original: Any, checkpoint: dict[str, Any], strict: bool = True
    ) -> None:
        """Copy the delta in, load the optimizer, and set what the engine counts."""
        super().load_model_state_dict(rules, original, checkpoint, strict)
        if self._is_training() and _KEY in checkpoint:
            for name, value in checkpoint[_KEY]["counters"].items():
                setattr(self.strategy.model, name, value)
            if (scaler := getattr(self._zero(), "loss_scaler", None)) is not None:
                vars(scaler).update(checkpoint[_KEY]["loss_scaler"])

    # --- details --------------------------------------------------------------------------------------

    def _is_training(self) -> bool:
        module = self.strategy.lightning_module
        return module is not None and module.trainer.state.fn == TrainerFn.FITTING and self.strategy.model is not module

    def _zero(self) -> Any:
        return self.strategy.optimizers[0]

    def _inner(self) -> Any:
        return getattr(self._zero(), "optimizer", self._zero())

    def _trained(self) -> dict[str, nn.Parameter]:
        module = self.strategy.lightning_module
        assert module is not None
        return trainable_of(module)


@contextmanager
def _whole_shapes(root: nn.Module) -> Iterator[None]:
    """Put parameters on the meta device in the place of partitioned ones; a tied one stays tied."""
    stand_ins: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, Any]] = []
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_partition(parameter):
                replaced.append((module, name, parameter))
    for _, _, p in replaced:
        stand_ins.setdefault(id(p), nn.Parameter(without_values(p), requires_grad=p.requires_grad))
    try:
        for module, name, parameter in replaced:
            module._parameters[name] = stand_ins[id(parameter)]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def _gathered(tensor: Any, modifier: int | None) -> Any:
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=modifier)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
