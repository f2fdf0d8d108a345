"""The mathematics of low-rank deltas: every form against its formula and against numerical gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_pet.layers.low_rank import LowRankLinear, LowRankParameter
from lightning_pet.layers.low_rank_hosts import LowRankConv, LowRankEmbedding
from lightning_pet.layers.low_rank_product import low_rank_linear, prefers_merged
from lightning_pet.layers.low_rank_source import source_of

D = torch.float64


def filled(delta: torch.nn.Module) -> torch.nn.Module:
    """Random values in every parameter."""
    delta.reset_parameters()
    for parameter in delta.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return delta


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, requires_grad=True)


@pytest.mark.parametrize(("merged", "bias"), list(itertools.product([True, False], [True, False])))
def test_fused_product_and_its_gradients(merged: bool, bias: bool) -> None:
    x, w, a, b = numbers(2, 3, 5), numbers(4, 5), numbers(2, 5), numbers(4, 2)
    offset = numbers(4) if bias else None
    out = low_rank_linear(x, w, offset, a, b, 0.7, merged=merged)
    expected = F.linear(x, w, offset) + 0.7 * (x @ a.T) @ b.T
    assert (out - expected).abs().max() < 1e-14

    def run(*values: Tensor) -> Tensor:
        return low_rank_linear(values[0], values[1], offset, values[2], values[3], 0.7, merged=merged)

    assert torch.autograd.gradcheck(run, (x, w, a, b))


@pytest.mark.parametrize("merged", [True, False])
def test_gradients_only_where_wanted(merged: bool) -> None:
    x, w, a, b = numbers(6, 5), numbers(4, 5), numbers(2, 5), numbers(4, 2)
    for frozen in (x, w, a, b):
        frozen.requires_grad_(False)
        low_rank_linear(x, w, None, a, b, 1.0, merged=merged).sum().backward()
        assert frozen.grad is None
        assert all(t.grad is not None for t in (x, w, a, b) if t is not frozen)
        frozen.requires_grad_(True)
        for t in (x, w, a, b):
            t.grad = None


@pytest.mark.parametrize("activation", ["gelu", "silu", "gate"])
def test_recomputed_input_gives_the_same_gradients(activation: str) -> None:
    functions = {"gelu": F.gelu, "silu": F.silu, "gate": lambda t: F.silu(t) * t}
    gradients = []
    for keep in (False, True):
        torch.manual_seed(0)
        start, w, a, b = numbers(7, 5), numbers(4, 5), numbers(2, 5), numbers(4, 2)
        x = functions[activation](start)
        if keep:
            x = x + 0  # a node whose inputs are not kept: x itself is
        assert (source_of(x) is None) is keep
        low_rank_linear(x, w.detach(), None, a, b, 1.0, merged=False).square().sum().backward()
        gradients.append((start.grad, a.grad, b.grad))
    assert all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))


def test_empty_and_strided_inputs() -> None:
    delta = filled(LowRankLinear(5, 4, 2, scale=1.0, dtype=D))
    w = numbers(4, 5)
    assert delta(torch.empty(0, 5, dtype=D), None, w, None).shape == (0, 4)
    x = numbers(5, 6).t()
    assert torch.allclose(delta(x, None, w, None), x @ delta.merged(w.detach()).T)


def test_merged_form_is_for_many_tokens_in_full_precision() -> None:
    w = torch.zeros(64, 64)
    assert prefers_merged(torch.zeros(512, 64), w)
    assert not prefers_merged(torch.zeros(4, 64), w)
    assert not prefers_merged(torch.zeros(512, 64, dtype=torch.bfloat16), w.bfloat16())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [None, ((1, 3),), ((0, 1), (4, 6))])
def test_rows_and_layout(rows: tuple[tuple[int, int], ...] | None, transposed: bool) -> None:
    delta = filled(LowRankLinear(5, 6, 2, scale=0.5, rows=rows, transposed=transposed, dtype=D))
    w = numbers(5, 6) if transposed else numbers(6, 5)
    x = numbers(3, 5)
    matrix = w.t() if transposed else w
    merged = delta.merged(w.detach())
    out = delta(x, None, w, None)
    assert torch.allclose(out, x @ (merged.t() if transposed else merged).t())
    assert torch.allclose(out, delta(x, x @ matrix.t()))
    touched = [i for start, stop in rows or ((0, 6),) for i in range(start, stop)]
    changed = ((merged - w).abs().sum(0 if transposed else 1) > 0).nonzero().flatten().tolist()
    assert changed == touched
    assert delta.b.shape[0] == len(touched)


def test_dora_matches_its_definition() -> None:
    delta = filled(LowRankLinear(5, 4, 2, scale=0.5, use_dora=True, dtype=D))
    w, x, offset = numbers(4, 5), numbers(3, 5), numbers(4)
    delta.initialize_from(w.detach())
    torch.nn.init.uniform_(delta.magnitude, 0.5, 2.0)
    torch.nn.init.normal_(delta.b)
    v = w + 0.5 * delta.b @ delta.a
    expected = x @ (delta.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)).T + offset
    assert torch.allclose(delta(x, None, w, offset), expected)
    assert torch.allclose(x @ delta.merged(w.detach()).T + offset, expected)


def test_experts_are_one_product_per_expert() -> None:
    delta = filled(LowRankParameter((3, 6, 5), 2, scale=0.5, dtype=D))
    w = numbers(3, 6, 5)
    for i in range(3):
        assert torch.allclose(delta(w)[i], w[i] + 0.5 * delta.b[i] @ delta.a[i])


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_equals_its_merged_weight(groups: int) -> None:
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": groups}
    x, w = numbers(2, 4, 7, 8), numbers(6, 4 // groups, 3, 3)
    delta = filled(LowRankConv(4, 6, (3, 3), 2, scale=0.5, dtype=D, **options))
    out = delta(x, F.conv2d(x, w, **options))
    assert torch.allclose(out, F.conv2d(x, delta.merged(w.detach()), **options))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_embedding_with_the_hosts_own_scale(factor: float) -> None:
    delta = filled(LowRankEmbedding(7, 5, 2, scale=0.5, embed_scale=factor, dtype=D))
    w, ids = numbers(7, 5), torch.tensor([[1, 0], [6, 6]])
    assert torch.allclose(delta(ids, F.embedding(ids, w) * factor), F.embedding(ids, delta.merged(w.detach())) * factor)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    delta, w = filled(LowRankLinear(5, 4, 2, scale=1.0, dtype=D)), numbers(4, 5).detach()
    x = numbers(6, 5)

    def block(t: Tensor) -> Tensor:
        return delta(F.gelu(t), None, w, None).square()

    block(x).sum().backward()
    expected = delta.a.grad.clone(), x.grad.clone()
    delta.a.grad = x.grad = None
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert torch.allclose(delta.a.grad, expected[0])
    assert torch.allclose(x.grad, expected[1])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_decompositions_start_at_the_base(init: str) -> None:
    w, x = numbers(4, 5).detach(), numbers(3, 5)
    delta = LowRankLinear(5, 4, 2, scale=0.5, init=init, dtype=D)
    delta.reset_parameters()
    delta.initialize_from(w)
    assert torch.equal(delta(x, None, w, None), F.linear(x, w))
    assert delta.b.abs().sum() > 0
    best = torch.linalg.svdvals(w)[2:].square().sum().sqrt()
    if init == "pissa":
        assert float(torch.linalg.norm(w - 0.5 * delta.b @ delta.a)) == pytest.approx(float(best))


def test_a_trained_bias_merges_into_the_hosts() -> None:
    delta = filled(LowRankLinear(5, 4, 2, scale=0.5, bias=True, dtype=D))
    weight, bias, x = numbers(4, 5).detach(), numbers(4).detach(), numbers(3, 5).detach()
    assert delta.changes_bias
    assert delta.needs_bias
    merged = torch.nn.functional.linear(x, delta.merged(weight), delta.merged_bias(bias))
    assert torch.allclose(merged, delta(x, torch.nn.functional.linear(x, weight, bias)), atol=1e-12)


def test_meta_device_then_reset() -> None:
    delta = LowRankLinear(5, 4, 2, scale=1.0, device="meta").to_empty(device="cpu")
    delta.reset_parameters()
    assert delta.b.abs().sum() == 0
    assert 0 < delta.a.abs().max() <= 5**-0.5
