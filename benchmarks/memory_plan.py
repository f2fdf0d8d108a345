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
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "engine"), str(ROOT / "benchmarks")]

from measuring import GIVES_BACK, resident  # noqa: E402

from lightning_pet import (  # noqa: E402
    AdapterCallback,
    BitFitCallback,
    DiffPruningCallback,
    FullFineTuningCallback,
    LoRACallback,
    PETCallback,
    PrefixTuningCallback,
)
from lightning_pet.report.memory.engines import Engine  # noqa: E402
from lightning_pet.report.memory.planner import MemoryPlan, plan_memory  # noqa: E402
from lightning_pet.report.memory.view import LABELS  # noqa: E402
from tests.launch import launch  # noqa: E402

PAGE = ROOT / "docs" / "memory.md"
BUCKET = 1_000_000  # of ZeRO: room that is never written to is no resident memory
STEPS = 3

METHODS: dict[str, Callable[[], PETCallback]] = {
    "LoRA, all linear": lambda: LoRACallback(target_modules="all-linear", verbose=False),
    "Houlsby": lambda: AdapterCallback(verbose=False),
    "BitFit": lambda: BitFitCallback(add_missing=True, verbose=False),
    "diff pruning": lambda: DiffPruningCallback(verbose=False),
    "full fine-tuning": lambda: FullFineTuningCallback(verbose=False),
}
ENGINES = ("single", "ddp", "fsdp", "fsdp2", "zero3")
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


def layers_of(model: nn.Module) -> list[nn.Module]:
    """What is numbered, and not within anything numbered."""
    numbered = {path: m for path, m in model.named_modules() if path.rpartition(".")[2].isdigit()}
    return [m for path, m in numbered.items() if not any(part.isdigit() for part in path.split(".")[:-1])]


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
        for layer in layers_of(self.model):
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

        own = {"reduce_bucket_size": BUCKET, "logging_batch_size_per_gpu": 1}
        return CPUDeepSpeed(stage=3, process_group_backend="gloo", **own)
    from engines import strategy_of as of_tests

    layers = {type(layer) for name in MODELS for layer in layers_of(build(name, tiny=True))}
    return of_tests(engine, **({"auto_wrap_policy": layers} if engine == "fsdp" else {}))


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
    if engine == "single":
        done = subprocess.run([sys.executable, *argv], env=os.environ | GIVES_BACK, capture_output=True, text=True)
        codes, outputs = [done.returncode], [done.stdout + done.stderr]
    else:
        codes, outputs = launch(argv, timeout=900, env=GIVES_BACK)
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


# --- on paper -------------------------------------------------------------------------------------

LLAMAS = {  # published hyper-parameters of Llama 3.1: width, inner width, layers, heads
    "8B": (4096, 14_336, 32, 32),
    "70B": (8192, 28_672, 80, 64),
    "405B": (16_384, 53_248, 126, 128),
}
SIZES = {"8B": (8,), "70B": (8, 64), "405B": (64, 128)}
PAPER: dict[str, Callable[[], PETCallback]] = {
    "full fine-tuning": METHODS["full fine-tuning"],
    "LoRA q, v": lambda: LoRACallback(verbose=False),
    "LoRA, all linear": METHODS["LoRA, all linear"],
    "Houlsby": METHODS["Houlsby"],
    "prefix tuning": lambda: PrefixTuningCallback(verbose=False),
    "diff pruning": METHODS["diff pruning"],
    "BitFit": METHODS["BitFit"],
}
SHARDING = ("ddp", "zero1", "zero2", "fsdp", "fsdp2", "zero3")
TOKENS = 4096


def llama(size: str) -> nn.Module:
    """A published shape on the meta device, with gradient checkpointing."""
    width, inner, layers, heads = LLAMAS[size]
    config = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def paper(size: str, method: str) -> MemoryPlan:
    """One sequence per process, in bfloat16."""
    ids = torch.empty((1, TOKENS), dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "labels": ids}
    return plan_memory(llama(size), [PAPER[method]()], batch, precision="bf16-true")


def totals(plan: MemoryPlan, processes: int) -> list[str]:
    """GiB in all under every engine, on this many processes."""
    return [f"{plan.under(name, processes).total / 2**30:,.1f}" for name in SHARDING]  # type: ignore[arg-type]


