"""Diff pruning: the battery, golden properties, and its own errors."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import (
    ArgumentError,
    DeltaFileError,
    DiffPruningCallback,
    LoRACallback,
    PETError,
    TargetError,
    apply,
    load_delta,
    save_delta,
)
from lightning_pet.callbacks.diff_pruning.cut import largest
from lightning_pet.model.call import Selection
from lightning_pet.store.delta_file import read_delta

from . import zoo
from .battery import LIKE_SMALLER, RECURRENT, Battery, Case, output_in_a_new_process, perturb

DIFF = DiffPruningCallback


class TestDiffPruning(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", DIFF, {"density": 0.1}, parameters=2 * (48 + 8 + 32 + 4) + 4),
        Case("mlp", DIFF, {"density": 0.1, "structured": False}, parameters=2 * (48 + 8 + 32 + 4)),
        Case("mlp", DIFF, {"density": 0.1, "gates": "group", "penalty": "sum"}, parameters=92 + 4),
        Case("embedding", DIFF, {"density": 0.1}),
        Case("conv1d", DIFF, {"density": 0.1, "temperature": 2 / 3, "stretch": [-0.1, 1.1]}),
        Case("lstm", DIFF, {"density": 0.1}, not_compiled=RECURRENT),
        Case("transformer_encoder", DIFF),
        Case("bert", DIFF, {"norms": False}, not_compiled=LIKE_SMALLER),
        Case("gpt2", DIFF, {"embeddings": False}, not_compiled=LIKE_SMALLER),
        Case("mixtral", DIFF, not_compiled=LIKE_SMALLER),
    ]


def adapted_mlp(**options: Any) -> tuple[nn.Module, Any, DiffPruningCallback]:
    model, _ = zoo.mlp()
    callback = DIFF(**{"density": 0.1, "modules_to_save": [], **options})
    return model, apply(model, [callback]), callback


def deltas(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "SparseDifference"]


def set_alpha(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for delta in deltas(model):
            for parameter in delta.gate_parameters:
                parameter.fill_(value)


# --- the gated form -------------------------------------------------------------------------------


def test_open_gates_are_full_fine_tuning_and_closed_ones_the_base() -> None:
    x = torch.randn(5, 6)
    full, _ = zoo.mlp()
    model, adapted, _ = adapted_mlp(l0_weight=0.0)
    base, before = [p.detach().clone() for p in full.parameters()], model(x)
    set_alpha(model, 30.0)
    model.train()
    for trained in (full, model):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5)
        trained(x).square().sum().backward()
        optimizer.step()
    moved = [delta.difference() for delta in deltas(model)]
    assert all(torch.equal(m + b, p) for m, b, p in zip(moved, base, full.parameters(), strict=True))
    assert torch.equal(model(x), full(x))
    set_alpha(model, -30.0)
    assert torch.equal(model(x), before)
    assert torch.equal(model.eval()(x), before)
    set_alpha(model, 30.0)
    adapted.merge_()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), full.parameters(), strict=True))


def test_training_is_random_and_evaluation_is_not() -> None:
    model, adapted, _ = adapted_mlp()
    perturb(adapted, 2.0)
    x = torch.randn(5, 6)
    typical = model(x)
    assert torch.equal(model(x), typical)
    first = model.train()(x)
    assert not torch.equal(first, typical)
    first.sum().backward()
    assert not torch.equal(model(x), first)  # other gates after every backward
    delta = deltas(model)[0]
    z = (3 * delta.alpha.sigmoid() - 1.5).clamp(0, 1) * (3 * delta.alpha_group.sigmoid() - 1.5).clamp(0, 1)
    assert torch.allclose(delta.difference(), z * delta.w)


def test_gates_train_even_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model, adapted, _ = adapted_mlp(l0_weight=0.01)
        perturb(adapted)
        model.train()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(3):
            for delta in deltas(model):
                delta.gates.begin(step)
            run(torch.ones(2, 6)).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*found)


def test_heads_norms_embeddings_and_exclusions() -> None:
    def places(**options: Any) -> set[str]:
        model, _ = zoo.bert()
        return {row.place for row in apply(model, [DIFF(**options)]).plan().rows if row.method == "diff_pruning"}

    model, _ = zoo.bert()
    names = {name for name, _ in model.named_parameters()}
    head = {"classifier.weight", "classifier.bias"}
    assert places() == names - head
    assert places(heads=True) == names
    assert places(norms=False) == {name for name in names - head if "LayerNorm" not in name}
    assert places(embeddings=False) == {name for name in names - head if "_embeddings." not in name}
    without = places(exclude_modules=["pooler", "encoder.layer.0"])
    assert without == {name for name in names - head if "pooler" not in name and "layer.0." not in name}


def test_tied_weights_move_together() -> None:
    model, run = zoo.gpt2()
    adapted = apply(model, [DIFF(density=0.5)])
    perturb(adapted)
    attached, tensors = run(model), len(list(model.parameters()))
    assert len(deltas(model)) == tensors - sum(p.requires_grad for p in model.parameters())
    adapted.merge_()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (run(model) - attached).abs().max() < 1e-5


def test_together_with_lora_on_the_same_layers() -> None:
    model, run = zoo.mlp()
    model.double()
    base = run(model)
    both = apply(model, [LoRACallback(r=2, target_modules="all-linear"), DIFF(density=0.1, modules_to_save=[])])
    perturb(both)
    attached = run(model)
    for key in ("lora_default", "diff_pruning_default"):
        hosts = [module.pet for module in model.modules() if hasattr(module, "pet")]
        others = frozenset(k for pet in hosts for k in pet._modules if not k.startswith(key))
        with both.record.switch.using(Selection(keys=others)):
            assert not torch.allclose(run(model), attached)
    both.merge_()
    assert (run(model) - attached).abs().max() < 1e-12
    assert not torch.allclose(attached, base)


def test_bfloat16_state() -> None:
    model, adapted, _ = adapted_mlp(state="bf16")
    assert {delta.alpha.dtype for delta in deltas(model)} == {torch.bfloat16}
    assert {delta.w.dtype for delta in deltas(model)} == {torch.float32}
    perturb(adapted)
    model.train()(torch.randn(3, 6)).sum().backward()
    assert all(delta.alpha.grad.dtype == torch.bfloat16 for delta in deltas(model))


# --- the cut ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 200, 1999, 5000])
def test_exactly_so_many_entries_of_largest_magnitude(count: int) -> None:
    tensors = [torch.randn(40, 30), torch.randn(700).round(), torch.randn(5, 5, 5), torch.randn(75) * 1e-30]
    found = largest(lambda: tensors, count)
    kept = [t.flatten()[places] for t, places in zip(tensors, found, strict=True)]
    flat = torch.cat([t.flatten() for t in tensors]).abs()
    nonzero = int(flat.count_nonzero())
    assert sum(len(k) for k in kept) == min(count, nonzero)
    assert all((places.diff() > 0).all() for places in found)
    assert torch.equal(torch.cat(kept).abs().sort().values, flat.topk(min(count, nonzero)).values.flip(0))


def test_nothing_finite_is_missed_and_nothing_else_is_taken() -> None:
    with pytest.raises(ValueError, match="NaN"):
        largest(lambda: [torch.tensor([1.0, float("nan")])], 1)
    assert [p.tolist() for p in largest(lambda: [torch.zeros(3)], 2)] == [[]]
    assert [p.tolist() for p in largest(lambda: [torch.tensor([-1.0, 1.0, 1.0])], 2)] == [[0, 1]]  # ties by order


@pytest.mark.parametrize("density", [0.02, 0.1, 0.29, 1.0])
def test_the_cut_keeps_exactly_the_share(density: float) -> None:
    model, adapted, callback = adapted_mlp(density=density)
    perturb(adapted, 3.0)
    before = [delta.difference().detach() for delta in deltas(model)]
    size = sum(t.numel() for t in before)
    wanted = min({0.02: 1, 0.1: 9, 0.29: 26, 1.0: 92}[density], sum(int(t.count_nonzero()) for t in before))
    exchanged = callback.cut(model)
    after = [delta.difference().detach() for delta in deltas(model)]
    assert (size, sum(int(t.count_nonzero()) for t in after)) == (92, wanted)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[new != 0], old[new != 0])  # what evaluation used, bit for bit
    dropped = torch.cat([old[new == 0].abs() for old, new in zip(before, after, strict=True)])
    kept = torch.cat([new[new != 0].abs() for new in after])
    assert not dropped.numel() or kept.min() >= dropped.max()
    assert adapted.plan().trainable == wanted == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(exchanged) == 3 * len(after)


def test_masked_entries_never_move_and_the_support_never_grows() -> None:
    model, adapted, callback = adapted_mlp()
    perturb(adapted, 3.0)
    callback.cut(model)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    mask = [delta.difference() != 0 for delta in deltas(model)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5, betas=(0.99, 0.9))
    for _ in range(20):
        model.train()(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for delta, kept in zip(deltas(model), mask, strict=True):
        assert not (delta.difference()[~kept] != 0).any()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    state = {name: p.detach().clone() for name, p in zoo.mlp()[0].named_parameters()}
    adapted.merge_()
    for (name, parameter), kept in zip(model.named_parameters(), mask, strict=True):
        assert torch.equal(parameter[~kept], state[name][~kept])
        assert not kept.any() or (parameter[kept] != state[name][kept]).all()


def fixed(density: float = 0.1, **options: Any) -> tuple[nn.Module, Any]:
    model, adapted, callback = adapted_mlp(density=density, **options)
    perturb(adapted, 3.0)
    callback.cut(model)
    return model, adapted


def test_fixed_differences_copy_pickle_compile_and_leave() -> None:
    model, adapted = fixed()
    _, run = zoo.mlp()
    changed = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), changed)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(run(compiled), changed, atol=1e-6)
    with adapted.disabled():
        assert torch.equal(run(model), run(zoo.mlp()[0]))
    adapted.remove()
    assert torch.equal(run(model), run(zoo.mlp()[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sparse_file_and_merge_equal_dense(dtype: torch.dtype, tmp_path: Path) -> None:
    model, run = zoo.mlp()
    callback = DIFF(density=0.1, modules_to_save=[])
    adapted = apply(model.to(dtype), [callback])
    perturb(adapted, 3.0)
    callback.cut(model)
    dense, attached = [delta.difference() for delta in deltas(model)], run(model)
    path = tmp_path / "d.pet.safetensors"
    save_delta(model, path)
    stored = read_delta(path).tensors
    assert {name.rpartition(".")[2] for name in stored} == {"indices", "values"}
    width = 8 if dtype == torch.float64 else 4
    assert sum(t.numel() * t.element_size() for t in stored.values()) == 9 * (width + 4)
    loaded = zoo.mlp()[0].to(dtype)
    twin = load_delta(loaded, path)
    assert torch.equal(run(loaded), attached)
    assert all(torch.equal(a.difference(), b) for a, b in zip(deltas(loaded), dense, strict=True))
    again = tmp_path / "again.pet.safetensors"
    save_delta(loaded, again)
    assert again.read_bytes() == path.read_bytes()
    twin.merge_()
    assert torch.equal(run(loaded), attached)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for merged, base, difference in zip(loaded.parameters(), zoo.mlp()[0].to(dtype).parameters(), dense, strict=True):
        assert torch.equal(merged, (base.to(wide) + difference).to(dtype))


@pytest.mark.parametrize("name", ["lstm"])
def test_a_new_process_loads_bit_exactly(name: str, tmp_path: Path) -> None:
    model, run = getattr(zoo, name)()
    callback = DIFF(density=0.05)
    perturb(apply(model, [callback], forward=lambda: run(model)), 2.0)
    callback.cut(model)
    save_delta(model, tmp_path / "d.pet.safetensors")
    loaded = output_in_a_new_process(name, tmp_path / "d.pet.safetensors", tmp_path / "out.pt")
    assert torch.equal(loaded, run(model))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: {**t, "indices": t["indices"].flip(0)}, "rising"),
        (lambda t: {**t, "indices": t["indices"] + 48}, "below 48"),
        (lambda t: {**t, "indices": t["indices"] - 48}, "below 48"),
        (lambda t: {**t, "indices": t["indices"][:-1]}, "shape"),
        (lambda t: {**t, "indices": t["indices"].double()}, "float64"),
        (lambda t: {**t, "values": t["values"].long()}, "dtype"),
        (lambda t: {"values": t["values"]}, "indices is missing"),
        (lambda t: {**t, "w": torch.zeros(8, 6)}, "w is unexpected"),
        (lambda t: {"w": torch.zeros(8, 6)}, "alpha is missing"),
    ],
)
def test_tensors_of_a_file_that_do_not_fit(change: Callable[[Any], dict[str, Tensor]], text: str) -> None:
    model, _ = fixed(0.5)
    delta = deltas(model)[0]
    tensors = delta.packed()
    assert len(tensors["values"]) > 2
    assert not delta.misfits(tensors)
    assert any(text in problem for problem in delta.misfits(change(tensors)))
    fresh = deltas(adapted_mlp()[0])[0]
    assert not fresh.take_form(change(tensors))
    assert fresh.w is not None


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    model, _ = fixed()
    save_delta(model, tmp_path / "d.pet.safetensors")
    other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    before = other(torch.ones(1, 6))
    with pytest.raises(ValueError, match="base model"):
        load_delta(other, tmp_path / "d.pet.safetensors")
    with pytest.raises(DeltaFileError):
        load_delta(nn.Sequential(nn.Linear(6, 8)), tmp_path / "d.pet.safetensors")
    assert torch.equal(other(torch.ones(1, 6)), before)
    assert not deltas(other)


def test_a_file_goes_on_where_it_ended(tmp_path: Path) -> None:
    model, _ = fixed()
    save_delta(model, tmp_path / "d.pet.safetensors")
    again, _ = zoo.mlp()
    apply(again, [DIFF(density=0.1, modules_to_save=[], start_from=str(tmp_path / "d.pet.safetensors"))])
    assert torch.equal(zoo.mlp()[1](again), zoo.mlp()[1](model))
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == 9


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"density": 0}, "density=0"),
        ({"density": 1.5}, "density=1.5"),
        ({"density": float("nan")}, "density=nan"),
        ({"stages": (0.7, 0.4)}, "add up to at most 1"),
        ({"stages": (0.0, 0.4)}, "first positive"),
        ({"stages": (0.5, -0.1)}, "first positive"),
        ({"stages": (0.5, 0.2, 0.1)}, "two shares"),
        ({"alpha_lr": 0}, "alpha_lr=0"),
        ({"alpha_clip": -1.0}, "alpha_clip"),
        ({"alpha_init": float("inf")}, "alpha_init"),
        ({"l0_weight": -1e-7}, "l0_weight"),
        ({"stretch": (0.1, 1.1)}, "stretch"),
        ({"stretch": (0.1, 1.1, 2)}, "two numbers"),
        ({"temperature": 0.0}, "temperature"),
        ({"penalty": "mean"}, "'product' or 'sum'"),
        ({"gates": "none"}, "'weight' or 'group'"),
        ({"state": "fp8"}, "'fp32' or 'bf16'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        DIFF(**options)


def test_places_that_do_not_work_leave_the_model_untouched() -> None:
    model, run = zoo.mlp()
    before = run(model)
    with pytest.raises(TargetError, match=r"the smallest that keeps one is 0\.011"):
        apply(model, [DIFF(modules_to_save=[])])
    with pytest.raises(TargetError, match="nowhere"):
        apply(model, [DIFF(density=0.5, exclude_modules=["nowhere"])])
    assert torch.equal(run(model), before)
    assert not deltas(model)


def test_a_cut_of_nothing_is_refused() -> None:
    model, adapted, callback = adapted_mlp()
    with pytest.raises(PETError, match="every difference is zero"):
        callback.cut(model)
    perturb(adapted)
    with torch.no_grad():
        deltas(model)[0].w[0, 0] = float("nan")
    with pytest.raises(PETError, match="NaN"):
        callback.cut(model)
    assert not any(delta.is_fixed for delta in deltas(model))


def test_raw_parameters_and_lists_of_them() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.shifts = nn.ParameterList([torch.zeros(3), torch.ones(3)])
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.attention(x, x, x)[0][..., :3]
            return y * self.scale + self.shifts[0] - self.shifts[1]

    model, x = Raw(), torch.randn(2, 5, 4)
    adapted = apply(model, [DIFF(density=0.2)], forward=lambda: model(x))
    model.train()(x).square().sum().backward()
    assert {row.place for row in adapted.plan().rows} == {n for n, _ in Raw().named_parameters()}
    assert all(delta.w.grad.count_nonzero() > 0 for delta in deltas(model))
    perturb(adapted)
    attached = model.eval()(x)
    adapted.merge_()
    torch.testing.assert_close(model(x), attached)


# --- parameters that an engine holds ---------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gates": "group"}, {"structured": False}], ids=str)
def test_what_an_engine_holds_is_fixed_in_place(options: dict[str, Any], tmp_path: Path) -> None:
    model, adapted, _ = adapted_mlp(**options)
    perturb(adapted)
    twin, x = copy.deepcopy(model), torch.randn(4, 6)
    before = dict(model.named_parameters())
    for delta, other in zip(deltas(model), deltas(twin), strict=True):
        places = torch.arange(0, delta.size, 3)
        kept = {"indices": places, "values": delta.difference().detach().reshape(-1)[places]}
        other.fix(places)
        assert delta.take_form(kept, held=True)
        delta.load_state_dict(delta.spread(kept), strict=True)
        assert torch.equal(delta.difference(), other.difference())
        assert delta.count_nonzero() == other.count_nonzero()
        assert {name: t.tolist() for name, t in delta.packed().items()} == {
            name: t.tolist() for name, t in other.packed().items()
        }
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(x), twin(x))
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for delta, other in zip(deltas(model), deltas(twin), strict=True):
        places = other.indices.long()
        assert torch.equal(delta.w.grad.reshape(-1)[places], other.values.grad)
        assert not delta.w.grad.reshape(-1)[1::3].any()
        with torch.no_grad():
            delta.w.view(-1)[1::3] += 1  # by an optimizer that has some momentum left
    assert torch.equal(model(x), twin(x))
    save_delta(model, tmp_path / "held.pet.safetensors")
    fresh, _ = zoo.mlp()
    load_delta(fresh, tmp_path / "held.pet.safetensors")
    assert torch.equal(fresh(x), twin(x))
    for delta, other in zip(deltas(model), deltas(twin), strict=True):
        delta.unpack(other.packed())  # no engine holds it any more
        assert delta.w is None
    adapted.merge_()
    assert torch.equal(model(x), twin(x))
