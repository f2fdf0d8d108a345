"""(IA)³: the battery, golden properties, equality with HF PEFT, and its own errors."""

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lightning_pet import ArgumentError, IA3Callback, LoRACallback, TargetError, apply
from lightning_pet.layers.scaling import scaled

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, perturb

K_V = {"feedforward_modules": []}


class TestIA3(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", IA3Callback, {"target_modules": "0", "feedforward_modules": "2"}, parameters=8 + 8),
        Case("transformer_encoder", IA3Callback, parameters=2 * (16 + 16 + 24)),
        Case("gpt2", IA3Callback, parameters=2 * (16 + 16 + 64)),
        Case("llama", IA3Callback, parameters=2 * (8 + 8 + 24)),
        Case("t5", IA3Callback, parameters=2 * (16 + 16 + 24) + 2 * (2 * 16 + 2 * 16 + 24), not_compiled=LIKE_SMALLER),
        Case("mixtral", IA3Callback, parameters=16 + 16 + 3 * 24),
        Case("conv1d", IA3Callback, {"target_modules": "0", "feedforward_modules": "2"}, parameters=6 + 6),
        Case("conv2d", IA3Callback, {"target_modules": "0", "feedforward_modules": "2"}, parameters=6 + 6),
        Case("conv3d", IA3Callback, {"target_modules": "0", "feedforward_modules": []}, parameters=6),
        Case("own", IA3Callback, {"target_modules": ["turned"], "feedforward_modules": "conv", "modules_to_save": []}),
        Case("reading", IA3Callback, {"target_modules": [], "feedforward_modules": ["conv", "down"]}),
        Case("reading", IA3Callback, {"target_modules": ["conv", "down"], "feedforward_modules": []}),
    ]


# --- golden properties ---------------------------------------------------------------------------


def vector(adapted: Any, ending: str) -> torch.Tensor:
    (name,) = [n for n in adapted.state_dict() if n.endswith(f"{ending}.scale")]
    return adapted.state_dict()[name]


def test_formula_in_float64() -> None:
    """softmax(Q (l_k K)ᵀ / √d) (l_v V), then W2 (l_ff act(W1 x)), in a layer written out by hand."""
    layer = nn.TransformerEncoderLayer(8, 1, 12, dropout=0.0, batch_first=True).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    adapted = apply(layer, [IA3Callback()], forward=lambda: layer(x))
    perturb(adapted)
    attention = layer.self_attn
    q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
    l_k, l_v = vector(adapted, "in_proj_weight_k"), vector(adapted, "in_proj_weight_v")
    mixed = torch.softmax(q @ (l_k * k).mT / 8**0.5, -1) @ (l_v * v)
    x1 = layer.norm1(x + mixed @ attention.out_proj.weight.T + attention.out_proj.bias)
    inner = vector(adapted, "linear2.pet.ia3_default") * (x1 @ layer.linear1.weight.T + layer.linear1.bias).relu()
    wanted = layer.norm2(x1 + inner @ layer.linear2.weight.T + layer.linear2.bias)
    assert (layer(x) - wanted).abs().max() < 1e-14


def test_scaling_the_input_is_scaling_the_columns_and_the_output_the_rows() -> None:
    model, _ = zoo.mlp()
    model.double()
    perturb(apply(model, [IA3Callback(target_modules="0", feedforward_modules="2")]))
    x = torch.randn(7, 6, dtype=torch.float64)
    rows, columns = model[0].pet["ia3_default"].scale, model[2].pet["ia3_default"].scale
    hidden = x @ (rows[:, None] * model[0].weight).T + rows * model[0].bias
    assert (model[0](x) - hidden).abs().max() < 7e-15
    assert (model[2](hidden) - (hidden @ (model[2].weight * columns).T + model[2].bias)).abs().max() < 7e-15


