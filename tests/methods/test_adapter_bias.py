"""AdapterBias: the battery, golden properties, counts, and its own errors."""

from typing import Any, ClassVar

import pytest
import torch

from lightning_pet import AdapterBiasCallback, ArgumentError, TargetError, apply
from lightning_pet.layers.adapter_bias import TokenShift

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, perturb

D, F = 16, 24


def case(model: str, parameters: int, not_compiled: str = "", **options: Any) -> Case:
    own = {"parameters": parameters, "not_compiled": not_compiled}
    return Case(model, AdapterBiasCallback, options, mergeable=False, **own)


class TestAdapterBias(Battery):
    cases: ClassVar[list[Case]] = [
        case("bert", 2 * (D + F + 1)),
        case("bert", 2 * D + F + 1, share_alpha=True, layer_norms=True),
        case("gpt2", 2 * 2 * D, form="survey"),
        case("t5", 4 * (D + F + 1), LIKE_SMALLER),
        case("vit", D + F + 1, LIKE_SMALLER, layers_to_transform=[1]),
        case("transformer_encoder", 3 * D, form="survey", share_alpha=True),
    ]


# --- golden properties ---------------------------------------------------------------------------


def test_authors_form_reads_the_intermediate_activation() -> None:
    model, run = zoo.bert()
    model.double()
    perturb(apply(model, [AdapterBiasCallback()], forward=lambda: run(model)))
    host = model.bert.encoder.layer[0].output.dense
    delta = host.pet["adapter_bias_default"]
    h = torch.randn(2, 5, F, dtype=torch.float64)
    alpha = h @ delta.alpha.weight + delta.alpha.bias
    expected = h @ host.weight.T + host.bias + alpha.unsqueeze(-1) * delta.v
    assert (host(h) - expected).abs().max() < 1e-14


@pytest.mark.parametrize("form", ["authors", "survey"])
def test_the_update_has_rank_one_over_tokens(form: str) -> None:
    torch.manual_seed(0)
    shift = TokenShift(6, 5, bias=form == "authors", dtype=torch.float64)
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    assert torch.equal(shift(x, y), y)  # v = 0, whatever alpha is
    torch.nn.init.normal_(shift.v)
    assert torch.linalg.matrix_rank(shift(x, y) - y, rtol=1e-10) == 1


def test_survey_form_reads_the_input_of_the_sub_layer() -> None:
    model, run = zoo.gpt2()
    adapted = apply(model, [AdapterBiasCallback(form="survey")])
    perturb(adapted)
    seen: dict[str, torch.Tensor] = {}
    block = model.transformer.h[0]
    block.ln_2.register_forward_hook(lambda module, args, out: seen.update(x=args[0]))
    block.mlp.register_forward_hook(lambda module, args, out: seen.update(inside=args[0], out=out))
    run(model)
    found, delta = seen["out"], block.mlp.pet["adapter_bias_default"]
    assert delta.alpha.bias is None
    with adapted.disabled():
        base = block.mlp(seen["inside"])
    expected = base + (seen["x"] @ delta.alpha.weight).unsqueeze(-1) * delta.v
    assert torch.allclose(found, expected, atol=1e-6)


def test_shared_alpha_is_counted_once() -> None:
    model, _ = zoo.t5()
    plan = apply(model, [AdapterBiasCallback(share_alpha=True)]).plan()
    assert plan.trainable == 4 * D + F + 1
    assert "shared by 4 places" in str(plan)


@pytest.mark.parametrize(
    ("model", "norms"),
    [
        ("bert", ["bert.embeddings.LayerNorm", "bert.encoder.layer.0.output.LayerNorm"]),
        ("gpt2", ["transformer.h.0.ln_2"]),
        ("t5", ["encoder.block.0.layer.1.layer_norm", "decoder.block.0.layer.2.layer_norm"]),
        ("vit", ["vit.layers.0.layernorm_after"]),
        ("transformer_encoder", ["layers.0.norm2"]),
    ],
)
def test_norms_of_the_feed_forward_and_the_embedding(model: str, norms: list[str]) -> None:
    base, run = getattr(zoo, model)()
    callback = AdapterBiasCallback(layer_norms=True, modules_to_save=[], layers_to_transform=[0])
    adapted = apply(base, [callback], forward=lambda: run(base))
    assert {name.rpartition(".")[0] for name in adapted.record.trained_names} == set(norms)


# --- bad input -----------------------------------------------------------------------------------


def test_layers_without_an_activation_that_can_be_read() -> None:
    """Experts have none: there alpha reads the sub-layer's input, which is said; the other layers are as they are."""
    experts, run = zoo.mixtral()
    with pytest.warns(UserWarning, match=r"in 1 layers alpha reads the input of the sub-layer"):
        adapted = apply(experts, AdapterBiasCallback(), forward=lambda: run(experts))
    survey, run = zoo.mixtral()
    same = apply(survey, AdapterBiasCallback(form="survey"), forward=lambda: run(survey))
    assert [t.module for _, t, _ in adapted.record.places()] == [t.module for _, t, _ in same.record.places()]
    assert adapted.plan().trainable == same.plan().trainable

    mixed, run = zoo.llama()
    mixed.model.layers[1].mlp = zoo.mixtral()[0].model.layers[0].mlp
    with pytest.warns(UserWarning, match="in 1 layers"):
        adapted = apply(mixed, AdapterBiasCallback(), forward=lambda: run(mixed))
    places = [target for _, target, _ in adapted.record.places()]
    assert [(bool(t.parameter), t.module.split(".")[2]) for t in places] == [(True, "0"), (False, "1")]


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="form='paper': use one of 'authors', 'survey'"):
        AdapterBiasCallback(form="paper")
    mlp, _ = zoo.mlp()
    with pytest.raises(TargetError, match=r"ffn\.down"):
        apply(mlp, [AdapterBiasCallback()])
    encoder = torch.nn.Sequential(
        torch.nn.TransformerEncoderLayer(16, 2, 24), torch.nn.TransformerEncoderLayer(16, 2, 32)
    )
    with pytest.raises(ArgumentError, match=r"share_alpha=True .* \[24, 32\] features"):
        apply(encoder, [AdapterBiasCallback(share_alpha=True)], forward=lambda: encoder(torch.randn(3, 2, 16)))
