"""Folders as releases of HF PEFT from 0.3 to 0.21 have left them: written by hand, read or refused by name."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_pet import DeltaFileError, load_delta

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PREFIX = "base_model.model."
OLD: dict[str, Any] = {  # what 0.3 and 0.4 wrote
    "base_model_name_or_path": None,
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 2,
    "target_modules": ["lin"],
    "task_type": "CAUSAL_LM",
}
MINIMAL: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["lin"]}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.classifier = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.lin(x))
        return out


@pytest.fixture
def model() -> Model:
    torch.manual_seed(1)
    return Model().double().eval()


def factors(rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        f"{PREFIX}lin.lora_A.weight": torch.randn(rank, 4, generator=generator, dtype=torch.float64),
        f"{PREFIX}lin.lora_B.weight": torch.randn(5, rank, generator=generator, dtype=torch.float64),
    }


def folder(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], pickled: bool = False) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(dict(tensors), path / "adapter_model.bin")
    else:
        save_file(dict(tensors), path / "adapter_model.safetensors")
    return path


def changed(model: Model, scale: float, rank: int = 2) -> Tensor:
    """What the formula says."""
    a, b = factors(rank).values()
    return model.classifier(model.lin(X) + scale * X @ a.T @ b.T).detach()


READ: dict[str, tuple[dict[str, Any], float]] = {
    "no more than it needs": (MINIMAL, 3.0),
    "as 0.3 wrote it": (OLD, 3.0),
    "no alpha": ({key: value for key, value in MINIMAL.items() if key != "lora_alpha"}, 4.0),
    "no rank": ({key: value for key, value in MINIMAL.items() if key != "r"}, 3.0),
    "no targets": ({key: value for key, value in MINIMAL.items() if key != "target_modules"}, 3.0),
    "targets as an expression": ({**MINIMAL, "target_modules": ".*lin$"}, 3.0),
    "a start of old": ({**MINIMAL, "init_lora_weights": True}, 3.0),
    "a drawn start": ({**MINIMAL, "init_lora_weights": "gaussian"}, 3.0),
    "options of a later release, not asked for": (
        {**MINIMAL, "megatron_config": None, "layer_replication": None, "use_dora": False, "corda_config": None},
        3.0,
    ),
    "the release": ({**MINIMAL, "peft_version": "0.18.0"}, 3.0),
    "a rank that the file contradicts": ({**MINIMAL, "r": 16}, 3.0),
}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("case", READ)
def test_it_is_read(case: str, pickled: bool, tmp_path: Path, model: Model) -> None:
    config, scale = READ[case]
    expected = changed(model, scale)
    load_delta(model, folder(tmp_path / "folder", config, factors(), pickled), base_check="off")
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_the_magnitude_under_either_name(name: str, tmp_path: Path, model: Model) -> None:
    magnitude = torch.rand(5, dtype=torch.float64) + 0.5
    a, b = factors().values()
    weight = model.lin.weight + 3 * b @ a
    turned = (magnitude / weight.norm(dim=1))[:, None] * weight
    expected = model.classifier(X @ turned.T + model.lin.bias).detach()
    tensors = {**factors(), f"{PREFIX}lin.{name}": magnitude}
    load_delta(model, folder(tmp_path / "folder", {**MINIMAL, "use_dora": True}, tensors), base_check="off")
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)


def test_a_trained_head_beside_it(tmp_path: Path, model: Model) -> None:
    weight, bias = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    tensors = {**factors(), f"{PREFIX}classifier.weight": weight, f"{PREFIX}classifier.bias": bias}
    a, b = factors().values()
    expected = ((model.lin(X) + 3 * X @ a.T @ b.T) @ weight.T + bias).detach()
    load_delta(
        model, folder(tmp_path / "folder", {**OLD, "modules_to_save": ["classifier"]}, tensors), base_check="off"
    )
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)


def test_vectors_without_the_word_for_their_start(tmp_path: Path, model: Model) -> None:
    scale = torch.rand(5, 1, dtype=torch.float64)
    config = {"peft_type": "IA3", "target_modules": ["lin"], "feedforward_modules": [], "fan_in_fan_out": False}
    expected = model.classifier(model.lin(X) * scale[:, 0]).detach()
    load_delta(model, folder(tmp_path / "folder", config, {f"{PREFIX}lin.ia3_l": scale}), base_check="off")
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)


def test_a_folder_for_each_name(tmp_path: Path, model: Model) -> None:
    for name in ("blue", "red"):
        folder(tmp_path / "both" / name, MINIMAL, factors())
    with pytest.raises(DeltaFileError, match=r"folders that have one: blue, red"):
        load_delta(model, tmp_path / "both", base_check="off")
    expected = changed(model, 3.0)
    load_delta(model, tmp_path / "both" / "red", base_check="off")
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)


def with_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the state of a PEFT model has them, saved by hand."""
    return {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}


def copied_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A head under the wrapper's own name."""
    head = torch.zeros(2, 5, dtype=torch.float64)
    return {**tensors, f"{PREFIX}classifier.modules_to_save.default.weight": head}


REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "names of adapters in the keys": (MINIMAL, with_names, r"lora_A\.default\.weight"),
    "a wrapped head": (MINIMAL, copied_heads, r"classifier\.modules_to_save"),
    "enable_lora": ({**OLD, "enable_lora": [True, False, True]}, dict, "enable_lora"),
    "a base that was quantised to fit": ({**MINIMAL, "init_lora_weights": "loftq"}, dict, "init_lora_weights"),
    "a start that cannot be repeated": ({**MINIMAL, "init_lora_weights": "pissa_niter_4"}, dict, "pissa_niter_4"),
    "no type": ({"r": 2}, dict, "neither"),
    "a type of old": ({**MINIMAL, "peft_type": "BONE"}, dict, "BONE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name(case: str, tmp_path: Path, model: Model) -> None:
    config, change, words = REFUSED[case]
    before = model(X)
    with pytest.raises(DeltaFileError, match=words):
        load_delta(model, folder(tmp_path / "folder", config, change(factors())), base_check="off")
    assert torch.equal(model(X), before)
