"""HRA: the battery, golden numbers, what reflections keep, and its own errors."""

from typing import ClassVar

import pytest
import torch

from lightning_pet import ArgumentError, HRACallback, TargetError, apply
from lightning_pet.layers.rotation import Reflections

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case
from .test_oft import B, W, X

NEAR = {"exact_identity": False, "identity_tolerance": 2e-6}


class TestHRA(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", HRACallback, {"r": 4, "target_modules": ["0", "2"]}, parameters=4 * (6 + 8), **NEAR),
        Case(
            "mlp",
            HRACallback,
            {"r": 3, "apply_GS": True, "target_modules": ["0"]},
            exact_identity=False,
            identity_tolerance=None,
        ),
        Case("bert", HRACallback, {"r": 2}, parameters=2 * 2 * 2 * 16, not_compiled=LIKE_SMALLER, **NEAR),
        Case("conv2d", HRACallback, {"r": 2, "target_modules": ["0"]}, **NEAR),
    ]


def reflected(rank: int, **options: bool) -> Reflections:
    delta = Reflections(4, rank, dtype=torch.float64, **options)
    numbers = [((7 * n + 3) % 11 - 5) / 10 for n in range(4 * rank)]
    delta.u.data = torch.tensor(numbers, dtype=torch.float64).view(4, rank)
    return delta


def test_golden_numbers() -> None:
    expected = torch.tensor([-3.5535197989, 1.1934632307, 3.2811439346], dtype=torch.float64)
    delta = reflected(2)
    torch.testing.assert_close(delta(lambda x: x @ W.T + B, X), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(X @ delta.merged(W).T + B, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_it_is_the_product_of_the_reflections(rank: int) -> None:
    delta, product = reflected(rank), torch.eye(4, dtype=torch.float64)
    for u in delta.u.detach().T:
        product = product - 2 * product @ torch.outer(u, u) / u.dot(u)
    torch.testing.assert_close(delta.merged(W), W @ product, rtol=0, atol=1e-14)
    torch.testing.assert_close(delta(lambda x: x, X), product @ X, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: delta(lambda x: x, x), X.clone().requires_grad_())


def test_its_change_is_of_rank_r() -> None:
    delta = reflected(3)
    a, b = delta.low_rank_factors_on(lambda: W)
    assert a.shape[0] == b.shape[1] == 3
    torch.testing.assert_close(W + b @ a, delta.merged(W), rtol=0, atol=1e-14)


def test_made_orthogonal_first() -> None:
    delta = Reflections(4, 3, orthogonal=True, dtype=torch.float64)
    own = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    delta.u.data = own
    onto = own @ torch.linalg.inv(own.T @ own) @ own.T
    wanted = W @ (torch.eye(4, dtype=torch.float64) - 2 * onto)
    torch.testing.assert_close(delta.merged(W), wanted, rtol=0, atol=1e-13)


def test_a_column_of_zeros_does_nothing_and_has_a_gradient() -> None:
    delta = reflected(2)
    alone = reflected(2)
    with torch.no_grad():
        delta.u[:, 1] = 0
        alone.u[:, 1] = alone.u[:, 0]  # twice the same: nothing
    out = delta(lambda x: x, X)
    assert not torch.allclose(out, X)
    torch.testing.assert_close(alone(lambda x: x, X), X, rtol=0, atol=1e-14)
    out.sum().backward()
    assert torch.isfinite(delta.u.grad).all()


def test_an_odd_number_of_reflections_is_said() -> None:
    with pytest.warns(UserWarning, match="Use an even r"):
        apply(zoo.mlp()[0], [HRACallback(r=3, target_modules=["0"])])


def test_a_budget_picks_an_even_number() -> None:
    method = HRACallback(budget=0.5, target_modules=["0"])
    apply(zoo.mlp()[0], [method])
    assert method.r % 2 == 0


@pytest.mark.parametrize("options", [{"r": 0}, {"target_modules": []}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        HRACallback(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        ("gpt2", {}, r"one input for all.*\['c_attn'\]"),
        ("mlp", {"r": 8, "target_modules": ["0"]}, "has 6 inputs"),
        ("bert", {"target_modules": ["word_embeddings"]}, "cannot adapt|no weight"),
    ],
)
def test_bad_places(build: str, options: dict[str, object], words: str) -> None:
    model, run = getattr(zoo, build)()
    before = run(model)
    with pytest.raises(TargetError, match=words):
        apply(model, [HRACallback(**options)])  # type: ignore[arg-type]
    assert torch.equal(run(model), before)
