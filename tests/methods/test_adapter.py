"""Bottleneck adapters: the battery, golden properties, AdapterDrop, and their own errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet import AdapterCallback, ArgumentError, TargetError, apply, save_delta
from lightning_pet.layers.bottleneck import BehindNorm, Bottleneck, ParallelBottleneck
from lightning_pet.layers.low_rank import LowRankLinear
from lightning_pet.model.naming import named_modules

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, output_in_a_new_process, perturb

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
WIDTH, SIZE = 16, 4
ONE = 2 * WIDTH * SIZE + SIZE + WIDTH  # with biases


def case(model: str, placement: str, adapters: int, one: int = ONE, not_compiled: str = "", **options: Any) -> Case:
    near = options.get("init", "normal") == "normal"
    return Case(
        model,
        AdapterCallback,
        {"placement": placement, "bottleneck_size": SIZE, **options},
        exact_identity=not near,
        identity_tolerance=1e-3,
        mergeable=False,
        parameters=adapters * one,
        not_compiled=not_compiled,
    )


class TestAdapter(Battery):
    cases: ClassVar[list[Case]] = [
        case("bert", "houlsby", 4, layer_norms=True),
        case("bert", "pfeiffer", 2, init="lora"),
        case("bert", "parallel", 2, init="lora", scale=4.0, bias=False, one=2 * WIDTH * SIZE),
        case("gpt2", "houlsby", 4, init="lora", not_compiled=LIKE_SMALLER),
        case("gpt2", "pfeiffer", 2, inner_norm=True, one=ONE + 2 * WIDTH),
        case("gpt2", "parallel", 2, not_compiled=LIKE_SMALLER),
        case("llama", "houlsby", 4, not_compiled=LIKE_SMALLER),
        case("llama", "pfeiffer", 2, init="lora", sublayers=["ffn"], not_compiled=LIKE_SMALLER),
        case("llama", "parallel", 2, non_linearity="silu"),
        case("t5", "houlsby", 10, cross_attention=True, init="lora"),
        case("t5", "pfeiffer", 4, not_compiled=LIKE_SMALLER),
        case("t5", "parallel", 6, sublayers=["attention"], cross_attention=True, not_compiled=LIKE_SMALLER),
        case("vit", "houlsby", 2, sublayers=["attention"], not_compiled=LIKE_SMALLER),
        case("vit", "pfeiffer", 2, init="lora", not_compiled=LIKE_SMALLER),
        case("vit", "parallel", 2),
        case("transformer_encoder", "houlsby", 4, init="lora", not_compiled=LIKE_SMALLER),
        case("transformer_encoder", "pfeiffer", 4, sublayers=["attention", "ffn"], not_compiled=LIKE_SMALLER),
        case("transformer_encoder", "parallel", 2, inner_norm=True, one=ONE + 2 * WIDTH),
        case("scaled_blocks", "houlsby", 4),
        case("scaled_blocks", "pfeiffer", 2),
        case("scaled_blocks", "parallel", 2, init="lora"),
    ]


def adapted(build: str, **options: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor], Any]:
    """A model with perturbed adapters."""
    model, run = getattr(zoo, build)()
    handle = apply(
        model,
        [AdapterCallback(**{"bottleneck_size": SIZE, "modules_to_save": [], **options})],
        forward=lambda: run(model),
    )
    perturb(handle)
    return model, run, handle


def places(model: nn.Module, **options: Any) -> list[str]:
    """Hosts, without touching the model."""
    handle = apply(model, [AdapterCallback(bottleneck_size=SIZE, **options)])
    found = [target.module for _, target, _ in handle.record.places()]
    handle.remove()
    return found


# --- golden properties ---------------------------------------------------------------------------


def plain(delta: Bottleneck, h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """up(act(down(h))), written down again."""
    hidden = act(h @ delta.down.T + delta.down_bias)
    return hidden @ delta.up.T + delta.up_bias


def test_houlsby_in_float64() -> None:
    model, _, _ = adapted("bert", scale=1.5)
    model.double()
    host = model.bert.encoder.layer[1].output.dropout
    h = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    assert (host(h) - h - 1.5 * plain(host.pet["adapter_default"], h, F.gelu)).abs().max() < 1e-13


def test_pfeiffer_behind_a_norm_in_float64() -> None:
    model, _, _ = adapted("bert", placement="pfeiffer")
    model.double()
    norm = model.bert.encoder.layer[0].output.LayerNorm
    s = torch.randn(3, 5, WIDTH, dtype=torch.float64)

    def base(x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), norm.weight, norm.bias, norm.eps)

    update = plain(norm.pet["adapter_default"], base(s), torch.relu)
    assert (norm(s) - base(s + update)).abs().max() < 1e-13


def test_pfeiffer_and_parallel_around_a_block_in_float64() -> None:
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for placement in ("pfeiffer", "parallel"):
        model, _, handle = adapted("gpt2", placement=placement, scale=2.0)
        block = model.double().transformer.h[0]
        host = block if placement == "pfeiffer" else block.mlp
        with handle.disabled():
            seen: list[Tensor] = []
            hook = block.ln_2.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            base = block(x)
            hook.remove()
        # Pfeiffer reads the sum; the parallel adapter reads the input of the sub-layer before its norm.
        source = base if placement == "pfeiffer" else seen[0]
        expected = base + 2.0 * plain(host.pet["adapter_default"], source, torch.relu)
        assert (block(x) - expected).abs().max() < 1e-13


def test_inner_norm_in_float64() -> None:
    delta = Bottleneck(WIDTH, SIZE, inner_norm=True, dtype=torch.float64, init="lora")
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter))
    h = torch.randn(7, WIDTH, dtype=torch.float64)
    normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    normed = normed * delta.norm_weight + delta.norm_bias
    assert (delta(h, h) - h - plain(delta, normed, F.gelu)).abs().max() < 1e-13


def test_a_linear_parallel_adapter_is_a_low_rank_delta() -> None:
    host = nn.Linear(6, 8).double()
    lora = LowRankLinear(6, 6, 2, scale=3.0, dtype=torch.float64)
    parallel = ParallelBottleneck(6, 2, non_linearity="linear", scale=3.0, bias=False, dtype=torch.float64)
    with torch.no_grad():
        lora.b.normal_()
        parallel.down.copy_(lora.a)
        parallel.up.copy_(lora.b)
    x, y = torch.randn(5, 6, dtype=torch.float64), host(torch.randn(5, 6, dtype=torch.float64))[:, :6]
    assert (parallel(x, y) - lora(x, y.clone())).abs().max() < 1e-14


@pytest.mark.parametrize("kind", [Bottleneck, ParallelBottleneck, BehindNorm])
def test_starts_near_or_at_the_identity(kind: type[Bottleneck]) -> None:
    h, norm = torch.randn(50, 64), nn.LayerNorm(64)
    for init, tolerance in (("normal", 1e-4), ("lora", 0.0)):
        delta = kind(64, 8, init=init)
        base, found = (norm(h), delta(norm, h)) if kind is BehindNorm else (h, delta(h, h))
        assert ((found - base).norm() / base.norm()) <= tolerance
    assert Bottleneck(64, 8).down.abs().max() <= 2e-3
    assert 0.5e-3 < Bottleneck(64, 64).down.std() < 1.0e-3


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(model: str, placement: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        net, run, _ = adapted(model, placement=placement)
        if checkpointing:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        net.train()
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        run(net).square().mean().backward()
        gradients.append([p.grad for p in net.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_encoder_fast_path_with_padding(placement: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    with torch.no_grad():
        base = model(x, src_key_padding_mask=padding)
    handle = apply(model, [AdapterCallback(placement, bottleneck_size=SIZE)], forward=lambda: model(x))
    perturb(handle)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    slow = model.train()(x, src_key_padding_mask=padding)
    assert (fast - slow)[~padding].abs().max() < 1e-5
    assert (fast - base)[~padding].abs().max() > 1e-3
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model.eval()(x, src_key_padding_mask=padding), base)


def test_a_new_process_loads_bit_exactly(tmp_path: Path) -> None:
    model, run, _ = adapted("t5", placement="parallel", layer_norms=True)
    save_delta(model, tmp_path / "d.pet.safetensors")
    loaded = output_in_a_new_process("t5", tmp_path / "d.pet.safetensors", tmp_path / "out.pt")
    assert torch.equal(loaded, run(model))


# --- where ---------------------------------------------------------------------------------------


def test_sublayers_cross_attention_and_exclusion() -> None:
    model, _ = zoo.t5()
    assert len(places(model)) == 8
    assert len(places(model, cross_attention=True)) == 10
    only = places(model, sublayers=["attention"])
    assert only == [
        "encoder.block.0.layer.0.dropout",
        "encoder.block.1.layer.0.dropout",
        "decoder.block.0.layer.0.dropout",
        "decoder.block.1.layer.0.dropout",
    ]
    assert places(model, sublayers=["attention"], exclude_modules=["decoder"]) == only[:2]
    assert places(model, sublayers=["attention"], exclude_modules=["block.1", "re:encoder.*"]) == [only[2]]
    assert places(model, sublayers=["attention"], layers_to_transform=[1]) == only[1::2]
    assert places(model, sublayers=["attention"], module="decoder") == only[2:]


class SharedDropout(nn.Module):
    """Both branches end in the same dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.project = nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.project(self.attention(y, y, y, need_weights=False)[0]))
        return x + self.dropout(self.down(self.up(self.norm2(x)).relu()))