def test_in_a_gated_layer_it_is_the_same_to_scale_the_linear_half() -> None:
    outputs = []
    for options in ({"feedforward_modules": "ffn.down"}, {"feedforward_modules": [], "target_modules": "ffn.up"}):
        model, run = zoo.llama()
        model.double()
        adapted = apply(model, [IA3Callback(**{"target_modules": [], **options})])
        with torch.no_grad():
            for name, tensor in sorted(adapted.state_dict().items()):
                tensor.copy_(torch.linspace(0.5, 2, tensor.numel()) + (".1." in name))
        outputs.append(run(model))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-13


def test_a_fused_projection_is_rescaled_by_rows() -> None:
    model, _ = zoo.gpt2()
    adapted = apply(model, [IA3Callback(**K_V)])
    host, x = model.transformer.h[0].attn.c_attn, torch.randn(3, 16)
    before = host(x)
    with torch.no_grad():
        vector(adapted, "0.attn.c_attn.pet.ia3_default_k").fill_(2)
        vector(adapted, "0.attn.c_attn.pet.ia3_default_v").fill_(3)
    assert torch.equal(host(x), torch.cat([before[:, :16], 2 * before[:, 16:32], 3 * before[:, 32:]], 1))


def test_encoder_and_decoder_attentions_all_get_vectors() -> None:
    model, _ = zoo.t5()
    rows = apply(model, [IA3Callback(**K_V)]).plan().rows
    assert sum("EncDecAttention" in row.place for row in rows) == 2 * 2
    assert sum("SelfAttention" in row.place for row in rows) == 2 * 4


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_with_lora_on_the_same_layers_merges_in_any_order(order: tuple[int, int]) -> None:
    model, run = zoo.bert()
    model.double()
    both = [IA3Callback(), LoRACallback(r=2, target_modules=["attention.k", "ffn.down"])]
    adapted = apply(model, [both[i] for i in order])
    perturb(adapted)
    attached = run(model)
    adapted.merge_()
    assert (run(model) - attached).abs().max() < 1e-12


def test_vectors_stay_precise_on_a_half_precision_base() -> None:
    model, _ = zoo.mlp()
    model.bfloat16()
    apply(model, [IA3Callback(target_modules="0", feedforward_modules=[])])
    model[0].pet["ia3_default"].scale.data.fill_(1.003)  # 1 in bfloat16
    x = torch.randn(4000, 6, dtype=torch.bfloat16)
    with_, without = model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias)
    assert with_.dtype == torch.bfloat16
    assert not torch.equal(with_, without)


# --- HF PEFT -------------------------------------------------------------------------------------

PEFT_TARGETS = {
    "bert": (["key", "value", r"(?<!attention\.)output\.dense"], r".*(?<!attention)\.output\.dense"),
    "t5": (["k", "v", "wo"], r".*\.wo"),
    "llama": (["k_proj", "v_proj", "down_proj"], r".*\.down_proj"),
    "gpt2": (["c_attn", "mlp.c_proj"], r".*mlp\.c_proj"),
}


