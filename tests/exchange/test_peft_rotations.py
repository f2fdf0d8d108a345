"""OFT, HRA and BOFT: folders of PEFT give the outputs here that they give there, and ours give theirs there."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_pet import DeltaFileError, HRACallback, OFTCallback, PETCallback, export_delta, load_delta
from tests.exchange.peft_models import Attention, Convolutions, bert, gpt2, llama, made, output_of
from tests.exchange.test_peft_reading import theirs
from tests.exchange.test_peft_writing import in_peft, trained

Build = Callable[[], nn.Module]
THEIRS: dict[str, tuple[Build, Any]] = {
    "oft": (bert, peft.OFTConfig(oft_block_size=4, target_modules=["query", "dense"], task_type="SEQ_CLS")),
    "oft sizes that PEFT replaces": (llama, peft.OFTConfig(oft_block_size=24, target_modules=["q_proj", "down_proj"])),
    "oft exact": (bert, peft.OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=["key"])),
    "oft shared": (llama, peft.OFTConfig(oft_block_size=8, block_share=True, target_modules=["v_proj", "down_proj"])),
    "oft three terms": (llama, peft.OFTConfig(oft_block_size=8, num_cayley_neumann_terms=3, target_modules=["v_proj"])),
    "oft constrained": (llama, peft.OFTConfig(oft_block_size=8, coft=True, eps=0.1, target_modules=["v_proj"])),
    "hra": (bert, peft.HRAConfig(r=4, target_modules=["query", "dense"], task_type="SEQ_CLS")),
    "hra odd": (llama, peft.HRAConfig(r=3, target_modules=["q_proj", "down_proj"])),
    "hra orthogonal": (llama, peft.HRAConfig(r=3, apply_GS=True, target_modules=["q_proj"])),
    "hra convolutions": (Convolutions, peft.HRAConfig(r=4, target_modules=["first", "second", "linear"])),
    "boft": (llama, peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "down_proj"])),
}
OURS: dict[str, tuple[Build, Callable[[], PETCallback]]] = {
    "oft": (llama, lambda: OFTCallback(oft_block_size=4)),
    "oft exact": (bert, lambda: OFTCallback(oft_block_size=8, use_cayley_neumann=False)),
    "oft by number": (llama, lambda: OFTCallback(oft_block_size=0, r=4, target_modules=["q_proj", "down_proj"])),
    "oft shared and constrained": (bert, lambda: OFTCallback(8, block_share=True, coft=True, eps=0.1)),
    "hra": (bert, lambda: HRACallback(r=4)),
    "hra convolutions": (Convolutions, lambda: HRACallback(r=3, apply_GS=True, target_modules=["first", "linear"])),
}
WITHIN = {"oft constrained": 1e-6, "oft shared and constrained": 1e-6}  # PEFT has the bound in float32


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("case", THEIRS)
def test_outputs_are_those_of_peft(case: str, tmp_path: Path) -> None:
    build, config = THEIRS[case]
    model = made(build)
    before = output_of(model)
    expected = theirs(model, config, tmp_path)
    load_delta(model, tmp_path)
    tolerance = WITHIN.get(case, 1e-12)
    torch.testing.assert_close(output_of(model.eval()), expected, rtol=0, atol=tolerance)
    assert (expected - before).abs().max() > 1e-4


@pytest.mark.parametrize("case", OURS)
def test_outputs_in_peft_are_ours(case: str, tmp_path: Path) -> None:
    build, method = OURS[case]
    base = made(build)
    model = trained(base, method())
    ours = output_of(model)
    assert (ours - output_of(base)).abs().max() > 1e-4
    export_delta(model, tmp_path / "folder")
    tolerance = WITHIN.get(case, 1e-12)
    torch.testing.assert_close(in_peft(base, tmp_path / "folder", ours), ours, rtol=0, atol=tolerance)
    back = copy.deepcopy(base)
    load_delta(back, tmp_path / "folder", base_check="off")
    torch.testing.assert_close(output_of(back.eval()), ours, rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", [llama, Convolutions])
def test_reflections_are_written_as_the_lora_that_they_are(build: Build, tmp_path: Path) -> None:
    base = made(build)
    targets = ["first", "linear"] if build is Convolutions else ["q_proj", "v_proj"]
    model = trained(base, HRACallback(r=2, target_modules=targets))
    done = export_delta(model, tmp_path / "folder", to="lora", base=copy.deepcopy(base))
    assert done.error == 0.0
    ours = output_of(model)
    torch.testing.assert_close(in_peft(base, tmp_path / "folder", ours), ours, rtol=0, atol=1e-12)


def test_factors_of_outputs_that_leave_the_bias_alone(tmp_path: Path) -> None:
    config = peft.BOFTConfig(boft_block_size=4, target_modules=["query"])
    theirs(made(bert), config, tmp_path / "peft")
    with pytest.raises(DeltaFileError, match="rescales the weight but not the bias"):
        load_delta(made(bert), tmp_path / "peft")


def changed(change: Callable[[dict[str, Tensor]], None], folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def _older(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("oft_R.weight", "oft_r")] = tensors.pop(name)


def _zero(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values()))[:, 0] = 0


def _two_factors(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("boft_R")]:
        tensors[name] = tensors[name].repeat(2, 1, 1, 1)


@pytest.mark.parametrize(
    ("build", "config", "change", "words"),
    [
        (llama, peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]), _older, "before 0.16"),
        (llama, peft.HRAConfig(r=2, target_modules=["q_proj"]), _zero, "divides by"),
        (llama, peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]), _two_factors, "2 butterfly factors"),
        (Attention, peft.HRAConfig(r=2, target_modules=["out_proj"]), lambda tensors: None, "no effect until"),
        (lambda: Convolutions(2), peft.OFTConfig(oft_block_size=4, target_modules=["second"]), None, "PEFT does not"),
        (llama, peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], bias="all"), None, "bias='all'"),
    ],
)
def test_what_is_refused(build: Build, config: Any, change: Any, words: str, tmp_path: Path) -> None:
    model = made(build)
    with contextlib.suppress(RuntimeError):  # PEFT cannot run it, but has written it
        theirs(model, config, tmp_path / "peft")
    if change is not None:
        changed(change, tmp_path / "peft")
    before = output_of(model)
    with pytest.raises(DeltaFileError, match=words):
        load_delta(model, tmp_path / "peft")
    assert torch.equal(output_of(model), before)


@pytest.mark.parametrize(
    ("build", "method", "words"),
    [
        (gpt2, lambda: HRACallback(r=2, target_modules=["c_attn"]), "Conv1D"),
        (gpt2, lambda: OFTCallback(8), "Conv1D"),
        (Attention, lambda: HRACallback(r=2, target_modules=["in_proj_weight"]), "read without a call"),
        (
            llama,
            lambda: OFTCallback(8, target_modules=["q_proj", "down_proj"], block_size_pattern={"down_proj": 4}),
            "one block size for all",
        ),
    ],
)
def test_what_is_not_written(build: Build, method: Callable[[], PETCallback], words: str, tmp_path: Path) -> None:
    model = trained(made(build), method())
    with pytest.raises(DeltaFileError, match=words):
        export_delta(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
