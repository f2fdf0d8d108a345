"""A forward of which only the graph is read: large products are not computed, and nothing is read differently."""

import pytest
import torch
from tiny_models import hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_pet.model.structure import Structure
from lightning_pet.probe import trace
from lightning_pet.probe.probe import analyse, probe
from lightning_pet.probe.trace import candidate_forwards


@pytest.fixture
def all_are_large(monkeypatch):
    """Let every linear layer of a tiny model count as large."""
    monkeypatch.setattr(trace, "_LARGE", 0)
    monkeypatch.setattr(trace, "_COLUMNS", 4)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        *((kind, "eager") for kind in ("albert", "bart", "llama", "mpt", "modernbert", "phi3", "t5")),
        *((kind, "sdpa") for kind in ("bert", "gpt_neox", "vit")),
        ("mamba", None),
    ],
)
def test_the_same_is_read(kind, attention, all_are_large):
    model = hf(kind, attention=attention)
    whole, thin = (probe_of(model, thin) for thin in (False, True))
    assert whole == thin


def probe_of(model: nn.Module, thin: bool) -> Structure:
    torch.manual_seed(0)
    return probe(model, next(candidate_forwards(model)), thin=thin)


def wide(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    return LlamaModel(LlamaConfig(vocab_size=32, num_hidden_layers=layers, **sizes)).eval()


def test_the_work_is_less_than_that_of_two_layers():
    two, many = wide(2), wide(24)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        next(candidate_forwards(two))()
    with FlopCounterMode(display=False) as look:
        structure = analyse(many)
    assert structure.source == "probe"
    assert look.get_total_flops() <= forward.get_total_flops()


def test_a_forward_that_is_given_sees_what_the_model_returns(all_are_large):
    model, x, seen = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(2, 8), []
    expected = model(x)

    def forward():
        seen.append(model(x))
        return seen[-1]

    analyse(model, forward)
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_stand_in_has_the_shape_and_the_operands_of_the_product(dtype, all_are_large):
    x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    weight, bias = nn.Parameter(torch.randn(6, 8, dtype=dtype)), nn.Parameter(torch.randn(6, dtype=dtype))
    result = trace.thinned((x, weight), {"bias": bias})
    assert result.shape == (2, 3, 6)
    assert result.dtype is dtype
    assert result.grad_fn.name() == "LinearBackward"
    operands = [node for node, _ in result.grad_fn.next_functions]
    assert [node.variable is leaf for node, leaf in zip(operands, (x, weight, bias), strict=True)] == [True] * 3
    (gradient,) = torch.autograd.grad(result[0, 1].sum(), [x])
    assert gradient[0, 1].ne(0).all()  # each feature, and no other position
    assert gradient.ne(0).any(-1).sum() == 1


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(2, 8), torch.ones(6, 8, device="meta")),
        (torch.ones(2, 8, dtype=torch.float64), torch.ones(6, 8)),
        (torch.ones(2, 9), torch.ones(6, 9)),
        (torch.ones(2, 8), torch.ones(8)),
    ],
    ids=["meta", "other dtype", "odd width", "vector"],
)
def test_what_it_is_not_for_is_left_to_torch(x, weight, all_are_large):
    assert trace.thinned((x, weight), {}) is None


def test_small_products_are_computed():
    assert trace.thinned((torch.ones(2, 64), torch.ones(64, 64)), {}) is None
