"""PHM products against the formula with Kronecker products, and what is known of the algebra."""

import pytest
import torch
from torch import Tensor

from lightning_pet.errors import ArgumentError
from lightning_pet.layers.phm import PHMBottleneck, PHMLinear, PHMRule, factored_phm_product, phm_product

D = torch.float64
SIZES = [(1, 6, 4), (2, 8, 4), (2, 4, 8), (3, 6, 9), (4, 16, 8), (4, 8, 16), (4, 8, 8)]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, requires_grad=True)


def kronecker_sum(rule: Tensor, slices: Tensor) -> Tensor:
    return sum((torch.kron(a, b) for a, b in zip(rule, slices, strict=True)), start=torch.zeros((), dtype=D))


@pytest.mark.parametrize(("n", "inputs", "outputs"), SIZES)
def test_full_product_and_its_gradients(n: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, rule, weight = numbers(2, 3, inputs), numbers(n, n, n), numbers(n, inputs // n, outputs // n)
    y = phm_product(x, rule, weight)
    expected = x @ kronecker_sum(rule, weight)
    assert y.shape == (2, 3, outputs)
    assert (y - expected).abs().max() < 1e-13
    _compare_gradients(y, expected, (x, rule, weight))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(("n", "inputs", "outputs"), SIZES)
def test_factored_product_and_its_gradients(n: int, inputs: int, outputs: int, rank: int) -> None:
    torch.manual_seed(0)
    x, rule = numbers(2, 3, inputs), numbers(n, n, n)
    left, right = numbers(n, inputs // n, rank), numbers(n, rank, outputs // n)
    y = factored_phm_product(x, rule, left, right)
    expected = x @ kronecker_sum(rule, left @ right)
    assert (y - expected).abs().max() < 1e-13
    _compare_gradients(y, expected, (x, rule, left, right))


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize(("n", "inputs", "outputs"), [(2, 8, 4), (4, 16, 8), (4, 64, 16), (4, 16, 64)])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0, 3), ()])
def test_a_layer_of_either_size(n: int, inputs: int, outputs: int, rank: int | None, shape: tuple[int, ...]) -> None:
    """The sum of a small layer is formed, that of a large one is not; both are the formula."""
    torch.manual_seed(0)
    layer = PHMLinear(inputs, outputs, n, rank=rank, rule_std=0.1, dtype=D)
    torch.nn.init.normal_(layer.bias)
    x = numbers(*shape, inputs)
    slices = layer.weight if rank is None else layer.left @ layer.right
    expected = x @ kronecker_sum(layer._rule(), slices) + layer.bias
    y = layer(x)
    assert y.shape == (*shape, outputs)
    assert y.numel() == 0 or (y - expected).abs().max() < 1e-12
    _compare_gradients(y, expected, (x, *layer.parameters()))


def _compare_gradients(y: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((y * weights).sum(), inputs)
    reference = torch.autograd.grad((expected * weights).sum(), inputs)
    assert all((a - b).abs().sum() < 1e-10 for a, b in zip(ours, reference, strict=True))


def test_two_matrices_make_complex_numbers() -> None:
    rule = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [-1, 0]]], dtype=D)
    x, weight = torch.randn(5, 6, dtype=D), torch.randn(2, 3, 2, dtype=D)
    expected = torch.complex(x[:, :3], x[:, 3:]) @ torch.complex(weight[0], weight[1])
    y = phm_product(x, rule, weight)
    assert (torch.complex(y[:, :2], y[:, 2:]) - expected).abs().max() < 1e-14


def test_four_matrices_make_quaternions() -> None:
    """Row-vector convention: x ↦ x q for x in the basis (1, i, j, k)."""
    table = {
        0: [(0, 1), (1, 1), (2, 1), (3, 1)],
        1: [(1, 1), (0, -1), (3, -1), (2, 1)],
        2: [(2, 1), (3, 1), (0, -1), (1, -1)],
        3: [(3, 1), (2, -1), (1, 1), (0, -1)],
    }
    rule = torch.zeros(4, 4, 4, dtype=D)
    for unit, products in table.items():
        for row, (column, sign) in enumerate(products):
            rule[unit, row, column] = sign
    one, i, j, k = torch.eye(4, dtype=D)

    def times(a: Tensor, b: Tensor) -> Tensor:
        return phm_product(a, rule, b.view(4, 1, 1))

    assert torch.equal(times(i, j), k)
    assert torch.equal(times(j, k), i)
    assert torch.equal(times(k, i), j)
    assert all(torch.equal(times(unit, unit), -one) for unit in (i, j, k))
    p, q = torch.randn(4, dtype=D), torch.randn(4, dtype=D)
    assert (times(p, q).norm() - p.norm() * q.norm()).abs() < 1e-13


