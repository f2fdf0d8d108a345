"""Every engine that shards, on two CPU processes: the modules it wants, and the strategy that runs there."""

from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from models import Net, cosine
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import _init_utils

PLUS = {"lora_plus_ratio": 4.0}  # two groups of parameters with learning rates of their own


def shard(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for part in (net.fc1, net.fc2):
        fully_shard(part, mesh=mesh)
    fully_shard(net, mesh=mesh)


def sharding(base: type, variant: str) -> type:
    """A module for FSDP2.

    Args:
        base: what it does.
        variant: ``""``: the model is built before the delta comes, and sharded after it. ``"early"``: it is
            built and sharded before. ``"meta"``: it is built without values, and gets them in
            ``configure_model``. ``"late"``: likewise, but the Trainer makes room for them.
    """

    class Sharding(base):
        def __init__(self, dropout: float) -> None:
            super().__init__(None, cosine)
            self.rate = dropout
            if variant != "early":
                with torch.device("meta" if variant in ("meta", "late") else "cpu"):
                    self.net = Net(dropout=dropout)

        def configure_model(self) -> None:
            if variant == "early" and not hasattr(self, "net"):
                self.net = Net(dropout=self.rate)
            if any(hasattr(p, "full_tensor") for p in self.net.parameters()):
                return
            shard(self.net, self.device_mesh["data_parallel"])
            if variant == "meta":
                self.net.to_empty(device="cpu")
                fill(self.net, Net().state_dict())

        def on_fit_start(self) -> None:
            if variant == "late":
                fill(self.net, Net().state_dict())

    return Sharding


def fill(net: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """What a user does who loads the base after the model was sharded."""
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        for name, value in values.items():
            own = net.get_parameter(name)
            own.copy_(distribute_tensor(value, own.device_mesh, own.placements))


class CPUFSDP(FSDPStrategy):
    """FSDP1 on the CPU: Lightning passes the index of a CUDA device, which here is none."""

    def setup_environment(self) -> None:
        shape = self.kwargs.pop("device_mesh", None)  # Lightning makes a mesh of CUDA devices of it
        super().setup_environment()
        if shape is not None:
            self.kwargs["device_mesh"] = init_device_mesh("cpu", shape)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FSDP(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class Sent:
    """``sync_module_states=True`` on the CPU: without FSDP1's check that values are on GPUs before they are sent."""

    def __bool__(self) -> bool:
        _init_utils._check_module_states_for_sync_module_states = lambda states: None
        return True


class CPUDeepSpeed(DeepSpeedStrategy):
    """ZeRO on the CPU: without the check for CUDA, and on a device with an index."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def strategy_of(engine: str, **options: Any) -> Strategy | str:
    """The strategy of an engine."""
    if engine == "ddp":
        return engine
    if engine.startswith("fsdp2"):
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    if engine.startswith("fsdp"):
        return CPUFSDP(process_group_backend="gloo", **options)
    small = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}  # the defaults reserve gigabytes
    return CPUDeepSpeed(stage=int(engine[4]), process_group_backend="gloo", **small)


def make(engine: str, base: type, dropout: float) -> tuple[Any, Strategy | str]:
    """The module and strategy of an engine and its variant (``engine-variant``)."""
    name, _, variant = engine.partition("-")
    strategy = strategy_of(name, **({"auto_wrap_policy": {nn.Linear}} if variant == "layers" else {}))
    if name == "fsdp2":
        return sharding(base, variant)(dropout), strategy
    return base(Net(dropout=dropout), cosine), strategy


def trained_parameters(trainer: Any, engine: str) -> list[int]:
    """Numbers that this process holds, and steps, of each parameter (or partition) that trains."""
    if engine.startswith("zero"):
        (zero,) = trainer.optimizers
        groups = [p for group in zero.optimizer.param_groups for p in group["params"]]
        return [p.numel() for p in getattr(zero, "fp32_partitioned_groups_flat", groups)]
    parameters = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
    return [(p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters]
