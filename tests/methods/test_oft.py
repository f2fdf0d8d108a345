"""OFT: the battery, golden numbers, what a rotation keeps, and its own errors."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from lightning_pet import ArgumentError, OFTCallback, TargetError, apply
from lightning_pet.layers.rotation import BlockRotation

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, perturb

W = torch.tensor([[0.5, -1, 0.25, 2], [1, 0.5, -0.5, 0], [-0.25, 0.75, 1, -1.5]], dtype=torch.float64)
B = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
X = torch.tensor([1, 2, -1, 0.5], dtype=torch.float64)


class TestOFT(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", OFTCallback, {"oft_block_size": 2, "target_modules": ["0", "2"]}, parameters=3 + 4),
        Case(
            "gpt2",
            OFTCallback,
            {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False},
            parameters=2 * (3 * 4 * 6 + 4 * 120),
            not_compiled=LIKE_SMALLER,
        ),
        Case("mixtral", OFTCallback, {"oft_block_size": 4, "target_modules": ["experts.down_proj", "q_proj"]}),
    ]


def rotated(terms: int | None, skew: list[float], **options: object) -> BlockRotation:
    delta = BlockRotation(4, 2, terms=terms, dtype=torch.float64, **options)
    delta.skew.data = torch.tensor(skew, dtype=torch.float64).view_as(delta.skew)
    return delta


@pytest.mark.parametrize(
    ("terms", "golden"),
    [(5, [-1.686275, 2.68795, 0.737625]), (None, [0.0961538462, 1.1692307692, 0.0846153846])],
)
def test_golden_numbers(terms: int | None, golden: list[float]) -> None:
    delta = rotated(terms, [-0.2, 0.5])
    expected = torch.tensor(golden, dtype=torch.float64)
    torch.testing.assert_close(delta(lambda x: x @ W.T + B, X), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(X @ delta.merged(W).T + B, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(delta.merged(W), (delta.merged(W.T.contiguous().T)), rtol=0, atol=0)


def test_what_an_exact_rotation_keeps() -> None:
    delta = BlockRotation(12, 4, terms=None, dtype=torch.float64)
    torch.nn.init.normal_(delta.skew)
    x, weight = torch.randn(5, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(delta(lambda x: x, x).norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    merged = delta.merged(weight)
    torch.testing.assert_close(merged @ merged.T, weight @ weight.T, rtol=0, atol=1e-13)
    series = BlockRotation(12, 4, terms=40, dtype=torch.float64)
    series.skew.data = delta.skew.data * -0.1  # the series turns the other way
    delta.skew.data *= 0.1
    torch.testing.assert_close(series.blocks(torch.float64), delta.blocks(torch.float64), rtol=0, atol=1e-12)


def test_a_constrained_rotation_stays_within_its_bound() -> None:
    delta = rotated(5, [3.0, 1e-9], limit=0.1)
    free = rotated(5, [0.1 / 2**0.5 / 2**0.5, 1e-9])
    torch.testing.assert_close(delta.blocks(torch.float64), free.blocks(torch.float64), rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(lambda skew: _blocks(delta, skew), delta.skew.detach().requires_grad_())


def _blocks(delta: BlockRotation, skew: Tensor) -> Tensor:
    return torch.func.functional_call(_Blocks(delta), {"delta.skew": skew}, ())


class _Blocks(torch.nn.Module):
    def __init__(self, delta: BlockRotation) -> None:
        super().__init__()
        self.delta = delta

    def forward(self) -> Tensor:
        return self.delta.blocks(torch.float64)


def test_one_block_for_all() -> None:
    delta = rotated(None, [0.3], block_share=True)
    twice = rotated(None, [0.3, 0.3])
    torch.testing.assert_close(delta.merged(W), twice.merged(W), rtol=0, atol=1e-15)


def test_a_half_precision_base_is_turned_in_float32() -> None:
    model, _ = zoo.mlp()
    model.bfloat16()
    perturb(apply(model, [OFTCallback(oft_block_size=2, target_modules=["0"])]), 0.1)
    x = torch.randn(50, 6, dtype=torch.bfloat16)
    wanted = model[0].pet["oft_default"](lambda x: x, x.float()).bfloat16()
    assert torch.equal(model[0].pet["oft_default"](lambda x: x, x), wanted)


def test_sizes_by_place() -> None:
    adapted = apply(zoo.mlp()[0], [OFTCallback(2, target_modules=["0", "2"], block_size_pattern={"2": 4})])
    assert {tuple(t.shape) for n, t in adapted.state_dict().items() if "oft" in n} == {(3, 1), (2, 6)}
    adapted = apply(zoo.mlp()[0], [OFTCallback(2, target_modules=["0", "2"], block_size_pattern={"re:2": 4})])
    assert adapted.record.applied[0].config["block_size_pattern"] == {"=2.weight": 4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"oft_block_size": 1}, "two rows at least"),
        ({"oft_block_size": 4, "r": 4}, "give one of the two"),
        ({"oft_block_size": 0}, "give one of the two"),
        ({"num_cayley_neumann_terms": 1}, "2 to 100 terms"),
        ({"eps": 0.0}, "positive"),
        ({"target_modules": []}, "empty"),
        ({"budget": 0.1}, "no width"),
        ({"block_size_pattern": {"q": 1}}, "two rows at least"),
    ],
)
def test_bad_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        OFTCallback(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        ("gpt2", {"oft_block_size": 4, "target_modules": "attention.q"}, r"one input for all.*\['c_attn'\]"),
        ("gpt2", {"oft_block_size": 3}, r"16 inputs: blocks of 3 .* sizes that do: 2, 4, 8, 16"),
        ("gpt2", {"oft_block_size": 0, "r": 3}, r"16 inputs: r=3 blocks .* numbers that do: 1, 2, 4, 8"),
        ("conv2d", {"oft_block_size": 2, "target_modules": ["0"]}, "no agreed rotation"),
        ("bert", {"target_modules": ["word_embeddings"]}, "cannot adapt|no weight"),
    ],
)
def test_bad_places(build: str, options: dict[str, object], words: str) -> None:
    model, run = getattr(zoo, build)()
    before = run(model)
    with pytest.raises(TargetError, match=words):
        apply(model, [OFTCallback(**options)])  # type: ignore[arg-type]
    assert torch.equal(run(model), before)
