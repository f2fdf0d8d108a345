"""What low-rank deltas keep for the backward pass, counted tensor by tensor, and that it gives the same gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pet.layers import low_rank_product
from lightning_pet.layers.low_rank import LowRankLinear
from lightning_pet.layers.low_rank_product import drawn_mask, low_rank_linear
from lightning_pet.layers.low_rank_source import source_of
from lightning_pet.layers.svd_low_rank import SvdLowRankLinear

D = torch.float64
TOKENS, IN, OUT = 48, 12, 10

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"dropout": 0.3},
    "bias": {"bias": True},
    "bias-dropout": {"bias": True, "dropout": 0.3},
    "pissa": {"init": "pissa"},
    "pissa-dropout": {"init": "pissa", "dropout": 0.3},
    "dora": {"use_dora": True},
    "dora-rows": {"use_dora": True, "rows": [[1, 4], [6, 7]]},
    "dora-dropout": {"use_dora": True, "dropout": 0.3},
    "dora-pissa": {"use_dora": True, "init": "pissa"},
    "dora-pissa-dropout": {"use_dora": True, "init": "pissa", "dropout": 0.3},
    "dora-transposed": {"use_dora": True, "transposed": True},
}


@pytest.fixture(autouse=True)
def no_layer_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes here are small, and the nodes are for large ones."""
    monkeypatch.setattr(low_rank_product, "_SMALL", 0)


