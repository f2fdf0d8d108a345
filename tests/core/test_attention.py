"""Prefixes against the formula, in attention of every form; and the masks that go with them."""

import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import hf, ids
from torch import Tensor, nn

from lightning_pet import DeadSiteError, LoRACallback, PrefixTuningCallback, TargetError, apply
from lightning_pet.attention import interface as attention_interface
from lightning_pet.attention.masks import causal, wider
from lightning_pet.attention.prefix import AttentionPrefix, PrefixSite
from lightning_pet.probe.probe import probe

HEADS, DIM, WIDTH, ROWS, LENGTH, P = 2, 4, 8, 3, 5, 3


class Written(nn.Module):
    """Attention as people write it; ``form`` chooses how."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out = getattr(self, self.form)(q, k, v)
        return x + self.o(out.transpose(1, 2).flatten(2))

    def scaled_scores(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.drop((q @ k.mT / math.sqrt(DIM)).softmax(-1)) @ v

    def scaled_queries(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(F.softmax(torch.matmul(q / math.sqrt(DIM), k.transpose(-1, -2)), dim=-1), v)

    def flat_bmm(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(torch.zeros(1, 1, 1, dtype=q.dtype), q, k.mT, alpha=1 / math.sqrt(DIM))
        shares = torch.softmax(scores.unflatten(0, (-1, HEADS)), -1)
        return torch.bmm(shares.flatten(0, 1), v).unflatten(0, (-1, HEADS))

    def sums(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares = (torch.einsum("bnid,bnjd->bnij", q, k) / math.sqrt(DIM)).softmax(dim=3)
        return torch.einsum("bnij,bnjd->bnid", shares, v)

    def turned_sums(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
        shares = (torch.einsum("ibnd,jbnd->bnij", q / math.sqrt(DIM), k)).softmax(dim=-1)
        return torch.einsum("jbnd,bnij->ibnd", v, shares).permute(1, 2, 0, 3)

    def windows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))
        return ((q @ k.mT / math.sqrt(DIM)).softmax(-1) @ v).squeeze(2)

    def windows_in_front(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).unsqueeze(1) for x in (q, k, v))
        shares = (torch.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(DIM)).softmax(-1)
        return torch.einsum("...hqk,...khd->...qhd", shares, v).squeeze(1).transpose(1, 2)

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def fused_flat(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, HEADS))

    def fused_causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Library(nn.Module):
    """torch's own multi-head attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, **self.options)[0]
        return x + out


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapt(model: nn.Module, x: Tensor, **options: Any) -> AttentionPrefix:
    apply(model, [PrefixTuningCallback(length=P, projection=False, **options)], forward=lambda: model(x))
    found = [module for module in model.modules() if isinstance(module, AttentionPrefix)]
    assert len(found) == 1
    return found[0]


def gated(q: Tensor, k: Tensor, v: Tensor, prefix: AttentionPrefix, mask: Tensor | None = None) -> Tensor:
    """(1 − λ) Attn(q, k, v) + λ softmax(q P_kᵀ) P_v, with λ the prefix's share of the softmax."""
    real, ours = q @ k.mT / math.sqrt(DIM), q @ prefix.key.mT / math.sqrt(DIM)
    if mask is not None:
        real = real.masked_fill(~mask, -torch.inf)
    a, b = real.exp().sum(-1, keepdim=True), ours.exp().sum(-1, keepdim=True)
    return (a * (real.softmax(-1) @ v) + b * (ours.softmax(-1) @ prefix.value)) / (a + b)


