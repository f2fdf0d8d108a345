"""LoRA against an independent implementation: HF PEFT with the same weights."""

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pet import LoRACallback, apply

from . import zoo

TOLERANCE = 1e-5
MODELS = {
    # model: (targets for PEFT, the same places for us)
    "bert": (
        ["query", "value", "output.dense", "intermediate.dense"],
        ["query", "value", "output.dense", "intermediate.dense"],
    ),
    "gpt2": (["c_attn", "c_fc"], ["c_attn", "c_fc"]),
    "llama": (["q_proj", "v_proj", "gate_proj", "down_proj"], ["attention.q", "attention.v", "ffn.gate", "ffn.down"]),
    "t5": (["q", "v", "wo"], ["attention.q", "attention.v", "ffn.down"]),
    "vit": (["q_proj", "v_proj"], ["attention.q", "attention.v"]),
    "whisper": (["q_proj", "v_proj"], ["attention.q", "attention.v"]),
    "conv1d": (["0", "2"], ["0", "2"]),
    "conv2d": (["0", "2"], ["0", "2"]),
    "conv3d": (["0"], ["0"]),
    "embedding": (["table"], ["table"]),
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "bias": ({"lora_bias": True}, {"lora_bias": True}),
}


def peft_model(model: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    """A PEFT model of a copy of the base, its LoRA weights random."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **options)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return wrapped


def copy_weights(wrapped: nn.Module, model: nn.Module) -> int:
    """Copy PEFT's LoRA tensors into ours, host by host; returns how many hosts there were."""
    theirs = dict(wrapped.base_model.model.named_modules())
    count = 0
    with torch.no_grad():
        for path, host in model.named_modules():
            if not hasattr(host, "pet"):
                continue
            (ours,) = host.pet.values()
            other = theirs[path]
            embedding = isinstance(host, nn.Embedding)
            ours.a.copy_(other.lora_embedding_A["default"] if embedding else other.lora_A["default"].weight)
            ours.b.copy_(other.lora_embedding_B["default"] if embedding else other.lora_B["default"].weight)
            if getattr(ours, "bias", None) is not None:
                ours.bias.copy_(other.lora_B["default"].bias)
            if ours.magnitude is not None:
                ours.magnitude.copy_(other.lora_magnitude_vector["default"].weight.view_as(ours.magnitude))
            count += 1
    hosts = [m for m in theirs.values() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert count == len(hosts) > 0
    return count


WITH_BIAS = ("bert", "gpt2", "vit", "conv1d", "conv2d", "conv3d")  # into whose layers a bias of B can be merged
PAIRS = [(m, v) for m in MODELS for v in VARIANTS if v != "bias" or m in WITH_BIAS]


@pytest.mark.parametrize(("model", "variant"), PAIRS)
def test_equal_outputs_merged_and_unmerged(model: str, variant: str) -> None:
    theirs, ours = MODELS[model]
    their_options, our_options = VARIANTS[variant]
    base, run = getattr(zoo, model)()
    if model == "gpt2":
        their_options = {**their_options, "fan_in_fan_out": True}
    wrapped = peft_model(base, theirs, **their_options)
    adapted = apply(base, [LoRACallback(r=3, alpha=6, target_modules=ours, modules_to_save=[], **our_options)])
    copy_weights(wrapped, base)
    expected = run(wrapped)
    before = expected_base(adapted, base, run)
    assert (run(base) - expected).abs().max() <= TOLERANCE
    assert (expected - before).abs().max() > 100 * TOLERANCE
    adapted.merge_()
    assert (run(base) - expected).abs().max() <= TOLERANCE
    assert (run(wrapped.merge_and_unload()) - expected).abs().max() <= TOLERANCE


def expected_base(adapted: Any, base: nn.Module, run: Any) -> Tensor:
    with adapted.disabled():
        return run(base)


@pytest.mark.parametrize(("init", "theirs"), [("pissa", "pissa"), ("olora", "olora")])
def test_decompositions_give_the_same_function_after_training(init: str, theirs: str) -> None:
    """PEFT subtracts the start from the base weight, we subtract it in the delta: the sum is the same."""
    base, run = zoo.mlp()
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], init_lora_weights=theirs)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config).eval()
    apply(base, [LoRACallback(r=3, alpha=3, target_modules="0", init=init, modules_to_save=[])])
    ours, other = base[0].pet["lora_default"], wrapped.base_model.model[0]
    a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
    assert torch.allclose(ours.b @ ours.a, b @ a, atol=1e-5)
    step_a, step_b = torch.randn_like(a) * 0.1, torch.randn_like(b) * 0.1
    with torch.no_grad():
        # The factors are unique only up to sign, so bring ours to theirs before the same step.
        ours.a.copy_(a + step_a)
        ours.b.copy_(b + step_b)
        ours.b0.copy_(b)
        ours.a0.copy_(a)
        a.add_(step_a)
        b.add_(step_b)
    assert (run(base) - run(wrapped)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("model", "targets", "theirs"),
    [
        ("bert", ["attention.q", "attention.v"], ["query", "value"]),
        ("bert", ["all-linear"], "all-linear"),
        ("llama", ["all-linear"], "all-linear"),
        ("t5", ["attention.q", "attention.v"], ["q", "v"]),
    ],
)
def test_equal_parameter_counts(model: str, targets: list[str], theirs: Any) -> None:
    base, _ = getattr(zoo, model)()
    wrapped = peft_model(base, theirs, task_type="SEQ_CLS" if model == "bert" else None)
    expected = sum(p.numel() for n, p in wrapped.named_parameters() if "lora_" in n)
    adapted = apply(base, [LoRACallback(r=3, target_modules=targets, modules_to_save=[])])
    assert adapted.plan().trainable == expected


