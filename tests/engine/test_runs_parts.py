"""What keeps several runs in one Trainer apart: repeated batches, streams of random numbers, losses, clipping."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding

from lightning_pet import ArgumentError, PETError
from lightning_pet.training.runs.every_row import clip_each
from lightning_pet.training.runs.losses import measured_factor
from lightning_pet.training.runs.repeat import repeated, rows_of
from lightning_pet.training.runs.streams import Streams, numbers_between

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "x y")


@dataclass
class Example:
    x: Tensor
    note: str = "kept"


# --- batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "named", "class", "encoding", "ordered", "nested"])
def test_containers_stay_what_they_are(kind: str) -> None:
    x, y = torch.arange(6).view(3, 2), torch.tensor([1, 2, 3])
    batch: Any = {
        "tuple": (x, y),
        "list": [x, y],
        "dict": {"x": x, "y": y},
        "named": Pair(x, y),
        "class": Example(x),
        "encoding": BatchEncoding({"x": x}),
        "ordered": OrderedDict(x=x),
        "nested": {
            "a": [x, {"b": y}],
            "names": ["p", "q", "r"],
            "more": ([1], [2, 3], [4]),
            "step": 7,
            "t": torch.ones(()),
        },
    }[kind]
    found = repeated(batch, 2)
    assert type(found) is type(batch)
    assert rows_of(batch) == 3
    assert rows_of(found) == 6
    if kind == "nested":
        assert torch.equal(found["a"][1]["b"], torch.tensor([1, 2, 3, 1, 2, 3]))
        assert found["names"] == ["p", "q", "r"] * 2
        assert found["more"] == ([1], [2, 3], [4]) * 2
        assert (found["step"], found["t"].shape) == (7, ())
    first = found.x if kind in ("named", "class") else None
    if first is not None:
        assert torch.equal(first, torch.cat([x, x]))


def test_one_entry_for_all_rows_stays_one() -> None:
    found = repeated({"x": torch.ones(3, 2), "positions": torch.arange(2)[None], "n": np.ones((3, 1))}, 4)
    assert found["positions"].shape == (1, 2)
    assert (found["x"].shape, found["n"].shape) == ((12, 2), (12, 1))
    assert repeated({"x": torch.ones(1, 2)}, 4)["x"].shape == (4, 2)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.ones(3, 2), "mask": torch.ones(2, 2)}, r"batch\['x'\] has 3, batch\['mask'\] has 2"),
        ({"x": torch.ones(3, 2), "tags": ["a", "b"]}, r"batch\['tags'\] is a list of 2 entries in a batch of 3 rows"),
        ({"x": torch.ones(3), "graph": object()}, r"batch\['graph'\] is a builtins.object, whose rows are not known"),
        ([torch.ones(3, 3).to_sparse()], r"batch\[0\] is a torch.Tensor, whose rows are not known"),
        (nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)]), "PackedSequence, whose rows are not known"),
        ({"name": "x"}, "has no tensor with a first dimension"),
    ],
)
def test_what_cannot_be_repeated_is_named(batch: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        repeated(batch, 2)


# --- random numbers -------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Attention, dropout and noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor, through: Any = None) -> Tensor:
        x = F.dropout(self.first(x), 0.3)
        x = x + 0.1 * torch.randn_like(x) + torch.rand(len(x), 1, 1)
        return self.layer(x) if through is None else checkpoint(self.layer, x, use_reentrant=through == "reentrant")


def test_each_block_has_the_numbers_that_it_has_alone() -> None:
    net, x = Dropping(), torch.randn(3, 4, 8)
    streams = Streams({"a": 0, "b": 1, "c": None})
    before, common = streams.state(), torch.get_rng_state()
    with streams.by_rows(["a", "b", "c"], 3):
        together = net(repeated(x, 3))
    streams.load_state(before)
    for number, name in enumerate("abc"):
        with streams.alone(name, [CPU]):
            assert torch.allclose(together[3 * number : 3 * number + 3], net(x), rtol=0, atol=1e-6)
    for seed, rows in ((0, slice(3)), (1, slice(3, 6))):
        torch.manual_seed(seed)
        assert torch.allclose(together[rows], net(x), rtol=0, atol=1e-6)
    torch.set_rng_state(common)
    assert torch.allclose(together[6:], net(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("through", ["reentrant", "not reentrant"])
def test_checkpointing_repeats_them(through: str) -> None:
    net, x = Dropping().double(), torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    streams = Streams({"a": 0, "b": 1})
    before = streams.state()
    with streams.by_rows(["a", "b"], 3):
        loss = net(repeated(x, 2), through).square().sum()
    after, common = streams.state(), torch.get_rng_state()
    with streams.backward(["a", "b"], 3):
        loss.backward()
    found = [p.grad.clone() for p in net.parameters()]
    assert torch.equal(torch.get_rng_state(), common)
    assert all(torch.equal(streams.state()[name]["cpu"], after[name]["cpu"]) for name in after)
    net.zero_grad()
    streams.load_state(before)
    for name in "ab":
        with streams.alone(name, [CPU]):
            net(x).square().sum().backward()
    assert all(torch.allclose(own, p.grad, rtol=1e-9) for own, p in zip(found, net.parameters(), strict=True))


def test_torchs_own_generator_moves_on_as_for_one_run() -> None:
    net, x = Dropping(), torch.randn(3, 4, 8)
    streams, common = Streams({"a": 5, "b": 6}), torch.get_rng_state()
    with streams.by_rows(["a", "b"], 3):
        net(repeated(x, 2))
    moved = torch.get_rng_state()
    torch.set_rng_state(common)
    net(x)
    assert torch.equal(torch.get_rng_state(), moved)


def test_numbers_that_others_draw_are_counted() -> None:
    for count in (1, 5, 623, 624, 5000):
        before = torch.get_rng_state()
        torch.empty(count, dtype=torch.int32).random_()
        assert numbers_between(before, torch.get_rng_state()) == count
    before = torch.get_rng_state()
    torch.manual_seed(9)
    assert numbers_between(before, torch.get_rng_state()) == 0  # nobody can tell


def test_numbers_that_belong_to_no_row_are_refused() -> None:
    streams = Streams({"a": 0, "b": 1})
    for draw in (lambda: torch.rand(()), lambda: torch.rand(5, 3), lambda: torch.randperm(6)):
        with streams.by_rows(["a", "b"], 3), pytest.raises(PETError, match=r"draws random numbers for .* of 2 runs"):
            draw()
    query = torch.randn(6, 2, 4, 8)
    with streams.by_rows(["a", "b"], 3):
        F.scaled_dot_product_attention(query, query, query)  # drops nothing


# --- losses and gradients -------------------------------------------------------------------------------


def factor_of(reduce: Any) -> float:
    """Of a loss of 3 runs, each a number times its own parameter."""
    own = {name: nn.Parameter(torch.tensor(1.0)) for name in "abc"}
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def loss(names: str) -> Tensor:
        return reduce(torch.cat([own[name] * x for name in names]))

    return measured_factor(lambda: loss("abc"), loss, {name: [parameter] for name, parameter in own.items()})


def test_means_and_sums_are_told_apart() -> None:
    assert factor_of(lambda rows: rows.mean()) == 3
    assert factor_of(lambda rows: rows.sum()) == 1
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])  # padding
    assert factor_of(lambda r: (r * weights.repeat(len(r) // 4)).sum() / weights.repeat(len(r) // 4).sum()) == 3


@pytest.mark.parametrize(
    "reduce",
    [
        lambda rows: rows.square().mean().sqrt(),  # the same for equal runs, and yet their gradients hang together
        lambda rows: torch.logsumexp(rows, 0),
        lambda rows: rows.mean() + 1.0 * len(rows),
        lambda rows: rows.max(),
        lambda rows: rows.mean() * torch.nan,
    ],
)
def test_other_losses_are_refused(reduce: Any) -> None:
    with pytest.raises(PETError, match="neither their mean nor their sum"):
        factor_of(reduce)


def test_each_is_clipped_by_its_own_norm() -> None:
    own = {name: [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))] for name in "ab"}
    for name, size in (("a", 10.0), ("b", 0.1)):
        own[name][0].grad = torch.full((2,), size)

    def clip() -> None:
        nn.utils.clip_grad_norm_([p for parameters in own.values() for p in parameters], 1.0)

    clip_each(own, clip)
    assert float(own["a"][0].grad.norm()) == pytest.approx(1.0)
    assert torch.equal(own["b"][0].grad, torch.full((2,), 0.1))
    assert own["a"][1].grad is None
    with pytest.raises(ZeroDivisionError):
        clip_each(own, lambda: 1 / 0)
    assert own["b"][0].grad is not None
