"""Methods on one GPU: time and memory of a training step, and of generation, beside the floor and HF PEFT.

A Llama of 1.2 billion parameters (random weights, bfloat16) learns to predict the next token of random
text. The floor is the least that any method can cost whose gradient reaches the embeddings: forward and
backward through the frozen base, no parameter gradient, no optimizer. All variants see the same batch,
run one after the other in one process, and are measured in a plain loop, as a ``Trainer`` runs them and
under FSDP2 (one process: what its hooks cost), as they are and with every decoder layer compiled; and while
they generate token by token. Both libraries keep the delta in float32, which is their default; ``PEFT, bf16``
casts it to the base's type.

Times are medians of steps between CUDA events. Memory is the peak that the allocator gave out, above
what it had given out before the model was built: weights, delta, optimizer state, activations, logits.

    python benchmarks/gpu.py [--json PATH] [--budget SECONDS] [--write]
    python benchmarks/gpu.py --short --device cpu      # try the script itself
"""

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from libraries import METHODS
from lightning.pytorch.strategies import ModelParallelStrategy
from page import Row as PageRow
from page import Table, cells, facts, markdown, write
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pet import LoRACallback, apply

OURS, PEFT, PEFT_BF16 = "lightning_pet", "PEFT", "PEFT, bf16"
WARM_UP = 5
NEW_TOKENS = 32
COMMAND = "python benchmarks/gpu.py --write"
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TIMES = Table("gpu_step", "Llama 1.2B on a GPU: time / that of the floor run in the same way", COMMAND)
PEAKS = Table("gpu_memory", "Llama 1.2B on a GPU: peak GiB", COMMAND)
TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": list(LAYERS)}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the batch."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    sequences: int
    tokens: int


SHAPES = {
    "1B": Shape(128_256, 2048, 8192, 16, 32, 8, sequences=4, tokens=2048),
    "tiny": Shape(256, 32, 64, 2, 4, 2, sequences=2, tokens=16),
}


@dataclass(frozen=True)
class Variant:
    """What is trained and how it is run; a library may be none (``floor``, ``full``)."""

    library: str
    targets: str = "-"
    method: str = "LoRA"
    loop: str = "plain"
    compiled: bool = False


@dataclass(frozen=True)
class Row:
    """What was measured of one variant."""

    library: str
    targets: str
    method: str
    loop: str
    compiled: bool
    trained: int = 0
    milliseconds: float = float("nan")
    quartiles: float = float("nan")
    tokens_per_second: float = float("nan")
    peak_gib: float = float("nan")
    of_floor: float = float("nan")
    note: str = ""


def variants() -> list[Variant]:
    """In the order of their importance: what does not fit into the time is left out at the end."""
    own = [(OURS, targets) for targets in TARGETS]
    peers = [PEFT, PEFT_BF16] if importlib.util.find_spec("peft") else []
    own += [(name, targets) for name in peers for targets in TARGETS]
    more = [(name, "all-linear", m) for m in ("LoRA, dropout 0.1", "DoRA") for name in [OURS, *peers[:1]]]
    plain = [Variant("floor"), *(Variant(*pair) for pair in own), *(Variant(*three) for three in more), Variant("full")]
    trained = [Variant("floor", loop="Trainer"), *(Variant(OURS, t, loop="Trainer") for t in TARGETS)]
    compiled = [Variant("floor", compiled=True), *(Variant(*each, compiled=True) for each in (*own, *more))]
    both = [Variant(OURS, targets, loop="Trainer", compiled=True) for targets in TARGETS]
    sharded = [Variant("floor", loop="FSDP2"), *(Variant(OURS, targets, loop="FSDP2") for targets in TARGETS)]
    generated = [Variant("floor", loop="generate"), *(Variant(*pair, loop="generate") for pair in own)]
    return [*plain, *generated, *compiled, *trained, *sharded, *both]


def build(shape: Shape, device: str) -> nn.Module:
    """A model with random weights, made on the device."""
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def batch_for(shape: Shape, device: str) -> dict[str, Tensor]:
    """Random token ids, and the same as labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (shape.sequences, shape.tokens), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def callback(variant: Variant) -> LoRACallback:
    """This library's."""
    _, arguments = METHODS[variant.method].ours
    return LoRACallback(**arguments, target_modules=TARGETS[variant.targets], modules_to_save=[], verbose=False)


