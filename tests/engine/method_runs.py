"""One process of a campaign: every method on one engine, four steps and a resume; a line of JSON per method.

``python method_runs.py FOLDER ENGINE [METHOD …]``, started by ``launch``; the engine ``one`` is a single process.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import lightning as L  # noqa: E402
import torch  # noqa: E402
from ddp_runs import trainer  # noqa: E402  # it silences warnings and logs, too
from engines import strategy_of  # noqa: E402
from models import every_step  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler  # noqa: E402

import lightning_pet as pet  # noqa: E402
from tests.methods import zoo  # noqa: E402

STEPS, BATCH, RESUMED = 4, 4, 2
QUIET: dict[str, Any] = {"verbose": False}
METHODS: dict[str, Callable[[], pet.PETCallback]] = {
    "LoRA": lambda: pet.LoRACallback(r=2, **QUIET),
    "DoRA": lambda: pet.LoRACallback(r=2, use_dora=True, **QUIET),
    "AdaLoRA": lambda: pet.AdaLoRACallback(**QUIET),
    "Adapter": lambda: pet.AdapterCallback(bottleneck_size=4, **QUIET),
    "Adapter, parallel": lambda: pet.AdapterCallback(bottleneck_size=4, placement="parallel", **QUIET),
    "AdapterBias": lambda: pet.AdapterBiasCallback(**QUIET),
    "Compacter": lambda: pet.CompacterCallback(bottleneck_size=4, phm_dim=2, **QUIET),
    "IA3": lambda: pet.IA3Callback(**QUIET),
    "Prefix tuning": lambda: pet.PrefixTuningCallback(length=3, projection_size=4, **QUIET),
    "Prompt tuning": lambda: pet.PromptTuningCallback(length=3, **QUIET),
    "BitFit": lambda: pet.BitFitCallback(**QUIET),
    "Layer freezing": lambda: pet.LayerFreezingCallback(**QUIET),
    "Diff pruning": lambda: pet.DiffPruningCallback(
        density=0.1, stages=(0.75, 0.25), l0_weight=0.01, alpha_init=1.0, alpha_clip=1e-3, plot=False, **QUIET
    ),
    "Intrinsic dimension": lambda: pet.IntrinsicDimensionCallback(d=50, **QUIET),
    "Full fine-tuning": lambda: pet.FullFineTuningCallback(**QUIET),
}


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.net(**batch).loss
        self.losses.append(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean").item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Sharding(Classifier):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if any(hasattr(p, "full_tensor") for p in self.net.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def build(engine: str) -> Classifier:
    net = zoo.bert()[0].train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return (Sharding if engine == "fsdp2" else Classifier)(net)


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1, 50, (6,), generator=generator),
            "labels": torch.randint(0, 3, (1,), generator=generator)[0],
        }
        for _ in range(STEPS * BATCH)
    ]


def loader(world_size: int, rank: int) -> DataLoader:
    """Every global batch is that of one process."""
    sampler = DistributedSampler(rows(), world_size, rank, shuffle=False)
    return DataLoader(rows(), batch_size=BATCH // world_size, sampler=sampler)


def run(folder: Path, engine: str, name: str, path: Path | None = None) -> list[float]:
    size, rank = (1, 0) if engine == "one" else (int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    module = build(engine)
    torch.manual_seed(5)
    fitted = trainer(
        METHODS[name](),
        every_step(folder),
        strategy="auto" if engine == "one" else strategy_of(engine),
        devices=size,
        use_distributed_sampler=False,
        max_epochs=1,
    )
    fitted.fit(module, loader(size, rank), ckpt_path=path)
    return module.losses


def main(folder: Path, engine: str, names: list[str]) -> None:
    for name in names or METHODS:
        here = folder / engine / name
        found: dict[str, Any] = {"method": name}
        try:
            found["losses"] = run(here, engine, name)
            found["resumed"] = run(here / "again", engine, name, here / f"step={RESUMED}.ckpt")
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
        print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    if "TRY_ALL" in os.environ:  # also what a method says that it cannot
        pet.PETCallback.shards = True
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