def case(name: str, dtype: torch.dtype = D) -> tuple[LowRankLinear, Tensor, Tensor, Tensor]:
    """A delta somewhere on its way, its host's weight and bias, and an input."""
    options = OPTIONS[name]
    torch.manual_seed(0)
    delta = LowRankLinear(IN, OUT, 2, scale=0.7, dtype=dtype, **options)
    weight = torch.randn((IN, OUT) if options.get("transposed") else (OUT, IN), dtype=dtype)
    delta.initialize_from(weight)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    bias = torch.randn(OUT, dtype=dtype)
    return delta, weight, bias, torch.randn(2, TOKENS // 2, IN, dtype=dtype, requires_grad=True)


def plain(delta: LowRankLinear, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition in single steps, with the numbers that dropout draws."""
    w = weight.t() if delta.transposed else weight
    rows = [i for start, stop in delta.rows or ((0, OUT),) for i in range(start, stop)]
    spread = torch.zeros(OUT, delta.b.shape[1], dtype=w.dtype).index_copy(0, torch.tensor(rows), delta.b)
    dropped = F.dropout(x, delta.dropout) if delta.training and delta.dropout else x
    low = delta.scale * dropped @ delta.a.t() @ spread.t()
    change = delta.scale * spread @ delta.a
    if delta.a0 is not None:
        start = delta.scale * delta.b0 @ delta.a0
        low = low - (dropped if delta.use_dora else x) @ start.t()
        change = change - start
    y = x @ w.t() + bias + low
    if delta.bias is not None:
        y = y + delta.scale * delta.bias
    if delta.magnitude is None:
        return y
    norm = (w + change)[rows].norm(dim=1).detach()
    factor = torch.ones(OUT, dtype=w.dtype).index_copy(0, torch.tensor(rows), delta.magnitude / norm)
    return y + (factor - 1) * (dropped @ w.t() + low)


@pytest.mark.parametrize("shape", [(3, 5), (70_000,), (0, 4)])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_masks_are_those_of_torch(probability: float, shape: tuple[int, ...]) -> None:
    for x in (torch.ones(shape), torch.ones(*shape[::-1]).t() if len(shape) == 2 else torch.ones(2, 3, 4).mT):
        torch.manual_seed(7)
        expected = F.dropout(x, probability) != 0
        state = torch.get_rng_state()
        torch.manual_seed(7)
        mask = drawn_mask(x, probability)
        assert mask.element_size() == 1
        assert torch.equal(mask != 0, expected)
        assert torch.equal(torch.get_rng_state(), state)


def gradients(y: Tensor, delta: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((y * weights).sin().sum(), [x, *delta.parameters()]))


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_its_definition(name: str, given: bool) -> None:
    delta, weight, bias, x = case(name)
    weights = torch.randn(2, TOKENS // 2, OUT, dtype=D)
    torch.manual_seed(3)
    expected = plain(delta, x, weight, bias)
    product = F.linear(x, weight.t() if delta.transposed else weight, bias) if given else None
    torch.manual_seed(3)
    actual = delta(x, product, *((weight, bias) if delta.use_dora or not given else ()))
    torch.testing.assert_close(actual, expected)
    for one, other in zip(gradients(actual, delta, x, weights), gradients(expected, delta, x, weights), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", OPTIONS)
def test_second_derivatives(name: str) -> None:
    delta, weight, bias, x = case(name)
    found = []
    for run in (lambda: delta(x, None, weight, bias), lambda: plain(delta, x, weight, bias)):
        torch.manual_seed(3)
        first = torch.autograd.grad(run().sin().sum(), [x, *delta.parameters()], create_graph=True)
        norm = torch.stack([g.square().sum() for g in first]).sum()
        found.append(torch.autograd.grad(norm, [x, *delta.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_base_weight_that_trains_too(name: str) -> None:
    delta, weight, bias, x = case(name)
    weight.requires_grad_()
    bias.requires_grad_()
    found = []
    for run in (lambda: delta(x, None, weight, bias), lambda: plain(delta, x, weight, bias)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(run().sin().sum(), [weight, bias]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
def test_starts_as_the_base_while_training(name: str, given: bool) -> None:
    """Bit for bit; PiSSA's start sees x with dropout, so it is left out with dropout."""
    if "pissa-dropout" in name:
        return
    for tokens in (3, 400):
        delta, weight, bias, _ = case(name, torch.float32)
        delta.reset_parameters()
        delta.initialize_from(weight)
        x = torch.randn(tokens, IN)
        base = F.linear(x, weight.t() if delta.transposed else weight, bias)
        product = base if given else None
        assert torch.equal(delta(x, product, *((weight, bias) if delta.use_dora or not given else ())), base)


def saved(run: Any, *known: Tensor) -> list[Tensor]:
    """Tensors that a forward keeps beside known ones, each memory once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for tensor in known:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return list(kept.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_kept(name: str) -> None:
    """Beside x and parameters: a byte per number that may be dropped, and for DoRA one tensor of the output's size."""
    delta, weight, bias, x = case(name, torch.float32)
    known = (x, weight, bias, *delta.parameters(), *delta.buffers())
    kept = saved(lambda: delta(x, None, weight, bias), *known)
    large = [t for t in kept if t.numel() >= TOKENS * min(IN, OUT)]
    masks = [t for t in large if t.element_size() == 1]
    assert len(masks) == (1 if delta.dropout else 0)
    assert sum(t.numel() for t in large if t.element_size() > 1) <= (TOKENS * OUT if delta.use_dora else 0)


def test_a_norm_with_a_frozen_weight_is_computed_again() -> None:
    """As transformers writes it: bit for bit, and not where its weight trains or its factors have other shapes."""
    _, weight, bias, x = case("lora")
    for trained in (False, True):
        scales = torch.randn(IN, dtype=D, requires_grad=trained)
        found = []
        for keep in (False, True):
            y = scales * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
            y = y + 0 if keep else y
            recipe = source_of(y)
            assert (recipe is None) is (keep or trained)
            assert recipe is None or torch.equal(recipe[0](*recipe[1]), y)
            delta = case("lora")[0]
            a, b = delta.a, delta.b
            out = low_rank_linear(y, weight, bias, a, b, 0.7, merged=False).sin().sum()
            found.append(torch.autograd.grad(out, [x, a, b], retain_graph=True))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    factor = torch.randn(1, TOKENS // 2, 1, dtype=D, requires_grad=True)
    assert source_of(torch.randn(IN, dtype=D) * (x * factor)) is None
    assert source_of(torch.randn(IN, dtype=D) * (x * x)) is None
    assert source_of(torch.randn(1, dtype=D) * (x * x.mean(-1, keepdim=True))) is None


def test_dora_reads_its_output_instead_of_keeping_a_copy() -> None:
    delta, weight, bias, x = case("dora", torch.float32)
    y = delta(x, None, weight, bias)
    expected = torch.autograd.grad(y.sum(), delta.magnitude, retain_graph=True)[0]
    again = torch.autograd.grad(y.sum(), delta.magnitude)[0]  # let go by the first pass, so computed anew
    torch.testing.assert_close(again, expected)
    y = delta(x, None, weight, bias)
    node = y.grad_fn
    assert node.output.data_ptr() == y.data_ptr()
    y.sum().backward()
    assert node.output is None


def test_dora_allows_writing_into_its_output_and_magnitudes_of_zero() -> None:
    delta, weight, bias, x = case("dora")
    with torch.no_grad():
        delta.magnitude[3] = 0
    for after in (lambda y: y.mul_(2), lambda y: y * 2):
        found = []
        for run in (lambda: delta(x, None, weight, bias), lambda: plain(delta, x, weight, bias)):
            found.append(torch.autograd.grad(after(run()).sin().sum(), [x, *delta.parameters()]))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [n for n in OPTIONS if "dropout" in n or "dora" in n])
def test_checkpointing_repeats_what_was_drawn(name: str, reentrant: bool) -> None:
    delta, weight, bias, x = case(name, torch.float32)
    found = []
    for wrapped in (False, True):
        torch.manual_seed(5)

        def run(x: Tensor) -> Tensor:
            y: Tensor = delta(x, None, weight, bias)
            return y.tanh()

        y = checkpoint(run, x, use_reentrant=reentrant, preserve_rng_state=True) if wrapped else run(x)
        after = torch.rand(1)
        delta.zero_grad()
        x.grad = None
        y.sum().backward()
        found.append([y, after, *(p.grad.clone() for p in (x, *delta.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", OPTIONS)
def test_with_and_without_gradients_the_same_numbers(name: str, tokens: int) -> None:
    delta, weight, bias, _ = case(name, torch.float32)
    x = torch.randn(tokens, IN)
    torch.manual_seed(5)
    expected = delta(x, None, weight, bias)
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(delta(x, None, weight, bias), expected)


@pytest.mark.parametrize("tokens", [1, 40])
def test_triplets_count_without_gradients(tokens: int) -> None:
    delta, weight, x = SvdLowRankLinear(IN, OUT, 2, scale=0.7), torch.randn(OUT, IN), torch.randn(tokens, IN)
    nn.init.normal_(delta.e)
    expected = delta(x, None, weight, None)
    with torch.no_grad():
        assert torch.equal(delta(x, None, weight, None), expected)


@pytest.mark.parametrize("name", [n for n in OPTIONS if "dropout" in n or "dora" in n])
def test_autocast_and_half_precision(name: str) -> None:
    delta, weight, bias, x = case(name, torch.float32)
    torch.manual_seed(5)
    exact = delta(x, None, weight, bias)
    expected = torch.autograd.grad(exact.sum(), [x, *delta.parameters()])
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = delta(x, None, weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.2, rtol=0.05)
    actual = torch.autograd.grad(out.float().sum(), [x, *delta.parameters()])
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() < 0.03 * other.norm()
