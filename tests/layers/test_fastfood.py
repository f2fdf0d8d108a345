"""The Fastfood projection against its formula, and the properties that make it a good projection."""

import copy
import gc
import math
import threading
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from lightning_pet.layers import fastfood as layer
from lightning_pet.layers.fastfood import fastfood, fastfood_transposed, hadamard_
from lightning_pet.layers.subspace import Projected, Subspace

SIZES = [(64, 64), (100, 128), (20, 100), (60, 1000), (300, 100), (5, 1), (1, 7), (2, 2), (1, 1)]


def hadamard(n: int) -> Tensor:
    """Sylvester's construction."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def projection(d: int, numel: int, seed: int) -> Tensor:
    """The matrix P [numel, d]."""
    return torch.stack([fastfood(row, numel, seed) for row in torch.eye(d, dtype=torch.float64)], 1)


@pytest.mark.parametrize("n", [1, 2, 8, 256])
def test_the_transform_is_the_matrix(n: int) -> None:
    x = torch.randn(n, dtype=torch.float64)
    matrix = hadamard(n)
    assert (hadamard_(x.clone()) - matrix @ x).abs().max() < 1e-12
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(("d", "length"), [(64, 64), (16, 128), (4, 64), (1, 8)])
def test_the_projection_is_h_g_permutation_h_b(d: int, length: int) -> None:
    """What is left of P without the outer H: every row of H B equally often, times a number of its own."""
    inner = hadamard(length) @ projection(d, length, 3) / length  # G Π H B
    g = inner[:, :1]
    assert torch.allclose(inner.abs(), g.abs().expand_as(inner), rtol=1e-9)
    assert len(g.abs().unique()) == length
    rows = (inner / g).round()
    # The rows of H are a group under multiplication, so that B drops out.
    found, counts = torch.unique(rows * rows[0], dim=0, return_counts=True)
    assert (counts == length // d).all()
    assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in hadamard(d).tolist()}


@pytest.mark.parametrize(("d", "numel"), SIZES)
def test_transposed(d: int, numel: int) -> None:
    back = torch.stack([fastfood_transposed(row, d, 3) for row in torch.eye(numel, dtype=torch.float64)], 1)
    assert (back - projection(d, numel, 3).T).abs().max() < 1e-14


@pytest.mark.parametrize(("d", "numel"), SIZES)
def test_linear(d: int, numel: int) -> None:
    a, b = torch.randn(2, d, dtype=torch.float64)
    left = fastfood(2 * a - 3 * b, numel, 7)
    assert (left - (2 * fastfood(a, numel, 7) - 3 * fastfood(b, numel, 7))).abs().max() < 1e-13


def test_columns_have_norm_one() -> None:
    """Exactly where the tensor fills the transform, on average elsewhere."""
    for d, numel in ((64, 64), (100, 128), (256, 4096)):
        assert (projection(d, numel, 1).norm(dim=0) - 1).abs().max() < 1e-14
    for d, numel in ((60, 1000), (300, 700)):
        norms = projection(d, numel, 1).norm(dim=0)
        assert (norms - 1).abs().max() > 1e-6
        assert abs(norms.mean() - 1) < 0.01


@pytest.mark.parametrize(("d", "numel"), [(64, 64), (60, 1000), (300, 100), (20, 5000)])
def test_isometry_in_expectation(d: int, numel: int) -> None:
    vector = torch.randn(d, dtype=torch.float64)
    ratios = torch.stack([fastfood(vector, numel, seed).square().sum() / vector.square().sum() for seed in range(300)])
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / math.sqrt(300)


def test_directions_are_nearly_orthogonal() -> None:
    gram = projection(100, 20_000, 2)
    gram = gram.T @ gram
    assert (gram - torch.diag(gram.diag())).abs().max() < 0.08


def test_seeds() -> None:
    vector = torch.randn(50)
    assert torch.equal(fastfood(vector, 3000, 5), fastfood(vector, 3000, 5))
    cosine = torch.cosine_similarity(fastfood(vector, 3000, 5), fastfood(vector, 3000, 6), dim=0)
    assert abs(cosine) < 0.1


def test_a_seed_means_this_projection_for_ever() -> None:
    """Files hold seeds: these numbers must never change."""
    out = fastfood(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 70_000, 11)
    golden = [-0.001276836608700679, 0.004347457784151823, -0.0013065379296365368, -0.004927195812137533]
    assert out[[0, 1, 32_768, 69_999]].tolist() == pytest.approx(golden, rel=1e-9)


def test_float32_is_the_same_projection() -> None:
    vector = torch.randn(100, dtype=torch.float64)
    wide, narrow = fastfood(vector, 5000, 9), fastfood(vector.float(), 5000, 9)
    assert (wide - narrow).abs().max() < 1e-5 * wide.abs().max()


def test_zero_stays_zero() -> None:
    assert not fastfood(torch.zeros(20), 1000, 1).any()


def test_gradients() -> None:
    vector = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: fastfood(v, 50, 7), vector)
    assert torch.autograd.gradgradcheck(lambda v: fastfood(v, 50, 7).square(), vector)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU draws more at a time than a CPU."""
    vector = torch.randn(50, dtype=torch.float64)
    expected = fastfood(vector, 200_000, 1), fastfood_transposed(fastfood(vector, 200_000, 1), 50, 1)
    monkeypatch.setitem(layer._PIECE, "cpu", 1 << 17)
    changed = fastfood(vector, 200_000, 1), fastfood_transposed(fastfood(vector, 200_000, 1), 50, 1)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(expected, changed, strict=True))