FORMS = [
    "scaled_scores", "scaled_queries", "flat_bmm", "sums", "turned_sums", "windows", "windows_in_front",
    "fused", "fused_flat", "fused_causal",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_written_attention_becomes_a_gated_addition(form: str) -> None:
    model, x = Written(form).double().eval(), batch()
    prefix = adapt(model, x)
    q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (model.q, model.k, model.v))
    mask = torch.ones(LENGTH, LENGTH).tril().bool() if form == "fused_causal" else None
    expected = x + model.o(gated(q, k, v, prefix, mask).transpose(1, 2).flatten(2))
    assert (model(x) - expected).abs().max() < 1e-14


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
OPTIONS = [
    {},
    {"need_weights": False},
    {"key_padding_mask": PADDING},
    {"key_padding_mask": PADDING, "need_weights": False},
    {"attn_mask": ~torch.ones(LENGTH, LENGTH).tril().bool(), "need_weights": False},
    {"attn_mask": torch.ones(LENGTH, LENGTH).tril().log(), "key_padding_mask": torch.zeros(ROWS, LENGTH).double()},
]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_multi_head_attention_becomes_a_gated_addition(options: dict[str, Any], train: bool) -> None:
    options = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    model, x = Library(**options).double().train(train), batch()
    prefix = adapt(model, x)
    host = model.attention
    projected = F.linear(x, host.in_proj_weight, host.in_proj_bias).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in projected)
    mask = torch.ones(ROWS, 1, LENGTH, LENGTH).bool()
    if "key_padding_mask" in options and options["key_padding_mask"].dtype == torch.bool:
        mask = mask & ~PADDING[:, None, None]
    if "attn_mask" in options:
        mask = mask & torch.ones(LENGTH, LENGTH).tril().bool()
    expected = x + host.out_proj(gated(q, k, v, prefix, mask).transpose(1, 2).flatten(2))
    assert (model(x) - expected).abs().max() < 1e-14
    with torch.no_grad():
        assert (model(x) - expected).abs().max() < 1e-14


def test_returned_weights_are_those_of_real_positions() -> None:
    attention, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double(), batch()
    apply(attention, [PrefixTuningCallback(length=P, projection=False)], forward=lambda: attention(x, x, x)[0])
    _, shares = attention(x, x, x)
    assert shares.shape == (ROWS, LENGTH, LENGTH)
    assert (shares.sum(-1) < 1).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_of_the_table_becomes_a_gated_addition(implementation: str) -> None:
    model = hf("bert", attention=implementation, num_hidden_layers=1).double().eval()
    host, tokens = model.encoder.layer[0].attention.self, ids(2, 6)
    padding = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    apply(model, [PrefixTuningCallback(length=P, projection=False)])
    prefix = next(m for m in model.modules() if isinstance(m, AttentionPrefix))
    got: list[Tensor] = []
    inputs: list[Tensor] = []

    def note(_host: nn.Module, args: Any, out: Any) -> None:
        inputs.append(args[0])
        got.append(out[0])

    host.register_forward_hook(note)
    model(tokens, attention_mask=padding)
    q, k, v = (p(inputs[0]).unflatten(-1, (4, 8)).transpose(1, 2) for p in (host.query, host.key, host.value))
    real = (q @ k.mT / math.sqrt(8)).masked_fill(~padding.bool()[:, None, None], -torch.inf)
    shares = torch.cat([q @ prefix.key.mT / math.sqrt(8), real], -1).softmax(-1)
    expected = shares @ torch.cat([prefix.value.expand(2, -1, -1, -1), v], 2)
    assert (got[0] - expected.transpose(1, 2).flatten(2)).abs().max() < 1e-14


def test_dropout_reaches_the_shares_of_the_prefix() -> None:
    model, x = Written("scaled_scores").double().train(), batch()
    prefix = adapt(model, x)
    with torch.no_grad():
        prefix.value.fill_(1.0)
        prefix.key.fill_(50.0)
        model.q.weight.zero_()
        model.q.bias.fill_(1.0)
        model.o.weight.copy_(torch.eye(WIDTH))
        model.o.bias.zero_()
    out = model(x) - x  # the prefix has the whole softmax: each of its three shares of 1/3 is dropped or doubled
    assert set((out * 3 / 2).round(decimals=6).unique().tolist()) == {0.0, 1.0, 2.0, 3.0}


# --- what cannot be joined is refused ------------------------------------------------------------


