"""What every method does on one engine: one process of the campaign of ``benchmarks/strategies.py``.

``python method_runs.py FOLDER ENGINE [METHOD …]`` runs as one of two processes, started by ``launch``, and prints
a line of JSON per method. ``FOLDER/one`` holds what :func:`observe` wrote for the engine ``one``, a single process.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import lightning as L  # noqa: E402
import torch  # noqa: E402
from engines import strategy_of  # noqa: E402
from models import every_step, trainer  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler  # noqa: E402

import lightning_pet as pet  # noqa: E402
from tests.methods import zoo  # noqa: E402

STEPS, BATCH, RESUMED = 4, 4, 2
AFTER = "after.ckpt"
WRONG = "wrong"  # name of the run whose checkpoint no method may take
Callbacks = list[pet.PETCallback]


def adapters(folder: Path) -> list[str]:
    """Files of two adapters of earlier tasks, the second of which shares a tensor between its places."""
    from tests.methods.battery import perturb

    sizes: dict[str, Any] = {"bottleneck_size": 4, "modules_to_save": []}
    made = [pet.AdapterCallback(name="first", **sizes), pet.CompacterCallback(name="second", phm_dim=2, **sizes)]
    for method in made:
        net = zoo.bert()[0]
        perturb(pet.apply(net, [method]))
        pet.save_delta(net, folder / f"{method.name}.pet.safetensors")
    return [str(folder / f"{method.name}.pet.safetensors") for method in made]


METHODS: dict[str, Callable[[Path], Callbacks]] = {
    "LoRA": lambda _: [pet.LoRACallback(r=2)],
    "LoRA+": lambda _: [pet.LoRACallback(r=2, lora_plus_ratio=4.0)],
    "LoRA, EVA": lambda _: [pet.LoRACallback(r=2, init="eva")],
    "LoRA, PiSSA": lambda _: [pet.LoRACallback(r=2, init="pissa")],
    "DoRA": lambda _: [pet.LoRACallback(r=2, use_dora=True)],
    "AdaLoRA": lambda _: [pet.AdaLoRACallback(target_r=2, init_r=4, tinit=1, tfinal=1)],
    "Adapter": lambda _: [pet.AdapterCallback(bottleneck_size=4)],
    "Adapter, parallel": lambda _: [pet.AdapterCallback(bottleneck_size=4, placement="parallel")],
    "Adapter, robust drop": lambda _: [pet.AdapterCallback(bottleneck_size=4, robust_drop=True)],
    "AdapterBias": lambda _: [pet.AdapterBiasCallback()],
    "Adapter fusion": lambda folder: [pet.AdapterFusionCallback(adapters(folder), temperature=9.0)],
    "Compacter": lambda _: [pet.CompacterCallback(bottleneck_size=4, phm_dim=2)],
    "HiRA": lambda _: [pet.HiRACallback(r=2)],
    "HRA": lambda _: [pet.HRACallback(r=4)],
    "IA3": lambda _: [pet.IA3Callback()],
    "MiSS": lambda _: [pet.MiSSCallback(r=4)],
    "SHiRA": lambda _: [pet.SHiRACallback(r=2)],
    "LoHa": lambda _: [pet.LoHaCallback(r=2)],
    "LoKr": lambda _: [pet.LoKrCallback(r=1, decompose_both=True)],
    "OFT": lambda _: [pet.OFTCallback(oft_block_size=4)],
    "VeRA": lambda _: [pet.VeRACallback(r=4)],
    "Prefix tuning": lambda _: [pet.PrefixTuningCallback(length=3, projection_size=4)],
    "Prefix tuning, no network": lambda _: [pet.PrefixTuningCallback(length=3, projection=False)],
    "Prompt tuning": lambda _: [pet.PromptTuningCallback(length=3)],
    "Prompt tuning from words": lambda _: [pet.PromptTuningCallback(length=3, init="vocabulary")],
    "Trained tokens": lambda _: [pet.TrainableTokensCallback(list(range(3, 40)))],
    "AutoPrompt": lambda _: [pet.AutoPromptCallback(candidates=4, accumulation=1)],
    "ReFT": lambda _: [pet.ReFTCallback(r=2, suffix_positions=1, dropout=0.0)],
    "BitFit": lambda _: [pet.BitFitCallback()],
    "LN tuning": lambda _: [pet.LNTuningCallback()],
    "Layer freezing": lambda _: [pet.LayerFreezingCallback(train_last=1)],
    "Gradual unfreezing": lambda _: [pet.LayerFreezingCallback(unfreeze_every=1, unfreeze_interval="step")],
    "Diff pruning": lambda _: [
        pet.DiffPruningCallback(
            density=0.1, stages=(0.75, 0.25), l0_weight=0.01, alpha_init=1.0, alpha_clip=1e-3, plot=False
        )
    ],
    "Intrinsic dimension": lambda _: [pet.IntrinsicDimensionCallback(d=50)],
    "Full fine-tuning": lambda _: [pet.FullFineTuningCallback()],
    "MAM (prefix and parallel adapter)": lambda _: [
        pet.PrefixTuningCallback(length=3, projection_size=4),
        pet.AdapterCallback(bottleneck_size=4, placement="parallel", scale=2.0, init="lora"),
    ],
    "UniPELT (prefix, adapter and LoRA, gated)": lambda _: [
        pet.PrefixTuningCallback(length=3, projection_size=4, use_gating=True),
        pet.AdapterCallback(bottleneck_size=4, placement="pfeiffer", use_gating=True),
        pet.LoRACallback(r=2, use_gating=True),
    ],
    "LoRA with BitFit": lambda _: [pet.LoRACallback(r=2), pet.BitFitCallback()],
}


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, adam: bool) -> None:
        super().__init__()
        self.net, self.adam = net, adam
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.net(**batch)

    def on_train_batch_end(self, result: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Note the loss of the step: a search evaluates ``training_step`` more often."""
        self.losses.append(self.trainer.strategy.reduce(result["loss"].detach().clone(), reduce_op="mean").item())

    def configure_optimizers(self) -> Any:
        if self.adam:
            return torch.optim.AdamW(self.parameters(), lr=0.01)
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


