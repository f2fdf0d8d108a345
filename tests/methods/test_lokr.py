"""LoKr: the battery, its formula and golden numbers, and its own errors."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import ArgumentError, LoKrCallback, TargetError, apply
from lightning_pet.layers.kronecker import KroneckerLinear, Split, divided, kron
from lightning_pet.layers.weight_change import Drops

from . import zoo
from .battery import Battery, Case, perturb


class TestLoKr(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", LoKrCallback, {"r": 1, "target_modules": "0"}, parameters=2 * 2 + 4 + 3),
        Case(
            "gpt2",
            LoKrCallback,
            {"r": 1, "decompose_both": True, "target_modules": ["attention.v"]},
            parameters=2 * 4 * 4,
        ),
        Case("conv2d", LoKrCallback, {"r": 1, "use_effective_conv2d": True, "target_modules": ["0"]}),
        Case("mixtral", LoKrCallback, {"r": 1, "init": "lycoris", "target_modules": ["attention.q", "ffn"]}),
    ]


def the_delta(model: nn.Module) -> Any:
    (delta,) = model[0].pet.values()
    return delta


def fill(parameters: list[Tensor]) -> None:
    """Entry n of the k-th tensor is ((7 n + 3 + 2 k) mod 11 - 5) / 10."""
    for k, parameter in enumerate(parameters):
        numbers = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter.data.copy_((((7 * numbers + 3 + 2 * k) % 11 - 5) / 10).view_as(parameter))


def golden_layer() -> tuple[nn.Module, Tensor]:
    layer = nn.Linear(4, 3).double()
    rows = [[0.5, -1, 0.25, 2], [1, 0.5, -0.5, 0], [-0.25, 0.75, 1, -1.5]]
    layer.weight.data.copy_(torch.tensor(rows, dtype=torch.float64))
    layer.bias.data.copy_(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))
    return nn.Sequential(layer), torch.tensor([1, 2, -1, 0.5], dtype=torch.float64)


def test_golden_numbers() -> None:
    model, x = golden_layer()
    apply(model, [LoKrCallback(r=2, alpha=4, decompose_factor=2, target_modules="0", modules_to_save=[])])
    delta = the_delta(model)
    fill([delta.w1, delta.w2])
    assert (delta.w1.shape, delta.w2.shape) == ((1, 2), (3, 2))
    assert (model(x) - torch.tensor([-0.53, 1.91, 0.44], dtype=torch.float64)).abs().max() < 1e-15


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("sizes", [(12, 20), (20, 12), (7, 8)])
def test_formula_in_float64(sizes: tuple[int, int], r: int, both: bool) -> None:
    """W + s · (W1 ⊗ W2), by torch's own product, in all cases of factors; merged, and as the LoRA that it is."""
    inputs, outputs = sizes
    model = nn.Sequential(nn.Linear(inputs, outputs)).double()
    method = LoKrCallback(r=r, alpha=3, decompose_both=both, target_modules="0", modules_to_save=[])
    adapted = apply(model, [method])
    perturb(adapted)
    delta, layer, x = the_delta(model), model[0], torch.randn(2, 5, inputs, dtype=torch.float64)
    first = delta.w1 if delta.w1 is not None else delta.w1_a @ delta.w1_b
    second = delta.w2 if delta.w2 is not None else delta.w2_a @ delta.w2_b
    change = 3 / r * torch.kron(first.detach(), second.detach())
    output = model(x)
    assert (output - x @ (layer.weight + change).T - layer.bias).abs().max() < 1e-14
    factors = delta.low_rank_factors()
    if factors is not None:
        assert (factors[1] @ factors[0] - change).abs().max() < 1e-14
    else:
        assert r * min(first.shape) >= min(sizes)
    adapted.merge_()
    assert (model(x) - output).abs().max() < 1e-14


def test_sizes_are_taken_apart_as_peft_does() -> None:
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 200):
        for factor in (-1, 1, 2, 3, 4, 5, 7, 16, 64, 300):
            assert divided(size, factor) == factorization(size, factor)


def test_the_product_is_that_of_torch() -> None:
    first, second = torch.randn(3, 2, 5), torch.randn(3, 4, 7)
    expected = torch.stack([torch.kron(a, b) for a, b in zip(first, second, strict=True)])
    assert torch.equal(kron(first, second), expected)


def test_nothing_of_the_weights_size_is_made_on_a_linear_layer() -> None:
    """Neither in forward nor for backward: a change of 256 × 256 of factors of 16 × 16."""
    delta = KroneckerLinear(256, 256, 2, scale=1.0)
    nn.init.normal_(delta.w1)
    sizes: list[int] = []
    x, output = torch.randn(3, 256, requires_grad=True), torch.zeros(3, 256)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    with Watch():
        delta(x, output).square().sum().backward()
    assert max(sizes) <= 3 * 256


def test_whole_factors_are_scaled_by_alpha_over_r_too() -> None:
    model, x = golden_layer()
    before, changes = model(x), []
    for r in (8, 16):
        twin, _ = golden_layer()
        apply(twin, [LoKrCallback(r=r, alpha=4, target_modules="0", modules_to_save=[])])
        fill([the_delta(twin).w1, the_delta(twin).w2])
        changes.append(twin(x) - before)
    assert torch.allclose(changes[0], 2 * changes[1])


def test_features_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    split = Split(init="lycoris")
    delta = KroneckerLinear(40, 4000, 4, scale=1.0, split=split, drops=Drops(0.25, rescales=True))
    perturb_all(delta)
    x, output = torch.randn(3, 40), torch.zeros(3, 4000)
    kept = delta(x, output) / delta.eval()(x, output)
    share = (kept[0] != 0).float().mean()
    assert 0.7 < share < 0.8
    assert torch.equal(kept[0] != 0, kept[2] != 0)
    assert torch.allclose(kept[kept != 0], torch.tensor(1 / 0.75), rtol=1e-3)
    whole = KroneckerLinear(40, 4000, 4, scale=1.0, split=split, drops=Drops(whole=0.5))
    perturb_all(whole)
    assert {bool(whole(x, output).any()) for _ in range(20)} == {False, True}


def perturb_all(delta: nn.Module) -> None:
    for parameter in delta.parameters():
        nn.init.normal_(parameter)


def test_bad_input() -> None:
    for options, text in (
        ({"r": 0}, "positive integer"),
        ({"alpha": -1}, "positive number"),
        ({"decompose_factor": -2}, "or -1"),
        ({"rank_dropout": 1.0}, "probability"),
        ({"init": "zero"}, "init"),
        ({"rank_pattern": ["q"]}, "a number for each pattern"),
        ({"budget": 0.1}, "no width"),
    ):
        with pytest.raises(ArgumentError, match=text):
            LoKrCallback(**options)
    model, run = zoo.gpt2()
    before = run(model)
    with pytest.raises(TargetError):
        apply(model, [LoKrCallback(target_modules="wte")])
    with pytest.raises(ArgumentError, match="hits none"):
        apply(model, [LoKrCallback(rank_pattern={"nothing": 2})])
    assert torch.equal(run(model), before)
