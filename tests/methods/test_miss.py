"""MiSS: the battery, golden numbers, and what only this method promises."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_pet import (
    Adapted,
    ArgumentError,
    MiSSCallback,
    TargetError,
    apply,
    combine_deltas,
    load_delta,
    save_delta,
)

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, perturb
from .golden import BIAS, WEIGHT, X, fill


class TestMiSS(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", MiSSCallback, {"r": 4, "target_modules": ["0"]}, parameters=4 * 8),
        Case("transformer_encoder", MiSSCallback, {"r": 3, "target_modules": ["attention.q", "ffn.up"]}),
        Case("gpt2", MiSSCallback, {"r": 5, "mini_r": 4}, not_compiled=LIKE_SMALLER),
    ]


@pytest.mark.parametrize(("r", "expected"), [(2, [-1.4, 3.3, -0.2]), (3, [-1.15, 3.55, 0.05])])
def test_golden_numbers(r: int, expected: list[float]) -> None:
    host = nn.Linear(4, 3, dtype=torch.float64)
    host.weight.data.copy_(WEIGHT)
    host.bias.data.copy_(BIAS)
    model = nn.Sequential(host)
    apply(model, [MiSSCallback(r=r, target_modules=["0"])])
    block = host.pet["miss_default"].block
    block.data.copy_(fill(0, r, 3))
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert (model(X) - wanted).abs().max() < 1e-14
    change = torch.stack([block[column % r] for column in range(4)], 1)
    assert ((WEIGHT + change) @ X + BIAS - wanted).abs().max() < 1e-14
    a, b = host.pet["miss_default"].low_rank_factors()
    assert torch.equal(b @ a, change)


def test_the_input_is_not_kept_for_backward() -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    model.requires_grad_(False)
    apply(model, [MiSSCallback(r=8, target_modules=["0"])])
    x, kept = torch.randn(32, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(x)
    assert max(kept) < x.numel()


def test_sums_over_many_blocks_keep_their_precision_in_half_precision() -> None:
    model = nn.Sequential(nn.Linear(4096, 2, bias=False))
    model[0].weight.data.zero_()
    model.bfloat16()
    apply(model, [MiSSCallback(r=1, target_modules=["0"])])
    model[0].pet["miss_default"].block.data.fill_(1.0)
    out = model(torch.ones(1, 4096, dtype=torch.bfloat16))
    assert torch.equal(out, torch.full((1, 2), 4096.0, dtype=torch.bfloat16))  # 256 if added up in bfloat16


def test_sums_of_deltas_and_rows_of_their_own(tmp_path: Path) -> None:
    model, run = zoo.llama()
    model.double()
    before, changes, files = run(model), {}, []
    options: dict[str, Any] = {"target_modules": ["attention.q"], "modules_to_save": []}
    for name, r in (("one", 4), ("two", 4), ("other", 6)):
        twin = copy.deepcopy(model)
        adapted = apply(twin, [MiSSCallback(r=r, layers_to_transform=[0], **options)])
        perturb(adapted, 0.1 * (1 + len(files)))
        changes[name] = run(twin)
        files.append(tmp_path / f"{name}.pet.safetensors")
        save_delta(twin, files[-1])
    several = copy.deepcopy(model)
    for name, file in zip(changes, files, strict=True):
        load_delta(several, file, name=name)
    with Adapted(several).rows(["one", "other"]):
        found = run(several)
    assert (found - torch.cat([changes["one"][:1], changes["other"][1:]])).abs().max() < 1e-12
    combine_deltas(files[:2], tmp_path / "sum.pet.safetensors", weights=[1.0, 1.0])
    load_delta(model, tmp_path / "sum.pet.safetensors")
    weight = model.model.layers[0].self_attn.q_proj
    blocks = [load_file(file)["model.layers.0.self_attn.q_proj.pet.miss_default.block"] for file in files[:2]]
    assert torch.allclose(weight.pet["miss_default"].block, sum(blocks))
    assert (run(model) - before).abs().max() > 1e-3


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="r=0"):
        MiSSCallback(r=0)
    model, _ = zoo.mlp()
    with pytest.raises(TargetError, match="r can be at most that"):
        apply(model, [MiSSCallback(target_modules=["0"])])
    with pytest.raises(TargetError, match="does not divide"):
        apply(model, [MiSSCallback(r=2, target_modules=["0"], mini_r=3)])
    encoder, run = zoo.transformer_encoder()
    with pytest.raises(TargetError, match="no input can be dropped"):
        apply(encoder, [MiSSCallback(r=2, dropout=0.1, target_modules=["attention.q"])], forward=lambda: run(encoder))


def test_roles_of_one_weight_add_up() -> None:
    model, _ = zoo.gpt2()
    model.double()
    adapted = apply(model, [MiSSCallback(r=3, target_modules=["attention.q", "attention.v"])])
    perturb(adapted)
    host = model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 16, dtype=torch.float64)
    change = host(x) - (x @ host.weight + host.bias)
    assert change[:, 16:32].abs().max() < 1e-14
    assert min(change[:, :16].abs().max(), change[:, 32:].abs().max()) > 0.1
