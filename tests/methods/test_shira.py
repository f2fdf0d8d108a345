"""SHiRA: the battery, golden numbers, and what only this method promises."""

import copy
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_pet import ArgumentError, SHiRACallback, TargetError, apply, combine_deltas, load_delta, save_delta
from lightning_pet.layers.sparse_values import SparseValues, _drawn

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, perturb
from .golden import BIAS, WEIGHT, X, fill


class TestSHiRA(Battery):
    cases: ClassVar[list[Case]] = [
        Case("transformer_encoder", SHiRACallback, {"r": 1, "target_modules": ["attention.q", "ffn.up"]}),
        Case(
            "gpt2",
            SHiRACallback,
            {"r": 2, "target_modules": ["attention.v"]},
            parameters=2 * 2 * (16 + 16),
            not_compiled=LIKE_SMALLER,
        ),
        Case(
            "mlp",
            SHiRACallback,
            {"r": 1, "target_modules": ["0"], "mask_type": "magnitude"},
            parameters=6 + 8,
            needs_values=True,
        ),
    ]


def test_golden_numbers() -> None:
    host = nn.Linear(4, 3, dtype=torch.float64)
    host.weight.data.copy_(WEIGHT)
    host.bias.data.copy_(BIAS)
    model = nn.Sequential(host)
    apply(model, [SHiRACallback(r=1, target_modules=["0"])])
    delta = host.pet["shira_default"]
    assert isinstance(delta, SparseValues)
    rows, columns = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([1, 3, 0, 2, 1, 2, 3])
    delta.indices.copy_(rows * 4 + columns)
    delta.values.data.copy_(fill(0, 7))
    wanted = torch.tensor([-0.8, 2.7, 0.4], dtype=torch.float64)
    assert (model(X) - wanted).abs().max() < 1e-14
    change = torch.zeros(3, 4, dtype=torch.float64).index_put((rows, columns), fill(0, 7))
    assert ((WEIGHT + change) @ X + BIAS - wanted).abs().max() < 1e-14


def test_files_hold_the_places_whatever_the_seed_is(tmp_path: Path) -> None:
    model, run = zoo.gpt2()
    adapted = apply(model, [SHiRACallback(r=2, target_modules=["ffn.up"], random_seed=7)])
    perturb(adapted)
    save_delta(model, tmp_path / "x.pet.safetensors")
    other, _ = zoo.gpt2()
    load_delta(other, tmp_path / "x.pet.safetensors")
    assert torch.equal(run(other), run(model))
    resumed, _ = zoo.gpt2()
    start_from = str(tmp_path / "x.pet.safetensors")
    apply(resumed, [SHiRACallback(r=2, target_modules=["ffn.up"], random_seed=8, start_from=start_from)])
    assert torch.equal(run(resumed), run(model))


def test_deltas_at_different_places_add_up(tmp_path: Path) -> None:
    base, _ = zoo.gpt2()
    base.double()
    places, files = "transformer.h.0.mlp.c_fc", [tmp_path / "0.pet.safetensors", tmp_path / "1.pet.safetensors"]
    total = torch.zeros_like(base.get_submodule(places).weight)
    for seed, file in enumerate(files):
        model = copy.deepcopy(base)
        adapted = apply(model, [SHiRACallback(r=1 + seed, target_modules=["ffn.up"], random_seed=seed)])
        perturb(adapted)
        save_delta(model, file)
        adapted.merge_()
        total += model.get_submodule(places).weight.detach() - base.get_submodule(places).weight.detach()
    combine_deltas(files, tmp_path / "sum.pet.safetensors", weights=[1.0, 1.0])
    adapted = load_delta(base, tmp_path / "sum.pet.safetensors")
    before = base.get_submodule(places).weight.detach().clone()
    adapted.merge_()
    assert (base.get_submodule(places).weight - before - total).abs().max() < 1e-14


@pytest.mark.parametrize("count", [5, 60, 99])
def test_places_are_drawn_evenly_and_rise(count: int) -> None:
    times = torch.zeros(100)
    for seed in range(400):
        places = _drawn((10, 10), count, seed, None, 0)
        assert len(places) == count
        assert bool((places[1:] > places[:-1]).all())
        times[places] += 1
    assert (times / 400 - count / 100).abs().max() < 0.11
    assert torch.equal(_drawn((10, 10), count, 3, None, 0), _drawn((10, 10), count, 3, None, 0))


def test_places_of_one_role_lie_in_its_outputs() -> None:
    model, _ = zoo.gpt2()
    apply(model, [SHiRACallback(r=2, target_modules=["attention.v"])])
    host = model.transformer.h[0].attn.c_attn
    (delta,) = host.pet.values()
    assert bool((delta.indices.long() % host.weight.shape[1] >= 32).all())


def test_the_largest_entries_are_chosen() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    apply(model, [SHiRACallback(r=1, target_modules=["0"], mask_type="magnitude")])
    chosen = model[0].pet["shira_default"].indices.long()
    sizes = model[0].weight.detach().abs().flatten()
    assert sizes[chosen].min() >= sizes[torch.ones(48, dtype=torch.bool).index_fill(0, chosen, False)].max()


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="r=0"):
        SHiRACallback(r=0)
    with pytest.raises(ArgumentError, match="mask_type='snip'"):
        SHiRACallback(mask_type="snip")  # type: ignore[arg-type]
    model, _ = zoo.mlp()
    with pytest.raises(TargetError, match="r can be at most 3"):
        apply(model, [SHiRACallback(target_modules=["0"])])


def test_a_budget_counts_without_drawing() -> None:
    model, _ = zoo.gpt2()
    adapted = apply(model, [SHiRACallback(budget=0.1, target_modules=["ffn.up"])])
    assert adapted.plan().trainable <= 0.1 * sum(p.numel() for p in zoo.gpt2()[0].parameters())
