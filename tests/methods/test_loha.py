"""LoHa: the battery, its formula and golden numbers, what it keeps for backward, and its own errors."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import ArgumentError, LoHaCallback, TargetError, apply
from lightning_pet.layers.hadamard import HadamardLinear, HadamardWeight
from lightning_pet.layers.weight_change import Form

from . import zoo
from .battery import Battery, Case, perturb
from .test_lokr import fill, golden_layer, the_delta


class TestLoHa(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", LoHaCallback, {"r": 2, "target_modules": "0"}, parameters=4 * (6 + 8)),
        Case("gpt2", LoHaCallback, {"r": 2, "target_modules": ["attention.v", "attention.o"]}),
        Case("conv2d", LoHaCallback, {"r": 2, "use_effective_conv2d": True, "target_modules": ["0"]}),
        Case("mixtral", LoHaCallback, {"r": 2, "target_modules": ["attention.q", "ffn"]}),
    ]


def test_golden_numbers() -> None:
    model, x = golden_layer()
    apply(model, [LoHaCallback(r=2, alpha=4, target_modules="0", modules_to_save=[])])
    delta = the_delta(model)
    fill([delta.w1_a, delta.w1_b, delta.w2_a, delta.w2_b])
    assert (model(x) - torch.tensor([-0.6394, 2.3886, -0.1132], dtype=torch.float64)).abs().max() < 1e-15


def test_formula_in_float64() -> None:
    """W + s · (A1 B1) ⊙ (A2 B2); merged; and as a LoRA of rank r²."""
    model = nn.Sequential(nn.Linear(12, 10)).double()
    adapted = apply(model, [LoHaCallback(r=3, alpha=4, target_modules="0", modules_to_save=[])])
    perturb(adapted)
    delta, layer, x = the_delta(model), model[0], torch.randn(2, 5, 12, dtype=torch.float64)
    change = 4 / 3 * (delta.w1_a @ delta.w1_b) * (delta.w2_a @ delta.w2_b)
    output = model(x)
    assert (output - x @ (layer.weight + change).T - layer.bias).abs().max() < 1e-14
    a, b = delta.low_rank_factors()
    assert a.shape == (9, 12)
    assert (b @ a - change).abs().max() < 1e-14
    adapted.merge_()
    assert (model(x) - output).abs().max() < 1e-14


def test_at_the_start_only_the_zero_factor_has_a_gradient() -> None:
    model, _ = zoo.mlp()
    apply(model, [LoHaCallback(r=2, target_modules="0", modules_to_save=[])])
    model(torch.randn(4, 6)).square().sum().backward()
    moving = {name for name, p in the_delta(model).named_parameters() if p.grad.abs().max() > 0}
    assert moving == {"w2_b"}


@pytest.mark.parametrize("core", [False, True])
def test_gradients_of_the_nodes(core: bool) -> None:
    """First and second ones, of a layer with and without its weight, and of the change of a kernel."""
    torch.manual_seed(0)
    kernel = HadamardWeight(Form(3, 2, (3,)), 2, scale=0.7, core=core, dtype=torch.float64)
    linear = HadamardLinear(4, 3, 2, scale=0.7, dtype=torch.float64)
    for parameter in (*kernel.parameters(), *linear.parameters()):
        nn.init.normal_(parameter)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, weight, bias, output = random(2, 4), random(3, 4), random(3), random(2, 3)
    for delta, inputs, call in (
        (kernel, (random(3, 2, 3),), lambda w: kernel(w)),
        (linear, (x, weight, bias), lambda x, w, b: linear(x, None, w, b)),
        (linear, (x, output), lambda x, y: linear(x, y)),
    ):
        own = tuple(delta.parameters())
        every = (*inputs, *own)

        def run(*given: Tensor, call: Any = call, n: int = len(inputs)) -> Tensor:
            out: Tensor = call(*given[:n]).tanh()
            return out

        assert torch.autograd.gradcheck(run, every)
        assert core or torch.autograd.gradgradcheck(run, every)


def test_nothing_of_the_weights_size_is_kept_for_backward() -> None:
    layer, kept = nn.Linear(64, 48), []
    delta = HadamardLinear(64, 48, 2, scale=1.0)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        delta(x, None, layer.weight, layer.bias)
        delta(x, layer(x.detach()))
    large = {t.data_ptr() for t in kept if t.numel() >= 64 * 48}
    assert large == {layer.weight.data_ptr()}


def test_products_are_taken_in_single_precision_under_half() -> None:
    """A change of which half precision would leave a few bits, on a base that would swallow it."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 64).bfloat16()
    delta = HadamardLinear(256, 64, 4, scale=1.0)
    for parameter in delta.parameters():
        nn.init.normal_(parameter, std=0.03)
    x = torch.randn(50, 256, dtype=torch.bfloat16)
    found = delta(x, torch.zeros(50, 64, dtype=torch.bfloat16))
    expected = x.double() @ delta.change(torch.float64).T
    assert (found - expected).norm() <= 4e-3 * expected.norm()
    assert not torch.equal(delta(x, None, layer.weight, layer.bias), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = delta(x.float(), torch.zeros(50, 64))
    assert (cast - expected).norm() <= 4e-3 * expected.norm()


def test_bad_input() -> None:
    for options, text in (
        ({"r": 0}, "positive integer"),
        ({"alpha": 0}, "positive number"),
        ({"module_dropout": 1.5}, "probability"),
        ({"alpha_pattern": {"0": -1}}, "positive number"),
    ):
        with pytest.raises(ArgumentError, match=text):
            LoHaCallback(**options)
    model, run = zoo.gpt2()
    before = run(model)
    with pytest.raises(TargetError):
        apply(model, [LoHaCallback(target_modules="wte")])
    assert torch.equal(run(model), before)
