"""LoRA and its variants: the battery, golden properties, and its own errors."""

import copy
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_pet import ArgumentError, LoRACallback, NotMergeableError, TargetError, apply, load_delta, save_delta

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, output_in_a_new_process, perturb

QV = {"r": 2, "target_modules": ["attention.q", "attention.v"]}
ALL = {"r": 2, "target_modules": "all-linear"}
FIRST = {"r": 2, "target_modules": "0"}
INEXACT = {"exact_identity": False, "identity_tolerance": 1e-5}


class TestLoRA(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", options=FIRST, parameters=2 * (6 + 8)),
        Case("mlp", options={**FIRST, "use_rslora": True, "alpha": 4}),
        Case("mlp", options={**FIRST, "use_dora": True}, parameters=2 * (6 + 8) + 8, needs_values=True, **INEXACT),
        Case("mlp", options={**FIRST, "init": "gaussian"}),
        Case("mlp", options={**FIRST, "train_a": False}, parameters=2 * 8),
        Case("mlp", options={**FIRST, "init": "orthogonal"}, parameters=2 * (6 + 8), **INEXACT),
        Case("mlp", options={**FIRST, "init": "pissa"}, parameters=2 * (6 + 8), needs_values=True, **INEXACT),
        Case("mlp", options={**FIRST, "init": "olora"}, parameters=2 * (6 + 8), needs_values=True, **INEXACT),
        Case("mlp", options={**FIRST, "bias": "lora_only"}),
        Case("mlp", options={**FIRST, "bias": "all", "modules_to_save": ["2"]}),
        Case("embedding", options={"r": 2, "target_modules": "table", "modules_to_save": []}, parameters=2 * (12 + 6)),
        Case("conv1d", options=FIRST, parameters=2 * 4 * 3 + 6 * 2),
        Case("conv2d", options=FIRST, parameters=2 * 3 * 9 + 6 * 2),
        Case("mlp", options={**FIRST, "lora_bias": True}, parameters=2 * (6 + 8) + 8),
        Case("embedding", options={"r": 2, "target_modules": "table", "modules_to_save": [], "init": "gaussian"}),
        Case(
            "embedding",
            options={"r": 2, "target_modules": "table", "modules_to_save": [], "init": "pissa"},
            needs_values=True,
            **INEXACT,
        ),
        Case("conv2d", options={**FIRST, "lora_bias": True}, parameters=2 * 3 * 9 + 6 * 2 + 6),
        Case("conv3d", options=FIRST, parameters=2 * 2 * 6 + 6 * 2),
        Case("conv3d", options={**FIRST, "use_dora": True}, needs_values=True, **INEXACT),
        Case(
            "own", options={"r": 2, "target_modules": ["turned", "gated", "conv", "positions"], "modules_to_save": []}
        ),
        Case(
            "own",
            options={"r": 2, "target_modules": ["turned"], "use_dora": True, "modules_to_save": []},
            needs_values=True,
            **INEXACT,
        ),
        Case("reading", options={"r": 2, "target_modules": ["conv", "table", "down"]}, parameters=2 * (6 + 4 + 9 + 8)),
        Case(
            "reading",
            options={"r": 2, "target_modules": ["conv", "table"], "use_dora": True},
            needs_values=True,
            **INEXACT,
        ),
        Case("transformer_encoder", options=QV, parameters=2 * 2 * 2 * (16 + 16), not_compiled=LIKE_SMALLER),
        Case("transformer_encoder", options=ALL),
        Case("bert", options=QV, parameters=2 * 2 * 2 * (16 + 16), not_compiled=LIKE_SMALLER),
        Case("bert", options={**ALL, "use_dora": True}, needs_values=True, **INEXACT),
        Case("gpt2", options={"r": 2, "target_modules": "attention.v"}, parameters=2 * 2 * (16 + 16)),
        Case("gpt2", options=ALL, not_compiled=LIKE_SMALLER),
        Case("gpt2", options={**QV, "use_dora": True}, needs_values=True, **INEXACT),
        Case("llama", options=QV, parameters=2 * 2 * (16 + 16 + 16 + 8), not_compiled=LIKE_SMALLER),
        Case("llama", options=ALL),
        Case("t5", options=QV),
        Case("mixtral", options={"r": 2, "target_modules": ["attention.q", "ffn"]}),
        Case("vit", options=QV, not_compiled=LIKE_SMALLER),
        Case("whisper", options=QV, not_compiled=LIKE_SMALLER),
    ]