def let_flow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Gradients reach this output."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


def adapt(model: nn.Module, variant: Variant) -> nn.Module:
    """Freeze the model and give it its delta; ours under a Trainer comes from the callback."""
    if variant.library != "full":
        model.get_input_embeddings().register_forward_hook(let_flow)
    if variant.library == "floor":
        model.requires_grad_(False)
    elif variant.library == OURS and variant.loop in ("plain", "generate"):
        apply(model, [callback(variant)])
    elif variant.library in (PEFT, PEFT_BF16):
        from peft import LoraConfig, get_peft_model

        _, arguments = METHODS[variant.method].peft
        config = LoraConfig(**arguments, target_modules=TARGETS[variant.targets])
        model = get_peft_model(model, config, autocast_adapter_dtype=variant.library == PEFT)
    return model


def compile_layers(model: nn.Module) -> None:
    """Compile the decoder layers, which all share one graph; on a CPU by what shows that they can be traced."""
    backend = "inductor" if next(model.parameters()).is_cuda else "aot_eager"
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            module.compile(backend=backend)


class Clock:
    """Milliseconds between marks; on a GPU they are events in its queue, so that marking waits for nothing."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Note the time."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between every two marks after warming up."""
        if self.cuda:
            torch.cuda.synchronize()
        pairs = list(zip(self.marks[WARM_UP:], self.marks[WARM_UP + 1 :], strict=False))
        return [a.elapsed_time(b) if self.cuda else (b - a) * 1e3 for a, b in pairs]


