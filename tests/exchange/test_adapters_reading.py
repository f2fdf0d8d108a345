"""Folders that the adapters library has written give the outputs here that they give there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_pet import DeltaFileError, load_delta
from tests.methods.adapters_files import ARCHITECTURES, Reference, read

_COMMON: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "inv_adapter": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_dim": 4,
    "phm_layer": False,
    "phm_rank": 1,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "use_gating": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "houlsby": {**_COMMON, "mh_adapter": True, "non_linearity": "swish"},
    "pfeiffer": {**_COMMON, "original_ln_before": True},
    "parallel": {**_COMMON, "is_parallel": True, "scaling": 4.0},
    "compacter": {**_COMMON, "mh_adapter": True, "non_linearity": "gelu", "phm_layer": True},
    "prefix": {
        "architecture": "prefix_tuning",
        "bottleneck_size": 8,
        "flat": False,
        "leave_out": [],
        "non_linearity": "tanh",
        "prefix_length": 3,
        "use_gating": False,
    },
}
_REFT: dict[str, Any] = {
    "architecture": "reft",
    "dropout": 0.05,
    "dtype": None,
    "init_weights_seed": None,
    "layers": "all",
    "non_linearity": None,
    "orthogonality": True,
    "output_reft": True,
    "prefix_positions": 3,
    "r": 2,
    "suffix_positions": 2,
    "tied_weights": False,
}
CONFIGS["loreft"] = _REFT
_STACKED = ("t5", "bart", "whisper")  # whose decoders count last positions by the encoder's mask there
FORMS: dict[tuple[str, str], dict[str, Any]] = {
    ("bert", "noreft"): {**_REFT, "orthogonality": False, "subtract_projection": True},
    ("gpt2", "direft"): {
        **{**_REFT, "orthogonality": False, "subtract_projection": False, "suffix_positions": 1},
        **{"tied_weights": True, "non_linearity": "relu"},
    },
}


def config_of(architecture: str, method: str) -> dict[str, Any]:
    """What a folder of this method says on this architecture."""
    stacked = method == "loreft" and architecture in _STACKED
    return CONFIGS[method] | ({"suffix_positions": 0} if stacked else {})


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], version: str = "adapters.1.3.0") -> Path:
    """A folder as that library writes it."""
    folder.mkdir(exist_ok=True)
    described = {"config": config, "hidden_size": 16, "model_class": "M", "model_name": "", "name": "task"}
    (folder / "adapter_config.json").write_text(json.dumps({**described, "version": version}))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter.safetensors")
    return folder


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_are_those_of_adapters(architecture: str, method: str, tmp_path: Path) -> None:
    reference: Reference = read(architecture, method)
    assert (reference.run() - reference.output).abs().max() > 0.1
    load_delta(reference.model, written(tmp_path / "folder", config_of(architecture, method), reference.delta))
    assert (reference.run() - reference.output).abs().max() <= 1e-5


@pytest.mark.parametrize(("architecture", "method"), FORMS)
def test_edits_are_those_of_adapters(architecture: str, method: str, tmp_path: Path) -> None:
    reference: Reference = read(architecture, method)
    assert (reference.run() - reference.output).abs().max() > 0.1
    load_delta(reference.model, written(tmp_path / "folder", FORMS[architecture, method], reference.delta))
    assert (reference.run() - reference.output).abs().max() <= 1e-5


def test_of_an_orthonormal_edit_its_rows_are_kept_and_no_square_matrix(tmp_path: Path) -> None:
    reference = read("bert", "loreft")
    folder = written(tmp_path / "folder", CONFIGS["loreft"], reference.delta)
    tensors = load_delta(reference.model, folder)["default"].state_dict()
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(2, 16), (2,)}
    decayed = {key: t * 0.9 if key.endswith("original") else t for key, t in reference.delta.items()}
    with pytest.raises(DeltaFileError, match="rows are not orthonormal"):
        load_delta(read("bert", "loreft").model, written(tmp_path / "folder", CONFIGS["loreft"], decayed))


def test_a_folder_that_may_be_of_two_forms_asks_which(tmp_path: Path) -> None:
    reference = read("bert", "noreft")
    config = {name: value for name, value in FORMS["bert", "noreft"].items() if name != "subtract_projection"}
    before = reference.run()
    with pytest.raises(DeltaFileError, match=r'"subtract_projection": true \(NoReFT\) or false \(DiReFT\)'):
        load_delta(reference.model, written(tmp_path / "folder", config, reference.delta))
    assert torch.equal(reference.run(), before)


def test_it_needs_no_task_named_alike_and_is_inside_of_a_model_with_a_head(tmp_path: Path) -> None:
    import transformers

    reference = read("bert", "houlsby")
    config = reference.model.config
    outer = transformers.BertForSequenceClassification(config).eval()
    outer.bert = reference.model
    load_delta(outer, written(tmp_path / "folder", CONFIGS["houlsby"], reference.delta))
    assert (reference.run() - reference.output).abs().max() <= 1e-5


@pytest.mark.parametrize("version", ["adapters.1.3.0", "adapters.1.0.1"])
def test_lora_and_its_old_scale(version: str, tmp_path: Path) -> None:
    reference = read("bert", "houlsby")
    model = reference.model
    tensors, expected = {}, {}
    torch.manual_seed(0)
    for layer in range(2):
        for part in ("query", "value"):
            path = f"encoder.layer.{layer}.attention.self.{part}"
            a, b = torch.randn(2, 16), torch.randn(16, 2)
            tensors |= {f"{path}.loras.task.lora_A": a, f"{path}.loras.task.lora_B": b}
            expected[path] = b @ a * (3.0 if version.endswith("1.3.0") else 1.0)
    config = {"architecture": "lora", "composition_mode": "add", "r": 2, "alpha": 6, "dropout": 0.0}
    load_delta(model, written(tmp_path / "folder", config, tensors, version))
    attached = reference.run()
    plain = read("bert", "houlsby").model
    with torch.no_grad():
        for path, change in expected.items():
            plain.get_submodule(path).weight.add_(change)
    assert (attached - reference.run(plain)).abs().max() <= 1e-5


def test_ia3_and_flat_prefixes(tmp_path: Path) -> None:
    reference = read("bert", "houlsby")
    path = "encoder.layer.0.intermediate.dense"
    scale = torch.rand(24, 1)
    config = {"architecture": "lora", "composition_mode": "scale", "r": 1, "alpha": 1}
    load_delta(reference.model, written(tmp_path / "ia3", config, {f"{path}.loras.task.lora_B": scale}))
    plain = read("bert", "houlsby").model
    with torch.no_grad():
        layer = plain.get_submodule(path)
        layer.weight.mul_(scale)
        layer.bias.mul_(scale[:, 0])
    assert (reference.run() - reference.run(plain)).abs().max() <= 1e-6
    other = read("bert", "houlsby")
    values = torch.randn(3 * 4 * 16)
    flat = {**CONFIGS["prefix"], "flat": True}
    adapted = load_delta(
        other.model,
        written(tmp_path / "flat", flat, {"prefix_tuning.prefix_tunings.task.self_prefix.control_trans": values}),
    )
    tensors = adapted["default"].state_dict()
    first = tensors["encoder.layer.0.attention.self.pet.prefix_tuning_default.key"]
    assert torch.equal(first, values.view(3, 4, 2, 8)[:, 0].transpose(0, 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_gating": True}, "gate_weight is missing"),
        ({"inv_adapter": "nice"}, "inv_adapter"),
        ({"scaling": "learned"}, "scaling"),
        ({"leave_out": [1]}, "leave_out"),
        ({"architecture": "prompt_tuning"}, "prompt_tuning"),
        ({"output_adapter": False}, "places of that kind"),
    ],
)
def test_what_has_no_counterpart_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    reference = read("bert", "houlsby")
    folder = written(tmp_path / "folder", CONFIGS["houlsby"] | change, reference.delta)
    before = reference.run()
    with pytest.raises(DeltaFileError, match=words):
        load_delta(reference.model, folder)
    assert torch.equal(reference.run(), before)


def test_a_compacter_without_its_rule_is_refused(tmp_path: Path) -> None:
    reference = read("bert", "compacter")
    tensors = {name: tensor for name, tensor in reference.delta.items() if "phm_rule" not in name}
    with pytest.raises(DeltaFileError, match="no phm_rule"):
        load_delta(reference.model, written(tmp_path / "folder", CONFIGS["compacter"], tensors))


def token_classifier() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    model = transformers.BertForTokenClassification(config).eval()
    model.bert = read("bert", "pfeiffer").model
    model.bert.pooler = None
    return model


def with_head(folder: Path, made: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Path:
    written(folder, CONFIGS["pfeiffer"], read("bert", "pfeiffer").delta)
    (folder / "head_config.json").write_text(json.dumps({"config": made, "name": "task"}))
    torch.save(tensors, folder / "pytorch_model_head.bin")
    return folder


@pytest.mark.parametrize("own", [True, False])
def test_a_head_that_computes_the_same_is_copied(own: bool, tmp_path: Path) -> None:
    model = token_classifier()
    weight, bias = torch.randn(3, 16), torch.randn(3)
    tagging = {"head_type": "tagging", "layers": 1, "num_labels": 3}
    named = "classifier" if own else "heads.task.1"
    tensors = {f"{named}.weight": weight, f"{named}.bias": bias}
    adapted = load_delta(model, with_head(tmp_path / "folder", None if own else tagging, tensors))
    assert torch.equal(model.classifier.weight, weight)
    assert torch.equal(model.classifier.bias, bias)
    adapted.remove()
    assert not torch.equal(model.classifier.weight, weight)


@pytest.mark.parametrize(
    ("made", "size", "words"),
    [
        ({"head_type": "classification", "layers": 1, "use_pooler": False}, 3, "'classification' does"),
        ({"head_type": "classification", "layers": 1, "use_pooler": True}, 3, "reads a pooler"),
        ({"head_type": "tagging", "layers": 2}, 3, "it has 2 layers"),
        ({"head_type": "tagging", "layers": 1}, 5, "has another size"),
    ],
)
def test_a_head_without_counterpart_is_offered_by_name(
    made: dict[str, Any], size: int, words: str, tmp_path: Path
) -> None:
    model = token_classifier()
    before = model.classifier.weight.clone()
    tensors = {"heads.task.1.weight": torch.randn(size, 16), "heads.task.1.bias": torch.randn(size)}
    with pytest.warns(UserWarning, match=f"{words}.*heads.task.1.bias") as caught:
        load_delta(model, with_head(tmp_path / "folder", made, tensors))
    assert any("pytorch_model_head.bin" in str(one.message) for one in caught)
    assert torch.equal(model.classifier.weight, before)


def test_a_prompt_and_a_fusion_are_refused_with_the_reason(tmp_path: Path) -> None:
    reference = read("bert", "houlsby")
    config = {"architecture": "prompt_tuning"}
    with pytest.raises(DeltaFileError, match="behind the norm and the positions"):
        load_delta(reference.model, written(tmp_path / "prompt", config, reference.delta))
    (tmp_path / "fusion").mkdir()
    (tmp_path / "fusion" / "adapter_fusion_config.json").write_text("{}")
    with pytest.raises(DeltaFileError, match="AdapterFusionCallback"):
        load_delta(reference.model, tmp_path / "fusion")
