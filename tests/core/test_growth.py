"""Work grows as the model does: calls are counted, which a slow machine does not change."""

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_pet import AdapterCallback, BitFitCallback, IA3Callback, LoRACallback, apply, load_delta, save_delta

LAYERS = (6, 12, 24)
BOUND = 2.3  # from one number of layers to the next, which is twice as large

METHODS: dict[str, Callable[[], Any]] = {
    "lora by name": lambda: LoRACallback(r=2, target_modules=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]),
    "lora by role": lambda: LoRACallback(r=2, target_modules="all-linear"),
    "adapter": lambda: AdapterCallback(bottleneck_size=2),
    "ia3": IA3Callback,
    "bitfit": lambda: BitFitCallback(add_missing=True),
}


def llama(layers: int) -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=layers, pad_token_id=0, **sizes)).eval()


def calls(action: Callable[[], Any]) -> tuple[int, Any]:
    profile = cProfile.Profile()
    result = profile.runcall(action)
    return pstats.Stats(profile).total_calls, result  # type: ignore[attr-defined]


def life_of_a_delta(make: Callable[[], Any], layers: int, path: Path) -> dict[str, int]:
    """The calls of every verb on one model."""
    model, fresh = llama(layers), llama(layers)
    fresh.load_state_dict(model.state_dict())
    found: dict[str, int] = {}
    found["attach"], adapted = calls(lambda: apply(model, make()))
    found["plan"], _ = calls(adapted.plan)
    found["disabled"], _ = calls(lambda: adapted.disabled().__enter__())
    found["save"], _ = calls(lambda: save_delta(model, path))
    found["load"], loaded = calls(lambda: load_delta(fresh, path))
    if path.stem.startswith(("lora", "ia3")):
        found["merge"], _ = calls(loaded.merge_)
    model = llama(layers)
    adapted = apply(model, make())
    found["remove"], _ = calls(adapted.remove)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_verb_is_linear_in_the_number_of_layers(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / f"{method}.pet.safetensors".replace(" ", "_")
    life_of_a_delta(METHODS[method], 2, file)  # what is done once only: imports, classes
    found = [life_of_a_delta(METHODS[method], layers, file) for layers in LAYERS]
    for verb in found[0]:
        ratios = [found[i + 1][verb] / found[i][verb] for i in range(len(LAYERS) - 1)]
        assert max(ratios) <= BOUND, f"{verb} of {method}: {[f[verb] for f in found]} calls with {LAYERS} layers"
