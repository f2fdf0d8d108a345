"""LoKr and LoHa of HF PEFT, both ways: in every form that sizes and options lead to."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_pet import (
    DeltaFileError,
    LoHaCallback,
    LoKrCallback,
    PETCallback,
    export_delta,
    load_delta,
)
from lightning_pet.exchange.folder import read_folder
from tests.exchange.peft_models import Kernels, bert, gpt2, made, output_of
from tests.exchange.test_peft_reading import Build, theirs
from tests.exchange.test_peft_writing import in_peft, trained

KERNELS = ["line", "point", "plane", "spot", "linear"]
BERT: dict[str, Any] = {
    "target_modules": ["query", "dense"],
    "rank_pattern": {"query": 3},
    "alpha_pattern": {"dense": 5},
}
READ: dict[str, tuple[Build, Any]] = {
    "lokr": (bert, peft.LoKrConfig(r=1, alpha=2, task_type="SEQ_CLS", **BERT)),
    "lokr kernels": (Kernels, peft.LoKrConfig(r=1, alpha=2, target_modules=KERNELS)),
    "lokr whole": (Kernels, peft.LoKrConfig(r=8, alpha=4, target_modules=KERNELS, init_weights="lycoris")),
    "lokr core": (Kernels, peft.LoKrConfig(r=2, target_modules=KERNELS, decompose_factor=2, use_effective_conv2d=True)),
    "lokr both": (Kernels, peft.LoKrConfig(r=1, target_modules=KERNELS, decompose_factor=4, decompose_both=True)),
    "loha": (bert, peft.LoHaConfig(r=2, alpha=3, modules_to_save=["classifier"], **BERT)),
    "loha kernels": (Kernels, peft.LoHaConfig(r=2, target_modules=KERNELS)),
    "loha core": (Kernels, peft.LoHaConfig(r=2, target_modules=KERNELS, use_effective_conv2d=True)),
}
KERNEL: dict[str, Any] = {"target_modules": KERNELS, "modules_to_save": []}
WRITTEN: dict[str, tuple[Build, PETCallback]] = {
    "lokr": (bert, LoKrCallback(r=1, rank_pattern={"attention.q": 3}, alpha_pattern={"ffn.up": 5})),
    "lokr kernels": (Kernels, LoKrCallback(r=1, **KERNEL)),
    "lokr whole": (Kernels, LoKrCallback(r=8, init="lycoris", **KERNEL)),
    "lokr core": (Kernels, LoKrCallback(r=2, decompose_factor=2, use_effective_conv2d=True, **KERNEL)),
    "lokr both": (Kernels, LoKrCallback(r=1, decompose_factor=4, decompose_both=True, **KERNEL)),
    # PEFT holds the scale of LoHa in float32: one that has few bits
    "loha": (bert, LoHaCallback(r=2, rank_pattern={"attention.q": 4}, alpha_pattern={"ffn.up": 5})),
    "loha kernels": (Kernels, LoHaCallback(r=2, **KERNEL)),
    "loha core": (Kernels, LoHaCallback(r=2, use_effective_conv2d=True, **KERNEL)),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_outputs_are_those_of_peft(tmp_path: Path) -> None:
    for case, (build, config) in READ.items():
        model = made(build)
        before = output_of(model)
        expected = theirs(model, config, tmp_path / case)
        load_delta(model, tmp_path / case)
        torch.testing.assert_close(output_of(model.eval()), expected, rtol=0, atol=1e-12, msg=case)
        assert (expected - before).abs().max() > 1e-6, case


def test_outputs_in_peft_are_ours(tmp_path: Path) -> None:
    for case, (build, method) in WRITTEN.items():
        base = made(build)
        model = trained(base, copy.deepcopy(method))
        ours = output_of(model)
        assert (ours - output_of(base)).abs().max() > 1e-6, case
        done = export_delta(model, tmp_path / case)
        torch.testing.assert_close(in_peft(base, tmp_path / case, ours), ours, rtol=0, atol=1e-12, msg=case)
        assert (done.difference or 0.0) <= 1e-6, case
        again = copy.deepcopy(base)
        load_delta(again, tmp_path / case)
        assert torch.equal(output_of(again.eval()), ours), case


def test_lora_of_the_rank_that_they_have_is_exact(tmp_path: Path) -> None:
    for case, rank in (("lokr both", 1), ("loha kernels", 4), ("lokr core", 4), ("loha core", 4)):
        build, method = WRITTEN[case]
        base = made(build)
        model = trained(base, copy.deepcopy(method))
        done = export_delta(model, tmp_path / case, to="lora")
        assert (done.rank, done.error) == (rank, 0.0), case
        ours = output_of(model)
        torch.testing.assert_close(in_peft(base, tmp_path / case, ours), ours, rtol=0, atol=1e-12, msg=case)


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    for method in (LoKrCallback(r=1, target_modules="attention.v"), LoHaCallback(r=1, target_modules="c_proj")):
        model = trained(made(gpt2), method)
        with pytest.raises(DeltaFileError, match="to='lora'"):
            export_delta(model, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_damaged_folders_are_refused_by_name(tmp_path: Path) -> None:
    model = made(Kernels)
    theirs(model, READ["lokr core"][1], tmp_path)
    values, options = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(values), json.loads(options.read_text())

    def refused(match: str, base: Any = model, drop: str = "", **options: Any) -> None:
        save_file(
            {n: t for n, t in tensors.items() if not drop or drop not in n}, tmp_path / "adapter_model.safetensors"
        )
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | options))
        with pytest.raises(DeltaFileError, match=match):
            load_delta(base, tmp_path)
        assert not hasattr(base.linear, "pet")

    refused("make no change together", drop="line.lokr_w2_a")
    refused("expected -1 or a positive", decompose_factor=0)
    refused("expected a number", alpha="2")
    refused("changes what the delta computes", rotates=True)
    padded = made(Kernels)
    padded.plane.padding_mode = "reflect"
    refused("pads with zeros", padded)
    assert read_folder(tmp_path).config["peft_type"] == "LOKR"
