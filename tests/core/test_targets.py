"""From patterns to targets."""

import dataclasses
import functools

import pytest
import torch
from tiny_models import hf
from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.model.structure import Structure, Target
from lightning_pet.probe.probe import analyse
from lightning_pet.targets.targets import output_heads, resolve_targets, role_names, suggest


@functools.cache
def known(name, kind="AutoModel"):
    model = hf(name, kind)
    return model, analyse(model)


def modules(targets):
    return [target.module for target in targets]


def resolve(name, patterns, kind="AutoModel", **options):
    model, structure = known(name, kind)
    return resolve_targets(model, patterns, structure, **options)


# -- roles --------------------------------------------------------------------------------------------


def test_roles():
    assert modules(resolve("bert", ["attention.v", "attention.q"], layers=[0])) == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.attention.self.value",
    ]
    assert len(resolve("bert", "attention")) == 8
    assert len(resolve("bert", "ffn")) == 4
    assert len(resolve("llama", "ffn")) == 6
    assert modules(resolve("llama", "ffn.gate", layers=[1])) == ["layers.1.mlp.gate_proj"]
    assert resolve("bert", "embedding") == (Target("embeddings.word_embeddings", role="embedding"),)


def test_self_and_cross():
    assert len(resolve("t5", "attention.q")) == 6
    assert len(resolve("t5", "attention.self.q")) == 4
    assert modules(resolve("t5", "attention.cross.v", layers=[1])) == ["decoder.block.1.layer.1.EncDecAttention.v"]
    assert len(resolve("t5", "attention.cross")) == 8


def test_fused_roles_are_parts():
    (target,) = resolve("gpt2", "attention.v", layers=[0])
    assert target == Target("h.0.attn.c_attn", role="attention.v", rows=((64, 96),))


def test_a_role_the_model_lacks_lists_the_others():
    with pytest.raises(TargetError, match=r"'ffn\.gate'.*no such role.*attention\.q.*ffn\.down"):
        resolve("bert", "ffn.gate")
    with pytest.raises(TargetError, match=r"attention\.cross\.q"):
        resolve("bert", "attention.cross.q")
    mlp = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TargetError, match=r"Roles found .*by names only.*none"):
        resolve_targets(mlp, "attention.q", analyse(mlp))


# -- names --------------------------------------------------------------------------------------------


def test_suffixes_match_whole_components():
    assert len(resolve("llama", "q_proj")) == 2
    assert len(resolve("bert", "self.query")) == 2
    assert len(resolve("bert", "output.dense")) == 4
    assert modules(resolve("bert", "encoder.layer.1.output.dense")) == ["encoder.layer.1.output.dense"]
    with pytest.raises(TargetError, match=r"Did you mean 'q_proj'"):
        resolve("llama", "q_prj")
    with pytest.raises(TargetError, match="hits no module"):
        resolve("llama", "_proj")


def test_globs_and_expressions():
    assert len(resolve("bert", "encoder.layer.*.output.dense")) == 4
    assert len(resolve("bert", r"re:encoder\.layer\.\d+\.(intermediate|output)\.dense")) == 4
    assert len(resolve("llama", r"re:.*\.(q|v)_proj")) == 4
    with pytest.raises(TargetError, match="not a regular expression"):
        resolve("llama", "re:(")
    with pytest.raises(TargetError, match="hits no module"):
        resolve("llama", "re:q_proj")  # the whole name must match


def test_names_carry_their_role():
    assert [t.role for t in resolve("llama", "q_proj")] == ["attention.q"] * 2
    assert [t.role for t in resolve("gpt2", "c_attn")] == [None] * 2
    assert all(t.cross for t in resolve("t5", "EncDecAttention.k"))


def test_all_linear():
    model, structure = known("llama", "AutoModelForCausalLM")
    targets = resolve_targets(model, "all-linear", structure)
    assert len(targets) == 14
    assert "lm_head" not in modules(targets)
    assert len(resolve("gpt2", "all-linear")) == 8
    classifier = resolve("bert", "all-linear", "AutoModelForSequenceClassification")
    assert "classifier" not in modules(classifier)
    assert "bert.pooler.dense" in modules(classifier)
    experts = {t.parameter for t in resolve("mixtral", "all-linear")}
    assert experts == {"weight", "gate_up_proj", "down_proj"}
    assert not [t for t in resolve("mixtral", "all-linear") if t.module.endswith("gate")]