class Unfinished(Written):
    """Shares that reach their values in no form that is known, next to an attention of a known one."""

    unknown = False

    def scaled_scores(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares = (torch.matmul(input=q, other=k.mT) / math.sqrt(DIM)).softmax(-1)
        if self.unknown:
            out = (shares[..., None] * v[:, :, None]).sum(-2)
            return out + super().scaled_scores(q, k, v)
        return shares @ v


def test_shares_that_never_reach_their_values_are_an_error() -> None:
    model, x = Unfinished("scaled_scores").eval(), batch(torch.float32)
    adapt(model, x)
    model(x)
    model.unknown = True
    with pytest.raises(TargetError, match="not multiplied with values"):
        model(x)


class Turned(Written):
    """Shares with the keys in front: no form that is known."""

    def scaled_scores(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares = (k @ q.mT / math.sqrt(DIM)).softmax(-2)
        return (v.mT @ shares).mT


class Half(Written):
    """Two attentions in one, of which a prefix could join the first."""

    def scaled_scores(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = torch.cat([q @ k[:, :, :2].mT, q @ k[:, :, 2:].mT], -1).softmax(-1)
        return super().scaled_scores(q, k, v) + parts[..., :2] @ v[:, :, :2] + parts[..., 2:] @ v[:, :, 2:]


@pytest.mark.parametrize("kind", [Turned, Half])
def test_an_unknown_form_is_refused_and_named(kind: type[Written]) -> None:
    model, x = kind("scaled_scores").eval(), batch(torch.float32)
    before = model(x)
    with pytest.raises(TargetError, match="prefix tuning"):
        apply(model, [PrefixTuningCallback(length=P)], forward=lambda: model(x))
    assert torch.equal(model(x), before)
    assert not any(isinstance(module, AttentionPrefix) for module in model.modules())


def test_an_attention_that_changed_its_form_is_an_error() -> None:
    model, x = Written("fused").eval(), batch(torch.float32)
    adapt(model, x)
    model.form = "scaled_scores"
    with pytest.raises(TargetError, match="another way"):
        model(x)
    model.form = "no_attention"
    model.no_attention = lambda q, k, v: v
    with pytest.raises(DeadSiteError, match="not seen"):
        model(x)


class Biased(nn.Module):
    """Causal attention with a bias per distance (ALiBi), of which softmax forgives where it is counted from."""

    def __init__(self, counted: str, fused: bool, library: bool = False) -> None:
        super().__init__()
        self.counted = counted
        self.written = Library() if library else Written("scaled_scores")
        if not library:
            self.written.scaled_scores = self.fused if fused else self.by_hand

    def bias(self, length: int) -> Tensor:
        keys, queries = torch.arange(length), torch.arange(length)[:, None]
        table = torch.tensor([3, 1, 4, 1, 5])[:length]
        distance = {"last": keys - length + 1, "first": keys, "query": keys - queries, "table": table}
        slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)[:, None, None]
        return (slopes * distance[self.counted]).masked_fill(keys > queries, -torch.inf)

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / math.sqrt(DIM) + self.bias(q.shape[-2])).softmax(-1) @ v

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(q.shape[-2]))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.written, Library):
            self.written.options = {"attn_mask": self.bias(x.shape[1]).repeat(len(x), 1, 1)}
        return self.written(x)


@pytest.mark.parametrize("way", ["by hand", "fused", "library"])
@pytest.mark.parametrize("counted", ["last", "first", "query", "table"])
def test_biases_that_are_counted_from_the_last_key_are_refused_and_named(counted: str, way: str) -> None:
    model, x = Biased(counted, way == "fused", way == "library").double().eval(), batch()
    assert (model(x)[:, :3] - model(x[:, :3])).abs().max() < 1e-14
    if counted == "last":
        with pytest.raises(TargetError, match=r"'written.*counted from the last key"):
            adapt(model, x)
        return
    adapt(model, x)
    assert (model(x)[:, :3] - model(x[:, :3])).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["mpt", "bloom", "falcon"])
def test_biases_of_models(name: str) -> None:
    model = hf(name, **({"alibi": True} if name == "falcon" else {}))
    if name == "mpt":
        with pytest.raises(TargetError, match=r"MptAttention.*counted from the last key"):
            apply(model, [PrefixTuningCallback(length=P)])
        return
    apply(model, [PrefixTuningCallback(length=P)])
    tokens = ids(1, 8)
    with torch.no_grad():
        long, short = (model(tokens[:, :n], use_cache=False)[0] for n in (8, 5))
    assert (long[:, :5] - short).abs().max() < 1e-5


def test_sizes_survive_a_round_trip() -> None:
    for site in (PrefixSite(2, 8, 4, 16, "interface"), PrefixSite(2, 8, 8, 16, "functional", 8**-0.5, 2)):
        assert PrefixSite.read(site.sizes()) == site
    for sizes in ((), (2, 8, 8, 16, 2, 0, 1, 1), (2, 8, 0, 16, 0, 0, 1, 1), (2, 8, 8, 16, 0, 0, 0, 1)):
        with pytest.raises(DeadSiteError, match="sizes"):
            PrefixSite.read(sizes)


