"""Effective weights that backward makes again: the same numbers, and nothing that is kept until then."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_pet
from lightning_pet import Adapted, DiffPruningCallback, IntrinsicDimensionCallback
from lightning_pet.errors import PETError
from lightning_pet.insertion.remade import Remade
from lightning_pet.layers import sparse_difference, subspace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.eye(24))  # a host with hosts inside
        self.first, self.conv = nn.Linear(24, 24), nn.Conv1d(2, 3, 5)
        self.last = nn.Linear(60, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.first(x) @ self.own).tanh() + x
        return self.last(self.conv(x.view(-1, 2, 24)).flatten(1))


def adapted(method: str = "intrinsic_dimension", dtype: torch.dtype = torch.float32) -> tuple[Net, Adapted, Tensor]:
    torch.manual_seed(0)
    net, x = Net().to(dtype), torch.randn(6, 24, dtype=dtype)
    options: dict[str, Any] = {"modules_to_save": [], "verbose": False}
    if method == "diff_pruning":
        callback = DiffPruningCallback(density=0.3, structured=False, **options)
    else:
        callback = IntrinsicDimensionCallback(d=40, seed=1, **options)
    handle = lightning_pet.apply(net, [callback], forward=lambda: net(x))
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    if method == "diff_pruning":
        callback.cut(net)
    return net, handle, x


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])
    return [loss.detach(), *found]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether small weights are made again, too."""

    def say(again: bool) -> None:
        for module in (subspace, sparse_difference):
            monkeypatch.setattr(module, "REMADE", 1 if again else 1 << 16)

    return say


METHODS = pytest.mark.parametrize("method", ["intrinsic_dimension", "diff_pruning"])
Small = Callable[[bool], None]


@METHODS
def test_the_same_numbers_and_no_weight_is_kept(method: str, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[weakref.ref[Tensor]] = []
    note = Remade.note

    def watched(self: Remade, effective: Tensor, remake: Any) -> None:
        noted.append(weakref.ref(effective))
        note(self, effective, remake)

    monkeypatch.setattr(Remade, "note", watched)
    found = []
    for again in (False, True):
        small(again)
        net, _, x = adapted(method)
        loss = net(x).square().sum()
        assert bool(noted) == again
        assert all(reference() is None for reference in noted)
        found.append(gradients(net, loss))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    small(True)
    net, handle, x = adapted(method)
    count = len(noted)
    with torch.no_grad():
        net(x)
    with handle.disabled():
        net(x)
    assert len(noted) == count


@METHODS
def test_what_looks_at_saved_tensors_keeps_them(method: str, small: Small) -> None:
    def offloaded(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return net(x)

    calls: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda net, x: net(x),
        lambda net, x: checkpoint(net, x, use_reentrant=False),
        lambda net, x: checkpoint(net, x.clone().requires_grad_(), use_reentrant=True),
        offloaded,
    ]
    small(True)
    net, _, x = adapted(method)
    first, *others = [gradients(net, call(net, x).square().sum()) if i != 2 else None for i, call in enumerate(calls)]
    calls[2](net, x).square().sum().backward()
    others[1] = [first[0], *(p.grad for p in net.parameters() if p.requires_grad)]
    for other in others:
        torch.testing.assert_close(other, first)


def test_second_derivatives(small: Small) -> None:
    found = []
    for again in (False, True):
        small(again)
        net, _, x = adapted(dtype=torch.float64)
        trained = [p for p in net.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(net(x).pow(3).sum(), trained, create_graph=True)
        found.append(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), trained))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@METHODS
def test_changes_between_forward_and_backward_are_found(method: str, small: Small) -> None:
    small(True)
    net, _, x = adapted(method)
    loss = net(x).square().sum()
    with torch.no_grad():
        net.last._parameters["weight"].mul_(2)
    with pytest.raises(PETError, match="between forward and backward"):
        loss.backward()
    x = x + 0
    hidden = x.requires_grad_() * 1
    loss = net.first(hidden).sum()
    with torch.no_grad():
        hidden.mul_(2)  # the layer has saved it
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_a_compiler_sees_nothing_of_it(small: Small) -> None:
    small(True)
    torch._dynamo.reset()
    net, _, x = adapted()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(net, compiled(x).square().sum()), gradients(net, net(x).square().sum()))


def test_random_numbers_that_are_drawn_twice_in_a_row_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_pet.layers import fastfood

    drawn = []
    normal = fastfood._normal
    monkeypatch.setattr(fastfood, "_normal", lambda *args: drawn.append(1) or normal(*args))
    vector, seed = torch.randn(40), 99
    plain = fastfood.projected_values(vector, 900, seed), fastfood.transposed_values(torch.ones(900), 40, seed)
    count = len(drawn)
    again = fastfood.projected_before_back(vector, 900, seed), fastfood.transposed_values(torch.ones(900), 40, seed)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(drawn) == count * 3 // 2
    assert not fastfood._kept.lent