# --- golden properties ---------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "scale"), [({"alpha": 6}, 3.0), ({"alpha": 6, "use_rslora": True}, 6 / 2**0.5)])
def test_formula_in_float64(options: dict[str, object], scale: float) -> None:
    model, _run = zoo.mlp()
    model.double()
    adapted = apply(model, [LoRACallback(r=2, target_modules="0", **options)])
    perturb(adapted)
    delta = model[0].pet["lora_default"]
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = x @ model[0].weight.T + model[0].bias + scale * (x @ delta.a.T) @ delta.b.T
    assert (model[0](x) - expected).abs().max() < 1e-14
    assert torch.linalg.matrix_rank(delta.b @ delta.a) <= 2


def test_only_v_changes_on_a_fused_projection() -> None:
    model, _run = zoo.gpt2()
    adapted = apply(model, [LoRACallback(r=2, target_modules="attention.v")])
    host = model.transformer.h[0].attn.c_attn
    x = torch.randn(3, 16)
    before = host(x)
    perturb(adapted)
    changed = (host(x) - before).abs().sum(0) > 0
    assert not changed[:32].any()
    assert changed[32:].all()


def test_rank_and_alpha_patterns() -> None:
    model, _ = zoo.bert()
    callback = LoRACallback(
        r=2, rank_pattern={"attention.self.query": 4}, alpha_pattern={"encoder.layer.0.*": 1.0, "*": 3.0}
    )
    apply(model, [callback])
    layer = model.bert.encoder.layer
    assert layer[0].attention.self.query.pet["lora_default"].a.shape == (4, 16)
    assert layer[0].attention.self.value.pet["lora_default"].a.shape == (2, 16)
    assert layer[1].attention.self.value.pet["lora_default"].scale == pytest.approx(3.0 / 2)


def test_patterns_by_role_and_expression() -> None:
    model, _ = zoo.bert()
    ranks = {"re:.*layer\\.1\\..*query": 5, "attention.q": 4, "attention": 3}
    apply(model, LoRACallback(r=2, target_modules="all-linear", rank_pattern=ranks, alpha_pattern={"ffn.up": 7.0}))
    first, second = model.bert.encoder.layer
    rank = [m.pet["lora_default"].a.shape[0] for m in (second.attention.self.query, first.attention.self.query)]
    assert [*rank, second.attention.output.dense.pet["lora_default"].a.shape[0]] == [5, 4, 3]
    assert second.intermediate.dense.pet["lora_default"].scale == pytest.approx(7 / 2)
    assert second.output.dense.pet["lora_default"].scale == pytest.approx(16 / 2)


@pytest.mark.parametrize(
    ("build", "ranks"),
    [
        (zoo.bert, {"re:.*layer\\.1\\..*query": 5, "query": 3}),  # files sort: the second would stand first
        (zoo.bert, {"encoder.layer.0.attention.self.query": 4, "*": 3}),
        (zoo.gpt2, {"re:.*1.attn.*": 5, "attention.q": 3, "c_attn": 4}),  # parts of one parameter
    ],
)
def test_patterns_decide_in_a_file_as_they_did(build, ranks, tmp_path: Path) -> None:
    """Files keep no order, and no regular expression of a file is looked up."""
    model, run = build()
    callback = LoRACallback(r=2, target_modules=["attention.q", "attention.v"], rank_pattern=ranks)
    adapted = apply(model, callback, forward=lambda: run(model))
    perturb(adapted)
    save_delta(model, tmp_path / "delta.pet.safetensors")
    again, _ = build()
    loaded = load_delta(again, tmp_path / "delta.pet.safetensors")
    assert torch.equal(run(model), run(again))
    assert loaded.record.applied[0].config == adapted.record.applied[0].config
    save_delta(again, tmp_path / "again.pet.safetensors")
    load_delta(build()[0], tmp_path / "again.pet.safetensors")