class Scores(nn.Module):
    """Layers with one output: two weigh features (as they are, and as a sum over positions), two are values."""

    def __init__(self):
        super().__init__()
        self.enc, self.mix, self.pool = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 1)
        self.critic, self.energy = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x):
        h = self.enc(x).relu()
        h = h + self.mix(h).sigmoid() * h
        pooled = self.pool(h).softmax(1).transpose(1, 2) @ h
        return self.critic(pooled).tanh() * 3 + self.energy(h).sum(1)


def test_a_router_is_what_weighs_other_features():
    model = Scores()
    seen = analyse(model, lambda: model(torch.randn(2, 3, 4)))
    assert seen.weighing == {"mix", "pool"}
    assert modules(resolve_targets(model, "all-linear", seen)) == ["enc", "critic", "energy"]
    inside = analyse(nn.ModuleDict({"net": model}), lambda: model(torch.randn(2, 3, 4))).within("net")
    assert resolve_targets(model, "all-linear", inside) == resolve_targets(model, "all-linear", seen)
    assert modules(resolve_targets(model, "mix", seen)) == ["mix"]  # who names it gets it


def test_without_a_forward_names_tell_a_gate_of_one_output():
    names = ("value", "shared_expert_gate", "router", "discriminator")
    model = nn.ModuleDict({name: nn.Linear(4, 1) for name in names})
    assert modules(resolve_targets(model, "all-linear", Structure())) == ["value", "discriminator"]


def test_all_conv(caplog):
    model = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3),
            "wave": nn.Conv1d(3, 8, 3, groups=1),
            "up": nn.ConvTranspose2d(8, 8, 2),
            "proj": nn.Linear(8, 8),
            "classifier": nn.Conv2d(8, 2, 1),
        }
    )
    assert modules(resolve_targets(model, "all-conv", Structure())) == ["stem", "wave", "up"]
    some = functools.partial(resolve_targets, hosts=lambda module, name: not isinstance(module, nn.ConvTranspose2d))
    assert modules(some(model, "all-conv", Structure())) == ["stem", "wave"]
    assert "leaves out 1 layers that this method cannot adapt: up (ConvTranspose2d)" in caplog.text
    both = resolve_targets(model, ["all-conv", "all-linear"], Structure(), exclude=["up"])
    assert modules(both) == ["stem", "wave", "proj"]
    with pytest.raises(TargetError, match="'all-conv' hits nothing: the model has no convolution"):
        resolve("bert", "all-conv")


def test_all_linear_reaches_torch_attention():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)
    targets = resolve_targets(model, "all-linear", Structure())
    assert [t.path for t in targets] == [
        "layers.0.self_attn.in_proj_weight",
        "layers.0.self_attn.out_proj.weight",
        "layers.0.linear1.weight",
        "layers.0.linear2.weight",
    ]


def test_parameters():
    assert {t.path for t in resolve("mixtral", "mlp.experts.gate_up_proj", layers=[0])} == {
        "layers.0.mlp.experts.gate_up_proj"
    }
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 8), "head": nn.Linear(8, 2)})
    assert resolve_targets(model, "lstm.weight_ih_l0", Structure()) == (Target("lstm", "weight_ih_l0"),)
    assert [t.parameter for t in resolve_targets(model, "lstm", Structure())] == ["weight_ih_l0", "weight_hh_l0"]


def test_containers_are_no_target():
    with pytest.raises(TargetError, match=r"BertIntermediate.*no weight.*for example 'encoder\.layer\.0\.intermediate"):
        resolve("bert", "intermediate")


def test_hosts_limit_what_counts_as_a_hit():
    with pytest.raises(TargetError, match="LayerNorm"):
        resolve("bert", "LayerNorm")
    norms = resolve("bert", "LayerNorm", hosts=lambda module, parameter: isinstance(module, nn.LayerNorm))
    assert len(norms) == 5


# -- selection ----------------------------------------------------------------------------------------


def test_exclude():
    kept = resolve("bert", "all-linear", exclude=["pooler.dense", "ffn"])
    assert len(kept) == 8
    with pytest.raises(TargetError, match="'poler'"):
        resolve("bert", "all-linear", exclude=["poler"])
    with pytest.raises(TargetError, match="nothing is left"):
        resolve("bert", "attention.q", exclude=["query"])


def test_excluding_a_container_excludes_what_is_below_it():
    assert modules(resolve("bert", "query", exclude=["encoder.layer.0"])) == ["encoder.layer.1.attention.self.query"]
    assert len(resolve("bert", "all-linear", exclude=["intermediate", "attention.output"])) == 9
    assert len(resolve("bert", "all-linear", exclude=["re:encoder.layer.1", "pooler"])) == 6
    assert {t.parameter for t in resolve("mixtral", "all-linear", exclude=["experts"])} == {"weight"}
    with pytest.raises(TargetError, match=r"'encodr'.*hits no module"):
        resolve("bert", "query", exclude=["encodr"])
    with pytest.raises(TargetError, match="nothing is left"):
        resolve("bert", "query", exclude=["encoder"])