def test_the_numbers_are_normal() -> None:
    numbers = layer._normal(torch.arange(1 << 18, dtype=torch.int32), 1 << 15, layer._keys(4), torch.float64)
    n = len(numbers)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(numbers.pow(power).mean() - moment) < 4 * math.sqrt(spread / n)
    assert abs((numbers[:-1] * numbers[1:]).mean()) < 4 / math.sqrt(n)
    half = numbers.view(-1, 2, 1 << 14)
    assert abs((half[:, 0] * half[:, 1]).mean()) < 4 / math.sqrt(n / 2)


def test_the_permutation_is_one() -> None:
    for bits in (1, 2, 5, 16):
        index = layer._permuted(torch.arange(1 << bits, dtype=torch.int32), bits, layer._keys(bits))
        assert torch.equal(index.sort().values, torch.arange(1 << bits, dtype=torch.int32))
    assert (index[1:] - index[:-1]).abs().float().mean() > 0.3 * (1 << 16)


@pytest.mark.parametrize(("d", "numel"), [(20, 100), (30, 10)])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_derivative_is_the_projection(d: int, numel: int, compiled: bool) -> None:
    """Both are linear: the forward-mode derivative, the columns of either Jacobian, and batches of them."""
    torch._dynamo.reset()
    matrix = projection(d, numel, 3)
    wrap = partial(torch.compile, backend="aot_eager", dynamic=False) if compiled else lambda function: function
    for project, back, own in (
        (partial(fastfood, numel=numel, seed=3), partial(fastfood_transposed, size=d, seed=3), matrix),
        (partial(fastfood_transposed, size=d, seed=3), partial(fastfood, numel=numel, seed=3), matrix.T),
    ):
        at, way = torch.randn(2, own.shape[1], dtype=torch.float64)
        value, slope = wrap(lambda v, w, f=project: torch.func.jvp(f, (v,), (w,)))(at, way)
        assert torch.allclose(value, own @ at)
        assert torch.allclose(slope, own @ way)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(project(forward_ad.make_dual(at, way)))
            assert torch.allclose(dual.tangent, own @ way)
        for jacobian in (torch.func.jacfwd, torch.func.jacrev):
            assert torch.allclose(jacobian(project)(at), own)
        rows = torch.randn(3, own.shape[1], dtype=torch.float64)
        assert torch.allclose(wrap(torch.func.vmap(project))(rows), rows @ own.T)
        assert torch.allclose(torch.func.hessian(lambda v, f=project: f(v).square().sum())(at), 2 * own.T @ own)
        assert torch.allclose(torch.func.vjp(project, at)[1](value)[0], back(value))


# --- numbers that are kept --------------------------------------------------------------------------


class Owner:
    """Something that uses a seed again and again."""


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> layer._Kept:
    """Nothing is kept yet."""
    fresh = layer._Kept()
    monkeypatch.setattr(layer, "_kept", fresh)
    return fresh


