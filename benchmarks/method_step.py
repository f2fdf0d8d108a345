"""Time of a training step for every method, beside its peer in HF PEFT or in the adapters library.

All variants train the same BERT (6 layers, width 384, 32 × 48 tokens, float32, one thread) and are given as a ratio to
the floor: the frozen base with the gradient flowing to the embeddings. The libraries need different releases of
transformers, so the script runs in any environment and measures what it finds there, each time against the floor of
that same run:

    python benchmarks/method_step.py                          # this library, and PEFT if it is installed
    python -m venv adapters && adapters/bin/pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6
    adapters/bin/python benchmarks/method_step.py             # the adapters library

Variants take turns; the figure is the CPU time of each one's best turn.
"""

import argparse
import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_step import build, take_turns

Adapt = Callable[[nn.Module], nn.Module]

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA q,v": ("LoRACallback", {"r": 8}),
    "Houlsby": ("AdapterCallback", {"placement": "houlsby"}),
    "Pfeiffer": ("AdapterCallback", {"placement": "pfeiffer"}),
    "parallel": ("AdapterCallback", {"placement": "parallel", "reduction_factor": 2, "scale": 4.0}),
    "Compacter": ("CompacterCallback", {}),
    "Compacter++": ("CompacterCallback", {"placement": "ffn"}),
    "AdapterBias": ("AdapterBiasCallback", {}),
    "prefix 30": ("PrefixTuningCallback", {"length": 30, "projection": False}),
    "prefix 30, network": ("PrefixTuningCallback", {"length": 30}),
    "prompt 20": ("PromptTuningCallback", {"length": 20}),
    "(IA)³": ("IA3Callback", {}),
    "BitFit": ("BitFitCallback", {}),
    "AdaLoRA q,v": ("AdaLoRACallback", {"target_modules": ["attention.q", "attention.v"]}),
    "last 2 layers": ("LayerFreezingCallback", {"train_last": 2}),
    "full": ("FullFineTuningCallback", {}),
}
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA q,v": ("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}),
    "(IA)³": (
        "IA3Config",
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "prompt 20": ("PromptTuningConfig", {"num_virtual_tokens": 20, "task_type": "FEATURE_EXTRACTION"}),
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Houlsby": ("DoubleSeqBnConfig", {}),
    "Pfeiffer": ("SeqBnConfig", {}),
    "parallel": ("ParBnConfig", {}),
    "Compacter": ("CompacterConfig", {}),
    "Compacter++": ("CompacterPlusPlusConfig", {}),
    "prefix 30": ("PrefixTuningConfig", {"flat": True, "prefix_length": 30}),
    "prefix 30, network": ("PrefixTuningConfig", {"prefix_length": 30}),
    "prompt 20": ("PromptTuningConfig", {"prompt_length": 20}),
    "LoRA q,v": ("LoRAConfig", {"r": 8, "alpha": 16}),
    "(IA)³": ("IA3Config", {}),
}


def with_ours(name: str) -> Adapt:
    """This library's method."""

    def adapt(model: nn.Module) -> nn.Module:
        import lightning_pet

        callback, options = OURS[name]
        lightning_pet.apply(model, [getattr(lightning_pet, callback)(**options, modules_to_save=[])])
        return model

    return adapt


def with_peft(name: str) -> Adapt:
    """HF PEFT's."""

    def adapt(model: nn.Module) -> nn.Module:
        import peft

        config, options = PEFT[name]
        return peft.get_peft_model(model, getattr(peft, config)(**options))

    return adapt


def with_adapters(name: str) -> Adapt:
    """The adapters library's."""

    def adapt(model: nn.Module) -> nn.Module:
        import adapters

        config, options = ADAPTERS[name]
        adapters.init(model)
        model.add_adapter("task", config=getattr(adapters, config)(**options))
        model.train_adapter("task")
        return model

    return adapt


def floor(model: nn.Module) -> nn.Module:
    """The frozen base."""
    return model.requires_grad_(False)


def variants() -> dict[tuple[str, str], Adapt]:
    """What this environment offers, by method and library."""
    found: dict[tuple[str, str], Adapt] = {("floor", ""): floor}
    libraries = (("lightning_pet", OURS, with_ours), ("peft", PEFT, with_peft), ("adapters", ADAPTERS, with_adapters))
    for library, methods, adapt in libraries:
        if importlib.util.find_spec(library) is not None:
            found |= {(name, library): adapt(name) for name in methods}
    return found


def step_of(model: nn.Module, batch: dict[str, Tensor], adapt: Adapt) -> Callable[[], None]:
    """One training step; the gradient always reaches the embeddings' output."""
    model = adapt(model).train()
    embeddings = next(module for module in model.modules() if type(module).__name__.startswith("BertEmbeddings"))
    embeddings.register_forward_hook(lambda module, args, out: out if out.requires_grad else out.requires_grad_())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def step() -> None:
        model(**batch).last_hidden_state.square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def measure(chosen: dict[tuple[str, str], Adapt], turns: int) -> dict[tuple[str, str], float]:
    """Best CPU seconds per step."""
    base, batch = build("bert")
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    steps = {key: step_of(copy.deepcopy(base), batch, adapt) for key, adapt in chosen.items()}
    return {key: min(seconds) for key, seconds in take_turns(steps, turns).items()}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--methods", help="comma-separated names")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = options.methods.split(",") if options.methods else None
    chosen = {key: adapt for key, adapt in variants().items() if wanted is None or key[0] in (*wanted, "floor")}
    best = measure(chosen, options.turns)
    bottom = best[("floor", "")]
    print("| method | library | ms per step | / floor |\n|---|---|--:|--:|")
    for (name, library), seconds in sorted(best.items()):
        print(f"| {name} | {library} | {1e3 * seconds:.0f} | {seconds / bottom:.3f} |")
    if options.json:
        rows = [{"method": n, "library": lib, "ms": 1e3 * s, "of_floor": s / bottom} for (n, lib), s in best.items()]
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
