"""Options of engines that shard, late building, several methods at once: the losses of one process, or a refusal."""

import json
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_operator import can_build, require_deepspeed
from launch import launch

from lightning_pet.operations.delta import load_delta

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from tests.methods import zoo  # noqa: E402

SCRIPT = str(Path(__file__).with_name("feature_runs.py"))
SEVERAL = ["Prefix tuning, parallel adapter", "LoRA, BitFit", "LoRA, LoRA"]
SINGLE = ["LoRA", "Adapter"]
OPTIONS = {
    "fsdp": ["meta", "sync", "hybrid12", "hybrid21", "grad", "mixed"],
    "fsdp2": ["keep", "mixed", "offload", "hybrid", "early"],
    "zero2": ["fp16", "offload"],
    "zero3": ["init", "fp16", "offload", "init+true", "init+amp"],
}
PRECISIONS = ["true", "amp"]  # bf16-true, bf16-mixed: under every engine
SHORT = [
    "fsdp-meta:Adapter",
    "fsdp-hybrid21:LoRA",
    "fsdp2-hybrid:LoRA, LoRA",
    "fsdp2-true:LoRA, BitFit",
    "zero3-init:LoRA",
    "zero3-init+true:LoRA",
]
LONG = [
    *(
        f"{engine}-{option}:{method}"
        for engine in OPTIONS
        for option in OPTIONS[engine]
        for method in ("LoRA", "Adapter")
    ),
    *(f"{engine}:{methods}" for engine in OPTIONS for methods in SEVERAL),
    "fsdp2-early+true:LoRA, BitFit",
    *(f"{engine}-true:LoRA, BitFit" for engine in ("ddp", "fsdp", "fsdp2")),
    *(f"{engine}-{precision}:LoRA" for engine in ("ddp", *OPTIONS) for precision in PRECISIONS),
]
REFUSED = {
    ("hybrid21", "losses"): "torch turns this into NO_SHARD",
    ("meta", "started"): "start_from: FSDP1 would fill deltas on the meta device",
}
ROUNDED = (
    "mixed",
    "early",
    "fp16",
    *PRECISIONS,
    "init+true",
    "init+amp",
    "early+true",
)  # these compute in half precision


def results(folder, cases, processes):
    codes, outputs = launch([SCRIPT, str(folder), *cases], n=processes, timeout=900)
    assert codes == [0] * processes, "\n".join(output[-3000:] for output in outputs)
    ranks = [[json.loads(line[6:]) for line in o.splitlines() if line.startswith("FOUND ")] for o in outputs]
    assert all(rank == ranks[0] for rank in ranks)
    return {found["case"]: found for found in ranks[0]}


def check_file(folder, case, size):
    """The file of save_delta, written by all processes together, is the last checkpoint's delta, in plain torch."""
    path = folder / case / "saved.pet.safetensors"
    assert path.stat().st_size == size
    outputs = []
    for file in (path, folder / case / "step=4.ckpt"):
        model, run = zoo.bert()
        load_delta(model, file)
        outputs.append(run(model))
    assert torch.equal(*outputs)


def check(folder, cases):
    methods = sorted({case.partition(":")[2] for case in cases})
    one = results(folder, [f"one:{method}" for method in methods], 1)
    two = results(folder, cases, 2)
    assert list(two) == cases
    for case, found in two.items():
        option, method = case.partition(":")[0].partition("-")[2], case.partition(":")[2]
        expected, tolerance = one[f"one:{method}"], 5e-2 if option in ROUNDED else 1e-5
        for part in ("losses", "started"):
            if (option, part) in REFUSED:
                assert REFUSED[option, part] in found["error"], case
            elif option == "fp16":  # steps are left out while the scale of the loss is found
                assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=tolerance), case
            elif "losses" in found:
                assert found[part] == pytest.approx(expected[part], rel=tolerance), (case, part)
        if "losses" in found:
            assert found["resumed"] == found["losses"][2:], case
            check_file(folder, case, found["size"])


def test_of_every_kind(tmp_path):
    if can_build():  # in one group with the other engines: starting processes takes longer than these cases
        require_deepspeed()
    check(tmp_path, [case for case in SHORT if can_build() or not case.startswith("zero")])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", *OPTIONS])
def test_all(engine, tmp_path):
    if engine.startswith("zero"):
        require_deepspeed()
    check(tmp_path, [case for case in LONG if case.partition(":")[0].partition("-")[0] == engine])
