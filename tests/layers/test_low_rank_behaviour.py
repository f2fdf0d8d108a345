"""Low-rank deltas in the surroundings they meet: dtypes, autocast, copies, compilation, checkpointing."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pet.errors import ArgumentError
from lightning_pet.layers import low_rank_product
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.low_rank import LowRankLinear, LowRankParameter
from lightning_pet.layers.low_rank_hosts import ConvWeight, EmbeddingWeight, LowRankConv, LowRankEmbedding


@pytest.fixture(autouse=True, params=[True, False], ids=["small", "large"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for small layers, which run on autograd's own nodes, and for large ones, which do not."""
    if not request.param:
        monkeypatch.setattr(low_rank_product, "_SMALL", 0)


D = torch.float64
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"rows": [[0, 2], [5, 6]]},
    "transposed": {"transposed": True},
    "bias": {"bias": True},
    "dora": {"use_dora": True},
    "dora-rows": {"use_dora": True, "rows": [[1, 4]]},
    "pissa": {"init": "pissa"},
    "olora-transposed": {"init": "olora", "transposed": True},
    "dora-pissa": {"use_dora": True, "init": "pissa"},
}


def linear_case(name: str, dtype: torch.dtype = D, width: int = 5) -> tuple[LowRankLinear, Tensor, Tensor]:
    """A delta initialised from its weight, the weight and the bias."""
    options = OPTIONS[name]
    delta = LowRankLinear(width, 6, 2, scale=0.7, dtype=dtype, **options)
    weight = torch.randn((width, 6) if options.get("transposed") else (6, width), dtype=dtype)
    delta.initialize_from(weight)
    return delta, weight, torch.randn(6, dtype=dtype)


def move(delta: Delta) -> None:
    """What training does: every parameter ends up somewhere else."""
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def base(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return F.linear(x, weight.t() if transposed else weight, bias)


@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, D, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_starts_bit_equal_to_the_base(name: str, dtype: torch.dtype, tokens: int) -> None:
    if dtype == torch.bfloat16 and "init" in OPTIONS[name]:
        weight = linear_case(name, torch.float32)[1].bfloat16()  # factors stay float32 above a bfloat16 base
        delta = LowRankLinear(5, 6, 2, scale=0.7, **OPTIONS[name])
        delta.initialize_from(weight)
        bias = torch.randn(6, dtype=dtype)
    else:
        delta, weight, bias = linear_case(name, dtype)
    x = torch.randn(2, tokens, 5, dtype=dtype)
    for offset in (bias, None):
        expected = base(x, weight, offset, delta.transposed)
        assert torch.equal(delta(x, None, weight, offset), expected)
        if not delta.use_dora:
            assert torch.equal(delta(x, expected.clone()), expected)
    assert delta.bias is not None or torch.equal(delta.merged(weight), weight)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("name", [n for n in OPTIONS if "dora" not in n])
def test_gradients_against_finite_differences(name: str, tokens: int) -> None:
    delta, weight, bias = linear_case(name)
    move(delta)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in delta.named_parameters()), strict=True)
    x = torch.randn(tokens, 5, dtype=D, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(delta, dict(zip(names, values, strict=True)), (x, None, weight, bias))

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


@pytest.mark.parametrize("name", ["dora", "dora-rows", "dora-pissa"])
def test_dora_gradients_take_the_norm_as_constant(name: str) -> None:
    delta, weight, bias = linear_case(name)
    move(delta)
    x = torch.randn(3, 5, dtype=D)
    rows = [i for start, stop in delta.rows or ((0, 6),) for i in range(start, stop)]
    v = weight[rows] + 0.7 * delta.b @ delta.a
    if delta.a0 is not None:
        v = v - 0.7 * delta.b0 @ delta.a0
    direction = delta.magnitude[:, None] * v / v.norm(dim=1, keepdim=True).detach()
    full = torch.index_copy(weight, 0, torch.tensor(rows), direction)
    loss = (x @ full.t() + bias).pow(3).sum()
    expected = torch.autograd.grad(loss, [delta.a, delta.b, delta.magnitude])
    actual = torch.autograd.grad(delta(x, None, weight, bias).pow(3).sum(), [delta.a, delta.b, delta.magnitude])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "bias"])
