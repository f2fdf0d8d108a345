"""Folders of HF PEFT at the edges: biases and ties, scales of zero, ranks above a layer, tables beside a delta."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_pet import (
    BitFitCallback,
    DeltaFileError,
    LoRACallback,
    PETCallback,
    apply,
    combine_deltas,
    export_delta,
    import_delta,
    inspect_delta,
    load_delta,
    save_delta,
)
from tests.exchange.peft_models import Attention, Convolutions, bert, llama, made, output_of, t5
from tests.exchange.test_peft_reading import retouch, theirs, tied
from tests.exchange.test_peft_writing import in_peft, trained


def mlm() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return transformers.BertForMaskedLM(config)


READ: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "no bias": (t5, peft.LoraConfig(r=2, bias="all", target_modules=["q"])),
    "a tied bias": (mlm, peft.LoraConfig(r=2, bias="all", target_modules=["query"])),
    "an attention": (Attention, peft.LoraConfig(r=2, bias="all", target_modules=["attention"])),
    "beside an attention": (Attention, peft.LoraConfig(r=2, bias="all", target_modules=["linear"])),
    "of an attention": (Attention, peft.LoraConfig(r=2, bias="lora_only", target_modules=["attention"])),
    "alpha of zero": (bert, peft.LoraConfig(r=2, alpha_pattern={"query": 0}, target_modules=["query", "value"])),
    "alpha below zero": (bert, peft.LoraConfig(r=2, lora_alpha=-3, lora_bias=True, target_modules=["query"])),
    "a high rank": (Convolutions, peft.LoraConfig(r=7, use_rslora=True, target_modules=["first", "linear"])),
    "a high rank with dora": (bert, peft.LoraConfig(r=20, use_dora=True, target_modules=["query"])),
    "a high rank of a table": (bert, peft.LoraConfig(r=20, target_modules=["word_embeddings"])),
}


@pytest.mark.parametrize("case", READ)
def test_outputs_are_those_of_peft_there_and_back(case: str, tmp_path: Path) -> None:
    build, config = READ[case]
    base = made(build)
    expected = theirs(base, config, tmp_path / "theirs")
    model = copy.deepcopy(base)
    load_delta(model, tmp_path / "theirs")
    torch.testing.assert_close(output_of(model.eval()), expected, rtol=0, atol=1e-12)
    export_delta(model, tmp_path / "again")
    torch.testing.assert_close(in_peft(base, tmp_path / "again", expected), expected, rtol=0, atol=1e-12)


WRITTEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], PETCallback]]] = {
    "all biases": (Attention, lambda: LoRACallback(r=2, bias="all")),
    "biases of targets": (
        Attention,
        lambda: LoRACallback(r=2, bias="lora_only", target_modules=["in_proj_weight", "out_proj"]),
    ),
    "bitfit": (Attention, BitFitCallback),
    "one bias": (
        Attention,
        lambda: LoRACallback(r=2, target_modules=["linear"], modules_to_save=["attention.in_proj_bias"]),
    ),
    "a part of a module": (
        bert,
        lambda: LoRACallback(r=2, modules_to_save=["classifier.weight"]),
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_outputs_in_peft_are_ours(case: str, tmp_path: Path) -> None:
    build, method = WRITTEN[case]
    base = made(build)
    model = trained(base, method())
    ours = output_of(model)
    export_delta(model, tmp_path / "folder")
    torch.testing.assert_close(in_peft(base, tmp_path / "folder", ours), ours, rtol=0, atol=1e-12)
    back = copy.deepcopy(base)
    load_delta(back, tmp_path / "folder")
    torch.testing.assert_close(output_of(back.eval()), ours, rtol=0, atol=1e-12)


def test_ranks_above_a_small_layer_come_back(tmp_path: Path) -> None:
    base = made(Convolutions)
    callback = LoRACallback(r=6, target_modules=["first", "second", "linear"], clamp_rank=True)
    model = trained(base, callback)
    export_delta(model, tmp_path / "folder")
    back = copy.deepcopy(base)
    adapted = load_delta(back, tmp_path / "folder")
    torch.testing.assert_close(output_of(back.eval()), output_of(model), rtol=0, atol=1e-12)
    assert adapted["default"].state_dict()["first.pet.lora_default.a"].shape[0] == 4


def test_tables_that_are_the_bases_are_passed_over(tmp_path: Path) -> None:
    base = made(llama)
    for number, config in enumerate(
        (
            peft.LoraConfig(r=2, target_modules=["q_proj"]),
            peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        )
    ):
        wrapped = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
        wrapped.save_pretrained(tmp_path / f"{number}", save_embedding_layers=True)
        assert any("embed_tokens" in name for name in load_file(tmp_path / f"{number}" / "adapter_model.safetensors"))
        load_delta(copy.deepcopy(base), tmp_path / f"{number}")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    with pytest.raises(DeltaFileError, match=r"lm_head\.weight .* is not the base's lm_head\.weight"):
        load_delta(other, tmp_path / "0")


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_ties_are_seen_when_a_file_without_its_base_is_loaded(saved: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])
    theirs(made(llama), config, tmp_path / "theirs")
    with pytest.warns(UserWarning, match="imported without its base"):
        import_delta(tmp_path / "theirs", tmp_path / "x.pet.safetensors")
    assert "without its base" in inspect_delta(tmp_path / "x.pet.safetensors").notes["not_compared"]
    model = made(tied)
    before = output_of(model)
    with pytest.raises(DeltaFileError, match="shares a weight"):
        load_delta(model, tmp_path / "x.pet.safetensors")
    assert torch.equal(output_of(model), before)
    load_delta(made(llama), tmp_path / "x.pet.safetensors")


def test_a_tied_bias_of_a_file_without_its_base(tmp_path: Path) -> None:
    build, config = READ["a tied bias"]
    base = made(build)
    expected = theirs(base, config, tmp_path / "theirs")
    import_delta(tmp_path / "theirs", tmp_path / "x.pet.safetensors")
    load_delta(base, tmp_path / "x.pet.safetensors")
    torch.testing.assert_close(output_of(base.eval()), expected, rtol=0, atol=1e-12)


# --- refused by name -----------------------------------------------------------------------------------------


def as_table(tensors: dict[str, Tensor]) -> None:
    for name in [*tensors]:
        other = name.replace("lora_A.weight", "lora_embedding_A").replace("lora_B.weight", "lora_embedding_B")
        tensors[other] = tensors.pop(name)


def on_a_norm(tensors: dict[str, Tensor]) -> None:
    for name in [*tensors]:
        tensors[name.replace("self_attn.q_proj", "input_layernorm")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [(as_table, "gives an embedding for .*, which is a Linear"), (on_a_norm, "LlamaRMSNorm here")],
)
def test_tensors_of_another_kind_of_layer(
    change: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    base = made(llama)
    theirs(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    retouch(tmp_path, change)
    before = output_of(base)
    with pytest.raises(DeltaFileError, match=words) as caught:
        load_delta(base, tmp_path)
    assert caught.value.code == "mismatch"
    assert torch.equal(output_of(base), before)


def test_a_prefix_of_relative_positions_says_so(tmp_path: Path) -> None:
    base = made(t5, torch.float32)
    theirs(base, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"), tmp_path)
    with pytest.raises(DeltaFileError, match="T5ForConditionalGeneration has no rotary positions"):
        load_delta(base, tmp_path)


def test_options_that_fit_a_folder_are_said(tmp_path: Path) -> None:
    base = made(bert)
    theirs(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"]), tmp_path)
    with pytest.raises(DeltaFileError, match=r"r=3, alpha=5, target_modules=\['query', 'value'\]"):
        apply(base, LoRACallback(r=2, start_from=str(tmp_path)))


def test_text_is_no_delta(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"format": 1, "runs": []}')
    with pytest.raises(DeltaFileError, match="found text, such as JSON"):
        inspect_delta(tmp_path / "sweep.json")


def test_one_file_twice_is_itself(tmp_path: Path) -> None:
    from lightning_pet import IA3Callback

    base = made(bert)
    save_delta(trained(base, IA3Callback()), tmp_path / "x.pet.safetensors")
    combine_deltas([tmp_path / "x.pet.safetensors"] * 2, tmp_path / "y.pet.safetensors")
    outputs = []
    for name in ("x", "y"):
        load_delta(model := copy.deepcopy(base), tmp_path / f"{name}.pet.safetensors")
        outputs.append(output_of(model.eval()))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-14)


def test_a_merged_folder_is_whole(tmp_path: Path) -> None:
    base = made(llama, torch.float32)
    base.generation_config.max_new_tokens = 7
    base.save_pretrained(tmp_path / "base")
    told = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**told, "_name_or_path": "owner/base"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja", "source.spm"):
        (tmp_path / "base" / name).write_text("{}")
    model = trained(base, LoRACallback(r=2))
    save_delta(model, tmp_path / "x.pet.safetensors")
    export_delta(tmp_path / "x.pet.safetensors", tmp_path / "merged", to="transformers", base=tmp_path / "base")
    there = {file.name for file in (tmp_path / "base").iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == there | {"README.md"}
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.generation_config.max_new_tokens == 7
    torch.testing.assert_close(output_of(merged), output_of(model), rtol=0, atol=1e-6)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "base_model: owner/base" in card
    assert "base_model_relation: finetune" in card
    assert "The base `owner/base`, into which a delta of lora was merged." in card
    assert str(tmp_path) not in card


def test_a_folder_is_combined_with_a_delta_of_ours(tmp_path: Path) -> None:
    base = made(bert)
    theirs(base, peft.LoraConfig(r=2, target_modules=["query"]), tmp_path / "theirs")
    save_delta(
        trained(base, LoRACallback(r=3, target_modules=["query"], modules_to_save=[])), tmp_path / "x.pet.safetensors"
    )
    model = copy.deepcopy(base)
    adapted = load_delta(model, tmp_path / "theirs", name="a")
    adapted.load("b", tmp_path / "x.pet.safetensors")
    adapted.combine("c", {"a": 1.0, "b": 1.0})
    adapted.activate("a", "b")
    both = output_of(model)
    adapted.activate("c")
    torch.testing.assert_close(output_of(model), both, rtol=0, atol=1e-12)
