"""What it costs that a call's state belongs to the calling thread, and that many threads may share a model.

Cost: every host asks once per call what its thread has chosen (``chosen()``), and weight hosts note their scope. The
same step runs with that and with stand-ins that answer at once, taking turns; times are CPU seconds of this process,
of which the best turn counts, and the figure is the share of the step that the context takes. Because that is close
to what a shared machine adds by chance, the questions are also counted and timed alone, which gives the same share
with far less noise. Beside it: a linear LoRA layer without gradients, in the plain form and as an autograd node.

Threads: eight of them run one model 1,000 times per method, switching as often as Python can; two of the eight switch
the deltas off. All outputs are compared bit by bit.

    python benchmarks/call_context.py [--quick] [--json PATH]
"""

import argparse
import json
import sys
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import lightning_pet as lp
from lightning_pet.insertion import host as insertion
from lightning_pet.insertion import slot
from lightning_pet.layers import low_rank_product
from lightning_pet.model import call

BOUND = 0.01  # of a step
THREADS, FORWARDS = 8, 1000

METHODS: dict[str, Callable[[], lp.PETCallback]] = {
    "LoRA, all-linear": lambda: lp.LoRACallback(r=8, target_modules="all-linear"),
    "DoRA": lambda: lp.LoRACallback(r=8, use_dora=True),
    "AdaLoRA": lambda: lp.AdaLoRACallback(),
    "IA3": lambda: lp.IA3Callback(),
    "intrinsic dimension": lambda: lp.IntrinsicDimensionCallback(d=1000),
    "Houlsby adapter": lambda: lp.AdapterCallback(),
    "parallel adapter": lambda: lp.AdapterCallback(placement="parallel"),
    "Compacter": lambda: lp.CompacterCallback(reduction_factor=8),
    "AdapterBias": lambda: lp.AdapterBiasCallback(),
    "prefix": lambda: lp.PrefixTuningCallback(),
    "prompt": lambda: lp.PromptTuningCallback(),
    "layer freezing": lambda: lp.LayerFreezingCallback(train_last=1),
    "BitFit": lambda: lp.BitFitCallback(),
    "diff pruning": lambda: lp.DiffPruningCallback(structured=False),
    "full fine-tuning": lambda: lp.FullFineTuningCallback(),
}
COSTS = ["LoRA, all-linear", "intrinsic dimension", "Houlsby adapter", "prefix"]


def small_bert() -> tuple[nn.Module, dict[str, Tensor]]:
    """BERT-tiny on 8 rows of 16 tokens: a step so short that what is not arithmetic shows."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    return BertForSequenceClassification(config).eval(), {"input_ids": torch.randint(1000, (8, 16))}


def tiny_bert() -> tuple[nn.Module, dict[str, Tensor]]:
    """Small enough that threads change places in the middle of every layer."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return BertForSequenceClassification(config).eval(), {"input_ids": torch.randint(100, (4, 9))}


def adapted(build: Callable[[], tuple[nn.Module, dict[str, Tensor]]], method: str) -> tuple[Any, nn.Module, Any]:
    """The handle, the model and its input; the delta is moved away from its start."""
    model, batch = build()
    handle = lp.apply(model, [METHODS[method]()], forward=lambda: model(**batch))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return handle, model.eval(), batch


# --- cost --------------------------------------------------------------------------------------------


@contextmanager
def without_context() -> Iterator[None]:
    """Questions are answered at once."""
    nothing: call.Chosen = {}
    with patch.object(slot, "of_host", lambda host: nothing):
        yield


def questions(step: Callable[[], None]) -> int:
    """How often a step asks."""
    asked = 0
    original = slot.of_host

    def counted(host: nn.Module) -> call.Chosen:
        nonlocal asked
        asked += 1
        return original(host)

    with patch.object(slot, "of_host", counted):
        step()
    return asked


