"""Which rows of a fused projection belong to which role."""

import pytest
import torch
from tiny_models import hf, ids
from torch import nn
from torch.nn import functional as F

from lightning_pet.errors import TargetError
from lightning_pet.model.structure import overlap
from lightning_pet.probe.graph import count, ranges, without
from lightning_pet.probe.probe import analyse, probe
from lightning_pet.targets.targets import resolve_targets


def rows(structure, module):
    return {t.role.rpartition(".")[2]: t.rows for t in structure.targets if t.module == module}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gpt2_conv1d(attention):
    structure = analyse(hf("gpt2", attention=attention))
    for layer in range(2):
        assert rows(structure, f"h.{layer}.attn.c_attn") == {"q": ((0, 32),), "k": ((32, 64),), "v": ((64, 96),)}


def test_gpt_neox_heads_interleave():
    found = rows(analyse(hf("gpt_neox")), "layers.0.attention.query_key_value")
    assert found == {
        "q": ((0, 8), (24, 32), (48, 56), (72, 80)),
        "k": ((8, 16), (32, 40), (56, 64), (80, 88)),
        "v": ((16, 24), (40, 48), (64, 72), (88, 96)),
    }


def test_persimmon_heads_interleave():
    found = rows(analyse(hf("persimmon")), "layers.0.self_attn.query_key_value")
    assert found["q"] == ((0, 8), (24, 32), (48, 56), (72, 80))
    assert found["v"] == ((16, 24), (40, 48), (64, 72), (88, 96))


def test_phi3_grouped_and_gated():
    structure = analyse(hf("phi3"))
    assert rows(structure, "layers.0.self_attn.qkv_proj") == {"q": ((0, 32),), "k": ((32, 48),), "v": ((48, 64),)}
    assert rows(structure, "layers.0.mlp.gate_up_proj") == {"gate": ((0, 48),), "up": ((48, 96),)}


def test_gpt_bigcode_single_key_head():
    assert rows(analyse(hf("gpt_bigcode")), "h.0.attn.c_attn") == {"q": ((0, 32),), "k": ((32, 40),), "v": ((40, 48),)}


def test_modernbert():
    found = rows(analyse(hf("modernbert")), "layers.0.attn.Wqkv")
    assert found == {"q": ((0, 32),), "k": ((32, 64),), "v": ((64, 96),)}


def test_gpt_oss_gate_and_up_alternate():
    structure = analyse(hf("gpt_oss"))
    found = {t.role: t.rows for t in structure.targets if t.parameter == "gate_up_proj" and ".0." in t.module}
    assert found["ffn.gate"][:3] == ((0, 1), (2, 3), (4, 5))
    assert found["ffn.up"][:3] == ((1, 2), (3, 4), (5, 6))
    assert count(found["ffn.gate"]) == count(found["ffn.up"]) == 48


def test_quick_gelu_is_not_taken_for_a_gate():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            y = self.a(x)
            return x + self.b(y * torch.sigmoid(1.7 * y))

    model = Block()
    structure = probe(model, lambda: model(torch.randn(2, 3, 8)))
    assert [(t.module, t.role, t.rows) for t in structure.targets] == [("a", "ffn.up", None), ("b", "ffn.down", None)]


class Silent(nn.Module):
    """A gated feed-forward whose ReLU lets nothing through."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(8, 32), nn.Linear(16, 8)
        with torch.no_grad():
            self.both.bias.fill_(-100.0)

    def forward(self, x):
        up, gate = self.both(x).chunk(2, -1)
        return x + self.down(torch.relu(gate) * up)


def test_a_gate_that_is_closed_for_the_whole_batch():
    model = Silent()
    structure = probe(model, lambda: model(torch.randn(2, 3, 8)))
    assert rows(structure, "both") == {"gate": ((16, 32),), "up": ((0, 16),)}


class Hand(nn.Module):
    """Hand-written attention with v first and the heads inside."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        v, q, k = self.qkv(x).view(*x.shape[:2], 2, 3, 4).permute(3, 0, 2, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_any_layout_of_a_hand_written_attention():
    model = Hand()
    structure = probe(model, lambda: model(torch.randn(2, 5, 8)))
    assert rows(structure, "qkv") == {"v": ((0, 4), (12, 16)), "q": ((4, 8), (16, 20)), "k": ((8, 12), (20, 24))}


def test_unknown_rows_are_refused_by_role_but_not_by_name():
    with torch.device("meta"):
        model = hf("phi3")
    structure = analyse(model)
    assert {t.role for t in structure.unresolved} >= {"attention.q", "attention.k", "attention.v"}
    with pytest.raises(TargetError, match=r"layers\.0\.self_attn\.qkv_proj"):
        resolve_targets(model, "attention.v", structure)
    (first, _) = resolve_targets(model, "qkv_proj", structure)
    assert (first.module, first.rows) == ("layers.0.self_attn.qkv_proj", None)
    assert len(resolve_targets(model, "attention.o", structure)) == 2


def test_gpt2_on_meta_has_thirds():
    with torch.device("meta"):
        model = hf("gpt2")
    assert rows(analyse(model), "h.0.attn.c_attn")["v"] == ((64, 96),)


def test_batches_with_padding_give_the_same_rows():
    model = hf("gpt2")
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3])
    structure = probe(model, lambda: model(input_ids=ids(2), attention_mask=mask, use_cache=False))
    assert rows(structure, "h.1.attn.c_attn")["k"] == ((32, 64),)


def test_row_arithmetic():
    assert ranges([False, True, True, False, True]) == ((1, 3), (4, 5))
    assert ranges([]) == ()
    assert without(((0, 10),), ((2, 4), (8, 10))) == ((0, 2), (4, 8))
    assert overlap(((0, 3),), ((2, 5),))
    assert not overlap(((0, 2),), ((2, 5),))