# --- training, not only outputs ------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
def test_equal_gradients(model: str, variant: str) -> None:
    theirs, ours = MODELS[model]
    their_options, our_options = VARIANTS[variant]
    if model == "gpt2":
        their_options = {**their_options, "fan_in_fan_out": True}
    base, run = getattr(zoo, model)()
    wrapped = peft_model(base, theirs, **their_options)
    apply(base, [LoRACallback(r=3, alpha=6, target_modules=ours, modules_to_save=[], **our_options)])
    copy_weights(wrapped, base)
    for network in (wrapped, base):
        out = run(network)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    layers = dict(wrapped.base_model.model.named_modules())
    for path, host in base.named_modules():
        if hasattr(host, "pet"):
            (delta,) = host.pet.values()
            pairs = [(delta.a, layers[path].lora_A), (delta.b, layers[path].lora_B)]
            for mine, other in pairs:
                assert torch.allclose(mine.grad, other["default"].weight.grad, rtol=1e-4, atol=1e-5), path
            if delta.magnitude is not None:
                expected = layers[path].lora_magnitude_vector["default"].weight.grad
                assert torch.allclose(delta.magnitude.grad, expected.view_as(delta.magnitude), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(  # PEFT's OLoRA fails on a transposed weight
    ("init", "model"),
    [("pissa", "bert"), ("pissa", "gpt2"), ("pissa", "llama"), ("olora", "bert"), ("olora", "llama")],
)
def test_decompositions_start_with_the_same_product(init: str, model: str) -> None:
    """On every host, and the model itself computes what the base did."""
    theirs, ours = MODELS[model]
    base, run = getattr(zoo, model)()
    before = run(base)
    options = {"fan_in_fan_out": True} if model == "gpt2" else {}
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=theirs, init_lora_weights=init, **options)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config).eval()
    apply(base, [LoRACallback(r=3, alpha=3, target_modules=ours, init=init, modules_to_save=[])])
    layers, hosts = dict(wrapped.base_model.model.named_modules()), 0
    for path, host in base.named_modules():
        if hasattr(host, "pet"):
            (delta,) = host.pet.values()
            a, b = layers[path].lora_A["default"].weight, layers[path].lora_B["default"].weight
            assert (delta.b @ delta.a - b @ a).abs().max() < TOLERANCE, path
            hosts += 1
    assert hosts > 3
    assert (run(base) - before).abs().max() < TOLERANCE
    assert (run(wrapped) - before).abs().max() < 10 * TOLERANCE  # theirs went through the base weight


class Fit(pl.LightningModule):
    """Three steps of Adam on a fixed batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return loss_of(self.net(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01, weight_decay=0.0)


def loss_of(out: Tensor) -> Tensor:
    return (out - torch.linspace(-1, 1, out.numel()).view_as(out)).square().sum()


def test_lora_plus_trains_as_pefts_optimizer_does() -> None:
    base, _ = zoo.mlp()
    batch = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    wrapped = peft_model(base, ["0", "2"])
    callback = LoRACallback(
        r=3, alpha=6, target_modules=["0", "2"], modules_to_save=[], lora_plus_ratio=8.0, verbose=False
    )
    apply(base, [callback])
    copy_weights(wrapped, base)
    optimizer = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8.0, weight_decay=0.0)
    for _ in range(3):
        loss_of(wrapped(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    before = base(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Fit(base), DataLoader(batch.repeat(3, 1), batch_size=5))
    expected = wrapped(batch)
    assert (base(batch) - expected).abs().max() <= TOLERANCE
    assert (expected - before).abs().max() > 100 * TOLERANCE