def test_a_dropout_that_both_branches_share_hosts_nothing() -> None:
    model = SharedDropout()
    x = torch.randn(2, 3, 16)
    handle = apply(model, [AdapterCallback(bottleneck_size=SIZE)], forward=lambda: model(x))
    assert [target.module for _, target, _ in handle.record.places()] == ["project", "down"]


def test_a_layer_that_runs_several_times_has_one_adapter() -> None:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model = AlbertModel(config).eval()
    ids = torch.tensor([[3, 4, 5]])
    base = model(ids).last_hidden_state
    for placement, count in (("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)):
        handle = apply(model, [AdapterCallback(placement, bottleneck_size=SIZE)])
        perturb(handle)
        assert len(list(handle.record.places())) == count
        assert (model(ids).last_hidden_state - base).abs().max() > 0.1
        handle.remove()


def test_layer_norms_train_all_of_the_base() -> None:
    model, _ = zoo.bert()
    handle = apply(model, [AdapterCallback(bottleneck_size=SIZE, layer_norms=True, modules_to_save=[])])
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert set(handle.record.trained_names) == {f"{n}.{part}" for n in norms for part in ("weight", "bias")}
    handle.remove()
    model, _ = zoo.t5()
    handle = apply(model, [AdapterCallback(bottleneck_size=SIZE, layer_norms=True, module="decoder")])
    trained = handle.record.applied[0].trained
    assert len(trained) == 3 * 2 + 1
    assert all(name.startswith("decoder.") for name in trained)


def test_a_budget_picks_the_bottleneck() -> None:
    model, _ = zoo.bert()
    callback = AdapterCallback(budget=0.1)
    plan = apply(model, [callback]).plan()
    spent = sum(row.parameters for row in plan.rows if row.method == "adapter")
    assert spent == 4 * (2 * WIDTH * callback.bottleneck_size + callback.bottleneck_size + WIDTH)
    assert spent <= 0.1 * plan.base < spent + 4 * (2 * WIDTH + 1)


# --- AdapterDrop ---------------------------------------------------------------------------------


def test_drop_layers_counts_in_every_stack() -> None:
    model, _ = zoo.t5()
    everywhere = places(model)
    assert places(model, drop_layers=0) == everywhere
    assert places(model, drop_layers=1) == [path for path in everywhere if ".block.1." in path]
    with pytest.raises(TargetError, match=r"no place for an adapter is left.*drop_layers=2"):
        places(model, drop_layers=2)


def test_dropping_all_first_layers_by_hand_gives_the_base() -> None:
    for placement in PLACEMENTS:
        model, run, handle = adapted("bert", placement=placement)
        callback = AdapterCallback(placement, bottleneck_size=SIZE)
        full = run(model)
        callback.drop_first(handle.root, 1)
        run(model).square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if ".pet." in n}
        assert all((grad is None) == (".layer.0." in name) for name, grad in gradients.items())
        callback.drop_first(handle.root, 2)
        dropped = run(model)
        with handle.disabled():
            assert torch.equal(run(model), dropped)
        callback.drop_first(handle.root, 0)
        assert torch.equal(run(model), full)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"placement": "serial"}, "'houlsby'"),
        ({"bottleneck_size": 0}, "bottleneck_size=0"),
        ({"bottleneck_size": 2.5}, r"bottleneck_size=2\.5"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
        ({"reduction_factor": float("nan")}, "reduction_factor=nan"),
        ({"scale": -1.0}, r"scale=-1\.0"),
        ({"init_std": 0}, "init_std=0"),
        ({"init": "zeros"}, "'lora'"),
        ({"non_linearity": "rleu"}, "'relu'"),
        ({"sublayers": ["mlp"]}, "'ffn'"),
        ({"sublayers": []}, "sublayers is empty"),
        ({"drop_layers": -1}, "drop_layers=-1"),
        ({"seed": True}, "seed=True"),
        ({"drop_layers": 1, "robust_drop": True}, "exclude each other"),
        ({"budget": 2}, "budget=2"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        AdapterCallback(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reduction_factor": 17}, "16 features wide.*reduction_factor=17"),
        ({"exclude_modules": ["encoder.layers"]}, "'encoder.layers' names no place"),
        ({"exclude_modules": ["re:("]}, "regular expression"),
        ({"exclude_modules": ["encoder"]}, r"no place for an adapter is left.*exclude=\['encoder'\]"),
        ({"layers_to_transform": [2]}, "no layer 2; it has 0, 1"),
        ({"cross_attention": True}, "no cross-attention.*cross_attention=False"),
        ({"sublayers": ["mixer"]}, r"'mixer'.*Found: attention, ffn"),
        ({"module": "encoder"}, "no such submodule"),
    ],
)
def test_bad_places_leave_the_model_untouched(options: dict[str, Any], text: str) -> None:
    model, run = zoo.bert()
    before, kinds = run(model), [type(m) for m in model.modules()]
    with pytest.raises(TargetError, match=text):
        apply(model, [AdapterCallback(**options)])
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(run(model), before)
    assert all(p.requires_grad for p in model.parameters())


class ConvolutionalBlock(nn.Module):
    """A residual sum over [rows, channels, height, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.up, self.down = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_channels_first_is_refused_by_name(placement: str) -> None:
    model = nn.Sequential(ConvolutionalBlock(), ConvolutionalBlock())
    x = torch.randn(2, 8, 8, 8)  # the wrong dimension would fit
    with pytest.raises(TargetError, match=r"'0\.down'.*second dimension"):
        apply(model, [AdapterCallback(placement, bottleneck_size=SIZE, sublayers=["ffn"])], forward=lambda: model(x))
    assert type(model[0]) is ConvolutionalBlock


@pytest.mark.parametrize("build", ["mlp", "lstm", "conv2d"])
def test_a_model_without_sums_is_refused(build: str) -> None:
    model, run = getattr(zoo, build)()
    with pytest.raises(TargetError, match=r"needs sub-layers with a residual sum"):
        apply(model, [AdapterCallback()], forward=lambda: run(model))


def test_a_sub_layer_without_a_sum_is_named() -> None:
    model, _ = zoo.bert()
    layer = named_modules(model)["bert.encoder.layer.1.output"]

    class Unsummed(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            return self.LayerNorm(self.dropout(self.dense(hidden_states)))

    layer.__class__ = Unsummed
    with pytest.raises(
        TargetError, match=r"'bert\.encoder\.layer\.1' has a sub-layer of kind 'ffn'.*layer\.1\.intermediate"
    ):
        apply(model, [AdapterCallback(bottleneck_size=SIZE)])
    handle = apply(model, [AdapterCallback(bottleneck_size=SIZE, exclude_modules=["layer.1.intermediate"])])
    assert len(list(handle.record.places())) == 3
