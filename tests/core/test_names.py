"""What names alone say."""

import pytest
import torch
from tiny_models import hf
from torch import nn

from lightning_pet.model.named_roles import (
    is_linear,
    is_router,
    layer_index,
    roles_by_name,
    tensor_parallel_plan,
    without_numbers,
)
from lightning_pet.model.naming import canonical, named_modules, named_tensors, walk
from lightning_pet.model.structure import Structure, Target
from lightning_pet.probe.probe import analyse
from lightning_pet.probe.roles import merge

ARCHITECTURES = ["bert", "gpt2", "llama", "t5", "bart", "vit", "mixtral", "phi3", "gpt_neox", "distilbert", "electra"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_agree_with_the_probe(name):
    model = hf(name, **({"dim": 32, "n_heads": 4, "hidden_dim": 48} if name == "distilbert" else {}))
    seen = analyse(model)
    named = merge(model, None)
    assert not seen.disagreements
    expected = {(t.module, t.parameter, t.role, t.cross) for t in seen.targets if t.role != "embedding"}
    assert {(t.module, t.parameter, t.role, t.cross) for t in (*named.targets, *named.unresolved)} == expected


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_state_their_layout(name):
    model = hf(name)
    seen = analyse(model)
    by_name = [target for target in merge(model, None).targets if target.parameter == "gate_up_proj"]
    assert seen.source == "probe"
    assert by_name == [target for target in seen.targets if target.parameter == "gate_up_proj"]
    assert len(by_name) == 4


def test_a_task_head_has_no_role():
    model = hf("bert", "AutoModelForSequenceClassification")
    assert not [named for named in roles_by_name(model) if "classifier" in named.module or "pooler" in named.module]


def test_the_probe_wins_and_the_difference_is_noted():
    model = hf("bert")
    query = "encoder.layer.0.attention.self.query"
    seen = Structure(targets=(Target(query, role="attention.k"),), called=frozenset(), source="probe")
    merged = merge(model, seen)
    assert [t.role for t in merged.targets if t.module == query] == ["attention.k"]
    assert any(query in note and "attention.q" in note for note in merged.disagreements)


def test_the_plan_is_a_third_opinion():
    model = hf("llama")
    assert tensor_parallel_plan(model)["layers.*.self_attn.o_proj"] == "rowwise"
    seen = Structure(targets=(Target("layers.0.self_attn.o_proj", role="attention.q"),), called=frozenset())
    assert any("rowwise" in note for note in merge(model, seen).disagreements)


class Experts(nn.Module):
    """Two experts, of which only the first ever gets a token."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 16), "b": nn.Linear(16, 8)}) for _ in range(2))

    def forward(self, x):
        return x + self.experts[0]["b"](torch.relu(self.experts[0]["a"](x)))


def test_experts_without_tokens_take_the_roles_of_their_siblings():
    model = Experts()
    structure = analyse(model, lambda: model(torch.randn(2, 3, 8)))
    assert {t.module: t.role for t in structure.targets} == {
        "experts.0.a": "ffn.up",
        "experts.0.b": "ffn.down",
        "experts.1.a": "ffn.up",
        "experts.1.b": "ffn.down",
    }
    assert "experts.1.a" not in structure.called


def test_layer_index():
    assert layer_index("encoder.block.3.layer.1.DenseReluDense.wi") == 3
    assert layer_index("0.weight") == 0
    assert layer_index("model.layers.11") == 11
    assert layer_index("lm_head") is None
    assert without_numbers("h.3.mlp.experts.12.w1") == "h.*.mlp.experts.*.w1"


def test_kinds_of_modules():
    from transformers.pytorch_utils import Conv1D

    class TopKRouter(nn.Linear):
        def forward(self, x):
            return super().forward(x).topk(1)

    assert is_linear(nn.Linear(2, 2))
    assert is_linear(Conv1D(4, 2))
    assert not is_linear(nn.Embedding(2, 2))
    assert is_router(TopKRouter(2, 2))
    assert not is_router(nn.Linear(2, 2))


def test_the_walk_is_that_of_torch_with_canonical_names() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"pet": nn.ModuleDict({"x": nn.Linear(2, 2)})}))
    net = nn.Sequential(nn.Linear(2, 2), block, nn.ModuleList([block, nn.Sequential()]))
    net.register_module("none", None)
    compiled = nn.Sequential(torch.compile(net), nn.Linear(2, 2))
    for root in (net, compiled, torch.compile(net)):
        named = [(canonical(name), module) for name, module in root.named_modules(remove_duplicate=False)]
        assert list(walk(root)) == named
        assert named_modules(root) == dict(named)
        tensors = [(canonical(name), t) for name, t in root.named_parameters(remove_duplicate=False)]
        assert [(name, id(t)) for name, t in named_tensors(root)] == [(name, id(t)) for name, t in tensors]
        assert [name for name, _ in walk(root, of_base=True)] == [n for n, _ in named if "pet" not in n.split(".")]