def cost(method: str, turns: int) -> dict[str, float]:
    """Milliseconds of a training step, and the context's share of it, from turns and from counting."""
    _, model, batch = adapted(small_bert, method)
    model.train()
    labels = torch.arange(8) % 2

    def step() -> None:
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()

    def seconds() -> float:
        begin = process_time()
        step()
        return process_time() - begin

    step()
    best = {"with": float("inf"), "without": float("inf")}
    for _ in range(turns):
        best["with"] = min(best["with"], seconds())
        with without_context():
            best["without"] = min(best["without"], seconds())
    host = next(module for module in model.modules() if isinstance(module, slot.Deltas))
    count = questions(step)
    each = min(timeit.repeat(lambda: slot.of_host(host), number=10_000, repeat=5)) / 10_000
    scope = min(timeit.repeat(_scope, number=10_000, repeat=5)) / 10_000
    return {
        "milliseconds": 1e3 * best["with"],
        "measured": best["with"] / best["without"] - 1,
        "questions": count,
        "counted": count * (each + scope) / best["with"],
    }


def _scope() -> None:
    here = call.HERE.call
    before = here.scope
    here.scope = (*before, None)  # type: ignore[arg-type]
    here.scope = before


def layer(turns: int) -> dict[str, float]:
    """Microseconds of a linear LoRA layer without gradients: plain, as an autograd node, and written by hand."""
    torch.manual_seed(0)
    host, x = nn.Linear(64, 64), torch.randn(8, 64)
    lp.apply(adapted_host := nn.Sequential(host), [lp.LoRACallback(r=8, target_modules=["0"], modules_to_save=[])])
    delta: Any = insertion.deltas_of(adapted_host[0])["lora_default"]
    a, b, w, bias = (t.detach() for t in (delta.a, delta.b, host.weight, host.bias))

    def by_hand() -> Tensor:
        out = torch.nn.functional.linear(x, w, bias)
        return out.addmm_(x @ a.t(), b.t(), alpha=delta.scale)

    def node() -> Any:
        arguments = (x, w, bias, a, b, None, None, delta.scale, False, None, None, None, 1.0)
        return low_rank_product._LowRankLinear.apply(*arguments)

    def best(function: Callable[[], Any]) -> float:
        return 1e6 * min(timeit.repeat(function, timer=process_time, number=500, repeat=turns)) / 500

    with torch.no_grad():
        return {"layer": best(lambda: adapted_host[0](x)), "node alone": best(node), "by hand": best(by_hand)}


# --- threads -----------------------------------------------------------------------------------------


def wrong_outputs(method: str, forwards: int) -> int:
    """Outputs of eight threads that differ from those of one."""
    handle, model, batch = adapted(tiny_bert, method)

    def output() -> Tensor:
        with torch.inference_mode():
            return model(**batch).logits

    expected = output()
    with handle.disabled():
        base = output()

    def work(number: int) -> int:
        off, wrong = number % 4 == 3, 0
        for _ in range(forwards // THREADS // 5):
            with handle.disabled() if off else nullcontext():
                wrong += sum(not torch.equal(output(), base if off else expected) for _ in range(5))
        return wrong

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return sum(pool.map(work, range(THREADS)))
    finally:
        sys.setswitchinterval(before)


def main() -> int:
    """Print a table of each; exit status 1 if an output is wrong or the context costs more than its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the forwards and turns")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    forwards, turns = (FORWARDS // 10, 3) if options.quick else (FORWARDS, 20)
    found: dict[str, Any] = {"cost": {}, "wrong": {}}
    print(f"{'method':22}{'step, ms':>10}{'questions':>11}{'share, counted':>16}{'share, measured':>17}")
    for method in COSTS:
        row = found["cost"][method] = cost(method, turns)
        print(
            f"{method:22}{row['milliseconds']:10.1f}{row['questions']:11.0f}{row['counted']:16.3%}{row['measured']:17.2%}"
        )
    found["layer"] = layer(turns)
    print("LoRA layer without gradients, µs:", ", ".join(f"{k} {v:.1f}" for k, v in found["layer"].items()))
    print(f"{'method':22}{'wrong of ' + str(forwards):>15}")
    for method in METHODS:
        found["wrong"][method] = wrong_outputs(method, forwards)
        print(f"{method:22}{found['wrong'][method]:15}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    return int(any(found["wrong"].values()) or any(row["counted"] > BOUND for row in found["cost"].values()))


if __name__ == "__main__":
    sys.exit(main())
