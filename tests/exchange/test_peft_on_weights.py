"""HiRA, MiSS and SHiRA between HF PEFT and here: what their folders may say that the outputs do not show."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_pet import DeltaFileError, SHiRACallback, export_delta, import_delta, load_delta
from tests.exchange.peft_models import llama, made, output_of
from tests.exchange.test_peft_reading import theirs
from tests.exchange.test_peft_writing import in_peft, trained


def test_bone_is_refused_by_name(tmp_path: Path) -> None:
    model = made(llama)
    theirs(model, peft.MissConfig(r=4, init_weights="bat", target_modules=["q_proj"]), tmp_path)
    with pytest.raises(DeltaFileError, match="is another method"):
        load_delta(model, tmp_path)


def test_hira_on_a_table_that_multiplies_its_rows(tmp_path: Path) -> None:
    def gemma() -> nn.Module:
        config = transformers.GemmaConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8
        )
        return transformers.GemmaForCausalLM(config)

    model = made(gemma)
    theirs_there = theirs(model, peft.HiraConfig(r=2, target_modules=["embed_tokens"]), tmp_path / "theirs")
    with pytest.raises(DeltaFileError, match="may do more than look up"):
        import_delta(tmp_path / "theirs", tmp_path / "x.pet.safetensors")
    adapted = copy.deepcopy(model)
    load_delta(adapted, tmp_path / "theirs")
    torch.testing.assert_close(output_of(adapted.eval()), theirs_there, rtol=0, atol=1e-12)
    export_delta(adapted, tmp_path / "ours")
    torch.testing.assert_close(in_peft(model, tmp_path / "ours", theirs_there), theirs_there, rtol=0, atol=1e-12)


def test_places_of_shira(tmp_path: Path) -> None:
    model = made(llama)
    folder, file = tmp_path / "theirs", tmp_path / "theirs" / "adapter_model.safetensors"
    expected = theirs(model, peft.ShiraConfig(r=2, target_modules=["q_proj"]), folder)
    with pytest.raises(DeltaFileError, match="only the base can tell"):
        import_delta(folder, tmp_path / "x.pet.safetensors")
    import_delta(folder, tmp_path / "x.pet.safetensors", base=copy.deepcopy(model))
    adapted = copy.deepcopy(model)
    load_delta(adapted, tmp_path / "x.pet.safetensors")
    torch.testing.assert_close(output_of(adapted.eval()), expected, rtol=0, atol=1e-12)
    good: dict[str, Any] = load_file(file)
    name = next(name for name in good if name.endswith("shira_indices"))
    for wrong in (good[name] + 16, good[name][:, 1:], good[name] - 1, good[name].float() + 0.5):
        save_file({**good, name: wrong.contiguous()}, file)
        with pytest.raises(DeltaFileError, match="expected a row and a column"):
            load_delta(copy.deepcopy(model), folder)
    save_file({**good, name: good[name].float()}, file)  # as PEFT writes them on one platform
    again = copy.deepcopy(model)
    load_delta(again, folder)
    torch.testing.assert_close(output_of(again.eval()), expected, rtol=0, atol=1e-12)


def test_free_places_are_filled_up_where_layers_differ(tmp_path: Path) -> None:
    base = made(llama)
    model = trained(base, SHiRACallback(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=[]))
    delta = model.model.layers[0].self_attn.q_proj.pet["shira_default"]
    delta.take_form({"indices": delta.indices[:7], "values": delta.values.detach()[:7]})
    export_delta(model, tmp_path / "folder")
    torch.testing.assert_close(
        in_peft(base, tmp_path / "folder", output_of(model)), output_of(model), rtol=0, atol=1e-12
    )
