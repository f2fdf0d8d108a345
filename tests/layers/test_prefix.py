"""Prefixes as mathematics: the network against its formula, folding, fitting, and what a file holds."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_pet.layers.prefix import Prefix, PrefixNetwork, attend_with_prefix

L, D, M, H, DK, DV = 4, 6, 5, 2, 3, 2
DOUBLE = {"dtype": torch.float64}


def projected(size: int = M) -> tuple[Prefix, PrefixNetwork]:
    network = PrefixNetwork(L, D, size, **DOUBLE)
    return Prefix(L, H, DK, DV, network, **DOUBLE), network


def wanted() -> tuple[Tensor, Tensor]:
    return torch.randn(H, L, DK, **DOUBLE), torch.randn(H, L, DV, **DOUBLE)


def test_network_is_a_linear_map_a_tanh_and_a_linear_map() -> None:
    prefix, network = projected()
    rows = nn.functional.linear(
        torch.tanh(network.embedding @ network.weight.T + network.bias), prefix.weight, prefix.bias
    )
    key, value = prefix.key_value()
    for head in range(H):
        assert (key[head] - rows[:, head * DK : (head + 1) * DK]).abs().max() < 1e-15
        start = H * DK + head * DV
        assert (value[head] - rows[:, start : start + DV]).abs().max() < 1e-15
    assert key.requires_grad
    assert sum(p.numel() for p in prefix.parameters()) == M * H * (DK + DV) + H * (DK + DV)  # the network's are its own


def test_folded_once_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, network = projected()
    prefix.eval()
    calls = []
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda: calls.append(1) or forward())
    with torch.no_grad():
        first = prefix.key_value()
        assert prefix.key_value()[0] is first[0]
        assert len(calls) == 1
        for parameter in (network.embedding, network.weight, network.bias, prefix.weight, prefix.bias):
            parameter.add_(0.1)
            changed = prefix.key_value()
            assert not torch.equal(changed[0], first[0])
            first = changed
    assert len(calls) == 6
    assert prefix.key_value()[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(prefix.key_value()[1], first[1])


def test_in_training_nothing_is_kept() -> None:
    """An engine may write past a tensor's version between a layer's two forwards under reentrant checkpointing."""
    prefix, _ = projected()
    with torch.no_grad():
        first = prefix.key_value()[0]
        prefix.weight.data.zero_()
        assert not torch.equal(prefix.key_value()[0], first)


def test_a_kept_prefix_belongs_to_no_transform() -> None:
    prefix = projected()[0].eval()
    at, way = ({name: fill(p) for name, p in prefix.named_parameters()} for fill in (torch.clone, torch.ones_like))

    def keys(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(Keys(prefix), {f"prefix.{name}": t for name, t in values.items()}, ())

    with torch.no_grad():
        expected = prefix.key_value()[0]
        _, slope = torch.func.jvp(keys, (at,), (way,))
        both = torch.func.vmap(keys)({name: torch.stack([t, t + way[name]]) for name, t in at.items()})
        assert torch.equal(prefix.key_value()[0], expected)
    assert torch.allclose(both[0], expected)
    assert torch.allclose(both[1] - both[0], slope)
    assert slope.abs().max() > 0


class Keys(nn.Module):
    """The keys of a prefix, as a forward."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self) -> Tensor:
        return self.prefix.key_value()[0]


def test_folding_ignores_autocast() -> None:
    network = PrefixNetwork(L, D, M)
    prefix = Prefix(L, H, DK, DV, network)
    plain = prefix.key_value()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prefix.key_value()[0], plain)


def test_copies_own_what_they_hold() -> None:
    pair = nn.ModuleList(projected())
    with torch.no_grad():
        expected = pair[0].key_value()
    for twin in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert twin[0].network is twin[1]
        assert twin[0]._folded is None
        with torch.no_grad():
            assert torch.equal(twin[0].key_value()[0], expected[0])
            twin[1].embedding.zero_()
            assert not torch.equal(twin[0].key_value()[0], expected[0])
            assert torch.equal(pair[0].key_value()[0], expected[0])


def test_last_layer_is_solved_for() -> None:
    prefix, _ = projected(size=L)
    key, value = wanted()
    prefix.set_key_value(key, value)
    got = prefix.key_value()
    assert (got[0] - key).abs().max() < 1e-11
    assert (got[1] - value).abs().max() < 1e-11


def test_a_network_that_is_too_small_comes_as_near_as_it_can() -> None:
    prefix, network = projected(size=2)
    key, value = wanted()
    prefix.set_key_value(key, value)
    rows = torch.cat([x.transpose(0, 1).flatten(1) for x in (key, value)], 1)
    error = (torch.cat([x.transpose(0, 1).flatten(1) for x in prefix.key_value()], 1) - rows).square().sum()
    best = torch.linalg.lstsq(network(), rows - rows.mean(0)).solution
    assert float(error) == pytest.approx(float((network() @ best - rows + rows.mean(0)).square().sum()))


def test_a_file_is_read_in_every_form() -> None:
    prefix, network = projected()
    direct = Prefix(L, H, DK, DV, **DOUBLE)
    file = prefix.packed()
    assert set(file) == {"weight", "bias", "key", "value"}
    for form in (file, {n: file[n] for n in ("weight", "bias")}, {n: file[n] for n in ("key", "value")}):
        twin = copy.deepcopy(nn.ModuleList([prefix, network]))[0]
        with torch.no_grad():
            twin.weight.zero_()
        assert twin.misfits(form) == []
        twin.unpack(form)
        assert (twin.key_value()[0] - prefix.key_value()[0]).abs().max() < 1e-11
    assert direct.misfits(file) == []
    direct.unpack(file)
    assert torch.equal(direct.key, file["key"])
    assert network.misfits({}) == []


def test_where_both_forms_disagree_the_folded_one_counts() -> None:
    prefix, network = projected()
    prefix.eval()
    file = prefix.packed()
    with torch.no_grad():
        network.embedding.normal_()
    prefix.unpack(file)
    with torch.no_grad():
        assert torch.equal(prefix.key_value()[0], file["key"])
    assert (prefix.key_value()[0] - file["key"]).abs().max() < 1e-11


def test_what_does_not_fit_is_named() -> None:
    prefix, network = projected()
    direct, file = Prefix(L, H, DK, DV, **DOUBLE), prefix.packed()
    assert direct.misfits({}) == ["key is missing", "value is missing"]
    assert direct.misfits({**file, "other": file["key"]}) == ["other is unexpected"]
    assert direct.misfits({**file, "key": file["key"][:, 1:]}) == [
        "key (torch.float64) has shape (2, 3, 3), expected (2, 4, 3)"
    ]
    assert prefix.misfits({"weight": file["weight"], "key": file["key"]}) == ["bias is missing", "value is missing"]
    assert network.misfits({"embedding": network.embedding}) == ["bias is missing", "weight is missing"]


def test_shares_of_both_parts_sum_to_one() -> None:
    scores, ours = torch.randn(2, 3, 5, **DOUBLE), torch.randn(2, 3, 4, **DOUBLE)
    real, prefix = attend_with_prefix(scores, ours)
    gate = ours.exp().sum(-1, keepdim=True) / (ours.exp().sum(-1, keepdim=True) + scores.exp().sum(-1, keepdim=True))
    assert (real - (1 - gate) * scores.softmax(-1)).abs().max() < 1e-15
    assert (prefix - gate * ours.softmax(-1)).abs().max() < 1e-15
