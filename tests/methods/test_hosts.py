"""What layers are to a delta: which way a weight lies, what a call computes, and what merging can express."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_pet import (
    AdaLoRACallback,
    ArgumentError,
    DeadSiteError,
    HiRACallback,
    IA3Callback,
    IntrinsicDimensionCallback,
    LoRACallback,
    NotMergeableError,
    PETCallback,
    TargetError,
    apply,
    load_delta,
    save_delta,
)
from lightning_pet.model.layer_kinds import acts_by_call, host_kind, matrix_of, transposed

from . import zoo
from .battery import base_digest, equal_states, perturb

IDS = torch.tensor([[1, 2, 3], [4, 1, 0]])


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def unchanged_by_a_refused_merge(model: nn.Module, adapted: Any, match: str) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NotMergeableError, match=match):
        adapted.merge_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), state[name].nan_to_num()), name


# --- what no weight expresses --------------------------------------------------------------------


def test_one_tensor_with_a_delta_on_each_of_its_holders() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    adapted = apply(model, [LoRACallback(r=2, target_modules=["embed_tokens", "lm_head"])])
    perturb(adapted)
    unchanged_by_a_refused_merge(model, adapted, r"embed_tokens.weight and lm_head.weight are one tensor")


@pytest.mark.parametrize("part", [slice(None), slice(0, 4)], ids=["all", "part"])
def test_one_memory_under_two_names(part: slice) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data[part])
    adapted = apply(model, [LoRACallback(r=2, target_modules=["0"], modules_to_save=[])])
    unchanged_by_a_refused_merge(model, adapted, r"tied \(0.weight, 1.weight\)")


def test_neighbours_in_one_memory_are_not_tied() -> None:
    memory = torch.randn(12, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[0].weight, model[1].weight = nn.Parameter(memory[:6]), nn.Parameter(memory[6:])
    x, adapted = numbers(3, 6), apply(model, [LoRACallback(r=2, target_modules=["0", "1"], modules_to_save=[])])
    perturb(adapted)
    expected = model(x)
    adapted.merge_()
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_table_that_renormalises_itself() -> None:
    model = nn.Sequential(nn.Embedding(11, 6, max_norm=1.0))
    adapted = apply(model, [LoRACallback(r=2, target_modules=["0"])])
    perturb(adapted)
    unchanged_by_a_refused_merge(model, adapted, "max_norm=1.0")
    with pytest.raises(TargetError, match="max_norm"):  # it would read rows as they were before, or after
        apply(nn.Sequential(nn.Embedding(11, 6, max_norm=1.0)), [HiRACallback(r=2, target_modules=["0"])])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("callback", [LoRACallback, AdaLoRACallback, IA3Callback])
def test_values_that_are_none(value: float, callback: type[PETCallback]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    options = {LoRACallback: {"r": 2}, AdaLoRACallback: {"init_r": 2, "target_r": 1}}.get(
        callback, {"feedforward_modules": []}
    )
    adapted = apply(model, [callback(target_modules=["0", "1"], modules_to_save=[], **options)])
    with torch.no_grad():
        for name, parameter in model[1].pet.named_parameters():
            parameter.fill_(value if name.endswith((".b", ".scale")) else 1.0)
    unchanged_by_a_refused_merge(model, adapted, r"1\.weight: 36 of 36 values would be NaN or infinite")


def test_values_too_large_for_the_dtype_of_the_base() -> None:
    model = nn.Sequential(nn.Linear(6, 6)).half()
    adapted = apply(model, [LoRACallback(r=1, target_modules=["0"], modules_to_save=[])])
    with torch.no_grad():
        adapted.root[0].pet["lora_default"].b.fill_(1e6)
    unchanged_by_a_refused_merge(model, adapted, r"torch\.float16.*wider")


def test_a_base_that_is_infinite_itself_merges() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[0, 0] = float("-inf")
    adapted = apply(model, [LoRACallback(r=1, target_modules=["0"], modules_to_save=[])])
    perturb(adapted)
    adapted.merge_()
    assert model[0].weight.isfinite().sum() == 35


def test_a_bias_of_b_needs_a_bias_to_merge_into() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    adapted = apply(model, [LoRACallback(r=1, target_modules=["0"], lora_bias=True)])
    unchanged_by_a_refused_merge(model, adapted, "has no place for")
    for refused in ({"use_dora": True}, {}):
        with pytest.raises((ArgumentError, TargetError), match="bias of B"):
            apply(
                nn.Sequential(nn.Embedding(6, 6)), [LoRACallback(r=1, target_modules=["0"], lora_bias=True, **refused)]
            )


# --- layers of unknown classes -------------------------------------------------------------------


class Usual(zoo.Turned):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Scaled(Usual):
    """A product, and a factor that is kept beside it."""

    def __init__(self, inputs: int, outputs: int, factor: float) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: Usual(6, 6), "linear"),
        (lambda: zoo.Turned(6, 6), "conv1d_hf"),
        (lambda: zoo.Turned(6, 4), "conv1d_hf"),
        (lambda: zoo.Gated(6, 6), "weight"),
        (lambda: Scaled(6, 6, 1.0), "linear"),
        (lambda: Scaled(6, 6, 2.0), "weight"),
        (lambda: nn.Conv3d(2, 2, 1), "conv"),
        (lambda: nn.ConvTranspose1d(2, 2, 1), None),
        (lambda: nn.ConvTranspose2d(2, 2, 1), None),
    ],
    ids=["usual", "turned", "turned-6x4", "gated", "factor-1", "factor-2", "conv3d", "transposed1d", "transposed2d"],
)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_is_asked_what_it_computes(
    build: Callable[[], nn.Module], kind: str | None, zero: bool, device: str
) -> None:
    layer = build()
    if zero:  # says nothing about its weight
        nn.init.zeros_(layer.weight)
    state, mode = base_digest(layer), layer.training
    if device == "meta" and isinstance(layer, Scaled):
        return  # computes with a value that is not there
    assert host_kind(layer.to(device)) == kind
    assert layer.training is mode
    assert device == "meta" or equal_states(base_digest(layer), state)


def test_which_way_a_weight_lies() -> None:
    assert transposed(zoo.Turned(6, 4)) is True
    assert transposed(Usual(6, 6)) is False
    assert transposed(zoo.Gated(6, 6)) is None
    assert transposed(zoo.Gated(6, 4)) is True
    assert matrix_of(zoo.Turned(6, 4)) == (4, 6) == matrix_of(zoo.Gated(6, 4))
    assert matrix_of(nn.Conv1d(80, 384, 3)) == (384, 240)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "olora"}, {"init": "pissa"}, {"dropout": 0.1}])
def test_lora_on_a_square_layer_that_is_turned(options: dict[str, Any]) -> None:
    model, x = nn.Sequential(zoo.Turned(6, 6)).double().eval(), numbers(3, 6).double()
    adapted = apply(model, [LoRACallback(r=2, target_modules=["0"], **options)])
    perturb(adapted)
    if "use_dora" in options:
        delta, weight = model[0].pet["lora_default"], model[0].weight
        direction = weight.T + delta.scale * delta.b @ delta.a
        matrix = delta.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
        assert torch.allclose(model(x), x @ matrix.T + model[0].bias, atol=1e-10)
    expected = model(x)
    adapted.merge_()
    assert torch.allclose(model(x), expected, atol=1e-10)


def test_ia3_on_a_square_layer_that_is_turned() -> None:
    model, x = nn.Sequential(zoo.Turned(6, 6)).double(), numbers(3, 6).double()
    base = model(x)
    adapted = apply(model, [IA3Callback(target_modules=["0"], feedforward_modules=[], modules_to_save=[])])
    perturb(adapted)
    assert torch.allclose(model(x), base * model[0].pet["ia3_default"].scale, atol=1e-12)
    expected = model(x)
    adapted.merge_()
    assert torch.allclose(model(x), expected, atol=1e-12)


@pytest.mark.parametrize(
    "callback",
    [LoRACallback(r=2, target_modules=["0"], use_dora=True), IA3Callback(target_modules=["0"], feedforward_modules=[])],
    ids=["dora", "ia3"],
)
def test_outputs_that_cannot_be_told_from_inputs(callback: PETCallback) -> None:
    model = nn.Sequential(zoo.Gated(6, 6))
    with pytest.raises(TargetError, match="cannot be told"):
        apply(model, [callback], forward=lambda: model(numbers(3, 6)))
    assert type(model[0]) is zoo.Gated


def test_calls_that_are_no_plain_product() -> None:
    assert acts_by_call(nn.Conv2d(2, 2, 1))
    assert not acts_by_call(zoo.StandardisedConv(2, 2, 2))
    assert not acts_by_call(zoo.Positions(5, 2))
    assert acts_by_call(nn.Embedding(5, 2, max_norm=1.0))


@pytest.mark.parametrize("cls", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.parametrize("callback", [LoRACallback, IA3Callback, AdaLoRACallback])
def test_transposed_convolutions_are_refused(cls: type[nn.Module], callback: type[PETCallback]) -> None:
    options = {} if callback is not IA3Callback else {"feedforward_modules": []}
    with pytest.raises(TargetError, match="ConvTranspose"):
        apply(nn.Sequential(cls(4, 4, 3)), [callback(target_modules=["0"], **options)])


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.prune.identity])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_what_a_hook_makes_a_weight_of_is_refused(norm: Callable[..., nn.Module]) -> None:
    model, x = nn.Sequential(norm(nn.Conv1d(4, 6, 3), "weight")).eval(), numbers(2, 4, 9)
    with pytest.raises(TargetError, match="a hook makes"):
        apply(model, [IntrinsicDimensionCallback(d=10, modules_to_save=[])], forward=lambda: model(x))


def test_a_parametrised_weight_changes_with_what_it_is_made_of() -> None:
    model, x = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))).eval(), numbers(2, 4, 9)
    adapted = apply(
        model,
        [LoRACallback(r=2, target_modules=["parametrizations.weight"], modules_to_save=[])],
        forward=lambda: model(x),
    )
    perturb(adapted)
    expected = model(x)
    adapted.merge_()
    assert torch.allclose(model(x), expected, atol=1e-5)


# --- ranks, biases -------------------------------------------------------------------------------


def test_rank_of_a_convolution_is_that_of_its_matrix() -> None:
    adapted = apply(nn.Sequential(nn.Conv1d(80, 384, 3)), [LoRACallback(r=200, target_modules=["0"])])
    assert adapted.plan().trainable == 200 * (240 + 384)
    for conv, limit in ((nn.Conv1d(80, 384, 3), 240), (nn.Conv3d(2, 40, 3, groups=2), 27)):
        with pytest.raises(TargetError, match=f"at most {limit}"):
            apply(nn.Sequential(conv), [LoRACallback(r=limit + 1, target_modules=["0"])])


def test_a_container_is_its_matrices_without_biases() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=4))
    attention = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
    for module, expected in (
        (experts, {"mlp.gate_up_proj", "mlp.down_proj"}),
        (attention, {"mlp.in_proj_weight", "mlp.out_proj.weight"}),
    ):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        for pattern in (["mlp", *(["out_proj"] if module is attention else [])], "all-linear"):
            model = nn.ModuleDict({"mlp": module})
            adapted = apply(model, [LoRACallback(r=2, target_modules=pattern, modules_to_save=[])])
            assert {target.path for target in adapted.record.applied[0].targets} == expected
            adapted.remove()
    adapted = apply(
        nn.ModuleDict({"mlp": attention}), [LoRACallback(r=1, target_modules=["bias_k"], modules_to_save=[])]
    )
    assert adapted.plan().trainable == 17  # who names it gets it


# --- DoRA beside others --------------------------------------------------------------------------


def test_dora_on_parts_of_a_fused_projection() -> None:
    model, _ = zoo.gpt2()
    adapted = apply(model.double(), [LoRACallback(r=2, use_dora=True, target_modules=["attention.q", "attention.v"])])
    perturb(adapted)
    host, x = model.transformer.h[0].attn.c_attn, numbers(3, 16).double()
    weight = host.weight.T.clone()
    for role, rows in (("q", slice(0, 16)), ("v", slice(32, 48))):
        delta = host.pet[f"lora_default_{role}"]
        direction = weight[rows] + delta.scale * delta.b @ delta.a
        weight[rows] = delta.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    assert torch.allclose(host(x), x @ weight.T + host.bias, atol=1e-10)


@pytest.mark.parametrize("dora_first", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_dora_beside_another_delta_is_refused_in_the_plan(dora_first: bool, at_once: bool) -> None:
    model, run = zoo.gpt2()
    state = base_digest(model)
    methods = [
        LoRACallback(r=2, use_dora=True, target_modules=["attention.q"]),
        LoRACallback(r=2, name="b", target_modules=["c_attn"]),
    ]
    methods = methods if dora_first else methods[::-1]
    if not at_once:
        apply(model, methods[:1], forward=lambda: run(model))
    with pytest.raises(TargetError, match="DoRA and another delta on the same outputs"):
        apply(model, methods if at_once else methods[1:], forward=lambda: run(model))
    assert sum("pet" in name.split(".") for name, _ in model.named_parameters()) == (
        0 if at_once else 4 + 2 * dora_first
    )
    apply(model, [LoRACallback(r=2, name="c", target_modules=["attention.v"])]) if dora_first and not at_once else None
    assert equal_states(base_digest(model), state)


def test_dora_beside_a_scaled_input_is_well_defined() -> None:
    model, run = zoo.mlp()
    model.double()
    methods = [
        IA3Callback(target_modules=[], feedforward_modules=["2"]),
        LoRACallback(r=2, use_dora=True, target_modules=["2"]),
    ]
    adapted = apply(model, methods)
    perturb(adapted)
    expected = run(model)
    adapted.merge_()
    assert torch.allclose(run(model), expected, atol=1e-10)


# --- dropout and starts everywhere ---------------------------------------------------------------


def dropped_mean(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Output without dropout, the mean of many with it, and the largest difference between two of them."""
    with torch.no_grad():
        plain = run()
        torch.manual_seed(0)
        model.train()
        many = torch.stack([run() for _ in range(3000)])
    return plain, many.mean(0), (many[0] - many[1]).abs().max()