@pytest.mark.parametrize(("d", "numel"), [*SIZES, (962, 70_000), (40_000, 64), (40_000, 50_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_numbers_are_the_drawn_ones(d: int, numel: int, dtype: torch.dtype, kept: layer._Kept) -> None:
    vector, values = torch.randn(d, dtype=dtype), torch.randn(numel, dtype=dtype)
    drawn = fastfood(vector, numel, 3), fastfood_transposed(values, d, 3)
    assert not kept.drawn
    owner = Owner()
    layer.hold(owner, 3)
    for _ in range(2):
        assert torch.equal(fastfood(vector, numel, 3), drawn[0])
        assert torch.equal(fastfood_transposed(values, d, 3), drawn[1])
    assert len(kept.drawn) == 1


def test_no_more_is_kept_than_the_bound(kept: layer._Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "KEPT_BYTES", 20_000)
    owner = Owner()
    for seed in range(5):
        layer.hold(owner, seed)
        fastfood(torch.randn(50), 1000, seed)
    held = [tensor for drawn in kept.drawn.values() for tensor in (drawn.signs, *drawn._kept[0][1:])]
    assert len(kept.drawn) == 2
    assert sum(tensor.nbytes for tensor in held) == kept.bytes <= 20_000
    fastfood(torch.randn(50), 10_000, 0)  # too long for the room that is left
    assert len(kept.drawn) == 2


def test_kept_numbers_go_with_the_last_that_uses_them(kept: layer._Kept) -> None:
    delta = Projected(Subspace(20, 1), 0, 100, 5)
    twin = copy.deepcopy(delta)
    delta(torch.zeros(100))
    del delta
    assert len(kept.drawn) == 1
    del twin
    gc.collect()
    assert (dict(kept.drawn), kept.bytes, dict(kept.users)) == ({}, 0, {})


def test_who_is_collected_while_numbers_are_kept_waits_for_nobody(
    kept: layer._Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Projected(Subspace(20), 0, 100, 5)
    gone(torch.zeros(100))
    gone.__dict__["itself"] = gone  # only the collector ends it
    keep = layer._Drawn.keep
    monkeypatch.setattr(layer._Drawn, "keep", lambda drawn: (gc.collect(), keep(drawn)))
    del gone
    delta = Projected(Subspace(20), 0, 100, 6)
    thread = threading.Thread(target=delta, args=(torch.zeros(100),), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    layer.hold(delta, 7)  # whoever comes next settles it
    assert set(kept.users) == {6, 7}
    assert {key[0] for key in kept.drawn} == {6}


def test_stand_ins_for_tensors_are_not_kept(kept: layer._Kept) -> None:
    owner = Owner()
    layer.hold(owner, 3)
    with FakeTensorMode():
        fastfood(torch.randn(20), 100, 3)
    fastfood(torch.randn(20, device="meta"), 100, 3)
    assert not kept.drawn
    with torch.inference_mode():
        fastfood(torch.randn(20), 100, 3)
    vector = torch.randn(20, requires_grad=True)
    fastfood(vector, 100, 3).sum().backward()
    assert len(kept.drawn) == 1


# --- products in the place of additions -------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 19))
def test_products_are_the_transform(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1 << bits, dtype=torch.float64)
    by_products = hadamard_(x.clone())
    monkeypatch.setattr(layer, "multiplies_exactly", lambda x: False)
    assert (by_products - hadamard_(x.clone())).abs().max() < 1e-12 * 2**bits


def test_no_setting_makes_the_products_less_exact() -> None:
    vector = torch.randn(100)
    expected = fastfood(vector, 5000, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastfood(vector, 5000, 9), expected)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert (fastfood(vector, 5000, 9) - expected).abs().max() < 1e-6 * expected.abs().max()
        assert not layer.multiplies_exactly(vector)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


# --- a weight that is moved -------------------------------------------------------------------------


@pytest.mark.parametrize("authors_gradient", [False, True])
@pytest.mark.parametrize("factors", [0, 3])
def test_the_node_of_a_moved_weight_is_its_formula(factors: int, authors_gradient: bool) -> None:
    subspace = Subspace(20, factors, dtype=torch.float64)
    nn.init.normal_(subspace.vector)
    delta = Projected(subspace, 1, 30, 7, authors_gradient=authors_gradient)
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    matrix = projection(20, 30, 7)

    def formula(weight: Tensor) -> Tensor:
        factor = subspace.factors[1] if factors else 1.0
        return weight + (matrix @ (subspace.vector * factor)).view(5, 6)

    inputs = [weight, *subspace.parameters()]
    found, expected = (torch.autograd.grad(f(weight).tanh().sum(), inputs) for f in (delta, formula))
    divisor = 32 if authors_gradient else 1
    torch.testing.assert_close(found[1] * divisor, expected[1])
    torch.testing.assert_close([found[0], *found[2:]], [expected[0], *expected[2:]])
    if not authors_gradient:
        assert torch.autograd.gradcheck(lambda weight, *_: delta(weight), inputs)
        assert torch.autograd.gradgradcheck(lambda weight, *_: delta(weight).tanh(), inputs)


def test_a_moved_weight_keeps_the_trained_numbers_alone() -> None:
    subspace = Subspace(20, 3)
    delta = Projected(subspace, 1, 3000, 7)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        delta(torch.randn(50, 60))
    assert {x.data_ptr() for x in kept} <= {p.data_ptr() for p in subspace.parameters()}


def test_a_moved_weight_in_half_precision() -> None:
    subspace = Subspace(20, 3)
    nn.init.normal_(subspace.vector)
    delta = Projected(subspace, 1, 300, 7)
    weight = torch.randn(15, 20).bfloat16()
    moved = delta(weight)
    assert moved.dtype == torch.bfloat16
    change = fastfood(subspace.vector * subspace.factors[1], 300, 7).view(15, 20)
    assert torch.equal(moved, (weight + change).bfloat16())
    moved.sum().backward()
    ones = torch.ones(300)
    torch.testing.assert_close(subspace.vector.grad, fastfood_transposed(ones, 20, 7))