def plain_loop(model: nn.Module, batch: dict[str, Tensor], variant: Variant, steps: int, clock: Clock) -> None:
    """Steps without a Trainer."""
    model = adapt(model, variant).train()
    if variant.compiled:
        compile_layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    for _ in range(steps + WARM_UP + 1):
        clock.mark()
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def generate(model: nn.Module, batch: dict[str, Tensor], variant: Variant, steps: int, clock: Clock) -> None:
    """Texts, token by token; a mark per text."""
    model = adapt(model, variant).eval()
    prompt = batch["input_ids"][:, :8]
    for _ in range(max(2, steps // 4) + WARM_UP + 1):
        clock.mark()
        with torch.no_grad():
            model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0,
            )  # fmt: skip


class Module(pl.LightningModule):
    """The least that a Trainer needs."""

    def __init__(self, model: nn.Module, clock: Clock, frozen: bool) -> None:
        super().__init__()
        self.model = model
        self.clock = clock
        self.automatic_optimization = not frozen
        self.seen = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One mark and one loss; without an optimizer, the backward as well."""
        self.clock.mark()
        loss: Tensor = self.model(**batch).loss
        if not self.automatic_optimization:
            self.manual_backward(loss)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW over what trains."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None


class Sharded(Module):
    """The same under FSDP2: every layer is a unit, and the rest another."""

    def configure_model(self) -> None:
        """Shard once."""
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in [m for m in self.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def under_trainer(
    model: nn.Module, batch: dict[str, Tensor], variant: Variant, steps: int, clock: Clock, device: str
) -> None:
    """The same steps in a Trainer with everything off that is not training."""
    model = adapt(model, variant).train()
    if variant.compiled:
        compile_layers(model)
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        strategy=ModelParallelStrategy(1, 1) if variant.loop == "FSDP2" else "auto",
        precision="bf16-true",
        max_epochs=1,
        callbacks=[callback(variant)] if variant.library == OURS else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = [batch] * (steps + WARM_UP + 1)
    module = (Sharded if variant.loop == "FSDP2" else Module)(model, clock, variant.library == "floor")
    trainer.fit(module, DataLoader(rows, batch_size=None))


@contextmanager
def counted_memory(device: str) -> Iterator[Callable[[], float]]:
    """Give a function that returns the peak in GiB since the beginning of the block."""
    gc.collect()
    if device != "cuda":
        yield lambda: float("nan")
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(variant: Variant, shape: Shape, device: str, steps: int) -> Row:
    """Build, train and measure one variant."""
    torch.compiler.reset()
    with counted_memory(device) as peak:
        model, batch, clock = build(shape, device), batch_for(shape, device), Clock(device)
        if variant.loop == "plain":
            plain_loop(model, batch, variant, steps, clock)
        elif variant.loop == "generate":
            generate(model, batch, variant, steps, clock)
        else:
            under_trainer(model, batch, variant, steps, clock, device)
        each = NEW_TOKENS if variant.loop == "generate" else 1
        milliseconds = [taken / each for taken in clock.milliseconds()]
        low, median, high = statistics.quantiles(milliseconds)
        return Row(
            **asdict(variant),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            milliseconds=median,
            quartiles=high - low,
            tokens_per_second=shape.sequences * (1 if each > 1 else shape.tokens) / median * 1e3,
            peak_gib=peak(),
        )


def attempt(variant: Variant, shape: Shape, device: str, steps: int) -> Row:
    """A row even where the memory does not suffice, or anything else fails: the others are still wanted."""
    try:
        return measure(variant, shape, device, steps)
    except torch.OutOfMemoryError:
        return Row(**asdict(variant), note="out of memory")
    except Exception as error:
        return Row(**asdict(variant), note=f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}")


def measure_all(shape: Shape, device: str, steps: int, budget: float, only: str = "") -> list[Row]:
    """All variants that fit into the time, with ratios to the floor that was run in the same way."""
    rows: list[Row] = []
    begin, longest = time.monotonic(), 0.0
    for variant in [v for v in variants() if only in name_of(v)]:
        start = time.monotonic()
        if start - begin + 1.2 * longest > budget:
            rows.append(Row(**asdict(variant), note="left out: no time"))
            continue
        row = attempt(variant, shape, device, steps)
        longest = max(longest, time.monotonic() - start)
        same = [r for r in rows if r.library == "floor" and r.compiled == row.compiled]
        floors = [r.milliseconds for r in same if (r.loop == "generate") == (row.loop == "generate")]
        rows.append(Row(**{**asdict(row), "of_floor": row.milliseconds / (floors or [row.milliseconds])[0]}))
        print(f"# {time.monotonic() - begin:5.0f} s  {rows[-1]}", flush=True)
    return rows


def name_of(row: Row | Variant) -> str:
    """Of a case on the page."""
    run = {"plain": "step", "generate": "generation"}.get(row.loop, f"step, {row.loop}")
    return f"{row.method}, {row.targets}: {run}{', compiled' if row.compiled else ''}"


def on_the_page(rows: list[Row], figure: Callable[[Row], float], full: str) -> list[PageRow]:
    """One row per case in which ours was measured; ``full`` is what full fine-tuning's column is called."""
    measured = [row for row in rows if not row.note]
    whole = dict([(full, figure(row)) for row in measured if row.library == "full"])
    found = []
    for own in (row for row in measured if row.library == OURS):
        peers = {r.library: figure(r) for r in measured if name_of(r) == name_of(own) and r.library != OURS}
        found.append(PageRow(name_of(own), figure(own), peers, None, {} if found else whole))
    return found


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--short", action="store_true", help="a tiny model that any machine can run")
    parser.add_argument("--steps", type=int, default=20, help="measured steps per variant")
    parser.add_argument("--budget", type=float, default=400, help="seconds after which nothing new is begun")
    parser.add_argument("--only", metavar="WORD", default="", help="cases whose name contains it, as generation")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows to this file")
    args = parser.parse_args(argv)
    if args.write and (args.short or args.only or args.device == "cpu"):
        parser.error("only a whole run on a GPU belongs on the page")
    rows = measure_all(SHAPES["tiny" if args.short else "1B"], args.device, args.steps, args.budget, args.only)
    for table, figure in ((TIMES, lambda row: row.of_floor), (PEAKS, lambda row: row.peak_gib)):
        found = on_the_page(rows, figure, "full fine-tuning")
        print(f"{markdown([cells(table, row) for row in found])}\n" if found else "")
        if args.write:
            write(table, found)
    print(*(f"{name_of(row)}, {row.library}: {row.note}" for row in rows if row.note), facts(), sep="\n")
    if args.json:
        args.json.write_text(json.dumps({"facts": facts(), "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