def test_a_rank_that_a_target_cannot_have_is_clamped_on_request() -> None:
    model, _ = zoo.bert()
    with pytest.warns(UserWarning, match=r"clamp_rank: 4 of 4.*attention\.self\.query\.weight \(16 instead of 20\)"):
        adapted = apply(model, LoRACallback(r=20, clamp_rank=True))
    delta = model.bert.encoder.layer[0].attention.self.query.pet["lora_default"]
    assert (delta.a.shape, delta.scale) == ((16, 16), 1.0)
    adapted.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(model, LoRACallback(r=16, clamp_rank=True))
    sized = LoRACallback(budget=1.0, target_modules="pooler.dense", modules_to_save=[], clamp_rank=True)
    apply(zoo.bert()[0], sized)
    assert sized.r == 16


def test_a_tied_tensor_that_trains_is_counted_and_stored_once(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, list[LoRACallback]]:
        model, _ = zoo.gpt2()
        first = LoRACallback(r=2, target_modules="attention.q", modules_to_save="wte,lm_head")
        second = LoRACallback(r=2, target_modules="attention.v", modules_to_save="lm_head", name="second")
        return model, [first, second]

    model, callbacks = build()
    table = model.lm_head.weight
    assert table is model.transformer.wte.weight
    adapted = apply(model, callbacks)
    assert [row.place for row in adapted.plan().rows if row.method == "trained"] == ["transformer.wte.weight"]
    assert [name for name in adapted.state_dict() if ".pet." not in name] == ["transformer.wte.weight"]
    perturb(adapted)
    with torch.no_grad():
        table.add_(1.0)
    save_delta(model, tmp_path / "x.pet.safetensors")
    loaded, _ = zoo.gpt2()
    load_delta(loaded, tmp_path / "x.pet.safetensors")
    assert torch.equal(loaded.lm_head.weight, table)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_single_parameter_may_be_saved() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.temperature = nn.Parameter(torch.tensor(2.0))
    adapted = apply(model, LoRACallback(r=2, target_modules="0", modules_to_save=["temperature", "0.bias"]))
    assert adapted.record.trained_names == ("temperature", "0.bias")
    assert model.temperature.requires_grad
    with pytest.raises(TargetError, match=r"'temprature'. Did you mean 'temperature'\?"):
        apply(model, LoRACallback(name="other", r=2, target_modules="0", modules_to_save="temprature"))


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_on_experts_scales_their_output_features(transposed: bool) -> None:
    class Experts(nn.Module):
        is_transposed = transposed

        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Parameter(torch.randn(2, 3, 5) if transposed else torch.randn(2, 5, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,nio->nbo" if transposed else "bi,noi->nbo", x, self.proj)

    model, x = nn.Sequential(Experts(), nn.Tanh()), torch.randn(4, 3)
    adapted = apply(model, [LoRACallback(r=2, target_modules="0.proj", use_dora=True)], forward=lambda: model(x))
    delta = model[0].pet["lora_default_proj"]
    assert (delta.a.shape, delta.b.shape, delta.magnitude.shape) == ((2, 2, 3), (2, 5, 2), (2, 5))
    before = model[0](x)
    with torch.no_grad():
        delta.magnitude[:, 1] *= 2
    assert torch.allclose(model[0](x)[..., 1], 2 * before[..., 1], atol=1e-5)
    assert torch.allclose(model[0](x)[..., [0, 2, 3, 4]], before[..., [0, 2, 3, 4]], atol=1e-5)
    adapted.remove()


def test_layers_and_exclusion() -> None:
    model, _ = zoo.bert()
    adapted = apply(model, [LoRACallback(r=2, layers_to_transform=[1], exclude_modules=["value"])])
    places = {row.place for row in adapted.plan().rows if row.method == "lora"}
    assert places == {"bert.encoder.layer.1.attention.self.query.weight"}


def test_heads_are_found_and_language_model_heads_are_not() -> None:
    classifier, _ = zoo.bert()
    assert apply(classifier, [LoRACallback(r=2)]).record.trained_names == ("classifier.weight", "classifier.bias")
    for build in (zoo.gpt2, zoo.llama, zoo.t5):
        model, _ = build()
        assert apply(model, [LoRACallback(r=2)]).record.trained_names == ()


def test_biases() -> None:
    model, _ = zoo.bert()
    names = apply(model, [LoRACallback(r=2, bias="lora_only", modules_to_save=[])]).record.trained_names
    assert len(names) == 4
    assert all(name.endswith(("query.bias", "value.bias")) for name in names)


def test_two_named_deltas_add_up() -> None:
    model, run = zoo.mlp()
    model.double()
    base = run(model)
    both = apply(model, [LoRACallback(r=2, target_modules="2"), LoRACallback(r=1, name="second", target_modules="2")])
    perturb(both)
    first, second = (model[2].pet[key] for key in ("lora_default", "lora_second"))
    weight = first.merged(second.merged(model[2].weight))
    hidden = model[1](model[0](torch.ones(1, 6, dtype=torch.float64)))
    assert torch.allclose(model(torch.ones(1, 6, dtype=torch.float64)), hidden @ weight.T + model[2].bias, atol=1e-12)
    both.remove()
    assert torch.equal(run(model), base)


def test_merging_a_tied_weight_is_refused() -> None:
    model, run = zoo.gpt2()
    adapted = apply(model, [LoRACallback(r=2, target_modules="wte")])
    perturb(adapted)
    before = run(model)
    with pytest.raises(NotMergeableError, match="tied"):
        adapted.merge_()
    assert torch.equal(run(model), before)


class Reader(nn.Module):
    """Reads its child's weight, and never calls it, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inner.weight.T + self.inner.bias


@pytest.mark.parametrize("model", [Reader(), nn.Sequential(nn.Linear(4, 4), Reader())])
def test_a_weight_that_is_read_and_never_called(model: nn.Module, tmp_path: Path) -> None:
    model, x = model.double(), torch.randn(3, 4, dtype=torch.float64)
    base, before = copy.deepcopy(model), model(x)
    adapted = apply(model, [LoRACallback(r=2, target_modules=["inner"])], forward=lambda: model(x))
    perturb(adapted)
    attached = model(x)
    assert not torch.allclose(attached, before)
    save_delta(model, tmp_path / "d.pet.safetensors")
    load_delta(base, tmp_path / "d.pet.safetensors")
    assert torch.equal(base(x), attached)
    adapted.merge_()
    assert (model(x) - attached).abs().max() < 1e-12


def test_dropout_acts_in_training_only() -> None:
    model, run = zoo.mlp()
    perturb(apply(model, [LoRACallback(r=2, dropout=0.5, target_modules="0")]))
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, run = zoo.llama()
        perturb(apply(model, [LoRACallback(r=2, target_modules="all-linear")]))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run(model).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_encoder_fast_path_with_padding() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().double()  # the two ways round differently
    x, padding = (
        torch.randn(3, 5, 16).double(),
        torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool(),
    )
    with torch.no_grad():
        base = model(x, src_key_padding_mask=padding)
    adapted = apply(model, [LoRACallback(r=2, target_modules="all-linear")])
    perturb(adapted)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    slow = model.train()(x, src_key_padding_mask=padding)
    assert (fast - slow)[~padding].abs().max() < 1e-10
    assert (fast - base)[~padding].abs().max() > 1e-3
    adapted.remove()
    with torch.no_grad():
        assert torch.equal(model.eval()(x, src_key_padding_mask=padding), base)


@pytest.mark.parametrize("model", ["gpt2", "transformer_encoder", "mixtral"])
def test_a_new_process_loads_bit_exactly(model: str, tmp_path: Path) -> None:
    built, run = getattr(zoo, model)()
    targets = "attention.v" if model == "gpt2" else "all-linear"
    perturb(apply(built, [LoRACallback(r=2, target_modules=targets)], forward=lambda: run(built)))
    save_delta(built, tmp_path / "d.pet.safetensors")
    loaded = output_in_a_new_process(model, tmp_path / "d.pet.safetensors", tmp_path / "out.pt")
    assert torch.equal(loaded, run(built))


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"r": 0}, "r=0"),
        ({"r": -3}, "r=-3"),
        ({"r": 1.5}, "r=1.5"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio=0"),
        ({"init": "zeros"}, "'pissa'"),
        ({"bias": "some"}, "'lora_only'"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"use_dora": True, "init": "pissa"}, "choose one"),
        ({"name": "a b"}, "letters, digits"),
        ({"base_check": "maybe"}, "'warn'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        LoRACallback(**options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target_modules": ["query", "valeu"]}, TargetError, "value"),
        ({"target_modules": "attention.x"}, TargetError, "attention"),
        ({"r": 17}, TargetError, "at most 16"),
        ({"exclude_modules": ["nothing"]}, TargetError, "nothing"),
        ({"layers_to_transform": [7]}, TargetError, "layer"),
        ({"modules_to_save": ["clasifier"]}, TargetError, "classifier"),
        ({"rank_pattern": {"nowhere": 2}}, ArgumentError, "nowhere"),
        ({"rank_pattern": {"attention.q": 2, "layer.0.*.query": 4}}, ArgumentError, "Put 'layer.0.*.query' first"),
        ({"alpha_pattern": {"re:(": 2}}, TargetError, "regular expression"),
        ({"layers_to_transform": 0, "target_modules": "query,pooler.dense"}, TargetError, "pooler.dense"),
        ({"module": "encoder"}, TargetError, "encoder"),
    ],
)
def test_bad_places_leave_the_model_untouched(options: dict[str, object], error: type[Exception], text: str) -> None:
    model, run = zoo.bert()
    before, kinds = run(model), [type(m) for m in model.modules()]
    with pytest.raises(error, match=text):
        apply(model, [LoRACallback(**{"r": 2, **options})])
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(run(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_one_name_twice() -> None:
    model, _ = zoo.bert()
    with pytest.raises(ArgumentError, match="name='second'"):
        apply(model, [LoRACallback(r=2), LoRACallback(r=4)])
    assert not any("pet" in name for name, _ in model.named_modules())


def test_an_a_that_does_not_train_keeps_no_input(tmp_path: Path) -> None:
    """LoRA-FA: as LoRA of the same A to the bit, and of a large layer x Aᵀ is kept instead of x."""

    def built(**options: object) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
        torch.manual_seed(1)
        adapted = apply(net, LoRACallback(r=4, target_modules=["0", "2"], modules_to_save=[], **options))
        with torch.no_grad():
            for name, tensor in net.named_parameters():
                if name.endswith(".b"):
                    tensor.normal_(generator=torch.Generator().manual_seed(2))
        return net, adapted

    x = torch.randn(512, 256)
    plain, _ = built()
    fixed, adapted = built(train_a=False)
    kept: dict[str, int] = {}
    gradients = {}
    for name, net in (("plain", plain), ("fixed", fixed)):
        seen: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
        ):
            loss = net(x).square().mean()
        loss.backward()
        kept[name] = sum(seen.values())
        gradients[name] = {n: p.grad for n, p in net.named_parameters() if n.endswith(".b")}
    for name, gradient in gradients["plain"].items():
        assert torch.allclose(gradients["fixed"][name], gradient, rtol=1e-4, atol=1e-7)
    assert kept["fixed"] < kept["plain"] - x.nbytes // 2
    assert all(name.endswith(".b") for name, p in fixed.named_parameters() if p.requires_grad)
    path = tmp_path / "x.pet.safetensors"
    save_delta(fixed, path)
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
    load_delta(other, path)
    with torch.no_grad():
        assert torch.equal(other(x), fixed(x))
        expected = fixed(x)
        adapted.merge_()
        assert torch.allclose(fixed(x), expected, atol=1e-4)
    with pytest.raises(ArgumentError, match="lora_plus_ratio"):
        LoRACallback(train_a=False, lora_plus_ratio=4.0)
    model, run = zoo.embedding()
    with pytest.raises(TargetError, match="nothing would ever change"):
        apply(model, LoRACallback(r=2, target_modules="table", train_a=False), forward=lambda: run(model))
