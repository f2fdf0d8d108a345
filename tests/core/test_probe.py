"""What the probe finds, and that it leaves no trace."""

import copy
import random
from collections import Counter

import pytest
import torch
from tiny_models import hf, ids
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_pet.errors import TargetError
from lightning_pet.probe.probe import analyse, probe


def roles_in(structure, prefix):
    return {
        target.path.removeprefix(prefix): target.role
        for target in structure.targets
        if target.module.startswith(prefix)
    }


# -- roles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert(attention):
    model = hf("bert", attention=attention)
    structure = probe(model, lambda: model(input_ids=ids()))
    assert roles_in(structure, "encoder.layer.1.") == {
        "attention.self.query.weight": "attention.q",
        "attention.self.key.weight": "attention.k",
        "attention.self.value.weight": "attention.v",
        "attention.output.dense.weight": "attention.o",
        "intermediate.dense.weight": "ffn.up",
        "output.dense.weight": "ffn.down",
    }
    assert structure.embedding == "embeddings.word_embeddings"
    assert structure.consumer == ""
    assert "encoder.layer.1.output.dense" in structure.called
    assert [site.kind for site in structure.sites] == ["attention", "ffn"] * 2
    first = structure.sites[0]
    assert first.branch[0] == "encoder.layer.0.attention.output.dense"
    assert first.after_norm == ("encoder.layer.0.attention.output.LayerNorm",)
    assert first.after_out == ()
    assert first.inputs[-1] == "encoder.layer.0.attention.self.value"
    assert first.width == 32
    core = structure.attention[0]
    assert (core.owner, core.kv_heads, core.key_dim, core.value_dim, core.cross) == (
        "encoder.layer.0.attention.self", 4, 8, 8, False,
    )  # fmt: skip


def test_llama_grouped_keys_and_gated_ffn():
    model = hf("llama", "AutoModelForCausalLM")
    structure = probe(model, lambda: model(input_ids=ids(), use_cache=False).logits.sum())
    assert roles_in(structure, "model.layers.0.") == {
        "self_attn.q_proj.weight": "attention.q",
        "self_attn.k_proj.weight": "attention.k",
        "self_attn.v_proj.weight": "attention.v",
        "self_attn.o_proj.weight": "attention.o",
        "mlp.gate_proj.weight": "ffn.gate",
        "mlp.up_proj.weight": "ffn.up",
        "mlp.down_proj.weight": "ffn.down",
    }
    assert structure.consumer == "model"
    assert {core.kv_heads for core in structure.attention} == {2}
    attention, ffn = structure.sites[:2]
    assert attention.inputs == ("model.layers.0.input_layernorm",)
    assert attention.branch[-1] == "model.layers.0.self_attn"
    assert ffn.after_out == ("model.layers.0",)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_t5_cross_attention(attention):
    model = hf("t5", attention=attention)
    structure = analyse(model)
    counts = Counter((target.role, target.cross) for target in structure.targets)
    assert structure.source == "probe"
    for role in ("attention.q", "attention.k", "attention.v", "attention.o"):
        assert counts[role, False] == 4
        assert counts[role, True] == 2
    assert {t.module for t in structure.targets if t.cross and t.role == "attention.k"} == {
        "decoder.block.0.layer.1.EncDecAttention.k",
        "decoder.block.1.layer.1.EncDecAttention.k",
    }
    assert Counter(site.kind for site in structure.sites) == {"attention": 4, "cross": 2, "ffn": 4}
    assert structure.consumer == "encoder"


def test_bart_and_vit():
    bart = analyse(hf("bart"))
    assert Counter(site.kind for site in bart.sites) == {"attention": 4, "cross": 2, "ffn": 4}
    assert {t.module.split(".")[3] for t in bart.targets if t.cross} == {"encoder_attn"}
    vit = analyse(hf("vit"))
    assert Counter(target.role for target in vit.targets) == dict.fromkeys(
        ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.up", "ffn.down"), 2
    )
    assert vit.embedding is None
    assert all(site.branch[0] != site.branch[-1] for site in vit.sites)


def test_mixtral_experts_are_parameters():
    structure = analyse(hf("mixtral"))
    found = {(t.parameter, t.role): t.rows for t in structure.targets if t.module == "layers.0.mlp.experts"}
    assert found == {
        ("gate_up_proj", "ffn.gate"): ((0, 48),),
        ("gate_up_proj", "ffn.up"): ((48, 96),),
        ("down_proj", "ffn.down"): None,
    }
    assert [site.kind for site in structure.sites] == ["attention", "ffn"] * 2


def test_albert_shared_layer_is_one_place():
    structure = analyse(hf("albert"))
    assert Counter(target.role for target in structure.targets)["attention.q"] == 1
    assert len(structure.sites) == 2


def test_torch_transformer():
    model = nn.Transformer(32, 4, 1, 2, 64, batch_first=True)
    structure = analyse(model, lambda: model(torch.randn(2, 5, 32), torch.randn(2, 6, 32)))
    packed = {(t.module, t.role): (t.rows, t.cross) for t in structure.targets if t.parameter == "in_proj_weight"}
    assert packed["encoder.layers.0.self_attn", "attention.k"] == (((32, 64),), False)
    assert packed["decoder.layers.1.multihead_attn", "attention.v"] == (((64, 96),), True)
    assert Counter(site.kind for site in structure.sites) == {"attention": 3, "cross": 2, "ffn": 3}
    assert structure.sites[0].branch[0] == "encoder.layers.0.self_attn"
    outs = {t.module for t in structure.targets if t.role == "attention.o"}
    assert "decoder.layers.0.multihead_attn.out_proj" in outs


