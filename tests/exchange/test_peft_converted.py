"""Kinds of PEFT that are a LoRA in other words are read as one; the rest is refused with the way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_pet import DeltaFileError, load_delta
from lightning_pet.exchange.peft import _READERS
from lightning_pet.exchange.peft_refused import REFUSED
from tests.exchange.peft_models import bert, gpt2, llama, made, output_of
from tests.exchange.test_peft_reading import theirs

CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "delora": (
        bert,
        peft.DeloraConfig(r=3, rank_pattern={"query": 2}, delora_lambda=7, target_modules=["query", "dense"]),
    ),
    "gralora": (llama, peft.GraloraConfig(r=4, gralora_k=2, alpha=6, target_modules=["q_proj", "v_proj"])),
    "gralora hybrid": (llama, peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=3, alpha=6, target_modules=["down_proj"])),
    "gralora of full rank": (llama, peft.GraloraConfig(r=8, gralora_k=4, target_modules=["q_proj", "down_proj"])),
    "gralora fused": (gpt2, peft.GraloraConfig(r=4, gralora_k=2, fan_in_fan_out=True, target_modules=["c_attn"])),
    "vblora": (llama, peft.VBLoRAConfig(r=3, num_vectors=6, vector_length=4, topk=2, target_modules=["q_proj"])),
    "tinylora": (bert, peft.TinyLoraConfig(r=3, u=4, target_modules=["query", "value"], task_type="SEQ_CLS")),
    "tinylora in groups": (llama, peft.TinyLoraConfig(r=2, u=3, weight_tying=0.5, target_modules="all-linear")),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_peft(case: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    model = made(build)
    before = output_of(model)
    expected = theirs(model, config, tmp_path)
    adapted = load_delta(model, tmp_path)
    torch.testing.assert_close(output_of(model.eval()), expected, rtol=0, atol=1e-12)
    assert (expected - before).abs().max() > 1e-4
    assert [applied.method for applied in adapted.record.applied] == ["lora"]
    adapted.merge_()
    torch.testing.assert_close(output_of(model), expected, rtol=0, atol=1e-12)


def test_a_bank_with_shares_only(tmp_path: Path) -> None:
    """PEFT counts small banks in integers that are in no delta file; those of large ones are read."""
    sizes = {"r": 2, "num_vectors": 6, "vector_length": 4, "topk": 3}
    config = peft.VBLoRAConfig(**sizes, save_only_topk_weights=True, target_modules=["q_proj", "down_proj"])
    model = made(llama)
    expected = theirs(model, config, tmp_path)
    with pytest.raises(DeltaFileError, match="found dtype 'U8'"):
        load_delta(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wide = {name: t.to(torch.int32) if t.dtype == torch.uint8 else t for name, t in tensors.items()}
    save_file(wide, tmp_path / "adapter_model.safetensors")
    load_delta(model, tmp_path)
    torch.testing.assert_close(output_of(model.eval()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("delora", lambda tensors: _without(tensors, "delora_w_norm"), "has no delora_w_norm"),
        ("gralora", lambda tensors: _cut(tensors, "gralora_B"), "do not fit together"),
        ("vblora", lambda tensors: _without(tensors, "vblora_vector_bank"), "has no vblora_vector_bank"),
        ("tinylora", lambda tensors: _without(tensors, "tinylora_P"), "save_projection=True"),
        ("tinylora", lambda tensors: _without(tensors, "tinylora_v.1"), r"has no tinylora_v\.1"),
    ],
)
def test_what_is_incomplete_is_refused(case: str, change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    model = made(build)
    theirs(model, config, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DeltaFileError, match=words):
        load_delta(model, tmp_path)


def _without(tensors: dict[str, Tensor], ending: str) -> None:
    for name in [name for name in tensors if name.endswith(ending)]:
        del tensors[name]


def _cut(tensors: dict[str, Tensor], ending: str) -> None:
    for name in [name for name in tensors if name.endswith(ending)]:
        tensors[name] = tensors[name][:, :-1]


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType])
def test_every_type_is_read_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    if kind in _READERS:
        assert kind not in REFUSED
        return
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_file({"base_model.model.x.y": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DeltaFileError, match=kind) as caught:
        load_delta(made(llama), tmp_path)
    assert caught.value.code == "version"
    assert "train" in str(caught.value)
    if kind in REFUSED:
        assert f"or train {REFUSED[kind].instead} here" in str(caught.value)
