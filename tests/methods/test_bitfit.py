"""BitFit: the battery, golden properties, and its own errors."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_pet import (
    ArgumentError,
    BitFitCallback,
    DeltaFileError,
    LoRACallback,
    NotMergeableError,
    TargetError,
    apply,
    save_delta,
)

from . import zoo
from .battery import Battery, Case, frozen_output, perturb

ADDED = {"mergeable": False}


class TestBitFit(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", BitFitCallback),
        Case("transformer_encoder", BitFitCallback, {"biases": ["attention.q", "ffn.up"]}, parameters=2 * 16),
        Case("bert", BitFitCallback),
        Case("gpt2", BitFitCallback, {"biases": ["attention.q", "ffn.up"]}, parameters=2 * 16),
        Case("llama", BitFitCallback, {"biases": ["attention.v", "ffn"], "add_missing": True}, **ADDED),
    ]


# --- golden properties ---------------------------------------------------------------------------


def test_only_biases_and_the_head_train() -> None:
    model, _ = zoo.bert()
    names = apply(model, [BitFitCallback()]).record.trained_names
    assert set(names) == {n for n, _ in model.named_parameters() if n.endswith("bias") or n.startswith("classifier")}


def test_the_papers_subset() -> None:
    model, _ = zoo.bert()
    names = apply(model, [BitFitCallback(["attention.q", "ffn.up"], modules_to_save=[])]).record.trained_names
    assert len(names) == 4
    assert all(name.endswith(("attention.self.query.bias", "intermediate.dense.bias")) for name in names)


def test_the_output_layers_of_attention_and_of_the_feed_forward_are_told_apart() -> None:
    model, _ = zoo.bert()
    names = apply(model, [BitFitCallback("ffn.down", modules_to_save=[])]).record.trained_names
    assert names == tuple(f"bert.encoder.layer.{i}.output.dense.bias" for i in (0, 1))


@pytest.mark.parametrize("build", [zoo.bert, zoo.vit])
def test_the_gradient_of_key_biases_is_zero(build: object) -> None:
    """Softmax ignores what is added to all keys alike."""
    model, run = build()
    model.double()
    apply(model, [BitFitCallback(["attention.k", "attention.q"])], forward=lambda: run(model))
    run(model).square().sum().backward()
    gradients = {n: p.grad.abs().max() for n, p in model.named_parameters() if p.requires_grad and p.ndim == 1}
    key = [g for n, g in gradients.items() if "key" in n or "k_proj" in n]
    assert len(key) == 2
    assert max(key) < 1e-14
    assert all(g > 1e-9 for n, g in gradients.items() if "query" in n or "q_proj" in n)


def test_rows_of_a_fused_bias_train_like_the_bias_itself() -> None:
    """SGD on the vector for v equals SGD on the whole bias, restricted to the rows of v."""
    biases = []
    for pattern in ("all", "attention.v"):
        model, run = zoo.gpt2()
        adapted = apply(model, [BitFitCallback(pattern)])
        host = model.transformer.h[1].attn.c_attn
        own = host.bias if pattern == "all" else host.pet["bitfit_default_bias_v"].value
        (gradient,) = torch.autograd.grad(run(model).square().sum(), own)
        if pattern == "all":
            biases.append((host.bias - 0.1 * gradient)[32:])
            continue
        with torch.no_grad():
            own.sub_(0.1 * gradient)
        adapted.merge_()
        assert torch.equal(host.bias[:32], zoo.gpt2()[0].transformer.h[1].attn.c_attn.bias[:32])
        biases.append(host.bias[32:])
    assert torch.allclose(*biases, atol=1e-7)


def test_added_biases_of_t5() -> None:
    """Two encoder and two decoder layers, 16 wide: every projection and norm gets one, the output layer does not."""
    model, run = zoo.t5()
    before = frozen_output(model, run)
    adapted = apply(model, [BitFitCallback(add_missing=True)])
    assert torch.equal(frozen_output(model, run), before)
    per_stack = {"encoder": 4 * 16 + 24 + 16 + 2 * 16, "decoder": 8 * 16 + 24 + 16 + 3 * 16}
    assert adapted.plan().trainable == 2 * sum(per_stack.values()) + 2 * 16
    assert not hasattr(model.lm_head, "pet")
    assert not any("relative_attention_bias" in name for name in adapted.record.trainable_names)


def test_the_output_layer_gets_a_bias_where_it_is_named() -> None:
    model, _ = zoo.t5()
    adapted = apply(model, [BitFitCallback(["all", "lm_head"], exclude_modules=["final_layer_norm"], add_missing=True)])
    assert model.lm_head.pet["bitfit_default"].value.shape == (50,)
    assert not any(row.place.endswith("stack.final_layer_norm") for row in adapted.plan().rows)


def test_merging_an_added_bias_is_refused_and_says_why() -> None:
    model, _ = zoo.llama()
    with pytest.raises(NotMergeableError, match="add_missing"):
        apply(model, [BitFitCallback("attention.q", add_missing=True)]).merge_()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_with_lora_on_the_same_layer(order: tuple[int, int]) -> None:
    model, run = zoo.gpt2()
    model.double()
    both = [BitFitCallback("attention.v"), LoRACallback(r=2, target_modules="attention.v")]
    adapted = apply(model, [both[i] for i in order])
    before = run(model)
    perturb(adapted)
    attached = run(model)
    for row in adapted.plan().rows:
        assert row.parameters > 0
    host = model.transformer.h[0].attn.c_attn
    x = torch.randn(3, 16, dtype=torch.float64)
    lora, bias = host.pet["lora_default_v"], host.pet["bitfit_default_bias_v"]
    wanted = x @ host.weight + host.bias
    wanted[:, 32:] += lora.scale * (x @ lora.a.T) @ lora.b.T + bias.value
    assert torch.allclose(host(x), wanted, atol=1e-12)
    adapted.merge_()
    assert torch.allclose(run(model), attached, atol=1e-10)
    assert not torch.allclose(attached, before)


def test_start_from_a_file(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, run = zoo.bert()
    perturb(apply(model, [BitFitCallback(["attention.q", "ffn"])]))
    path = str(tmp_path / "d.pet.safetensors")
    save_delta(model, path)
    again, _ = zoo.bert()
    apply(again, [BitFitCallback(["attention.q", "ffn"], start_from=path)])
    assert torch.equal(run(again), run(model))
    assert not recwarn.list
    more, _ = zoo.bert()
    with pytest.warns(UserWarning, match=r"does not hold .*attention.self.value.bias"):
        apply(more, [BitFitCallback(["attention.q", "attention.v", "ffn"], start_from=path)])
    assert torch.equal(run(more), run(model))
    for other in (LoRACallback(r=2, start_from=path), BitFitCallback(name="second", start_from=path)):
        with pytest.raises(DeltaFileError, match="it holds bitfit:default"):
            apply(zoo.bert()[0], [other])


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", ["all", "attention.q", ["ffn"]])
@pytest.mark.parametrize("build", [zoo.t5, zoo.llama])
def test_a_model_without_biases(build: object, biases: object) -> None:
    model, run = build()
    before = run(model)
    with pytest.raises(TargetError, match="add_missing=True"):
        apply(model, [BitFitCallback(biases)])
    assert torch.equal(run(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_bad_patterns() -> None:
    model, _ = zoo.bert()
    with pytest.raises(TargetError, match="query"):
        apply(model, [BitFitCallback("qery")])
    with pytest.raises(TargetError, match="nothing is left"):
        apply(model, [BitFitCallback("query", exclude_modules=["query"])])
    with pytest.raises(ArgumentError, match="biases is empty"):
        BitFitCallback([])
    with pytest.raises(ArgumentError, match="no width"):
        BitFitCallback(budget=0.1)


class Convolutions(nn.Module):
    def __init__(self, bias: bool = True, norm: bool = True) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.fc = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))
        return out


def test_convolutional_networks() -> None:
    """The only linear layer is the head, so ``all-linear`` hits nothing; nobody has asked for it."""
    assert {"conv.bias", "bn.bias", "fc.bias"} <= set(apply(Convolutions(), BitFitCallback()).record.trained_names)
    added = apply(Convolutions(bias=False), BitFitCallback(add_missing=True, modules_to_save=[]))
    assert added.record.trained_names == ("bn.bias", "fc.bias")
    with pytest.raises(TargetError, match=r"has no bias there. Set add_missing=True"):
        apply(Convolutions(bias=False, norm=False), BitFitCallback(modules_to_save="fc"))
    with pytest.raises(TargetError, match="no linear layer or norm") as caught:
        apply(Convolutions(bias=False, norm=False), BitFitCallback(add_missing=True, modules_to_save="fc"))
    assert "exclude_modules" not in str(caught.value)
