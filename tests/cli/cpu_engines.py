"""What the shipped configurations of engines need where there is no GPU; imported as the user's module."""

from engines import CPUFSDP, CPUDeepSpeed
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry
from user_code import Net

FSDPStrategy._registered_strategies.clear()  # the names that the Trainer refuses without CUDA
StrategyRegistry.register("fsdp", CPUFSDP, override=True)
for stage in (1, 2, 3):
    StrategyRegistry.register(f"deepspeed_stage_{stage}", CPUDeepSpeed, override=True, stage=stage)


class ShardedNet(Net):
    """What FSDP2 asks of a LightningModule."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not any(hasattr(parameter, "full_tensor") for parameter in self.parameters()):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.head, mesh=self.device_mesh["data_parallel"])
