"""Intrinsic dimension (DID, SAID): the battery, golden properties, and its own errors."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pet import (
    ArgumentError,
    IntrinsicDimensionCallback,
    LoRACallback,
    TargetError,
    apply,
    load_delta,
    save_delta,
)
from lightning_pet.layers.fastfood import fastfood
from lightning_pet.layers.subspace import Projected

from . import zoo
from .battery import LIKE_SMALLER, RECURRENT, Battery, Case, output_in_a_new_process, perturb

METHOD = IntrinsicDimensionCallback
SMALL = {"d": 40}


class TestIntrinsicDimension(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", METHOD, {"d": 20}, parameters=20),
        Case("mlp", METHOD, {"d": 20, "structure_aware": False}, parameters=20),
        Case("mlp", METHOD, {"d": 20, "modules_to_save": ["2"]}, parameters=20),
        Case("conv2d", METHOD, {"d": 30, "structure_aware": False}, parameters=30),
        Case("transformer_encoder", METHOD, SMALL, parameters=40),
        Case("bert", METHOD, {"d": 100}, parameters=100),
        Case("t5", METHOD, {"d": 100}, parameters=100, not_compiled=LIKE_SMALLER),
        Case("mixtral", METHOD, {"d": 60, "norms": False}, parameters=60),
        Case("vit", METHOD, {"d": 60, "embeddings": False}, parameters=60, not_compiled=LIKE_SMALLER),
        Case("lstm", METHOD, {"d": 30}, parameters=30, not_compiled=RECURRENT),
    ]


# --- golden properties ---------------------------------------------------------------------------


def projections(root: nn.Module) -> dict[str, Projected]:
    found = METHOD().deltas(root)
    return {target.path: delta for target, delta in found if isinstance(delta, Projected)}


def subspace_of(root: nn.Module) -> Any:
    return METHOD().deltas(root)[0][1]


def test_formula() -> None:
    model, _ = zoo.mlp()
    model.double()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    perturb(apply(model, [METHOD(d=20)]))
    space = subspace_of(model)
    assert len(space.vector) == 16
    assert len(space.factors) == 4
    for index, (name, delta) in enumerate(projections(model).items()):
        change = space.factors[index] * fastfood(space.vector, delta.numel, delta.seed)
        expected = base[name] + change.view_as(base[name])
        assert (delta(base[name]) - expected).abs().max() < 1e-14


def test_said_with_factors_of_one_is_did() -> None:
    """The same vector through the same projections: only the factors are SAID's own."""
    outputs = []
    for aware in (True, False):
        model, run = zoo.bert()
        apply(model, [METHOD(d=100 if aware else 100 - 39, structure_aware=aware)])
        space = subspace_of(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            space.vector.copy_(torch.randn(space.vector.shape, generator=generator) * 0.3)
        outputs.append(run(model))
    assert torch.equal(*outputs)


def test_gradient_of_the_factors_is_zero_at_the_start_and_only_there() -> None:
    model, run = zoo.mlp()
    adapted = apply(model, [METHOD(d=20)])
    space = subspace_of(model)
    run(model).square().sum().backward()
    assert space.factors.grad.abs().max() == 0
    assert space.vector.grad.abs().max() > 0
    perturb(adapted)
    run(model).square().sum().backward()
    assert (space.factors.grad != 0).all()


@pytest.mark.parametrize("aware", [True, False])
def test_authors_gradient_is_ours_divided_by_the_length(aware: bool) -> None:
    """Tensor by tensor: 1/64 for the 8 × 6 weight; the value and the factors' gradients stay."""
    weight = torch.randn(8, 6, dtype=torch.float64)
    gradients = []
    for authors in (False, True):
        model, _ = zoo.mlp()
        model.double()
        perturb(apply(model, [METHOD(d=20, structure_aware=aware, authors_gradient=authors)]))
        space, delta = subspace_of(model), projections(model)["0.weight"]
        out = delta(weight)
        out.square().sum().backward()
        gradients.append((out.detach(), space.vector.grad, space.factors.grad if aware else torch.zeros(1)))
    (value, ours, factors), (same_value, theirs, same_factors) = gradients
    assert torch.equal(value, same_value)
    assert torch.allclose(ours / 64, theirs, rtol=1e-12, atol=0)
    assert torch.allclose(factors, same_factors)


def test_nothing_but_the_vector_is_kept_for_the_backward_pass() -> None:
    space_size, kept = 20, []
    model, _ = zoo.mlp()
    apply(model, [METHOD(d=space_size)])
    delta = projections(model)["0.weight"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        delta(model[0].weight)
    assert 0 < sum(kept) <= 3 * space_size


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tied_tensors_move_together(name: str) -> None:
    model, run = getattr(zoo, name)()
    model.double()
    adapted = apply(model, [METHOD(d=120)])
    perturb(adapted)
    attached = run(model)
    tied = [names for names in names_of_parameters(model).values() if len(names) > 1]
    assert len(tied) == 1
    adapted.merge_()
    assert list(names_of_parameters(model).values()).count(tied[0]) == 1  # still one tensor
    assert (run(model) - attached).abs().max() < 1e-10


def names_of_parameters(model: nn.Module) -> dict[int, tuple[str, ...]]:
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".pet." not in f".{name}":
            names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def test_every_tensor_of_a_model_moves() -> None:
    """Attached equals a model whose tensors were all replaced by hand."""
    model, run = zoo.transformer_encoder()
    model.double()
    plain = copy.deepcopy(model)
    perturb(apply(model, [METHOD(d=100)]))
    deltas = projections(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            before = parameter.clone()
            parameter.copy_(deltas[name](before))
            assert not torch.equal(parameter, before), name
    assert (run(plain) - run(model)).abs().max() < 1e-10


def test_leaving_a_tensor_out_does_not_change_the_projection_of_the_others() -> None:
    seeds = []
    for exclude in (None, ["0.bias"]):
        model, _ = zoo.mlp()
        apply(model, [METHOD(d=20, exclude_modules=exclude)])
        seeds.append({name: delta.seed for name, delta in projections(model).items()})
    assert seeds[1] == {name: seed for name, seed in seeds[0].items() if name != "0.bias"}
    assert len(set(seeds[0].values())) == 4


def test_the_seed_decides() -> None:
    outputs = []
    for seed in (0, 0, 1):
        model, run = zoo.mlp()
        perturb(apply(model, [METHOD(d=20, seed=seed)]))
        outputs.append(run(model))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_a_bfloat16_base_is_projected_in_float32() -> None:
    model, run = zoo.mlp()
    model.bfloat16()
    adapted = apply(model, [METHOD(d=20)])
    perturb(adapted, 0.1)
    weight, delta = model[0].weight, projections(model)["0.weight"]
    space = subspace_of(model)
    change = fastfood(space.vector * space.factors[0], 48, delta.seed).view(8, 6)
    assert change.dtype == torch.float32
    assert torch.equal(delta(weight), (weight.float() + change).bfloat16())
    attached = run(model)
    adapted.merge_()
    assert torch.equal(run(model), attached)


def test_the_file_is_a_few_kilobytes(tmp_path: Path) -> None:
    model, run = zoo.bert()
    perturb(apply(model, [METHOD(d=200)]))
    path = tmp_path / "d.pet.safetensors"
    save_delta(model, path)
    numbers = 200 + sum(p.numel() for p in model.classifier.parameters())
    print(f"{os.path.getsize(path)} bytes for {numbers} numbers")
    assert os.path.getsize(path) < 4 * numbers + 12 * 1024
    loaded = output_in_a_new_process("bert", path, tmp_path / "out.pt")
    assert torch.equal(loaded, run(model))


def test_together_with_another_method() -> None:
    model, run = zoo.bert()
    model.double()
    base = run(model)
    both = apply(model, [METHOD(d=100), LoRACallback(r=2)])
    assert torch.equal(run(model), base)
    perturb(both)
    attached = run(model)
    both.merge_()
    assert (run(model) - attached).abs().max() < 1e-10


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, run = zoo.llama()
        perturb(apply(model, [METHOD(d=100)]))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run(model).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*gradients, strict=True))


class Reader(nn.Module):
    """Reads its child's weights, and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.T + self.inner.bias


def test_a_module_that_reads_the_weight_of_its_child(tmp_path: Path) -> None:
    """The reader is found by the probe, and is in the file for whoever has seen no forward."""
    base = nn.Sequential(nn.Linear(4, 4), Reader()).double()
    model, x = copy.deepcopy(base), torch.randn(3, 4, dtype=torch.float64)
    adapted = apply(model, [METHOD(d=20)], forward=lambda: model(x))
    perturb(adapted)
    attached = model(x)
    save_delta(model, tmp_path / "reader.pet.safetensors")
    adapted.merge_()
    assert (model(x) - attached).abs().max() < 1e-12
    loaded = load_delta(base, tmp_path / "reader.pet.safetensors")
    assert torch.equal(base(x), attached)
    loaded.remove()
    assert type(base[1]) is Reader
    assert "_pet_reads" not in vars(base[1])


# --- in a Trainer --------------------------------------------------------------------------------


class Regression(pl.LightningModule):
    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.spare = nn.Linear(3, 3) if unused else None

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def fit(module: pl.LightningModule, *, steps: int, folder: Path, ckpt: str | None = None, **options: Any) -> pl.Trainer:
    data = DataLoader(torch.randn(64, 6, generator=torch.Generator().manual_seed(2)), batch_size=16)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[METHOD(verbose=False, **options)],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|log_every_n|max_epochs).*")
        trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


def test_training_and_exact_resume(tmp_path: Path) -> None:
    whole = Regression()
    fit(whole, steps=12, folder=tmp_path, d=40)
    half = Regression()
    trainer = fit(half, steps=8, folder=tmp_path, d=40)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert sum(tensor.numel() for tensor in saved.values()) == 40
    resumed = Regression()
    fit(resumed, steps=12, folder=tmp_path, ckpt=str(tmp_path / "half.ckpt"), d=40)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(resumed.net(x), whole.net(x))
    assert not torch.equal(half.net(x), whole.net(x))
    fresh = Regression()
    load_delta(fresh, tmp_path / "half.ckpt")
    assert torch.equal(fresh.net(x), half.net(x))


def test_tensors_that_do_not_run_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"2 of 6 tensors were not read.*spare\.weight, spare\.bias"):
        fit(Regression(unused=True), steps=1, folder=tmp_path, d=20)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"d": 0}, "d=0"),
        ({"d": 2.5}, r"d=2\.5"),
        ({"d": True}, "d=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
        ({"base_check": "maybe"}, "'warn'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        METHOD(**options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"d": 93}, ArgumentError, "d=93 is more than the 92 numbers"),
        ({"d": 4}, ArgumentError, "4 tensors.*at least 5"),
        ({"d": 10, "exclude_modules": ["3"]}, TargetError, "'3'"),
        ({"d": 10, "exclude_modules": ["0", "2"]}, TargetError, "no parameter is left"),
    ],
)
def test_bad_places_leave_the_model_untouched(options: dict[str, Any], error: type[Exception], text: str) -> None:
    model, run = zoo.mlp()
    before, kinds = run(model), [type(m) for m in model.modules()]
    with pytest.raises(error, match=text):
        apply(model, [METHOD(**options)])
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(run(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_budget_is_spent_to_the_last_number() -> None:
    model, _ = zoo.bert()
    total = sum(parameter.numel() for parameter in model.parameters())
    callback = METHOD(budget=0.05)
    adapted = apply(model, [callback])
    heads = sum(parameter.numel() for parameter in model.classifier.parameters())
    assert callback.d == int(0.05 * total) == adapted.plan().trainable - heads
    with pytest.raises(ArgumentError, match=r"d=40 costs 40 numbers.*smallest budget that works is 0\.00"):
        apply(zoo.bert()[0], [METHOD(budget=0.0001)])


def test_the_bounds_of_d_work() -> None:
    for options, size in (({"d": 92}, 88), ({"d": 5}, 1), ({"d": 1, "structure_aware": False}, 1)):
        model, _ = zoo.mlp()
        apply(model, [METHOD(**options)])
        assert len(subspace_of(model).vector) == size


def test_a_tie_that_leaves_the_module_is_refused() -> None:
    model, _ = zoo.t5()
    with pytest.raises(TargetError, match="one tensor"):
        apply(model, [METHOD(d=50, module="encoder")])
