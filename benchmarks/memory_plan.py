"""The memory plan: on paper for large Llamas, and beside what was measured where it can be measured.

    python benchmarks/memory_plan.py --write              # the tables of docs/memory.md for 8B, 70B and 405B
    python benchmarks/memory_plan.py --check              # planned against measured peaks, on this CPU
    python benchmarks/memory_plan.py --check --only bert  # of one model
    python benchmarks/memory_plan.py --gpu                # the same on one GPU, by its allocator

On the CPU the peak is that of the resident memory of a process of its own (two for the engines that shard),
above what it held after a first fit of a tiny model, over the second and third step. On a GPU it is
``torch.cuda.max_memory_allocated`` over the same steps.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "engine"), str(ROOT / "benchmarks")]

from lightning_pet import (  # noqa: E402
    AdapterCallback,
    BitFitCallback,
    DiffPruningCallback,
    FullFineTuningCallback,
    LoRACallback,
    PETCallback,
)
from lightning_pet.report.memory import MemoryPlan, plan_memory  # noqa: E402
from lightning_pet.report.memory_engines import Engine  # noqa: E402
from tests.launch import launch  # noqa: E402
from train_step import resident  # noqa: E402

BUCKET = 1_000_000  # of ZeRO: room that is never written to is no resident memory
STEPS = 3

METHODS: dict[str, Callable[[], PETCallback]] = {
    "LoRA, all linear": lambda: LoRACallback(target_modules="all-linear", verbose=False),
    "Houlsby": lambda: AdapterCallback(verbose=False),
    "BitFit": lambda: BitFitCallback(add_missing=True, verbose=False),
    "diff pruning": lambda: DiffPruningCallback(verbose=False),
    "full fine-tuning": lambda: FullFineTuningCallback(verbose=False),
}
ENGINES = ("single", "ddp", "fsdp2", "zero3")
MODELS = ("bert", "llama", "t5")


def build(name: str, tiny: bool = False) -> nn.Module:
    """A model of 60 to 110 million parameters with random weights, or a tiny one of the same kind."""
    width, layers, words = (32, 2, 100) if tiny else (512, 6, 32_128) if name == "t5" else (768, 12, 32_128)
    heads, inner = max(width // 64, 2), 4 * width
    common = {"vocab_size": words, "num_attention_heads": heads, "hidden_size": width, "num_hidden_layers": layers}
    if name == "bert":
        bert = transformers.BertConfig(**common, intermediate_size=inner)
        return transformers.BertForSequenceClassification(bert).train()
    if name == "llama":
        llama = transformers.LlamaConfig(
            **common, intermediate_size=inner * 2 // 3, use_cache=False, tie_word_embeddings=True
        )
        return transformers.LlamaForCausalLM(llama).train()
    t5 = transformers.T5Config(
        vocab_size=words,
        d_model=width,
        d_kv=width // heads,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(t5).train()


def batch_for(name: str, tiny: bool = False) -> dict[str, Tensor]:
    """Token ids and labels."""
    ids = torch.arange(8 if tiny else 512).remainder(90).view(2 if tiny else 4, -1) + 5
    return {"input_ids": ids, "labels": ids[:, 0] * 0 if name == "bert" else ids}


class Module(pl.LightningModule):
    """The least that a Trainer needs, and what FSDP2 asks for."""

    def __init__(self, model: nn.Module, shard: bool = False) -> None:
        super().__init__()
        self.model = model
        self.shard = shard

    def configure_model(self) -> None:
        """Shard the layers, then the rest."""
        if not self.shard or any(hasattr(parameter, "full_tensor") for parameter in self.parameters()):
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        numbered = {path: m for path, m in self.model.named_modules() if path.rpartition(".")[2].isdigit()}
        for path, layer in numbered.items():
            if not any(part.isdigit() for part in path.split(".")[:-1]):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own loss."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, parameter by parameter on the CPU."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Peak(pl.Callback):
    """The highest use of memory from the second step on."""

    def __init__(self) -> None:
        self.bytes = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        """Forget the first step, which makes the optimizer's state."""
        if i == 1 and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif i == 1:
            Path("/proc/self/clear_refs").write_text("5")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Read it."""
        cuda = pl_module.device.type == "cuda"
        self.bytes = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") * 2**20


def strategy_of(engine: str) -> Any:
    """The strategy of an engine on two processes."""
    if engine == "single":
        return "auto"
    if engine == "zero3":
        from engines import CPUDeepSpeed

        return CPUDeepSpeed(stage=3, process_group_backend="gloo", reduce_bucket_size=BUCKET)
    from engines import strategy_of as of_tests

    return of_tests(engine)


def fit(name: str, method: str, engine: str, tiny: bool, accelerator: str = "cpu") -> float:
    """Train for three steps; return the peak of the last two."""
    peak = Peak()
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1 if engine == "single" else 2,
        strategy=strategy_of(engine),
        callbacks=[METHODS[method](), peak],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Module(build(name, tiny), engine == "fsdp2")
    trainer.fit(module, DataLoader([batch_for(name, tiny)] * STEPS, batch_size=None))
    return peak.bytes


def measure_here(name: str, method: str, engine: str, accelerator: str = "cpu") -> float:
    """Peak bytes of this process, above what it held after a tiny fit of the same kind."""
    fit(name, method, engine, tiny=True, accelerator=accelerator)
    gc.collect()
    if accelerator == "cpu":
        before = resident("VmRSS") * 2**20
    else:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    return fit(name, method, engine, tiny=False, accelerator=accelerator) - before


def measure(name: str, method: str, engine: str) -> float:
    """The same in a process of its own, or in two: the mean of both."""
    argv = [__file__, "--measure", name, method, engine]
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    if engine == "single":
        done = subprocess.run([sys.executable, *argv], env=os.environ | env, capture_output=True, text=True)
        codes, outputs = [done.returncode], [done.stdout + done.stderr]
    else:
        codes, outputs = launch(argv, timeout=900, env=env)
    if any(codes):
        raise RuntimeError(outputs[0][-2000:])
    peaks = [float(line.split()[1]) for out in outputs for line in out.splitlines() if line.startswith("PEAK ")]
    return sum(peaks) / len(peaks)


def planned(name: str, method: str, engine: str, gpu: bool = False) -> MemoryPlan:
    """The plan of the same run, without any weights."""
    with torch.device("meta"):
        model = build(name)
    of = Engine(engine, 1 if engine == "single" else 2, reduce_bucket_size=BUCKET)  # type: ignore[arg-type]
    return plan_memory(Module(model), [METHODS[method]()], batch_for(name), strategy=of, gpu=gpu)


@dataclass(frozen=True)
class Checked:
    """One line of the comparison, in MiB."""

    model: str
    method: str
    engine: str
    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        """Planned over measured."""
        return self.planned / self.measured


def check(models: list[str], methods: list[str], engines: list[str]) -> list[Checked]:
    """Plan and measure every combination."""
    rows = []
    for name in models:
        for method in methods:
            for engine in engines:
                plan = planned(name, method, engine)
                total = plan.total + plan.inventory.originals  # host memory is the same memory here
                try:
                    measured = measure(name, method, engine)
                except RuntimeError as error:
                    print(f"# {name}, {method}, {engine}: {str(error).splitlines()[-1]}", flush=True)
                    continue
                rows.append(Checked(name, method, engine, total / 2**20, measured / 2**20))
                print(f"{rows[-1]} ratio {rows[-1].ratio:.3f}", flush=True)
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--methods", default=",".join(METHODS).replace(", ", "; "))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(f"PEAK {measure_here(*args.measure)}", flush=True)
        return
    if args.check:
        methods = [method.replace("; ", ", ") for method in args.methods.split(",")]
        check([args.only] if args.only else list(MODELS), methods, args.engines.split(","))


if __name__ == "__main__":
    main()