def test_the_table_is_wrapped_only_when_a_prefix_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import AttentionInterface

    before = attention_interface._table or AttentionInterface.get_interface
    monkeypatch.setattr(AttentionInterface, "get_interface", before)
    monkeypatch.setattr(attention_interface, "_wanted", {"prefixes": 0, "observers": 0})
    apply(hf("bert"), [LoRACallback(r=2)])
    adapt(Written("fused"), batch(torch.float32))
    assert AttentionInterface.get_interface is before
    model = hf("bert").eval()
    apply(model, [PrefixTuningCallback(length=2)])
    wrapped = AttentionInterface.get_interface
    assert wrapped is not before
    apply(hf("bert"), [PrefixTuningCallback(length=2)])
    assert AttentionInterface.get_interface is wrapped
    monkeypatch.setattr(AttentionInterface, "get_interface", before)
    monkeypatch.setattr(attention_interface, "_wanted", {"prefixes": 0, "observers": 0})
    copied = pickle.loads(pickle.dumps(model))  # as in a new process
    assert AttentionInterface.get_interface is not before
    assert torch.equal(copied(ids())[0], model(ids())[0])


# --- masks ---------------------------------------------------------------------------------------

QUERY, KEY = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 5, 4)


def test_masks_get_visible_columns_in_front() -> None:
    visible = torch.rand(2, 1, 3, 5) > 0.5
    assert torch.equal(wider(visible, 2, QUERY, KEY), torch.cat([torch.ones(2, 1, 3, 2).bool(), visible], -1))
    additive = visible.float().log()
    assert torch.equal(wider(additive, 2, QUERY, KEY), torch.cat([torch.zeros(2, 1, 3, 2), additive], -1))
    tokens = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    assert torch.equal(wider(tokens, 2, QUERY, KEY), torch.cat([torch.ones(2, 2).long(), tokens], -1))
    assert wider(None, 2, QUERY, KEY) is None


def test_masks_of_other_widths() -> None:
    longer = torch.rand(2, 1, 3, 9) > 0.5  # of a static cache
    assert torch.equal(wider(longer, 2, QUERY, KEY)[..., 2:], longer[..., :5])
    one = torch.tensor([True, False]).view(2, 1, 1, 1)
    assert torch.equal(wider(one, 2, QUERY, KEY)[1, 0, 0], torch.tensor([True, True] + [False] * 5))
    with pytest.raises(TargetError, match="cover 5 keys"):
        wider(torch.ones(2, 1, 3, 4).bool(), 2, QUERY, KEY)
    with pytest.raises(TargetError, match="type str"):
        wider("mask", 2, QUERY, KEY)


def test_causal_mask_is_that_of_torch_behind_the_prefix() -> None:
    q, k = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4)
    mask = causal(2, q, k)
    assert mask[:, :2].all()
    same = F.scaled_dot_product_attention(q, k, k, attn_mask=mask[:, 2:])
    assert torch.allclose(same, F.scaled_dot_product_attention(q, k, k, is_causal=True))


def test_block_masks_of_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, prefix = (torch.randn(1, 2, rows, 16) for rows in (8, 8, 8, 3))
    visible = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool()

    def rule(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (row >= column) & visible[column]

    block = create_block_mask(rule, None, None, 8, 8, device="cpu")
    keys, values = torch.cat([prefix, k], 2), torch.cat([prefix, v], 2)
    mask = wider(block, 3, q, k)
    assert wider(block, 3, q, k) is mask  # made once for all layers
    dense = torch.cat([torch.ones(8, 3).bool(), torch.ones(8, 8).tril().bool() & visible], -1)
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=dense)
    assert torch.allclose(flex_attention(q, keys, values, block_mask=mask), expected, atol=1e-6)


# --- what the probe sees -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "route", "heads"), [("llama", "interface", 2), ("gpt_oss", "interface", 2), ("bloom", "functional", 4)]
)
def test_routes_of_models(name: str, route: str, heads: int) -> None:
    model = hf(name)
    cores = probe(model, lambda: model(ids(), use_cache=False)[0]).attention
    assert {(core.route, core.kv_heads, core.key_dim, core.value_dim) for core in cores} == {(route, heads, 8, 8)}
    assert len(cores) == 2


def test_scale_of_written_scores() -> None:
    for form, scale in (("scaled_scores", 0.5), ("scaled_queries", 1.0)):
        model, x = Written(form), batch(torch.float32)
        (core,) = probe(model, lambda model=model, x=x: model(x)).attention
        assert (core.route, core.scale) == ("functional", scale)