def test_excluding_a_fused_projection_excludes_its_parts():
    kept = resolve("gpt2", ["attention.q", "attention.v"], exclude=["h.0.attn.c_attn"])
    assert modules(kept) == ["h.1.attn.c_attn"] * 2


def test_what_is_excluded_may_stay_unknown():
    model, structure = known("bert")
    query = Target("encoder.layer.0.attention.self.query", role="attention.v")
    uncertain = dataclasses.replace(structure, unresolved=(query,))
    with pytest.raises(TargetError, match=r"layer\.0\.attention\.self\.query.*exclude"):
        resolve_targets(model, "attention.v", uncertain)
    kept = resolve_targets(model, "attention.v", uncertain, exclude=["layer.0.attention.self.query"])
    assert len(kept) == 2


def test_layers():
    assert modules(resolve("bert", "attention.q", layers=[1])) == ["encoder.layer.1.attention.self.query"]
    with pytest.raises(TargetError, match=r"no layer 7; it has 0 to 1"):
        resolve("bert", "attention.q", layers=[0, 7])
    with pytest.raises(TargetError, match=r"nothing is left of target pattern 'embedding'.*no numbered layer"):
        resolve("bert", "embedding", layers=[0])


def test_no_pattern_is_lost_to_the_choice_of_layers():
    with pytest.raises(TargetError, match=r"'pooler\.dense'.*no numbered layer.*name='second'"):
        resolve("bert", ["attention.q", "pooler.dense"], layers=[1])
    with pytest.raises(TargetError, match=r"'layer\.0\.output\.dense'.*in the layers \[0\]"):
        resolve("bert", ["attention.q", "layer.0.output.dense"], layers=[1])
    assert len(resolve("bert", "all-linear", layers=[1])) == 6  # a pattern with places elsewhere, too, is not lost


def test_layers_of_a_named_list():
    model = nn.ModuleDict(
        {f"stage{i}": nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))}) for i in "ab"}
    )
    nested = nn.ModuleList([nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})])
    assert modules(resolve_targets(model, "all-linear", Structure(), layers=[1])) == [
        "stagea.blocks.1",
        "stageb.blocks.1",
    ]
    assert modules(resolve_targets(nested, "all-linear", Structure(), layers=[1], layers_pattern=["blocks"])) == [
        "0.blocks.1"
    ]
    with pytest.raises(TargetError, match=r"no layer 1 of layers_pattern=\['layers'\]"):
        resolve_targets(nested, "all-linear", Structure(), layers=[1], layers_pattern=["layers"])


def test_order_and_repetition():
    once = resolve("bert", ["attention.q", "query", "encoder.layer.*.query"])
    assert modules(once) == [f"encoder.layer.{i}.attention.self.query" for i in range(2)]


def test_whole_and_part_together_are_an_error():
    with pytest.raises(TargetError, match=r"h\.0\.attn\.c_attn.*twice"):
        resolve("gpt2", ["c_attn", "attention.v"])


def test_shared_modules_are_one_target():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": layer, "second": layer})
    for pattern in ("first", "second", ["first", "second"], "all-linear"):
        assert modules(resolve_targets(model, pattern, Structure())) == ["first"]
    assert len(resolve("albert", "attention.q")) == 1


def test_every_pattern_must_hit():
    with pytest.raises(TargetError, match="'qery'"):
        resolve("bert", ["query", "qery"])
    for bad in ([], [""]):
        with pytest.raises(TargetError):
            resolve("bert", bad)


def test_helpers():
    assert suggest("qury", ["query", "key"]) == " Did you mean 'query'?"
    assert suggest("zzz", ["query"]) == ""
    assert "attention.q" in role_names(known("bert")[1])
    assert output_heads(hf("bert", "AutoModelForSequenceClassification")) == {"classifier"}
    shell = nn.ModuleDict({"net": hf("gpt2", "AutoModelForCausalLM"), "probe": nn.Linear(2, 2)})
    assert output_heads(shell) == {"net.lm_head"}
    assert output_heads(hf("gpt2", "AutoModelForCausalLM")) == {"lm_head"}


def test_names_alone_resolve_too():
    model = nn.ModuleDict({"net": hf("bart")})  # nothing says how to run it
    structure = analyse(model)
    assert structure.source == "names"
    assert len(resolve_targets(model, "attention.cross.q", structure)) == 2
