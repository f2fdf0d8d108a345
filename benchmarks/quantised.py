"""Memory and accuracy of a base in each quantised format, on the CPU; one process per format.

python benchmarks/quantised.py                 # a Llama shape of 41 million numbers with random weights
python benchmarks/quantised.py --layers 12     # 97 million
"""

import argparse
import ctypes
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet import LoRACallback, apply
from lightning_pet.layers.sharding import ordinary_parts
from lightning_pet.model.quantised import is_quantised, scales_beside


def torchao(config: Callable[[Any], Any]) -> Callable[[nn.Module], object]:
    """Quantise all linear layers but the output layer by torchao."""

    def quantise(model: nn.Module) -> object:
        import torchao.quantization as ao

        return ao.quantize_(model, config(ao), lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")

    return quantise


def bitsandbytes(four: bool) -> Callable[[nn.Module], object]:
    """Replace all linear layers but the output layer by those of bitsandbytes."""

    def quantise(model: nn.Module) -> object:
        import bitsandbytes as bnb

        for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]:
            sizes = linear.in_features, linear.out_features
            made: Any
            if four:
                made = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4")
                made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            else:
                made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            model.set_submodule(name, made.train(linear.training).to("cpu"))
        return model

    return quantise


FORMATS: dict[str, Callable[[nn.Module], object]] = {
    "float32": lambda model: model,
    "bfloat16": lambda model: model.bfloat16(),
    "torchao int8": torchao(lambda ao: ao.Int8WeightOnlyConfig()),
    "torchao int4": torchao(lambda ao: ao.IntxWeightOnlyConfig(torch.int4, granularity=ao.PerGroup(32))),
    "torchao float8": torchao(lambda ao: ao.Float8WeightOnlyConfig()),
    "bitsandbytes int8": bitsandbytes(False),
    "bitsandbytes nf4": bitsandbytes(True),
}


def build(layers: int) -> nn.Module:
    """The same base every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8000, num_hidden_layers=layers, **sizes)).requires_grad_(False)


def resident() -> float:
    """Memory of this process in MB, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def stored(model: nn.Module) -> float:
    """Bytes of all parameters as they are stored, scales included, in MB."""
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                beside = scales_beside(module, parameter) if is_quantised(parameter) else []
                tensors |= {part.data_ptr(): part for part in (*ordinary_parts(parameter), *beside)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6


def measure(name: str, layers: int) -> None:
    """Print one row of the table."""
    logging.disable(logging.WARNING)
    start = resident()
    model = build(layers)
    ids = torch.randint(0, 8000, (4, 64), generator=torch.Generator().manual_seed(1))
    # In training mode, as layers run while a delta trains; there is no dropout.
    with torch.no_grad():
        before = model.train()(input_ids=ids, use_cache=False).logits
        FORMATS[name](model)
        after = model(input_ids=ids, use_cache=False).logits
    error = float((after - before).norm() / before.norm())
    del before, after
    base = resident() - start
    plan = apply(model, [LoRACallback(r=8, verbose=False)]).plan()
    print(f"| {name} | {stored(model):.0f} | {base:.0f} | {error:.1e} | {plan.trainable * 4 / 1e6:.1f} |", flush=True)


def main() -> None:
    """One process per format, or one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--format", choices=FORMATS)
    options = parser.parse_args()
    if options.format:
        measure(options.format, options.layers)
        return
    print("| base | parameters, MB | resident, MB | error of the logits | LoRA r=8 on q and v, MB |")
    print("|---|---|---|---|---|", flush=True)
    for name in FORMATS:
        command = [sys.executable, __file__, "--format", name, "--layers", str(options.layers)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
