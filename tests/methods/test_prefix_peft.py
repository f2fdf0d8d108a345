"""Prefix tuning against an independent implementation: HF PEFT with the same weights.

PEFT puts a prefix into the cache, so real positions start behind it. Learned positions are told to do the same
here; rotary keys are turned back by as much.
"""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_pet import PrefixTuningCallback, apply
from lightning_pet.attention.prefix import AttentionPrefix
from lightning_pet.layers.prefix import PrefixNetwork

TOLERANCE = 1e-5
P, WIDTH, LAYERS, HEADS = 4, 32, 2, 4
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64},
    "llama": {"num_key_value_heads": 2},
}
TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION", "roberta": "FEATURE_EXTRACTION"}
TOKENS = torch.tensor([[5, 9, 30, 3, 17, 20], [8, 8, 21, 40, 6, 11]])


def base(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**SIZES, **OWN.get(name, {})})
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if TASKS[name] == "CAUSAL_LM" else AutoModel
    return kind.from_config(config).eval()


def theirs(name: str, projection: bool) -> nn.Module:
    config = peft.PrefixTuningConfig(
        task_type=TASKS[name], num_virtual_tokens=P, prefix_projection=projection, encoder_hidden_size=16
    )
    torch.manual_seed(1)
    return peft.get_peft_model(base(name), config).eval()


def ours(name: str, projection: bool) -> nn.Module:
    model = base(name)
    apply(model, [PrefixTuningCallback(length=P, projection=projection, projection_size=16)])
    return model


def prefixes(model: nn.Module) -> list[AttentionPrefix]:
    return [module for module in model.modules() if isinstance(module, AttentionPrefix)]


@torch.no_grad()
def copy_weights(model: nn.Module, source: nn.Module, projection: bool) -> None:
    """Their table and network hold all layers in one: keys of layer 0, values of layer 0, keys of layer 1, …"""
    encoder = source.prompt_encoder["default"]
    network = next((module for module in model.modules() if isinstance(module, PrefixNetwork)), None)
    sites = prefixes(model)
    if projection:
        network.embedding.copy_(encoder.embedding.weight)
        network.weight.copy_(encoder.transform[0].weight)
        network.bias.copy_(encoder.transform[0].bias)
        weights = encoder.transform[2].weight.chunk(len(sites))
        biases = encoder.transform[2].bias.chunk(len(sites))
        for site, weight, bias in zip(sites, weights, biases, strict=True):
            site.weight.copy_(weight)
            site.bias.copy_(bias)
        return
    for site, rows in zip(sites, encoder.embedding.weight.chunk(len(sites), dim=1), strict=True):
        key, value = rows.chunk(2, dim=1)
        heads = (P, site.heads, site.key_dim)
        site.set_key_value(key.reshape(heads).transpose(0, 1), value.reshape(heads).transpose(0, 1))


@torch.no_grad()
def turn_back(model: nn.Module) -> None:
    """Keys as they are P positions earlier."""
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.full((1, 1), -P))
    for site in prefixes(model):
        key, value = site.folded()
        turned = torch.cat([-key[..., key.shape[-1] // 2 :], key[..., : key.shape[-1] // 2]], -1)
        site.set_key_value(key * cos + turned * sin, value)


# With grouped queries their input rows are as narrow as the keys, ours as wide as the model: compared without network.
CASES = [
    (name, projection)
    for name in sorted(TASKS)
    for projection in (False, True)
    if (name, projection) != ("llama", True)
]


@pytest.mark.parametrize(("name", "projection"), CASES)
def test_same_outputs_and_gradients_with_the_same_weights(name: str, projection: bool) -> None:
    reference, model = theirs(name, projection), ours(name, projection)
    copy_weights(model, reference, projection)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    positions: dict[str, Tensor] = {}
    if name == "llama":
        turn_back(model)
    elif name == "roberta":  # its positions start behind the padding index, which is also where PEFT's cache puts them
        positions = {"position_ids": torch.arange(P, P + 6)[None].expand(2, -1) + 1}
    else:
        positions = {"position_ids": torch.arange(P, P + 6)[None].expand(2, -1)}
    expected = reference(input_ids=TOKENS, attention_mask=mask)[0]
    got = model(input_ids=TOKENS, attention_mask=mask, **positions)[0]
    plain = base(name)(input_ids=TOKENS, attention_mask=mask)[0]
    assert (got - expected)[mask.bool()].abs().max() < TOLERANCE
    assert (got - plain)[mask.bool()].abs().max() > 1e-2
    if name == "llama":
        return  # the gradients are those of turned keys
    weight = torch.linspace(-1, 1, got.numel()).view_as(got) * mask[..., None]
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    encoder = reference.prompt_encoder["default"]
    if projection:
        network = next(module for module in model.modules() if isinstance(module, PrefixNetwork))
        pairs = [
            (network.embedding.grad, encoder.embedding.weight.grad),
            (network.weight.grad, encoder.transform[0].weight.grad),
        ]
    else:
        pairs = [
            (
                torch.cat(
                    [g.transpose(0, 1).flatten(1) for s in prefixes(model) for g in (s.key.grad, s.value.grad)], 1
                ),
                encoder.embedding.weight.grad,
            )
        ]
    for own, other in pairs:
        assert (own - other).abs().max() < TOLERANCE * (1 + other.abs().max())
