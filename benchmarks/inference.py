"""Time per token of generation, one row and one token at a time: with a delta attached, in HF PEFT, merged, and bare.

A call of a layer has one token then, so that what a method does beside its products shows more than anywhere else.
Every variant generates the same number of tokens greedily from the same Llama model in float32 on one thread, with a
cache of keys and values. Figures are ratios to the time of the bare model in the same run: CPU seconds of this process
in each variant's best turn, the variants taking turns. What a method itself adds is not the same for all: a prefix and
a prompt make every token attend to more; what they add to the first forward is in the time, too.

    python benchmarks/inference.py [--short] [--turns N] [--only WORD] [--write] [--json PATH]
"""

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from page import Options, Row, Table, run
from torch import nn

import lightning_pet as lp

TABLE = Table("inference", "time per token / that of the bare model", "python benchmarks/inference.py --write")
RANK, ALPHA, VIRTUAL = 8, 16, 8
PROMPT, NEW = 8, 24
PROJECTIONS = {"q,v": ("q_proj", "v_proj"), "all-linear": ("_proj",)}
FULL = {64: (4, 4), 512: (6, 8)}  # width: layers, heads
Variant = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Method:
    """How a method gets into a model, here and in HF PEFT."""

    ours: Callable[[], lp.PETCallback]
    peft: Callable[[], Any] | None
    merges: bool = False


def llama(width: int, short: bool) -> nn.Module:
    """A model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    layers, heads = (1, 2) if short else FULL[width]
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=43 * width // 16,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def lora(places: str) -> Method:
    """LoRA on some projections."""
    from peft import LoraConfig

    ends = PROJECTIONS[places]
    ours = {"r": RANK, "alpha": ALPHA, "target_modules": [f"*{end}" for end in ends], "modules_to_save": []}
    theirs = "all-linear" if places == "all-linear" else list(ends)
    return Method(
        lambda: lp.LoRACallback(**ours),
        lambda: LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=theirs),
        merges=True,
    )


def ia3() -> Method:
    """(IA)³ on keys, values and the input of the last projection."""
    from peft import IA3Config

    names = ["k_proj", "v_proj", "down_proj"]
    return Method(
        lambda: lp.IA3Callback(target_modules=["*k_proj", "*v_proj"], feedforward_modules=["*down_proj"]),
        lambda: IA3Config(task_type="CAUSAL_LM", target_modules=names, feedforward_modules=names[2:]),
        merges=True,
    )


def prefix() -> Method:
    """A prefix for every layer."""
    from peft import PrefixTuningConfig

    return Method(
        lambda: lp.PrefixTuningCallback(length=VIRTUAL),
        lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    )


def prompt() -> Method:
    """Virtual tokens before the first."""
    from peft import PromptTuningConfig

    return Method(
        lambda: lp.PromptTuningCallback(length=VIRTUAL),
        lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    )


def adapter() -> Method:
    """Houlsby's adapters, which HF PEFT does not have."""
    return Method(lambda: lp.AdapterCallback(bottleneck_size=16), None)


def attached(method: Method, model: nn.Module, merged: bool = False) -> nn.Module:
    """The model with our delta, its values moved away from the start."""
    ids = torch.randint(1000, (1, PROMPT))
    adapted = lp.apply(model, [method.ours()], forward=lambda: model(input_ids=ids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    if merged:
        adapted.merge_()
    return model.eval()


def in_peft(method: Method, model: nn.Module) -> nn.Module:
    """The model with HF PEFT's."""
    from peft import get_peft_model

    assert method.peft is not None
    peft: nn.Module = get_peft_model(model, method.peft())
    return peft.eval()


def generation(model: Any, new: int) -> Callable[[], None]:
    """Generates this number of tokens."""
    ids = torch.ones(1, PROMPT, dtype=torch.long)
    mask = torch.ones_like(ids)

    def generate() -> None:
        model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new)

    return generate


def best(steps: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """CPU seconds of each in its best turn, taking turns forwards and backwards."""
    found = dict.fromkeys(steps, float("inf"))
    for turn in range(turns + 1):
        for key in steps if turn % 2 else reversed(steps):
            start = time.process_time()
            steps[key]()
            if turn:  # the first is for warming up
                found[key] = min(found[key], time.process_time() - start)
        gc.collect()
    return found


def measure(name: str, width: int, build: Callable[[], Method], options: Options) -> Row:
    """One case."""
    base, method, new = llama(width, options.short), build(), 4 if options.short else NEW
    variants: dict[str, nn.Module] = {
        "bare": base,
        "attached": attached(method, copy.deepcopy(base)),
        **({"PEFT": in_peft(method, copy.deepcopy(base))} if method.peft else {}),
        **({"merged": attached(method, copy.deepcopy(base), merged=True)} if method.merges else {}),
    }
    seconds = best({key: generation(model, new) for key, model in variants.items()}, options.turns)
    ratio = {key: value / seconds["bare"] for key, value in seconds.items()}
    context: dict[str, float | str] = {"bare, ms": 1e3 * seconds["bare"] / new}
    if "merged" in ratio:
        context["merged"] = ratio["merged"]
    peers = {"PEFT": ratio["PEFT"]} if "PEFT" in ratio else {}
    return Row(name, ratio["attached"], peers, BOUNDS.get(name), context)


BOUNDS = {  # what ours should keep to beside the peer
    "width 64, LoRA q,v": 1.08,
    "width 64, LoRA all-linear": 1.4,
    "width 512, LoRA q,v": 1.08,
    "width 512, LoRA all-linear": 1.2,
}
METHODS: dict[str, Callable[[], Method]] = {
    "LoRA q,v": partial(lora, "q,v"),
    "LoRA all-linear": partial(lora, "all-linear"),
    "(IA)³": ia3,
    "adapter": adapter,
    "prefix": prefix,
    "prompt": prompt,
}
CASES = {
    f"width {width}, {method}": partial(measure, f"width {width}, {method}", width, build)
    for width in FULL
    for method, build in METHODS.items()
}

if __name__ == "__main__":
    run(__doc__, {TABLE: CASES})