def row(*cells: object) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def paper_tables() -> str:
    """All tables of the large models."""
    blocks = []
    for size, counts in SIZES.items():
        plans = {}
        for method in PAPER:
            start = time.monotonic()
            plans[method] = paper(size, method)
            print(f"# {size}, {method}: {time.monotonic() - start:.0f} s, {plans[method].notes}", flush=True)
        for count in counts:
            lines = [row("method", "trained", *SHARDING), row("---", *["--:"] * (1 + len(SHARDING)))]
            lines += [row(m, f"{plan.trained:,}", *totals(plan, count)) for m, plan in plans.items()]
            blocks.append(f"**{size} on {count} devices**, GiB per device\n\n" + "\n".join(lines))
        if size == "70B":
            blocks.append(parts_table(plans["LoRA, all linear"]))
    return "\n\n".join(blocks)


def parts_table(plan: MemoryPlan) -> str:
    """What the totals of one method consist of."""
    lines = [row("", *SHARDING), row("---", *["--:"] * len(SHARDING))]
    for name, label in LABELS.items():
        sizes = [getattr(plan.under(engine, 8).bytes, name) for engine in SHARDING]  # type: ignore[arg-type]
        lines.append(row(label, *(f"{size / 2**30:,.2f}" for size in sizes)))
    return "**70B, LoRA on all linear layers, on 8 devices**: what the totals consist of, GiB\n\n" + "\n".join(lines)


def put(mark: str, text: str) -> None:
    """Write generated text into the page, between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    start, stop = page.index(begin) + len(begin), page.index(end)
    PAGE.write_text(f"{page[:start]}\n\n{text}\n\n{page[stop:]}", encoding="utf-8")


# --- measured -------------------------------------------------------------------------------------


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


def check(models: Sequence[str], methods: Sequence[str], engines: Sequence[str]) -> list[Checked]:
    """Plan and measure every combination."""
    rows = []
    for name in models:
        for method in methods:
            for engine in engines:
                plan = planned(name, method, engine)
                total = plan.total + plan.host  # host memory is the same memory here
                try:
                    measured = measure(name, method, engine)
                except RuntimeError as error:
                    print(f"# {name}, {method}, {engine}: {str(error).splitlines()[-1]}", flush=True)
                    continue
                rows.append(Checked(name, method, engine, total / 2**20, measured / 2**20))
                print(f"{rows[-1]} ratio {rows[-1].ratio:.3f}", flush=True)
    return rows


def gpu_check() -> list[Checked]:
    """Plan and measure on one GPU, where the allocator counts."""
    rows = []
    for name in MODELS:
        for method in METHODS:
            peak = measure_here(name, method, "single", "cuda")
            total = planned(name, method, "single", gpu=True).total
            rows.append(Checked(name, method, "single", total / 2**20, peak / 2**20))
            print(f"{rows[-1]} ratio {rows[-1].ratio:.3f}", flush=True)
    return rows


def checked_table(rows: list[Checked]) -> str:
    """Planned over measured, and in brackets the measured MiB."""
    engines = list(dict.fromkeys(row.engine for row in rows))
    found = {(r.model, r.method, r.engine): f"{r.ratio:.2f} ({r.measured:,.0f})" for r in rows}
    pairs = dict.fromkeys((r.model, r.method) for r in rows)
    lines = [row("model", "method", *engines), row("---", "---", *["--:"] * len(engines))]
    return "\n".join([*lines, *(row(*pair, *(found.get((*pair, e), "") for e in engines)) for pair in pairs)])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables on paper into docs/memory.md")
    parser.add_argument("--check", action="store_true", help="measure on this CPU, and write the ratios")
    parser.add_argument("--gpu", action="store_true", help="measure on a GPU, and print the ratios")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--methods", default=";".join(METHODS), help="names, with semicolons between them")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--json", type=Path, help="file of measured rows, to which these are added")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(f"PEAK {measure_here(*args.measure)}", flush=True)
    if args.write:
        put("tables on paper", paper_tables())
    if args.gpu:
        print(checked_table(gpu_check()))
    if args.check:
        before = [Checked(**r) for r in json.loads(args.json.read_text())] if args.json and args.json.exists() else []
        rows = before + check([args.only] if args.only else MODELS, args.methods.split(";"), args.engines.split(","))
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        put("measured", checked_table(rows))


if __name__ == "__main__":
    main()