def test_merged_equals_attached(name: str, tokens: int) -> None:
    delta, weight, bias = linear_case(name)
    move(delta)
    kept = weight.clone()
    x = torch.randn(tokens, 5, dtype=D)
    merged = delta.merged(weight)
    assert (delta(x, None, weight, bias) - base(x, merged, bias, delta.transposed)).abs().max() < 1e-10
    assert torch.equal(weight, kept)
    change = merged - weight
    if not delta.use_dora:
        assert torch.linalg.matrix_rank(change) <= (4 if delta.a0 is not None else 2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"rows": [[1, 3]]}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize("experts", [(), (3,)])
def test_parameters(experts: tuple[int, ...], options: dict[str, Any], transposed: bool) -> None:
    weight = torch.randn(*experts, *((4, 6) if transposed else (6, 4)), dtype=D)
    delta = LowRankParameter(weight.shape, 2, scale=0.7, transposed=transposed, dtype=D, **options)
    delta.initialize_from(weight)
    assert torch.equal(delta(weight), weight)
    move(delta)
    torch.testing.assert_close(delta(weight), delta.merged(weight))
    assert not torch.allclose(delta(weight), weight)
    if "use_dora" not in options:  # its norm is a constant, which finite differences do not know
        names, values = zip(*((n, p.detach().requires_grad_()) for n, p in delta.named_parameters()), strict=True)
        run = lambda *v: torch.func.functional_call(delta, dict(zip(names, v, strict=True)), (weight,))  # noqa: E731
        assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d-groups"])