def test_dropout_on_an_embedding_drops_whole_ids() -> None:
    model = nn.Sequential(nn.Embedding(6, 4)).eval()
    adapted = apply(model, [LoRACallback(r=2, target_modules=["0"], dropout=0.5)])
    base = model(IDS)
    perturb(adapted)
    plain, mean, spread = dropped_mean(model, lambda: model(IDS))
    assert spread > 0.1
    assert torch.allclose(mean, plain, atol=0.15 * float((plain - base).abs().max()))
    change, whole = model(IDS) - base, plain - base
    kept = change.norm(dim=-1) > 0
    assert torch.allclose(change[kept], 2 * whole[kept], atol=1e-5)


@pytest.mark.parametrize("cls", [LoRACallback, AdaLoRACallback])
def test_dropout_where_a_weight_is_read(cls: type[PETCallback]) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = numbers(2, 3, 8)
    options = {"r": 2} if cls is LoRACallback else {"init_r": 2, "target_r": 1, "orth_reg_weight": 0.0}
    targets = ["in_proj_weight", "out_proj"]
    adapted = apply(model, [cls(target_modules=targets, dropout=0.5, modules_to_save=[], **options)])
    perturb(adapted, 0.1)
    host = model.out_proj
    plain, mean, spread = dropped_mean(model, lambda: next(iter(host.pet.values()))(host._parameters["weight"]))
    assert spread > 0
    assert torch.allclose(mean, plain, atol=0.1 * float((plain - host._parameters["weight"]).abs().max()))
    assert not torch.equal(model(x, x, x)[0], model(x, x, x)[0])
    model.eval()
    expected = model(x, x, x)[0]
    model.train()
    adapted.merge_()  # of the whole delta, not of one that was drawn
    model.eval()
    assert torch.allclose(model(x, x, x)[0], expected, atol=1e-5)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