@pytest.mark.parametrize("build", PEFT_TARGETS)
def test_equal_to_peft_on_copied_vectors(build: str) -> None:
    from peft import IA3Config, get_peft_model

    names, feedforward = PEFT_TARGETS[build]
    ours, run = getattr(zoo, build)()
    theirs, _ = getattr(zoo, build)()
    adapted = apply(ours, [IA3Callback(modules_to_save=[])])
    perturb(adapted)
    endings = "|".join(names).replace("mlp.c_proj", r"mlp\.c_proj")
    config = IA3Config(target_modules=rf".*\.({endings})", feedforward_modules=feedforward)
    wrapped = get_peft_model(theirs, config)
    hosts = {n.removesuffix(".ia3_l.default"): p for n, p in wrapped.named_parameters() if "ia3_l" in n}
    assert len(hosts) == len({row.place for row in adapted.plan().rows if row.method == "ia3"})
    with torch.no_grad():
        for name, theirs_l in hosts.items():
            host = name.removeprefix("base_model.model.")
            found = {n: t for n, t in adapted.state_dict().items() if n.startswith(f"{host}.pet")}
            values = [torch.ones(16)] * (len(found) == 2) + [found[n] for n in sorted(found)]  # PEFT rescales q, too
            theirs_l.copy_(torch.cat(values).view_as(theirs_l))
    assert (run(ours) - run(wrapped)).abs().max() <= 1e-5
    assert (run(ours) - run(getattr(zoo, build)()[0])).abs().max() > 1e-3


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("build", ["conv2d", "conv3d"])
def test_equal_to_peft_on_convolutions(build: str, inner: bool) -> None:
    from peft import IA3Config, get_peft_model

    ours, run = getattr(zoo, build)()
    theirs, _ = getattr(zoo, build)()
    wrapped = get_peft_model(theirs, IA3Config(target_modules=["0"], feedforward_modules=["0"] if inner else []))
    names = (
        {"target_modules": [], "feedforward_modules": ["0"]}
        if inner
        else {"target_modules": ["0"], "feedforward_modules": []}
    )
    adapted = apply(ours, [IA3Callback(modules_to_save=[], **names)])
    base = run(ours)
    perturb(adapted)
    with torch.no_grad():
        (theirs_l,) = [p for n, p in wrapped.named_parameters() if "ia3_l" in n]
        theirs_l.copy_(ours[0].pet["ia3_default"].scale.view_as(theirs_l))
    expected = run(wrapped)
    assert (run(ours) - expected).abs().max() <= 1e-5
    assert (run(ours) - base).abs().max() > 1e-3
    adapted.merge_()
    assert (run(ours) - expected).abs().max() <= 1e-5


# --- bad input -----------------------------------------------------------------------------------


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="are empty"):
        IA3Callback([], [])
    with pytest.raises(ArgumentError, match="no width"):
        IA3Callback(budget=0.1)
    model, run = zoo.gpt2()
    before = run(model)
    for options, text in (
        ({"target_modules": "attention.x"}, "attention"),
        ({"target_modules": "wte"}, "cannot adapt|no weight that this method"),
        ({"feedforward_modules": "attention.v"}, "one input for all"),
        ({"exclude_modules": ["nothing"]}, "nothing"),
        ({"layers_to_transform": [9]}, "layer"),
    ):
        with pytest.raises(TargetError, match=text):
            apply(model, [IA3Callback(**options)])
    assert torch.equal(run(model), before)


# --- what is kept for the backward pass -------------------------------------------------------------


ACTIVATIONS = {
    "gelu": lambda x, up: nn.functional.gelu(x),
    "gated": lambda x, up: nn.functional.silu(x) * up,
    "relu": lambda x, up: nn.functional.relu(x),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_scaled_input_has_the_gradients_of_the_formula(activation: str) -> None:
    def run(scale: Any, x: torch.Tensor, up: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return scale(ACTIVATIONS[activation](x, up), factor).tanh()

    x, up = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True).unbind(0)
    given = (x, up, torch.randn(5, dtype=torch.float64, requires_grad=True))
    found, expected = (
        torch.autograd.grad(run(scale, *given).sum(), given, allow_unused=True)
        for scale in (scaled, lambda x, factor: x * factor)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-12)
    inputs = [tensor.detach().requires_grad_() for tensor in given]
    assert torch.autograd.gradgradcheck(lambda *inputs: run(scaled, *inputs), inputs)


@pytest.mark.parametrize("activation", ["gelu", "gated"])
def test_an_input_that_can_be_made_again_is_not_kept(activation: str) -> None:
    kept: list[torch.Tensor] = []
    factor = torch.ones(5, requires_grad=True)
    x, up = (torch.randn(4, 5, requires_grad=True) * 1 for _ in range(2))
    value = ACTIVATIONS[activation](x, up)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scaled(value, factor)
    assert kept
    assert value.data_ptr() not in {tensor.data_ptr() for tensor in kept}


def test_a_scaled_input_in_half_precision() -> None:
    x = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    factor = torch.linspace(0.5, 1.5, 5).requires_grad_()
    found, expected = (
        torch.autograd.grad(scale(nn.functional.gelu(x), factor).sum(), (x, factor))
        for scale in (scaled, lambda x, factor: (x * factor).to(x.dtype))
    )
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(found, expected)
