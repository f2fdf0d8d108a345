"""HiRA: the battery, golden numbers, and what only this method promises."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_pet import ArgumentError, HiRACallback, TargetError, apply

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, perturb
from .golden import BIAS, WEIGHT, X, fill


class TestHiRA(Battery):
    cases: ClassVar[list[Case]] = [
        Case("transformer_encoder", HiRACallback, {"r": 3}, parameters=2 * 2 * 3 * (16 + 16)),
        Case("gpt2", HiRACallback, {"r": 2}, parameters=2 * 2 * 2 * (16 + 16), not_compiled=LIKE_SMALLER),
        Case("conv2d", HiRACallback, {"r": 2, "target_modules": ["0"]}, not_compiled=LIKE_SMALLER),
        Case("embedding", HiRACallback, {"r": 2, "target_modules": ["embedding"]}, not_compiled=LIKE_SMALLER),
    ]


def golden() -> tuple[nn.Linear, nn.Module]:
    host = nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        host.weight.copy_(WEIGHT)
        host.bias.copy_(BIAS)
    return host, nn.Sequential(host)


def test_golden_numbers() -> None:
    host, model = golden()
    apply(model, [HiRACallback(r=2, target_modules=["0"])])
    delta = host.pet["hira_default"]
    with torch.no_grad():
        delta.a.copy_(fill(0, 2, 4))
        delta.b.copy_(fill(1, 3, 2))
    expected = torch.tensor([-0.89, 2.385, -0.6475], dtype=torch.float64)
    assert (model(X) - expected).abs().max() < 1e-14
    written_out = (WEIGHT * (1 + delta.b @ delta.a)) @ X + BIAS
    assert (written_out - expected).abs().max() < 1e-14


def test_the_change_has_a_rank_as_high_as_that_of_the_weight_and_zeros_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10, dtype=torch.float64))
    model[0].weight.data[3, 4] = 0
    before = model[0].weight.detach().clone()
    adapted = apply(model, [HiRACallback(r=1, target_modules=["0"])])
    perturb(adapted)
    adapted.merge_()
    assert torch.linalg.matrix_rank(model[0].weight - before) == 10
    assert model[0].weight[3, 4] == 0


def test_large_weights_are_made_again_in_backward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    perturb(apply(model, [HiRACallback(r=2, target_modules=["0", "2"])]), 0.05)
    x, kept = torch.randn(4, 256), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = model(x)  # hooks of others: every effective weight is kept
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with_hooks = torch.autograd.grad(out.square().sum(), own.values())
    again = torch.autograd.grad(model(x).square().sum(), own.values())
    assert sum(size == 1 << 16 for size in kept) > 1
    assert all(torch.equal(a, b) for a, b in zip(with_hooks, again, strict=True))


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="r=0"):
        HiRACallback(r=0)
    with pytest.raises(ArgumentError, match="init='pissa'"):
        HiRACallback(init="pissa")  # type: ignore[arg-type]
    model, _ = zoo.mlp()
    with pytest.raises(TargetError, match="at most 6"):
        apply(model, [HiRACallback(target_modules=["0"])])
    with pytest.raises(ArgumentError, match="rank_pattern"):
        apply(model, [HiRACallback(r=2, target_modules=["0"], rank_pattern={"2": 4})])
    assert apply(model, [HiRACallback(target_modules=["0"], clamp_rank=True)]).plan().trainable == 6 * (6 + 8)