def test_gradients_of_other_hosts(kind: str) -> None:
    if kind == "embedding":
        delta: Delta = LowRankEmbedding(7, 5, 2, scale=0.5, embed_scale=3.0, dtype=D)
        x, output = torch.tensor([[1, 0], [6, 1]]), torch.randn(2, 2, 5, dtype=D)
    elif kind == "conv1d":
        delta = LowRankConv(3, 4, (3,), 2, scale=0.5, padding="same", padding_mode="circular", dtype=D)
        x, output = torch.randn(2, 3, 6, dtype=D), torch.randn(2, 4, 6, dtype=D)
    else:
        delta = LowRankConv(4, 6, (2, 3), 2, scale=0.5, groups=2, stride=(2, 1), dtype=D)
        x, output = torch.randn(2, 4, 4, 5, dtype=D), torch.randn(2, 6, 2, 3, dtype=D)
    move(delta)
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in delta.named_parameters()), strict=True)
    run = lambda *v: torch.func.functional_call(delta, dict(zip(names, v, strict=True)), (x, output))  # noqa: E731
    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("padding", ["same", (2,), (0,)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_as_their_hosts_pad_and_group(mode: str, padding: Any, groups: int) -> None:
    host = nn.Conv1d(4, 8, 4, padding=padding, dilation=2, padding_mode=mode, groups=groups, dtype=D)
    delta = LowRankConv(
        4,
        8,
        (4,),
        2,
        scale=0.5,
        padding=host.padding,
        dilation=host.dilation,
        groups=groups,
        padding_mode=mode,
        dtype=D,
    )
    x = torch.randn(2, 4, 11, dtype=D)
    assert torch.equal(delta(x, host(x)), host(x))
    move(delta)
    out = delta(x, host(x))
    host.weight.data = delta.merged(host.weight.data)
    torch.testing.assert_close(out, host(x))


# --- dtypes


@pytest.mark.parametrize("lead", [(0,), (0, 4), (4, 0), ()], ids=str)
@pytest.mark.parametrize("name", [*OPTIONS, "dropout"])
def test_no_tokens_and_a_single_one(name: str, lead: tuple[int, ...]) -> None:
    delta, weight, bias = linear_case("plain" if name == "dropout" else name)
    delta.dropout = 0.5 if name == "dropout" else 0.0
    x = torch.randn(*lead, 5, dtype=D, requires_grad=True)
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            assert delta(x, None, weight, bias).shape == (*lead, 6)
    found = torch.autograd.grad(delta(x, None, weight, bias).sum(), [x, *delta.parameters()])
    assert lead == () or not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize("grads", [True, False])
def test_dropout_on_an_input_of_any_layout(options: dict[str, Any], grads: bool) -> None:
    delta = LowRankLinear(5, 6, 2, scale=0.7, dropout=0.4, dtype=D, **options)
    weight, bias = torch.randn(6, 5, dtype=D), torch.randn(6, dtype=D)
    delta.initialize_from(weight)
    move(delta)
    for x in (torch.randn(4, 3, 5, dtype=D).transpose(0, 1), torch.randn(3, 1, 5, dtype=D).expand(3, 4, 5)):
        torch.manual_seed(0)
        scaled = F.dropout(x, 0.4)
        with torch.set_grad_enabled(grads):
            torch.manual_seed(0)
            output = delta(x, None, weight, bias)
            low = scaled @ delta.a.t() @ delta.b.t()
            if delta.a0 is not None and delta.b0 is not None:
                low = low - x @ delta.a0.t() @ delta.b0.t()
            expected = F.linear(x, weight, bias) + 0.7 * low
            if delta.magnitude is not None:
                factor = (delta.magnitude / (weight + 0.7 * delta.b @ delta.a).norm(dim=1).detach()) - 1
                expected = expected + factor * (scaled @ weight.t() + 0.7 * low)
        torch.testing.assert_close(output, expected)
        if grads:
            pairs = [torch.autograd.grad(y.sin().sum(), list(delta.parameters())) for y in (output, expected)]
            for one, other in zip(*pairs, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("tokens", [3, 200])
def test_autocast(name: str, tokens: int) -> None:
    delta, weight, bias = linear_case(name, torch.float32)
    move(delta)
    x = torch.randn(tokens, 5, requires_grad=True)
    exact = delta(x, None, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        out = delta(x, None, weight, bias)
        unfused = out if delta.use_dora else delta(x, base(x, weight, bias, delta.transposed))
    assert out.dtype == unfused.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.15, rtol=0.05)
    torch.testing.assert_close(unfused.float(), exact, atol=0.15, rtol=0.05)
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in delta.parameters())


@pytest.mark.parametrize("name", OPTIONS)
def test_full_precision_delta_on_a_half_precision_base(name: str) -> None:
    delta, weight, bias = linear_case(name, torch.float32)
    x = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    out = delta(x, None, weight.bfloat16(), bias.bfloat16())
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in delta.parameters())
    if delta.bias is None:
        assert delta.merged(weight.bfloat16()).dtype == torch.bfloat16


def test_weight_path_adds_in_full_precision_under_autocast() -> None:
    weight = torch.randn(6, 4)
    delta = LowRankParameter(weight.shape, 2, scale=0.7)
    move(delta)
    with torch.autocast("cpu", torch.bfloat16):
        effective = delta(weight)
    assert torch.equal(effective, delta.merged(weight))


# --- life cycle


def every_delta() -> dict[str, Delta]:
    return {
        **{name: linear_case(name)[0] for name in OPTIONS},
        "parameter": LowRankParameter((3, 4, 5), 2, scale=1.0, use_dora=True),
        "embedding": LowRankEmbedding(7, 5, 2, scale=1.0, padding_idx=0),
        "dora-embedding": EmbeddingWeight(7, 5, 2, scale=1.0, use_dora=True),
        "conv": LowRankConv(4, 6, (3,), 2, scale=1.0),
        "dora-conv": ConvWeight(4, 6, (3, 3), 2, scale=1.0, use_dora=True),
    }


@pytest.mark.parametrize("name", every_delta())
def test_copies_and_states(name: str) -> None:
    delta = every_delta()[name]
    move(delta)
    for twin in (copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
        assert vars(twin).keys() == vars(delta).keys()
        assert repr(twin) == repr(delta)
        assert all(torch.equal(v, twin.state_dict()[k]) for k, v in delta.state_dict().items())
        move(twin)
        assert not torch.equal(twin.a, delta.a)
    meta = copy.deepcopy(delta).to("meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert all(torch.isfinite(t).all() for t in meta.state_dict().values())
    meta.load_state_dict(delta.state_dict(), strict=True)
    assert torch.equal(meta.b, delta.b)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((5, 6, 0), {}, "r is the rank"),
        ((5, 6, 2), {"scale": float("nan")}, "scale"),
        ((5, 6, 2), {"dropout": 1.0}, "dropout"),
        ((5, 6, 2), {"init": "zero"}, "init"),
        ((5, 6, 2), {"rows": [[0, 7]]}, "rows"),
        ((5, 6, 2), {"rows": [[3, 5], [0, 2]]}, "rows"),
        ((5, 6, 2), {"rows": []}, "rows"),
        ((5, 6, 2), {"use_dora": True, "bias": True}, "bias"),
    ],
)
def test_arguments_are_checked(arguments: tuple[int, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        LowRankLinear(*arguments, **{"scale": 1.0, **options})


def test_misuse_is_named() -> None:
    delta = LowRankLinear(5, 6, 2, scale=1.0, use_dora=True)
    with pytest.raises(ArgumentError, match="only delta"):
        delta(torch.randn(3, 5), torch.randn(3, 6))
    with pytest.raises(ArgumentError, match="its own host"):
        delta.initialize_from(torch.randn(5, 6))
    with pytest.raises(ArgumentError, match="at most 5"):
        LowRankLinear(5, 6, 6, scale=1.0, init="pissa").initialize_from(torch.randn(6, 5))
    with pytest.raises(ArgumentError, match="acts on its weight"):
        LowRankConv(4, 6, (3,), 2, scale=1.0, use_dora=True)
    LowRankLinear(5, 6, 2, scale=1.0).initialize_from(torch.zeros(15, 1, dtype=torch.uint8))  # packed 4-bit weight


# --- compilation, checkpointing, function transforms


class Block(nn.Module):
    """A gated feed-forward whose down projection has a delta."""

    def __init__(self, options: dict[str, Any], width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 12, bias=False, dtype=D)
        self.down = nn.Linear(12, 6, dtype=D)
        self.requires_grad_(False)
        self.delta = LowRankLinear(12, 6, 2, scale=0.7, dtype=D, **options)
        self.delta.initialize_from(self.down.weight)
        move(self.delta)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        y: Tensor = self.delta(F.silu(h) * h, None, self.down.weight, self.down.bias)
        return y.tanh()


def gradients(run: Any, block: nn.Module, x: Tensor) -> list[Tensor]:
    x.grad = None
    block.zero_grad()
    out = run(x)
    out.square().sum().backward()
    return [out.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in block.parameters() if p.requires_grad)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{}, {"rows": [[1, 3]]}, {"use_dora": True}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize("tokens", [3, 64])
def test_compiles_to_one_graph(options: dict[str, Any], tokens: int, backend: str) -> None:
    torch.compiler.reset()
    block = Block(options)
    x = torch.randn(tokens, 8, dtype=D, requires_grad=True)
    expected = gradients(block, block, x)
    actual = gradients(torch.compile(block, fullgraph=True, backend=backend), block, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tokens", [3, 64])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"use_dora": True}], ids=str)
def test_checkpointing_gives_the_same_gradients(options: dict[str, Any], reentrant: bool, tokens: int) -> None:
    block = Block(options)
    x = torch.randn(tokens, 8, dtype=D, requires_grad=True)
    torch.manual_seed(1)
    expected = gradients(block, block, x)
    torch.manual_seed(1)
    actual = gradients(lambda t: checkpoint(block, t, use_reentrant=reentrant), block, x)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_offloaded_activations() -> None:
    block = Block({})
    x = torch.randn(3, 8, dtype=D, requires_grad=True)
    expected = gradients(block, block, x)
    with torch.autograd.graph.save_on_cpu():
        actual = gradients(block, block, x)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_recomputed_input_survives_second_backward_and_in_place_edits() -> None:
    block = Block({})
    x = torch.randn(3, 8, dtype=D, requires_grad=True)
    out = block(x).sum()
    first = torch.autograd.grad(out, [block.delta.a, x], retain_graph=True)
    second = torch.autograd.grad(out, [block.delta.a, x])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    edited = F.silu(x)
    with torch.no_grad():
        edited.clamp_(min=0)  # what the node would recompute is no longer what the layer saw
    delta = LowRankLinear(8, 6, 2, scale=0.7, dtype=D)
    move(delta)
    (grad,) = torch.autograd.grad(delta(edited, None, torch.zeros(6, 8, dtype=D), None).sum(), delta.a)
    torch.testing.assert_close(grad, 0.7 * torch.outer(delta.b.sum(0), edited.sum(0)))


@pytest.mark.parametrize("tokens", [3, 64])
def test_function_transforms(tokens: int) -> None:
    block = Block({})
    x = torch.randn(4, tokens, 8, dtype=D)
    values = {name: p.detach() for name, p in block.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(block, values, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for i in range(len(x)):
        block.zero_grad()
        block(x[i]).square().sum().backward()
        for name, parameter in block.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(per_sample[name][i], parameter.grad)
