"""Low-rank deltas against HF PEFT, layer by layer on the same weights."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_pet.layers import low_rank_product
from lightning_pet.layers.low_rank import LowRankLinear
from lightning_pet.layers.low_rank_hosts import ConvWeight, EmbeddingWeight


@pytest.fixture(autouse=True, params=[True, False], ids=["small", "large"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for small layers, which run on autograd's own nodes, and for large ones, which do not."""
    if not request.param:
        monkeypatch.setattr(low_rank_product, "_SMALL", 0)


def peft_layer(host: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    """PEFT's model of one layer (a copy), and its LoRA layer."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(host)), config)
    return model, model.base_model.model[0]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_decompositions_equal_peft(init: str) -> None:
    host = nn.Linear(12, 8)
    model, layer = peft_layer(host, init_lora_weights=init)
    delta = LowRankLinear(12, 8, 2, scale=1.5, init=init)
    delta.initialize_from(host.weight)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(delta.b @ delta.a, product, atol=1e-5, rtol=0)  # factors: up to their sign
    with torch.no_grad():
        for ours, theirs in ((delta.a, layer.lora_A), (delta.b, layer.lora_B)):
            ours.copy_(theirs["default"].weight)
        delta.a0.copy_(delta.a)
        delta.b0.copy_(delta.b)
        step_a, step_b = torch.randn_like(delta.a), torch.randn_like(delta.b)
        for a, b in ((delta.a, delta.b), (layer.lora_A["default"].weight, layer.lora_B["default"].weight)):
            a.add_(step_a, alpha=0.3)
            b.add_(step_b, alpha=0.3)
    x = torch.randn(5, 12)
    torch.testing.assert_close(delta(x, None, host.weight, host.bias), model(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d_hf"])
def test_dropout_acts_where_it_does_in_peft(kind: str, use_dora: bool) -> None:
    host = nn.Linear(12, 8) if kind == "linear" else Conv1D(8, 12)
    nn.init.normal_(host.bias)
    transposed = kind == "conv1d_hf"
    model, layer = peft_layer(host, lora_dropout=0.5, use_dora=use_dora, fan_in_fan_out=transposed)
    delta = LowRankLinear(12, 8, 2, scale=1.5, dropout=0.5, use_dora=use_dora, transposed=transposed)
    delta.initialize_from(host.weight)
    with torch.no_grad():
        for ours, theirs in ((delta.a, layer.lora_A), (delta.b, layer.lora_B)):
            ours.normal_()
            theirs["default"].weight.copy_(ours)
        if use_dora:
            delta.magnitude.uniform_(0.5, 2)
            layer.lora_magnitude_vector["default"].weight.copy_(delta.magnitude)
    for training in (True, False):
        model.train(training)
        delta.train(training)
        x = torch.randn(6, 12)
        torch.manual_seed(5)
        expected = model(x)
        torch.manual_seed(5)
        torch.testing.assert_close(delta(x, None, host.weight, host.bias), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_dora_of_other_hosts_equals_peft(kind: str) -> None:
    if kind == "conv":
        host: nn.Module = nn.Conv2d(4, 6, 3, padding=1)
        delta: Any = ConvWeight(4, 6, (3, 3), 2, scale=1.5, use_dora=True)
        x = torch.randn(2, 4, 5, 5)
    else:
        host, delta = nn.Embedding(9, 6), EmbeddingWeight(9, 6, 2, scale=1.5, use_dora=True)
        x = torch.randint(9, (2, 4))
    model, layer = peft_layer(host, use_dora=True)
    delta.initialize_from(host.weight)
    if kind == "conv":
        torch.testing.assert_close(delta(host.weight), host.weight)
        theirs = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    else:
        theirs = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    with torch.no_grad():
        magnitude = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(delta.magnitude, magnitude.flatten())
        for ours, other in zip((delta.a, delta.b), theirs, strict=True):
            ours.normal_(std=0.3)
            other.copy_(ours)
        magnitude.mul_(1.5)
        delta.magnitude.mul_(1.5)
    expected = model(x)
    host.weight.data = delta(host.weight).detach()
    torch.testing.assert_close(host(x), expected, atol=1e-5, rtol=1e-5)