def test_one_matrix_is_a_dense_or_low_rank_layer() -> None:
    x = torch.randn(3, 6, dtype=D)
    dense, low = PHMLinear(6, 4, 1, rank=None, dtype=D), PHMLinear(6, 4, 1, rank=2, dtype=D)
    assert dense.rule is None
    assert low.rule is None
    assert dense.weight is not None
    assert low.left is not None
    assert low.right is not None
    torch.nn.init.normal_(dense.bias)
    assert (dense(x) - x @ dense.weight[0] - dense.bias).abs().max() < 1e-14
    assert (low(x) - x @ low.left[0] @ low.right[0]).abs().max() < 1e-14
    a = torch.tensor([[[0.7]]], dtype=D)  # a rule of one number only scales
    assert (factored_phm_product(x, a, low.left, low.right) - 0.7 * low(x)).abs().max() < 1e-14


@pytest.mark.parametrize("rank", [1, 2])
def test_rank_is_at_most_n_squared_r_and_reaches_it(rank: int) -> None:
    torch.manual_seed(0)
    rule, left, right = numbers(4, 4, 4), numbers(4, 16, rank), numbers(4, rank, 12)
    matrix = factored_phm_product(torch.eye(64, dtype=D), rule, left, right)
    assert torch.linalg.matrix_rank(matrix) == 16 * rank


@pytest.mark.parametrize(
    ("n", "rank", "rule_std", "ratio"),
    [(4, 1, 1e-4, 4e-8), (4, None, 0.01, 5e-4), (12, None, 0.01, 5e-3), (1, 1, 0.01, 9e-2)],
)
@torch.no_grad()
def test_distance_from_the_identity_at_the_start(n: int, rank: int | None, rule_std: float, ratio: float) -> None:
    """The order of magnitude of the authors' modules at d=768, k=24."""
    torch.manual_seed(0)
    rule = PHMRule(n, std=rule_std, dtype=D) if rule_std < 0.01 else None
    delta = PHMBottleneck(768, 24, n, rank=rank, rule=rule, rule_std=rule_std, dtype=D)
    h = torch.randn(64, 768, dtype=D)
    found = float((delta(h, h) - h).norm() / h.norm())
    assert ratio / 3 < found < ratio * 3


@pytest.mark.parametrize(
    ("n", "rank", "parameters"),
    [
        (4, None, 10_136),  # 2 (dk/n + n³) + k + d
        (12, None, 2 * (768 * 24 // 12 + 12**3) + 792),
        (1, None, 2 * 768 * 24 + 792),
        (1, 1, 3 * 792),
        (4, 2, 2 * 2 * 792 + 792 + 2 * 64),
    ],
)
def test_counts_with_own_rules(n: int, rank: int | None, parameters: int) -> None:
    assert sum(p.numel() for p in PHMBottleneck(768, 24, n, rank=rank, device="meta").parameters()) == parameters


def test_a_shared_rule_is_no_parameter_of_its_users() -> None:
    rule = PHMRule(4)
    deltas = [PHMBottleneck(16, 8, 4, rule=rule) for _ in range(2)]
    assert all(sum(p.numel() for p in delta.parameters()) == 3 * 24 for delta in deltas)
    h = torch.randn(3, 16)
    (deltas[0](h, h) + deltas[1](h, h)).sum().backward()
    both, rule.matrices.grad = rule.matrices.grad, None
    assert both is not None
    parts = []
    for delta in deltas:
        parts.append(torch.autograd.grad(delta(h, h).sum(), rule.matrices)[0])
    assert torch.allclose(both, parts[0] + parts[1], atol=1e-7)


@pytest.mark.parametrize(
    ("width", "bottleneck", "message"),
    [
        (10, 8, r"width=10 is not divisible by phm_dim=4. Use phm_dim=2 or 5"),
        (16, 6, r"bottleneck_size=6 is not divisible by phm_dim=4. Use bottleneck_size=4 or 8, or phm_dim=2 or 3"),
        (16, 2, r"bottleneck_size=2 .* Use bottleneck_size=4, or phm_dim=1 or 2"),
    ],
)
def test_sizes_that_do_not_divide(width: int, bottleneck: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PHMBottleneck(width, bottleneck, 4)
