"""LN tuning: the battery, the formula, which norms are meant, and its own errors."""

from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pet import ArgumentError, LNTuningCallback, LoRACallback, TargetError, apply

from . import zoo
from .battery import Battery, Case, perturb


class TestLNTuning(Battery):
    cases: ClassVar[list[Case]] = [
        Case("transformer_encoder", LNTuningCallback),
        Case("bert", LNTuningCallback, {"target_modules": ["ffn.norm"]}),
        Case("llama", LNTuningCallback, {"modules_to_save": []}),
    ]


def test_the_formula() -> None:
    norm = nn.Sequential(nn.LayerNorm(4, dtype=torch.float64), nn.Identity())
    apply(norm, [LNTuningCallback(modules_to_save=[])])
    with torch.no_grad():
        norm[0].weight.copy_(torch.tensor([1.1, 0.9, 1.0, 1.2]))
        norm[0].bias.copy_(torch.tensor([0.1, 0.0, -0.1, 0.2]))
    wanted = torch.tensor([0.4810495519, 1.1431486556, -1.6011042952, 0.0614365266], dtype=torch.float64)
    x = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(norm(x), wanted, rtol=0, atol=1e-7)


def names(build: object, patterns: object, **options: object) -> set[str]:
    model, run = build()  # type: ignore[operator]
    method = LNTuningCallback(patterns, modules_to_save=[], **options)
    return set(apply(model, [method], forward=lambda: run(model)).record.trained_names)


def test_roles_are_the_norms_of_their_sub_layers() -> None:
    layers = [f"model.layers.{i}." for i in (0, 1)]
    assert names(zoo.llama, "attention.norm") == {f"{layer}input_layernorm.weight" for layer in layers}
    assert names(zoo.llama, "ffn.norm") == {f"{layer}post_attention_layernorm.weight" for layer in layers}
    assert names(zoo.llama, "all") == names(zoo.llama, ["attention.norm", "ffn.norm", "model.norm"])
    behind = {f"bert.encoder.layer.{i}.attention.output.LayerNorm.{own}" for i in (0, 1) for own in ("weight", "bias")}
    assert names(zoo.bert, "attention.norm") == behind
    cross = {name for name in names(zoo.t5, "attention.norm") if name.startswith("decoder.block.0.")}
    assert cross == {f"decoder.block.0.layer.{i}.layer_norm.weight" for i in (0, 1)}


def test_a_parameter_alone_and_what_is_excluded() -> None:
    assert all(name.endswith("weight") for name in names(zoo.bert, "LayerNorm.weight"))
    assert "bert.embeddings.LayerNorm.weight" not in names(zoo.bert, "all", exclude_modules="embeddings.LayerNorm")


def test_beside_lora() -> None:
    model, run = zoo.llama()
    model.double()
    adapted = apply(model, [LoRACallback(r=2), LNTuningCallback(modules_to_save=[])])
    perturb(adapted)
    attached = run(model)
    adapted.merge_()
    assert (run(model) - attached).abs().max() <= 1e-12


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch).sum() * 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)


def test_norms_do_not_decay_and_heads_do() -> None:
    module = Small()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    method = LNTuningCallback(modules_to_save=["2"], verbose=False)
    trainer = pl.Trainer(max_epochs=1, callbacks=[method], enable_model_summary=False, **options)
    trainer.fit(module, DataLoader(torch.ones(4, 4), batch_size=2))
    kept = {name for name, p in module.named_parameters() if torch.equal(p, before[name])}
    assert kept == {"net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"}


def test_bad_input() -> None:
    model, run = zoo.mlp()
    with pytest.raises(TargetError, match="has no norm"):
        apply(model, [LNTuningCallback()])
    with pytest.raises(TargetError, match=r"attention.norm.*no norm of such a sub-layer"):
        apply(model, [LNTuningCallback("attention.norm")], forward=lambda: run(model))
    with pytest.raises(TargetError, match="input_layernorm"):
        apply(zoo.llama()[0], [LNTuningCallback("input_layernrm")])
    with pytest.raises(TargetError, match=r"after exclude_modules"):
        apply(zoo.llama()[0], [LNTuningCallback("model.norm", exclude_modules="norm")])
    with pytest.raises(ArgumentError, match="target_modules is empty"):
        LNTuningCallback([])
