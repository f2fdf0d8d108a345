"""Deltas of ours, written as folders of the adapters library, hold what that library itself writes for the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_pet import (
    AdapterCallback,
    CompacterCallback,
    DeltaFileError,
    IA3Callback,
    LoRACallback,
    PETCallback,
    PrefixTuningCallback,
    apply,
    export_delta,
    load_delta,
)
from tests.exchange.peft_models import bert, gpt2, llama, made, output_of, t5
from tests.exchange.test_adapters_reading import CONFIGS, written
from tests.exchange.test_peft_writing import trained
from tests.methods.adapters_files import ARCHITECTURES, read


def their_names(delta: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the library under the name that ours has there; what all layers share once."""
    found: dict[str, Tensor] = {}
    for name, tensor in delta.items():
        shared = name.partition("prefix_tuning.prefix_tunings.")[2] or name.partition("pool.prefix_tunings.")[2]
        own = f"prefix_tuning.prefix_tunings.{shared}" if shared else name
        found[own.replace(".task.", ".default.")] = tensor
    return found


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel", "compacter", "prefix"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "vit"])
def test_what_came_from_there_goes_back_unchanged(architecture: str, method: str, tmp_path: Path) -> None:
    reference = read(architecture, method)
    load_delta(reference.model, written(tmp_path / "theirs", CONFIGS[method], reference.delta))
    done = export_delta(reference.model, tmp_path / "ours", to="adapters")
    ours, theirs = load_file(tmp_path / "ours" / "adapter.safetensors"), their_names(reference.delta)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert torch.load(tmp_path / "ours" / "pytorch_adapter.bin", weights_only=True).keys() == ours.keys()
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    told = {**config["config"], "reduction_factor": None}
    assert {option: told[option] for option in CONFIGS[method]} == CONFIGS[method]
    assert config["version"] == "adapters.1.3.0"
    assert done.difference is None or done.difference <= 1e-6


CASES: dict[str, tuple[PETCallback, dict[str, Any]]] = {
    "lora": (
        LoRACallback(r=3, alpha=5, target_modules=["attention.q", "attention.v", "ffn.up"]),
        {"r": 3, "alpha": 5, "attn_matrices": ["q", "v"], "intermediate_lora": True, "output_lora": False},
    ),
    "lora of a layer": (
        LoRACallback(r=2, use_rslora=True, layers_to_transform=[1]),
        {"r": 2, "leave_out": [0], "attn_matrices": ["q", "v"]},
    ),
    "ia3": (
        IA3Callback(target_modules=["attention.k", "attention.v", "ffn.up"], feedforward_modules=[]),
        {"composition_mode": "scale", "attn_matrices": ["k", "v"], "intermediate_lora": True},
    ),
    "dropped layers": (
        AdapterCallback(bottleneck_size=5, drop_layers=1, scale=2.0),
        {"leave_out": [0], "mh_adapter": True, "output_adapter": True, "scaling": 2.0, "non_linearity": "gelu"},
    ),
    "a layer in between": (
        AdapterCallback(bottleneck_size=5, layers_to_transform=[0]),
        {"leave_out": [1], "mh_adapter": True, "output_adapter": True},
    ),
    "folded prefixes": (
        PrefixTuningCallback(length=3, projection=False),
        {"flat": True, "prefix_length": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ours_read_again(case: str, tmp_path: Path) -> None:
    method, told = CASES[case]
    base = made(bert, torch.float32)
    model = trained(base, method)
    done = export_delta(model, tmp_path / "folder", to="adapters")
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())["config"]
    assert {option: config[option] for option in told} == told
    assert done.reader == "this library's own reader of the adapters library's folders"
    load_delta(back := made(bert, torch.float32), tmp_path / "folder")
    torch.testing.assert_close(output_of(back.eval()), output_of(model), rtol=0, atol=1e-6)
    assert (output_of(model) - output_of(base)).abs().max() > 1e-3


def test_places_that_peft_has_named_have_roles(tmp_path: Path) -> None:
    model = trained(made(bert, torch.float32), LoRACallback(r=2))
    export_delta(model, tmp_path / "peft")
    load_delta(other := made(bert, torch.float32), tmp_path / "peft")
    export_delta(other, tmp_path / "folder", to="adapters")
    load_delta(back := made(bert, torch.float32), tmp_path / "folder")
    torch.testing.assert_close(output_of(back.eval()), output_of(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "method", "words"),
    [
        (gpt2, LoRACallback(r=2), "a part of a fused weight"),
        (llama, LoRACallback(r=2, target_modules=["ffn.up"]), "has a gate"),
        (bert, LoRACallback(r=2, target_modules=["attention.o"]), "attention.o, which the adapters library"),
        (bert, LoRACallback(r=2, use_dora=True), "use_dora=True is not written"),
        (bert, LoRACallback(r=2, rank_pattern={"attention.q": 3}), "several ranks"),
        (bert, IA3Callback(), "rescales what a layer gets"),
        (bert, AdapterCallback(bottleneck_size=4, inner_norm=True), "inner_norm=True is not written"),
        (t5, AdapterCallback(bottleneck_size=4, cross_attention=True), "cross_attention=True is not written"),
        (t5, LoRACallback(r=2), "cross-attention"),
        (bert, CompacterCallback(phm_dim=2, bottleneck_size=4, factorized=False), "factorized=False is not written"),
    ],
)
def test_what_that_library_cannot_say_is_refused(build: Any, method: PETCallback, words: str, tmp_path: Path) -> None:
    model = trained(made(build, torch.float32), method)
    with pytest.raises(DeltaFileError, match=words) as caught:
        export_delta(model, tmp_path / "folder", to="adapters")
    assert caught.value.code == "mismatch"
    assert not (tmp_path / "folder").exists()


def test_models_of_images_have_other_names_there(tmp_path: Path) -> None:
    model = read("vit", "houlsby").model
    apply(model, AdapterCallback(bottleneck_size=4))
    with pytest.raises(DeltaFileError, match="models of images"):
        export_delta(model, tmp_path / "folder", to="adapters")


def test_layers_of_two_stacks_are_counted_in_one_row(tmp_path: Path) -> None:
    base = made(t5, torch.float32)
    model = trained(base, AdapterCallback(bottleneck_size=4, drop_layers=1))
    export_delta(model, tmp_path / "folder", to="adapters")
    assert json.loads((tmp_path / "folder" / "adapter_config.json").read_text())["config"]["leave_out"] == [0, 2]
    load_delta(back := made(t5, torch.float32), tmp_path / "folder")
    torch.testing.assert_close(output_of(back.eval()), output_of(model), rtol=0, atol=1e-6)