def build(dropout: float = 0.0) -> nn.Module:
    net = zoo.bert()[0].train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return net


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


class Runs:
    """The runs of one method on one engine; they share nothing but files."""

    def __init__(self, folder: Path, engine: str, method: str) -> None:
        self.single = folder / "one" / method
        self.folder, self.engine, self.method = folder / engine / method, engine, method
        alone = engine == "one"
        self.size, self.rank = (1, 0) if alone else (int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
        self.own = self.folder / f"process-{self.rank}"
        self.own.mkdir(parents=True, exist_ok=True)

    def fit(self, name: str, *, path: Path | None = None, noisy: bool = False, seed: int = 5) -> Classifier:
        """Train with a checkpoint of every step.

        Args:
            name: folder for the checkpoints.
            path: checkpoint to resume.
            noisy: with dropout, whose numbers every process draws for itself, and AdamW. Otherwise the processes
                do together what one does.
            seed: of the delta's start values and the dropout.
        """
        module = (Sharding if self.engine == "fsdp2" else Classifier)(build(0.2 if noisy else 0.0), noisy)
        torch.manual_seed(seed + (self.rank if noisy else 0))
        callbacks = [pet.BitFitCallback(name=WRONG)] if name == WRONG else METHODS[self.method](self.own)
        for callback in callbacks:
            callback.verbose = False
        fitted = trainer(
            *callbacks,
            every_step(self.folder / name),
            strategy="auto" if self.engine == "one" else strategy_of(self.engine),
            devices=self.size,
            use_distributed_sampler=False,
            max_epochs=1,
            limit_val_batches=1,
        )
        fitted.fit(module, loader(self.size, self.rank), loader(self.size, self.rank), ckpt_path=path)
        fitted.save_checkpoint(self.folder / name / AFTER)  # some engines leave a validation with other parameters
        return module

    def plain(self) -> list[float]:
        """Losses of four steps; one process keeps what its model gives in the end, and a wrong checkpoint."""
        module = self.fit("plain")
        if self.engine == "one":
            torch.save(outputs(module.net), self.single / "outputs.pt")
            self.fit(WRONG)
        return module.losses

    def noisy(self) -> list[float]:
        """Losses of an uninterrupted run."""
        return self.fit("noisy", noisy=True).losses

    def again(self) -> list[float]:
        """Losses of its second half, resumed with another seed."""
        return self.fit("again", noisy=True, path=step(self.folder / "noisy", RESUMED), seed=99).losses

    def taken_over(self) -> list[float]:
        """Losses of the second half of what one process began."""
        return self.fit("taken_over", path=step(self.single / "plain", RESUMED), seed=99).losses

    def refused(self) -> str:
        """Code of the error about a checkpoint of another method."""
        try:
            self.fit("refused", path=step(self.single / WRONG, RESUMED))
        except pet.PETError as error:
            return str(getattr(error, "code", type(error).__name__))
        return ""


def step(folder: Path, number: int) -> Path:
    return folder / f"step={number}.ckpt"


def outputs(net: nn.Module) -> Tensor:
    """What an adapted model gives for the training data."""
    with torch.no_grad():
        return net.eval()(input_ids=torch.stack([row["input_ids"] for row in rows()])).logits


def observe(folder: Path, engine: str, method: str) -> dict[str, Any]:
    """What this process sees of a method on an engine: findings, or why the engine is refused."""
    runs, found = Runs(folder, engine, method), {"method": method}
    for observation in ("plain", "noisy", "again", "taken_over", "refused"):
        try:
            found[observation] = getattr(runs, observation)()
        except pet.UnsupportedStrategyError as error:
            return {"method": method, "unsupported": str(error)}
        except Exception as error:
            found.setdefault("errors", {})[observation] = f"{type(error).__name__}: {error}"
    return found


def silence() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    silence()
    if "TRY_ALL" in os.environ:  # also what a method says that it cannot
        pet.PETCallback.shards = True
    for chosen in sys.argv[3:] or METHODS:
        print("FOUND " + json.dumps(observe(Path(sys.argv[1]), sys.argv[2], chosen)), flush=True)
