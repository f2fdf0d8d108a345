"""Small layers of DoRA, PiSSA and AdaLoRA, which change the weight in nodes of autograd, beside the nodes of ours."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.errors import PETError
from lightning_pet.layers import low_rank_product, svd_low_rank
from lightning_pet.layers.low_rank import LowRankLinear
from lightning_pet.layers.svd_low_rank import SvdLowRankLinear, orthogonality

D = torch.float64
IN, OUT, R = 6, 8, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "dropout": 0.3},
    "dora-pissa": {"use_dora": True, "init": "pissa"},
    "dora-transposed": {"use_dora": True, "transposed": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "pissa-dropout": {"init": "pissa", "dropout": 0.3},
    "adalora": {},
    "adalora-dropout": {"dropout": 0.3},
    "adalora-transposed": {"transposed": True},
}


def case(name: str, dtype: torch.dtype = D, moved: bool = True) -> tuple[LowRankLinear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    options = OPTIONS[name]
    cls = SvdLowRankLinear if name.startswith("adalora") else LowRankLinear
    delta = cls(IN, OUT, R, scale=0.7, dtype=dtype, **options)
    weight = torch.randn((IN, OUT) if options.get("transposed") else (OUT, IN), dtype=dtype)
    delta.initialize_from(weight)
    if isinstance(delta, SvdLowRankLinear):
        delta.penalty.weight = 0.3
    if moved:
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return delta, weight, torch.randn(OUT, dtype=dtype), torch.randn(2, 5, IN, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_node_of_large_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients (of the penalty, too) and, without a penalty, second derivatives; bits without gradients."""
    found = []
    for limit in (2**15, 0):
        monkeypatch.setattr(low_rank_product, "_SMALL", limit)
        delta, weight, bias, x = case(name)
        inputs = (x, *delta.parameters())
        torch.manual_seed(1)
        out = delta(x, None, weight, bias)
        torch.manual_seed(1)
        with torch.no_grad():
            assert torch.equal(out, delta(x, None, weight, bias))
        first = torch.autograd.grad(out.pow(3).sum(), inputs)
        if isinstance(delta, SvdLowRankLinear):
            delta.penalty.weight = 0.0
        torch.manual_seed(1)
        again = torch.autograd.grad(delta(x, None, weight, bias).pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), inputs)
        found.append([out, *first, *again, *second])
    assert all(torch.allclose(small, large, rtol=1e-9) for small, large in zip(*found, strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", OPTIONS)
def test_starts_exactly_at_the_base(name: str, bias: bool) -> None:
    delta, weight, offset, x = case(name, torch.float32, moved=False)
    if name == "pissa-dropout":
        delta.eval()  # its start sees x without dropout
    weight, own = (weight.t(), weight) if delta.transposed else (weight, weight)
    given = offset if bias else None
    assert torch.equal(delta(x, None, own, given), F.linear(x, weight, given))


@pytest.mark.parametrize("name", ["dora", "pissa", "olora", "adalora"])
def test_keeps_no_more_than_the_input_and_changed_weights(name: str) -> None:
    delta, weight, bias, x = case(name)
    own = {tensor.data_ptr() for tensor in (*delta.state_dict().values(), weight, bias, x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        delta(x, None, weight, bias)
    weights = 2 if delta.use_dora else 1  # before and after the factor
    assert sum(kept.values()) <= weights * IN * OUT + 2 * OUT + R * (IN + OUT)


def test_what_is_not_as_simple_takes_the_other_way() -> None:
    delta, weight, bias, x = case("dora", torch.float32)

    def is_direct(x: Tensor, weight: Tensor, **options: Any) -> bool:
        return delta._directly(x, weight, options.get("bias")) is not None

    assert is_direct(x, weight)
    assert not is_direct(x, weight, bias=bias.double())
    assert not is_direct(x, weight.t().contiguous().t())  # another layout rounds differently
    assert not is_direct(x.bfloat16(), weight.bfloat16())  # rounds the change away
    assert not is_direct(torch.randn(2**13, IN), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_direct(x, weight)
    delta.double()
    assert not is_direct(x, weight)
    wide = LowRankLinear(256, 128, R, scale=0.7, use_dora=True)
    assert wide._directly(torch.randn(1, 256), torch.randn(128, 256), None) is None  # its weight is large


def test_a_penalty_comes_once_in_a_forward_and_has_no_second_derivative() -> None:
    delta, weight, bias, x = case("adalora")
    assert isinstance(delta, SvdLowRankLinear)
    weighed, free = [], []
    for found, strength in ((weighed, 0.3), (free, 0.0)):
        delta.penalty.weight = strength
        out = delta(x, None, weight, bias).sum() + delta(2 * x, None, weight, bias).sum()  # called twice
        found += torch.autograd.grad(out, (delta.a, delta.b, delta.e), retain_graph=True)
        found += torch.autograd.grad(out, (delta.a, delta.b, delta.e))  # once more without a forward
    expected = torch.func.grad(lambda a, b: 0.3 * orthogonality(a, b), argnums=(0, 1))(delta.a, delta.b)
    for index, gradient in enumerate(expected):
        assert torch.allclose(weighed[index] - free[index], gradient, rtol=1e-9)
    assert all(torch.allclose(x, y) for x, y in zip(weighed[2:], free[2:], strict=True))
    delta.penalty.weight = 0.3
    first = torch.autograd.grad(delta(x, None, weight, bias).sum(), (delta.a,), create_graph=True)
    with pytest.raises(PETError, match="second derivatives"):
        first[0].sum().backward()


def test_gradients_of_many_penalties_are_those_of_each() -> None:
    torch.manual_seed(0)
    sizes = [(2, 6, 8), (2, 6, 8), (3, 6, 3), (2, 5, 8)]
    pairs = [(torch.randn(r, i, dtype=D), torch.randn(o, r, dtype=D)) for r, i, o in sizes]
    square = torch.linalg.qr(torch.randn(3, 3, dtype=D))[0]
    pairs.append((square, torch.eye(3, dtype=D)))  # orthonormal: no gradient
    for (a, b), found in zip(pairs[:-1], svd_low_rank._orthogonality_gradients(pairs, 0.3)[:-1], strict=True):
        expected = torch.func.grad(lambda a, b: 0.3 * orthogonality(a, b), argnums=(0, 1))(a, b)
        assert all(torch.allclose(x, y, rtol=1e-9) for x, y in zip(found, expected, strict=True))
    of_eye = svd_low_rank._orthogonality_gradients([(torch.eye(3), nn.Parameter(torch.eye(3)).detach())], 0.3)[0]
    assert not any(gradient.any() for gradient in of_eye)
