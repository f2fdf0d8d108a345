"""Compacter and its relatives: the battery, golden properties, counts, and its own errors."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lightning_pet import AdapterCallback, ArgumentError, CompacterCallback, PETCallback, TargetError, apply, save_delta
from lightning_pet.layers.phm import PHMBottleneck, PHMRule

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, output_in_a_new_process, perturb

SIZE = {"bottleneck_size": 8}
D, K = 16, 8
ONE = 3 * (D + K)  # factored, rank 1, without a rule


def case(
    model: str, parameters: int | None = None, tolerance: float | None = 1e-4, not_compiled: str = "", **options: Any
) -> Case:
    return Case(
        model,
        method=CompacterCallback,
        options={**SIZE, **options},
        exact_identity=False,
        identity_tolerance=tolerance,
        mergeable=False,
        parameters=parameters,
        not_compiled=not_compiled,
    )


class TestCompacter(Battery):
    cases: ClassVar[list[Case]] = [
        case("bert", 4 * ONE + 64),
        case("bert", 4 * ONE, None, phm_dim=1),
        case("gpt2", 2 * ONE + 64, placement="ffn"),
        case("llama", 4 * (2 * D * K // 4 + D + K + 2 * 64), 5e-2, factorized=False),
        case("t5", 10 * ONE + 8, phm_dim=2, cross_attention=True, not_compiled=LIKE_SMALLER),
        case("vit", 4 * (ONE + 2 * 64), 5e-2, shared_rule=False, not_compiled=LIKE_SMALLER),
        case("transformer_encoder", 4 * (2 * ONE - D - K) + 64, rank=2),
    ]


# --- golden properties ---------------------------------------------------------------------------


def adapters(model: nn.Module) -> list[PHMBottleneck]:
    return [module for module in model.modules() if isinstance(module, PHMBottleneck)]


def test_formula_in_float64_inside_a_model() -> None:
    model, run = zoo.bert()
    model.double()
    perturb(apply(model, [CompacterCallback(**SIZE, non_linearity="relu")], forward=lambda: run(model)))
    delta, rule = adapters(model)[0], model.pet["compacter_default_rule"].matrices

    def weight(layer: nn.Module) -> torch.Tensor:
        return sum(torch.kron(rule[i], layer.left[i] @ layer.right[i]) for i in range(4))

    h = torch.randn(3, D, dtype=torch.float64)
    expected = h + (h @ weight(delta.down) + delta.down.bias).relu() @ weight(delta.up) + delta.up.bias
    host = model.bert.encoder.layer[0].attention.output.dropout
    assert (host(h) - expected).abs().max() < 1e-12


def test_one_rule_is_counted_and_stored_once_and_learns_from_all(tmp_path: Path) -> None:
    model, run = zoo.t5()
    adapted = apply(model, [CompacterCallback(**SIZE)], forward=lambda: run(model))
    rules = [name for name in adapted.state_dict() if name.endswith("matrices")]
    assert rules == ["pet.compacter_default_rule.matrices"]
    assert adapted.plan().trainable == 8 * ONE + 64
    assert "shared by 8 places" in str(adapted.plan())
    perturb(adapted)
    rule = model.pet["compacter_default_rule"].matrices
    run(model).square().sum().backward()
    total, parts = rule.grad.clone(), torch.zeros_like(rule)
    for chosen in adapters(model):  # every adapter alone sees the rule; the others see a copy of it
        other = PHMRule(4)
        other.matrices = nn.Parameter(rule.detach().clone())
        for adapter in adapters(model):
            for layer in (adapter.down, adapter.up):
                layer.__dict__["shared"] = model.pet["compacter_default_rule"] if adapter is chosen else other
        rule.grad = None
        run(model).square().sum().backward()
        parts += rule.grad
    assert torch.allclose(total, parts, rtol=1e-3, atol=1e-4 * float(total.abs().max()))


def test_compacter_plus_plus_is_compacter_without_the_attention_adapters() -> None:
    model, run = zoo.gpt2()
    perturb(apply(model, [CompacterCallback(**SIZE)]))
    for block in model.transformer.h:
        up = block.attn.pet["compacter_default"].up
        for parameter in (up.right, up.bias):
            torch.nn.init.zeros_(parameter)
    plus, _ = zoo.gpt2()
    apply(plus, [CompacterCallback(**SIZE, placement="ffn")])
    values = {name: value for name, value in model.state_dict().items() if ".attn.pet." not in name}
    plus.load_state_dict(values)
    assert torch.allclose(run(plus), run(model), atol=1e-6)


def test_low_rank_adapter_has_no_rule() -> None:
    model, _ = zoo.bert()
    adapted = apply(model, [CompacterCallback(**SIZE, phm_dim=1, rank=2)])
    assert not [name for name in adapted.state_dict() if "rule" in name or "matrices" in name]
    matrix = adapters(model)[0].down(torch.eye(D))
    assert torch.linalg.matrix_rank(matrix) == 2


def test_a_new_process_reads_the_file(tmp_path: Path) -> None:
    model, run = zoo.t5()
    perturb(apply(model, [CompacterCallback(**SIZE, layer_norms=True)], forward=lambda: run(model)))
    path = tmp_path / "delta.pet.safetensors"
    save_delta(model, path)
    assert torch.equal(output_in_a_new_process("t5", path, tmp_path / "out.pt"), run(model).detach())


def test_budget_keeps_the_bottleneck_divisible() -> None:
    model, _ = zoo.bert()
    callback = CompacterCallback(budget=0.03)
    plan = apply(model, [callback]).plan()
    assert callback.bottleneck_size % 4 == 0
    delta = sum(row.parameters for row in plan.rows if row.method == "compacter")
    assert delta == 4 * 3 * (D + callback.bottleneck_size) + 64 <= 0.03 * plan.base < delta + 4 * 3 * 4


@pytest.mark.parametrize("method", [CompacterCallback, AdapterCallback])
def test_no_budget_buys_a_bottleneck_that_is_wider_than_the_model(method: type[PETCallback]) -> None:
    model, _ = zoo.bert()
    callback = method(budget=0.9)
    apply(model, [callback])
    assert callback.bottleneck_size == D


def test_a_budget_that_is_too_small_names_a_bottleneck_that_exists() -> None:
    model, _ = zoo.bert()
    with pytest.raises(ArgumentError, match=r"bottleneck_size=4 costs 304 numbers") as caught:
        apply(model, [CompacterCallback(budget=0.01)])
    enough = float(re.search(r"budget that works is ([\d.]+);", str(caught.value)).group(1))
    callback = CompacterCallback(budget=enough)
    apply(model, [callback])
    assert callback.bottleneck_size == 4


def test_dropped_layers_are_counted_per_stack() -> None:
    model, run = zoo.t5()
    plan = apply(model, [CompacterCallback(**SIZE, drop_layers=1)], forward=lambda: run(model)).plan()
    assert all("block.1." in row.place for row in plan.rows if row.role)
    assert plan.trainable == 4 * ONE + 64


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phm_dim": 0}, "phm_dim=0: must be a positive integer"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"bottleneck_size": 26}, r"bottleneck_size=26 .* Use bottleneck_size=24 or 28, or phm_dim=1 or 2"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
        ({"placement": "attention"}, r"placement='attention': .* 'both', 'ffn'"),
        ({"non_linearity": "softplus"}, "non_linearity='softplus'"),
        ({"rule_init": 0.0}, "rule_init=0.0"),
        ({"drop_layers": -1}, "drop_layers=-1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        CompacterCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phm_dim": 3, "bottleneck_size": 6}, r"dropout: width=16 is not divisible by phm_dim=3. Use phm_dim=2 or 4"),
        ({}, r"reduction_factor=32 makes of width 16 bottleneck_size=0 .* Use bottleneck_size=4\."),
        ({"reduction_factor": 3}, r"bottleneck_size=5 .* Use bottleneck_size=4 or 8, or phm_dim=1 or 5"),
    ],
)
def test_sizes_that_do_not_divide(options: dict[str, Any], message: str) -> None:
    model, _ = zoo.bert()
    with pytest.raises(ArgumentError, match=message):
        apply(model, [CompacterCallback(**options)])
    assert not [name for name, _ in model.named_parameters() if ".pet." in name]


def test_a_model_without_the_sub_layer_is_refused() -> None:
    model, _ = zoo.mlp()
    with pytest.raises(TargetError, match="residual sum"):
        apply(model, [CompacterCallback(**SIZE)])
    bert, _ = zoo.bert()
    with pytest.raises(TargetError, match="no cross-attention"):
        apply(bert, [CompacterCallback(**SIZE, cross_attention=True)])


# --- checkpoints -----------------------------------------------------------------------------------


def test_a_base_checkpoint_loads_strictly_and_half_a_delta_does_not() -> None:
    model, _ = zoo.bert()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply(model, [CompacterCallback(**SIZE)])
    model.load_state_dict(base, strict=True)
    half = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("down.left")}
    with pytest.raises(RuntimeError, match=r"Missing key.*down\.left"):
        model.load_state_dict(half, strict=True)