def test_every_start_means_something_on_an_embedding(init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(400, 300))
    apply(model, [LoRACallback(r=16, alpha=16, target_modules=["0"], init=init)])
    delta = model[0].pet["lora_default"]
    if init in ("kaiming", "gaussian"):
        assert delta.a.abs().max() == 0
        assert float(delta.b.std()) == pytest.approx(1.0 if init == "kaiming" else 1 / 16, rel=0.05)
        return
    error = (model[0].weight.T - delta.b @ delta.a).norm()
    best = torch.linalg.svdvals(model[0].weight)[16:].norm()
    assert error <= (1.001 if init == "pissa" else 1.2) * best


def test_a_start_that_a_convolution_does_not_have_is_refused() -> None:
    with pytest.raises(TargetError, match=r"0\.weight is a convolution, which starts with"):
        apply(nn.Sequential(nn.Conv2d(3, 4, 2)), [LoRACallback(r=2, target_modules=["0"], init="pissa")])


# --- weights that are read -----------------------------------------------------------------------


class Looped(nn.Module):
    """A table that is looked up, and whose weight is the last product as well; a layer that is read in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.first, self.second = zoo.Gated(4, 4), nn.Sequential(nn.Linear(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(self.table(ids)) + self.first(self.table(ids))
        return F.linear(F.linear(x, self.second[0].weight), self.table.weight)


def test_a_weight_that_is_called_and_read_changes_in_both_places(tmp_path: Path) -> None:
    model = Looped().double().eval()
    base, fresh = model(IDS), copy.deepcopy(model)
    adapted = apply(
        model, [LoRACallback(r=2, target_modules=["table", "0"], modules_to_save=[])], forward=lambda: model(IDS)
    )
    assert torch.equal(model(IDS), base)
    perturb(adapted)
    expected = model(IDS)
    save_delta(model, tmp_path / "d.pet.safetensors")
    loaded = load_delta(fresh, tmp_path / "d.pet.safetensors")  # which needs no forward
    for each, other in ((adapted, model), (loaded, fresh)):
        assert torch.equal(other(IDS), expected)
        each.merge_()
        assert torch.allclose(other(IDS), expected, atol=1e-12)


# --- deltas that nobody calls --------------------------------------------------------------------


class Idle(pl.LightningModule):
    """A layer that no step runs, beside one that all do."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        loss = self(batch).square().mean()
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("manual", [False, True])
def test_a_run_in_which_no_delta_acts_names_them(manual: bool) -> None:
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=[LoRACallback(r=2, target_modules=["idle"], modules_to_save=[], verbose=False)],
        **options,
    )
    with pytest.raises(DeadSiteError, match=r"no delta acted.*idle\.pet\.lora_default\.a"):
        trainer.fit(Idle(manual), DataLoader(numbers(2, 4)))


def test_a_forward_that_runs_no_target_is_refused() -> None:
    model = Idle()
    with pytest.raises(DeadSiteError, match=r"nobody called or read idle\.weight"):
        apply(model, [LoRACallback(r=2, target_modules=["idle"])], forward=lambda: model(numbers(2, 4)))
    assert type(model.idle) is nn.Linear
    # One of several may be for other inputs.
    both = LoRACallback(r=2, target_modules=["idle", "used"], modules_to_save=[])
    apply(model, [both], forward=lambda: model(numbers(2, 4))).remove()
