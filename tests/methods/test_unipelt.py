"""UniPELT: gates of one number per example in front of LoRA, prefixes and bottlenecks, as in the adapters library."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_pet import (
    AdapterCallback,
    ArgumentError,
    DeltaFileError,
    LoRACallback,
    NotMergeableError,
    PETCallback,
    PETError,
    PrefixTuningCallback,
    TargetError,
    apply,
    export_delta,
    load_delta,
    save_delta,
)
from tests.exchange.test_adapters_reading import CONFIGS, written

from . import zoo
from .adapters_files import Reference, read
from .battery import LIKE_SMALLER, Battery, Case, perturb
from .test_adapters_library import host_of

GATED: dict[str, Any] = {"use_gating": True, "modules_to_save": []}


class TestGates(Battery):
    cases: ClassVar[list[Case]] = [
        Case(
            "bert",
            options={"r": 2, "target_modules": ["attention.q", "attention.v"], **GATED},
            mergeable=False,
            parameters=4 * (2 * 32 + 17),
        ),
        Case(
            "gpt2",
            options={"r": 2, "target_modules": "attention.v", **GATED},
            mergeable=False,
            not_compiled=LIKE_SMALLER,
        ),
        Case(
            "bert",
            AdapterCallback,
            {"bottleneck_size": 4, "placement": "pfeiffer", "init": "lora", **GATED},
            mergeable=False,
            parameters=2 * (4 * 33 + 16 + 17),
            not_compiled=LIKE_SMALLER,
        ),
        Case(
            "llama",
            PrefixTuningCallback,
            {"length": 3, "projection_size": 8, **GATED},
            exact_identity=False,
            identity_tolerance=None,
            mergeable=False,
        ),
        Case(
            "bert",
            PrefixTuningCallback,
            {"length": 3, "projection": False, **GATED},
            exact_identity=False,
            identity_tolerance=None,
            mergeable=False,
            not_compiled=LIKE_SMALLER,
        ),
    ]


def unipelt(**lora: Any) -> list[PETCallback]:
    return [
        PrefixTuningCallback(length=3, projection_size=8, **GATED),
        AdapterCallback(placement="pfeiffer", reduction_factor=4, **GATED),
        LoRACallback(**{"r": 2, "alpha": 2, **GATED, **lora}),
    ]


def folder_of(path: Path, reference: Reference, **changes: Any) -> Path:
    """What the library would have written."""
    parts: list[dict[str, Any]] = [
        {**CONFIGS["prefix"], "use_gating": True, "shared_gating": True, **changes},
        {**CONFIGS["pfeiffer"], "use_gating": True},
        {"architecture": "lora", "composition_mode": "add", "r": 2, "alpha": 6, "dropout": 0.0, "use_gating": True},
    ]
    return written(path, {"architecture": "union", "configs": parts}, reference.delta)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama", "t5", "bart", "whisper"])
def test_outputs_are_those_of_the_library(architecture: str, tmp_path: Path) -> None:
    reference = read(architecture, "unipelt")
    assert (reference.run() - reference.output).abs().max() > 0.1
    adapted = load_delta(reference.model, folder_of(tmp_path / "folder", reference))
    assert (reference.run() - reference.output).abs().max() <= 1e-5
    own = read(architecture, "unipelt")
    mine = apply(own.model, unipelt())
    shapes = {name: tensor.shape for name, tensor in mine.state_dict().items()}
    assert {name: tensor.shape for name, tensor in adapted.state_dict().items()} == shapes
    assert sum(t.numel() for t in mine.state_dict().values()) == sum(t.numel() for t in reference.delta.values())
    with torch.no_grad(), pytest.raises(NotMergeableError, match="attached"):
        mine.merge_()


@torch.no_grad()
def test_roles_of_a_fused_projection_have_gates_of_their_own() -> None:
    reference = read("gpt2", "unipelt")
    adapted = apply(reference.model, unipelt())
    own = dict(adapted.root.named_parameters())
    kinds: dict[str, Tensor] = {}
    for name, tensor in reference.delta.items():
        if ".loras." in name:
            kinds[name] = tensor
    for layer in range(2):
        theirs, ours = f"h.{layer}.attn.c_attn.loras.task", f"h.{layer}.attn.c_attn.pet.lora_default"
        for index, role in enumerate("qv"):
            own[f"{ours}_{role}.a"].copy_(kinds[f"{theirs}.lora_A"].chunk(2)[index])
            own[f"{ours}_{role}.b"].copy_(kinds[f"{theirs}.lora_B"].chunk(2)[index])
            own[f"{ours}_{role}.gate_weight"].copy_(kinds[f"{theirs}.gate.weight"][index : index + 1])
            own[f"{ours}_{role}.gate_bias"].copy_(kinds[f"{theirs}.gate.bias"][index : index + 1])
        place = host_of("gpt2", "pfeiffer", f"h.{layer}.output_adapters.adapters")
        for part, mine in {
            "adapter_down.0.weight": "down",
            "adapter_down.0.bias": "down_bias",
            "adapter_up.weight": "up",
            "adapter_up.bias": "up_bias",
            "gate.weight": "gate_weight",
            "gate.bias": "gate_bias",
        }.items():
            tensor = reference.delta[f"h.{layer}.output_adapters.adapters.task.{part}"]
            own[f"{place}.pet.adapter_default.{mine}"].copy_(tensor)
        gate = f"h.{layer}.attn.prefix_tuning.prefix_gates.task"
        own[f"h.{layer}.attn.pet.prefix_tuning_default.gate_weight"].copy_(reference.delta[f"{gate}.weight"])
        own[f"h.{layer}.attn.pet.prefix_tuning_default.gate_bias"].copy_(reference.delta[f"{gate}.bias"])
    pool = {name.partition("self_prefix.")[2]: t for name, t in reference.delta.items() if "self_prefix." in name}
    network = "pet.prefix_tuning_default_network0"
    own[f"{network}.embedding"].copy_(pool["wte.weight"])
    own[f"{network}.weight"].copy_(pool["control_trans.0.weight"])
    own[f"{network}.bias"].copy_(pool["control_trans.0.bias"])
    for layer in range(2):
        prefix = f"h.{layer}.attn.pet.prefix_tuning_default"
        own[f"{prefix}.weight"].copy_(pool["control_trans.2.weight"].chunk(2)[layer])
        own[f"{prefix}.bias"].copy_(pool["control_trans.2.bias"].chunk(2)[layer])
    assert (reference.run() - reference.output).abs().max() <= 1e-5


def test_the_formula_in_float64_and_padding_counts() -> None:
    torch.manual_seed(0)
    host = nn.Linear(4, 3).double()
    adapted = apply(nn.Sequential(host), LoRACallback(r=2, alpha=4, target_modules="0", **GATED))
    perturb(adapted)
    own = {name.rpartition(".")[2]: t.double() for name, t in adapted.state_dict().items()}
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    gate = torch.sigmoid(x @ own["gate_weight"].T + own["gate_bias"]).mean(1, keepdim=True)
    expected = x @ host.weight.T + host.bias + gate * 2 * (x @ own["a"].T @ own["b"].T)
    found = adapted.root(x)
    assert (found - expected).abs().max() < 1e-14
    assert (adapted.root(x[:, :3]) - found[:, :3]).abs().max() > 1e-4  # by the length, as in that library
    rows = adapted.root(x[:, 0])  # a row without positions is an example
    gate = torch.sigmoid(x[:, 0] @ own["gate_weight"].T + own["gate_bias"])
    expected = x[:, 0] @ host.weight.T + host.bias + gate * 2 * (x[:, 0] @ own["a"].T @ own["b"].T)
    assert (rows - expected).abs().max() < 1e-14


def test_the_configuration_is_the_papers_union(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "configs" / "method" / "unipelt.yaml").read_text(encoding="utf-8")
    import lightning_pet

    entries = yaml.safe_load(text)["pet"]
    methods = [getattr(lightning_pet, e["class_path"].rpartition(".")[2])(**e["init_args"]) for e in entries]
    assert all(method.use_gating for method in methods)
    model, run = zoo.bert()
    adapted = apply(model, methods)
    perturb(adapted, 0.05)
    path = tmp_path / "x.pet.safetensors"
    save_delta(model, path)
    other, _ = zoo.bert()
    load_delta(other, path)
    with torch.no_grad():
        assert torch.equal(run(other), run(model))


def test_what_a_gate_cannot_do_is_named(tmp_path: Path) -> None:
    for options, words in [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init": "pissa"}, "init='pissa'"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            LoRACallback(use_gating=True, **options)
    model, run = zoo.embedding()
    with pytest.raises(TargetError, match="no called linear layer"):
        apply(model, LoRACallback(target_modules="table", r=2, **GATED), forward=lambda: run(model))
    model, run = zoo.transformer_encoder()
    with pytest.raises(TargetError, match="prefix of its own"):
        apply(model, PrefixTuningCallback(length=2, **GATED), forward=lambda: run(model))
    for gated in (LoRACallback(r=2, **GATED), PrefixTuningCallback(length=2, projection=False, **GATED)):
        model, run = zoo.llama()
        handle = apply(model, gated)
        with pytest.raises(DeltaFileError, match="has no gates"):
            export_delta(model, tmp_path / "peft", to="peft")
        assert not (tmp_path / "peft").exists()
        handle.save(tmp_path / "gated.pet.safetensors")
        model, run = zoo.llama()
        for name in ("one", "two"):
            handle = load_delta(model, tmp_path / "gated.pet.safetensors", name=name)
        with pytest.raises(PETError, match="gate"):
            handle.combine("both", ["one", "two"], method="cat")
        assert list(handle) == ["one", "two"]
    reference = read("bert", "unipelt")
    before = reference.run()
    with pytest.raises(DeltaFileError, match="shared_gating"):
        load_delta(reference.model, folder_of(tmp_path / "folder", reference, shared_gating=False))
    assert torch.equal(reference.run(), before)