def test_torch_encoder_without_a_forward_is_read_by_names():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    structure = analyse(model)
    assert structure.source == "names"
    assert structure.called is None
    assert Counter(target.role for target in structure.targets)["ffn.down"] == 2


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), (2, 8)),
        (nn.LSTM(8, 16, 2), (5, 2, 8)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), (1, 3, 12, 12)),
    ],
    ids=["mlp", "lstm", "cnn"],
)
def test_models_without_roles(model, batch):
    structure = analyse(model, lambda: model(torch.randn(batch)))
    assert structure.source == "probe"
    assert structure.targets == ()
    assert structure.attention == ()


def test_mamba_is_a_mixer_and_no_ffn():
    structure = analyse(hf("mamba"))
    assert {site.kind for site in structure.sites} == {"mixer"}
    assert not [target for target in structure.targets if target.role != "embedding"]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, tokens):
        return checkpoint(self.layer, self.embed(tokens), use_reentrant=False)


def test_gradient_checkpointing():
    model = Checkpointed()
    structure = analyse(model, lambda: model(ids()))
    assert [site.kind for site in structure.sites] == ["attention", "ffn"]
    llama = hf("llama")
    enable = getattr(llama, "activation_checkpointing_enable", None) or llama.gradient_checkpointing_enable
    enable()
    llama.train()
    structure = analyse(llama)
    assert structure.source == "probe"
    assert len(structure.sites) == 4


def test_meta_device():
    with torch.device("meta"):
        model = hf("llama")
    structure = analyse(model)
    assert structure.source == "probe"
    assert Counter(target.role for target in structure.targets)["attention.v"] == 2


class Int8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.float().t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0].float(), None


class QuantisedLinear(nn.Module):
    """A linear whose weight the autograd graph does not show."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", (linear.weight.detach() * 100).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        y = Int8.apply(x, self.weight) * 0.01
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_quantised_linears_keep_their_roles(name):
    model = hf(name)
    before = analyse(model).targets
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(path, QuantisedLinear(module))
    structure = analyse(model)
    assert structure.source == "probe"
    assert structure.targets == before


def test_position_embeddings_are_no_residual():
    class Positioned(nn.Module):
        """Adds positions to queries and keys in every layer, as detection transformers do."""

        def __init__(self):
            super().__init__()
            self.positions = nn.Embedding(9, 32)
            self.layers = nn.ModuleList(nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(3))

        def forward(self, x):
            places = self.positions(torch.arange(x.shape[1]))
            for layer in self.layers:
                x = x + layer(x + places, x + places, x, need_weights=False)[0]
            return x

    model = Positioned()
    structure = analyse(model, lambda: model(torch.randn(2, 9, 32)))
    assert [(site.kind, site.branch) for site in structure.sites] == [("attention", (f"layers.{i}",)) for i in range(3)]


# -- no trace -----------------------------------------------------------------------------------------


def snapshot(model):
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "random": (torch.get_rng_state().tolist(), random.getstate()),
    }


def assert_same(before, after):
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(t, after["tensors"][n]) for n, t in before["tensors"].items())
    for left, right in zip(before["grads"], after["grads"], strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)
    for key in ("flags", "modes", "hooks", "attributes", "random"):
        assert before[key] == after[key], key


def prepared():
    model = hf("bert")
    model.train()
    model.encoder.layer[0].eval()
    for parameter in model.encoder.layer[1].parameters():
        parameter.requires_grad_(False)
    model.embeddings.word_embeddings.weight.grad = torch.ones(99, 32)
    model.register_buffer("count", torch.zeros(3))
    model.register_forward_pre_hook(count_and_draw)
    return model


def count_and_draw(module, args):
    module.count += 1
    module.last = torch.rand(1), random.random()


def test_leaves_no_trace():
    model = prepared()
    before = snapshot(model)
    probe(model, lambda: model(input_ids=ids()))
    assert_same(before, snapshot(model))


def test_leaves_no_trace_when_the_forward_fails():
    model = prepared()
    before = snapshot(model)

    def forward():
        model(input_ids=ids()).last_hidden_state.sum().backward()
        raise KeyError("labels")

    with pytest.raises(TargetError, match=r"KeyError.*labels") as caught:
        probe(model, forward)
    assert isinstance(caught.value.__cause__, KeyError)
    assert_same(before, snapshot(model))


def test_works_under_no_grad_and_inference_mode():
    model = hf("bert")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert probe(model, lambda: model(input_ids=ids().clone())).sites


def test_the_probed_model_can_be_copied():
    model = prepared()
    probe(model, lambda: model(input_ids=ids()))
    copy.deepcopy(model)


def test_an_output_without_a_graph_is_an_error():
    model = nn.Linear(2, 2)

    def forward():
        with torch.no_grad():
            return model(torch.ones(1, 2))

    with pytest.raises(TargetError, match=r"torch\.no_grad"):
        probe(model, forward)


def test_lazy_modules_are_an_error():
    with pytest.raises(TargetError, match="Run one batch"):
        probe(nn.LazyLinear(3), lambda: None)


def test_analyse_falls_back_to_names_and_says_why():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)

    def forward():
        raise RuntimeError("no batch")

    structure = analyse(model, forward)
    assert structure.source == "names"
    assert "no batch" in structure.disagreements[0]
