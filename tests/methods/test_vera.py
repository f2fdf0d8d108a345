"""VeRA: the battery, golden numbers, equality with HF PEFT, its exact LoRA, and its own errors."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_pet import (
    ArgumentError,
    DeltaFileError,
    PETError,
    VeRACallback,
    apply,
    export_delta,
    import_delta,
    load_delta,
    save_delta,
)
from lightning_pet.layers.vera import Projections, VeraLinear, VeraParameter
from tests.exchange.peft_models import bert, gpt2, llama, made, output_of

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, perturb

SMALL = {"r": 3}


class TestVeRA(Battery):
    cases: ClassVar[list[Case]] = [
        Case("bert", VeRACallback, SMALL, parameters=2 * 2 * (3 + 16)),
        Case("gpt2", VeRACallback, {**SMALL, "target_modules": ["attention.v", "ffn.up"]}),
        Case("transformer_encoder", VeRACallback, SMALL, not_compiled=LIKE_SMALLER),
        Case(
            "mixtral",
            VeRACallback,
            {**SMALL, "target_modules": ["attention.q", "ffn.down"]},
            not_compiled=LIKE_SMALLER,
        ),
    ]


# --- golden properties ---------------------------------------------------------------------------


def fill(k: int, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.tensor([((7 * n + 3 + 2 * k) % 11 - 5) / 10 for n in range(count)], dtype=torch.float64).view(shape)


def test_golden_numbers() -> None:
    drawn = Projections(2, 4, 3)
    assert drawn.a[0].tolist() == pytest.approx([-0.0091694454, 0.6570065618, -1.0080204010, -0.9013375640], abs=1e-9)
    assert drawn.b[0].tolist() == pytest.approx([-0.1537091881, 0.4583223760], abs=1e-9)
    weight = torch.tensor([[0.5, -1, 0.25, 2], [1, 0.5, -0.5, 0], [-0.25, 0.75, 1, -1.5]], dtype=torch.float64)
    bias, x = (torch.tensor(row, dtype=torch.float64) for row in ([0.1, -0.2, 0.3], [1, 2, -1, 0.5]))
    shared = Projections(2, 4, 3, dtype=torch.float64)
    delta = VeraLinear(4, 3, 2, scale=1.0, projections=shared, dtype=torch.float64)
    with torch.no_grad():
        delta.lambda_b.copy_(fill(0, 3))
        delta.lambda_d.copy_(fill(1, 2))
    expected = [-0.6245193786, 2.3473202052, -0.1681130765]
    for y in (delta(x, weight @ x + bias), delta(x, None, weight, bias), delta.merged(weight) @ x + bias):
        assert y.tolist() == pytest.approx(expected, abs=1e-9)


def test_each_layer_reads_its_corner_and_rows_their_own_places() -> None:
    shared = Projections(2, 6, 8, dtype=torch.float64)
    linear = VeraLinear(4, 8, 2, scale=1.0, projections=shared, rows=[(2, 5)], dtype=torch.float64)
    experts = VeraParameter((3, 5, 6), 2, scale=1.0, projections=shared, dtype=torch.float64)
    for delta in (linear, experts):
        nn.init.normal_(delta.lambda_b)
        nn.init.normal_(delta.lambda_d)
    change = linear.merged(torch.zeros(8, 4, dtype=torch.float64))
    expected = torch.diag(linear.lambda_b) @ shared.b[2:5] @ torch.diag(linear.lambda_d) @ shared.a[:, :4]
    torch.testing.assert_close(change[2:5], expected, rtol=0, atol=1e-14)
    assert not change[[0, 1, 5, 6, 7]].any()
    changes = experts.merged(torch.zeros(3, 5, 6, dtype=torch.float64))
    for n in range(3):
        expected = torch.diag(experts.lambda_b[n]) @ shared.b[:5] @ torch.diag(experts.lambda_d[n]) @ shared.a
        torch.testing.assert_close(changes[n], expected, rtol=0, atol=1e-14)


def test_the_inner_vector_learns_from_the_second_step_on_and_the_matrices_never() -> None:
    model, run = zoo.bert()
    apply(model, [VeRACallback(**SMALL, modules_to_save=[])])
    layer = model.bert.encoder.layer[0].attention.self.query.pet["vera_default"]
    shared = model.pet["vera_default_projections"]
    before = shared.a.clone(), shared.b.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sizes = []
    for _ in range(2):
        optimizer.zero_grad()
        run(model).square().sum().backward()
        sizes.append((layer.lambda_d.grad.abs().max().item(), layer.lambda_b.grad.abs().max().item()))
        optimizer.step()
    assert sizes[0][0] == 0 < min(sizes[0][1], *sizes[1])
    assert torch.equal(before[0], shared.a)
    assert torch.equal(before[1], shared.b)


def test_a_file_holds_the_matrices_once_and_needs_no_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = zoo.llama()
    perturb(apply(model, [VeRACallback(r=5, projection_prng_key=3)]))
    expected = run(model).detach()
    save_delta(model, tmp_path / "x.pet.safetensors")
    with safe_open(tmp_path / "x.pet.safetensors", "pt") as file:
        names = [name for name in file.keys() if "projections" in name]  # noqa: SIM118  # not a dictionary
    assert sorted(names) == ["pet.vera_default_projections.a", "pet.vera_default_projections.b"]
    monkeypatch.setattr(Projections, "reset_parameters", lambda own: own.a.zero_())
    fresh, _ = zoo.llama()
    load_delta(fresh, tmp_path / "x.pet.safetensors")
    assert torch.equal(run(fresh), expected)


def test_rows_of_one_batch_use_matrices_of_their_own(tmp_path: Path) -> None:
    base, _ = zoo.bert()
    for key, name in enumerate("ab"):
        alone = copy.deepcopy(base)
        perturb(apply(alone, [VeRACallback(r=3 + key, projection_prng_key=key, modules_to_save=[])]))
        save_delta(alone, tmp_path / name)
    adapted = load_delta(base, tmp_path / "a", name="a")
    load_delta(base, tmp_path / "b", name="b")
    ids = torch.arange(6).repeat(3, 1) + 3
    expected = []
    with torch.no_grad():
        for row, name in enumerate(["b", None, "a"]):
            with adapted.using(*filter(None, [name])):
                expected.append(base(input_ids=ids[row : row + 1]).logits)
        with adapted.rows(["b", None, "a"]):
            found = base(input_ids=ids).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


# --- against HF PEFT -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fresh_one_is_that_of_peft_with_its_gradients(dtype: torch.dtype) -> None:
    """The same matrices from the same key: nothing but the two vectors is copied."""
    model = made(llama, dtype)
    config = peft.VeraConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"], projection_prng_key=4)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    apply(model, [VeRACallback(r=6, target_modules=["q_proj", "v_proj", "down_proj"], projection_prng_key=4)])
    theirs = dict(wrapped.base_model.model.named_modules())
    pairs = []
    torch.manual_seed(2)
    for path, module in model.named_modules():
        if isinstance(module, VeraLinear):
            other = theirs[path.partition(".pet.")[0]]
            for name in ("lambda_b", "lambda_d"):
                pairs.append((getattr(module, name), getattr(other, f"vera_{name}")["default"]))
    with torch.no_grad():
        for mine, other in pairs:
            other.normal_()
            mine.copy_(other)
    relative, tolerance = (1e-4, 1e-5) if dtype == torch.float32 else (1e-10, 1e-12)
    torch.testing.assert_close(output_of(model), output_of(wrapped), rtol=0, atol=tolerance)
    ids = torch.arange(6).view(1, 6) + 3
    for net in (model, wrapped):
        net(input_ids=ids).logits.square().mean().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=relative, atol=tolerance)


def test_it_is_exactly_a_lora_of_its_rank(tmp_path: Path) -> None:
    model = made(bert)
    base = copy.deepcopy(model)
    perturb(apply(model, [VeRACallback(r=4, modules_to_save=[])]))
    done = export_delta(model, tmp_path / "lora", to="lora")
    assert (done.rank, done.error) == (4, 0.0)
    load_delta(base, tmp_path / "lora", base_check="off")
    torch.testing.assert_close(output_of(base), output_of(model), rtol=0, atol=1e-12)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0: the rank must be"),
        ({"d_initial": 0}, "d_initial=0: must be positive"),
        ({"projection_prng_key": -1}, "projection_prng_key=-1: a seed"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"target_modules": []}, "target_modules"),
        ({"alpha": 16}, "alpha"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        VeRACallback(**options)


def test_a_convolution_is_refused() -> None:
    model, _ = zoo.conv1d()
    with pytest.raises(PETError, match="no weight that this method can adapt"):
        apply(model, [VeRACallback(r=2, target_modules=["0"])])


def test_what_peft_cannot_say_is_refused(tmp_path: Path) -> None:
    fused = made(gpt2)
    apply(fused, [VeRACallback(r=2)])
    with pytest.raises(DeltaFileError, match=r"several roles in one weight.*target_modules=\['c_attn'\]"):
        export_delta(fused, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_with_its_key_alone_needs_its_base_and_trained_biases_are_refused(tmp_path: Path) -> None:
    for name, options in (("key", {"save_projection": False}), ("biases", {"bias": "all"})):
        config = peft.VeraConfig(r=2, target_modules=["query"], **options)
        peft.get_peft_model(made(bert), config).save_pretrained(tmp_path / name)
    with pytest.raises(DeltaFileError, match=r"save_projection=false: .* together with its base"):
        import_delta(tmp_path / "key", tmp_path / "x.pet.safetensors")
    with pytest.raises(DeltaFileError, match=r"bias='all'.*trains biases"):
        load_delta(made(bert), tmp_path / "biases")
