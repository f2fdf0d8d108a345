"""Which places are "every parameter", and which of them are one tensor."""

import pytest
import torch
from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.model.structure import Structure
from lightning_pet.targets.parameters import every_parameter, tied
from tests.methods import zoo

NOTHING_KNOWN = Structure()


def paths(model: nn.Module, **options: object) -> list[str]:
    return [target.path for target in every_parameter(model, NOTHING_KNOWN, **options)]


@pytest.mark.parametrize("name", ["mlp", "embedding", "conv2d", "transformer_encoder", "llama", "mixtral", "whisper"])
def test_every_parameter_is_there(name: str) -> None:
    model, _ = getattr(zoo, name)()
    assert set(paths(model, heads=True)) == {n for n, _ in model.named_parameters(remove_duplicate=False)}


def test_all_hosts_of_a_tied_parameter_follow_each_other() -> None:
    model, _ = zoo.t5()
    targets = every_parameter(model, NOTHING_KNOWN)
    groups = tied(model, targets)
    assert [target for group in groups for target in group] == list(targets)
    assert len(groups) == len(list(model.parameters()))
    several = [{target.path for target in group} for group in groups if len(group) > 1]
    assert {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= several[0]


def test_embeddings_norms_and_heads() -> None:
    model, _ = zoo.bert()
    everything = set(paths(model, heads=True))
    heads = {"classifier.weight", "classifier.bias"}
    assert set(paths(model)) == everything - heads
    assert {p for p in everything - set(paths(model, embeddings=False)) - heads} == {
        f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    }
    left = everything - set(paths(model, norms=False)) - heads
    assert left == {path for path in everything if "LayerNorm" in path}
    assert len(left) == 10


def test_a_tied_parameter_is_left_out_as_a_whole() -> None:
    model, _ = zoo.gpt2()  # the output layer is the token table
    assert not {"transformer.wte.weight", "lm_head.weight"} & set(paths(model, embeddings=False))
    assert not {"transformer.wte.weight", "lm_head.weight"} & set(paths(model, exclude=["lm_head"]))


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("encoder.layer.0", lambda p: ".layer.0." in p),
        ("query", lambda p: ".query." in p),
        ("query.bias", lambda p: p.endswith("query.bias")),
        ("*.intermediate.*", lambda p: ".intermediate." in p),
        (r"re:.*LayerNorm\.weight", lambda p: p.endswith("LayerNorm.weight")),
    ],
)
def test_excluded_by_name(pattern: str, gone: object) -> None:
    model, _ = zoo.bert()
    everything = paths(model)
    expected = [path for path in everything if not gone(path)]
    assert paths(model, exclude=[pattern]) == expected != everything


def test_names_as_the_user_has_them() -> None:
    model, _ = zoo.mlp()
    targets = every_parameter(model, Structure(prefix="net"), exclude=["net.0"])
    assert [target.path for target in targets] == ["2.weight", "2.bias"]


def test_refused() -> None:
    model, _ = zoo.bert()
    with pytest.raises(TargetError, match="query"):
        every_parameter(model, NOTHING_KNOWN, exclude=["qeury"])
    with pytest.raises(TargetError, match="no parameter"):
        every_parameter(model, NOTHING_KNOWN, exclude=["bert"])
    model.bert.pooler.dense.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"pooler\.dense\.weight is stored as torch\.int8"):
        every_parameter(model, NOTHING_KNOWN)


def test_a_tie_that_leaves_the_scope_is_refused() -> None:
    model, _ = zoo.gpt2()
    inside = [target for target in every_parameter(model, NOTHING_KNOWN) if target.module != "lm_head"]
    with pytest.raises(TargetError, match=r"lm_head.weight.*one tensor"):
        tied(model, inside)
