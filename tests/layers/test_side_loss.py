"""The side loss in plain torch: its gradient against that of a penalty added by hand."""

import copy
import gc
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pet.errors import PETError
from lightning_pet.layers import side_loss
from lightning_pet.layers.bottleneck import Bottleneck
from lightning_pet.layers.fusion import Mixture
from lightning_pet.layers.side_loss import Penalty, forget_scale, measure, with_penalty
from lightning_pet.layers.svd_low_rank import SvdLowRankLinear


def cross(a: Tensor, b: Tensor, power: int = 2) -> Tensor:
    return (a.pow(power).sum() * b.exp().sum()).log()


def cross_gradient(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * a / a.square().sum(), b.exp() / b.exp().sum()


class Gate(nn.Module):
    """Multiplies by a, shifts by b, and carries a penalty on both."""

    def __init__(self, weight: float = 0.3, gradient: object = None) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.b = nn.Parameter(torch.tensor([0.1, 0.2]))
        self.penalty = Penalty(partial(cross, power=2), gradient, weight)

    def forward(self, x: Tensor) -> Tensor:
        a = with_penalty(self.a, [self.a, self.b], self.penalty)
        return (x * a).tanh() + self.b.sum()


def truth(gate: Gate, scale: float = 1.0, calls: int = 1) -> list[Tensor]:
    """Gradients of ``scale · (loss + penalty)``, by plain autograd."""
    x, (a, b) = torch.linspace(-1, 1, 3), (p.detach().clone().requires_grad_() for p in (gate.a, gate.b))
    for _ in range(calls):
        x = (x * a).tanh() + b.sum()
    (scale * (x.square().sum() + gate.penalty.weight * cross(a, b))).backward()
    return [a.grad, b.grad]


def loss_of(model: nn.Module, calls: int = 1, **checkpointing: bool) -> Tensor:
    x = torch.linspace(-1, 1, 3)
    if checkpointing.get("use_reentrant"):
        x.requires_grad_()
    for _ in range(calls):
        x = checkpoint(model, x, **checkpointing) if checkpointing else model(x)
    return x.square().sum()


def gradients(gate: Gate) -> list[Tensor]:
    found = [gate.a.grad, gate.b.grad]
    gate.zero_grad()
    return found


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", [None, cross_gradient])
def test_value_and_gradient(gradient: object) -> None:
    gate = Gate(gradient=gradient)
    assert torch.equal(with_penalty(gate.a, [gate.a, gate.b], gate.penalty), gate.a)
    for _ in range(2):
        loss_of(gate).backward()
        close(gradients(gate), truth(gate))
    assert torch.allclose(gate.penalty(gate.a, gate.b), 0.3 * cross(gate.a, gate.b))
    assert not gate.penalty(gate.a, gate.b).requires_grad


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_once_however_often_it_is_called_or_recomputed(calls: int, checkpointing: dict[str, bool]) -> None:
    gate = Gate()
    for _ in range(2):
        loss_of(gate, calls, **checkpointing).backward()
        close(gradients(gate), truth(gate, calls=calls))


def test_once_per_forward_of_an_accumulation() -> None:
    gate = Gate()
    for _ in range(4):
        loss = loss_of(gate)
        measure(loss)
        (loss / 4).backward()
    forget_scale()
    close(gradients(gate), truth(gate))


def test_a_second_backward_through_one_forward_adds_nothing() -> None:
    gate = Gate()
    loss = loss_of(gate)
    loss.backward(retain_graph=True)
    gradients(gate)
    loss.backward()
    gate.penalty.weight = 0.0
    close(gradients(gate), truth(gate))


def test_scaled_as_the_loss_is() -> None:
    gate = Gate()
    for scale in (7.0, 2.0**16, 0.25):
        loss = loss_of(gate)
        measure(loss)
        (loss * scale).backward()
        found = gradients(gate)
        close([g / scale for g in found], [g / scale for g in truth(gate, scale)])
    forget_scale()
    loss_of(gate).backward()
    close(gradients(gate), truth(gate))


def test_the_weight_may_change() -> None:
    gate = Gate()
    for weight in (0.0, 2.0):
        gate.penalty.weight = weight
        loss_of(gate).backward()
        close(gradients(gate), truth(gate))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("calls", [1, 2])
def test_compiled_in_one_graph(backend: str, calls: int) -> None:
    torch._dynamo.reset()
    gate = Gate()
    compiled = torch.compile(gate, backend=backend, fullgraph=True)
    for scale in (1.0, 7.0, 0.5):  # a factor that was baked in would stay 1
        loss = loss_of(compiled, calls)
        measure(loss)
        (loss * scale).backward()
        close(gradients(gate), truth(gate, scale, calls))
    forget_scale()


def test_compiled_layers_keep_their_own_penalties() -> None:
    torch._dynamo.reset()
    gates = [Gate(weight) for weight in (0.1, 1.0, 3.0)]
    for gate in gates:
        gate.compile(backend="aot_eager", fullgraph=True)
    for gate in gates:
        loss_of(gate).backward()
        close(gradients(gate), truth(gate))


def test_half_precision_parameters() -> None:
    gate = Gate().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate(torch.ones(3)).float().sum().mul(0).backward()
    expected = torch.autograd.grad(0.3 * cross(*(p.float() for p in (gate.a, gate.b))), (gate.a, gate.b))
    assert gate.a.grad.dtype == torch.bfloat16
    close(gradients(gate), [g.bfloat16() for g in expected])


def test_copies_have_penalties_of_their_own() -> None:
    gate = Gate()
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert twin.penalty.key != gate.penalty.key
        twin.penalty.weight = 5.0
        loss_of(twin).backward()
        close(gradients(twin), truth(twin))
    loss_of(gate).backward()
    close(gradients(gate), truth(gate))


def test_a_forward_without_gradient_changes_nothing() -> None:
    gate = Gate()
    loss = loss_of(gate)
    with torch.no_grad():
        loss_of(gate)
    loss.backward()
    close(gradients(gate), truth(gate))


def test_once_where_some_calls_are_checkpointed_reentrantly() -> None:
    gate = Gate()
    x = torch.linspace(-1, 1, 3).requires_grad_()
    for first in (True, False):
        inner = checkpoint(gate, x, use_reentrant=True) if first else gate(x)
        outer = gate(inner) if first else checkpoint(gate, inner, use_reentrant=True)
        outer.square().sum().backward()
        close(gradients(gate), truth(gate, calls=2))


def test_an_evaluation_between_two_backwards_makes_nothing_due() -> None:
    gate = Gate()
    loss = loss_of(gate)
    loss.backward(retain_graph=True)
    gradients(gate)
    with torch.no_grad():
        loss_of(gate)
    loss.backward()
    gate.penalty.weight = 0.0
    close(gradients(gate), truth(gate))


@pytest.mark.parametrize("layer", ["AdaLoRA", "fusion"])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_keep_theirs_under_reentrant_checkpointing(layer: str, compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    if layer == "fusion":
        delta = Mixture(4, [Bottleneck(4, 2), Bottleneck(4, 2)], regularization=0.3)
    else:
        delta = SvdLowRankLinear(4, 4, 2, scale=1.0)
        delta.penalty.weight = 0.3
        nn.init.ones_(delta.e)
    fixed = torch.randn(3, 4)

    def call(x: Tensor) -> Tensor:
        return delta(x + fixed, x)

    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    forward = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    found = []
    for reentrant in (None, False, True):
        x = torch.zeros(3, 4, requires_grad=True)
        out = forward(x) if reentrant is None else checkpoint(forward, x, use_reentrant=reentrant)
        delta.zero_grad()
        out.square().sum().backward()
        found.append({name: p.grad for name, p in delta.named_parameters() if p.requires_grad})
    delta.penalty.weight = 0.0
    delta.zero_grad()
    call(torch.zeros(3, 4)).square().sum().backward()
    plain = {name: p.grad for name, p in delta.named_parameters() if p.requires_grad}
    assert any(not torch.allclose(found[0][name], gradient) for name, gradient in plain.items())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_other_derivatives_are_refused() -> None:
    gate = Gate()
    at = {name: p.detach() for name, p in gate.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(gate, values, (torch.ones(3),)).sum()

    for call in (
        lambda: torch.func.grad(loss)(at),
        lambda: torch.func.jvp(loss, (at,), (at,)),
        lambda: torch.func.vmap(loss)({name: t[None] for name, t in at.items()}),
    ):
        with pytest.raises(PETError, match="penalty"):
            call()
        assert not gate.penalty._due
    with torch.no_grad():
        assert torch.func.jvp(loss, (at,), (at,))[1] != 0
    slopes = torch.autograd.grad(loss_of(gate), list(gate.parameters()), create_graph=True)
    with pytest.raises(PETError, match="second derivatives"):
        sum(slope.sum() for slope in slopes).backward()


def test_a_gate_that_went_away_adds_nothing() -> None:
    gate = Gate()
    loss, (a, b) = loss_of(gate), (gate.a, gate.b)
    gate.penalty.weight = 0.0
    expected = truth(gate)
    del gate
    gc.collect()
    loss.backward()
    close([a.grad, b.grad], expected)


# --- penalties that are alike -----------------------------------------------------------------------


class Alike(nn.Module):
    """Some layers of triplets in a row, of two shapes."""

    def __init__(self, layers: int = 4, weight: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [(6, 6), (6, 4), (4, 6), (6, 6)][:layers]
        self.layers = nn.ModuleList(SvdLowRankLinear(i, o, 2, scale=1.0, dtype=torch.float64) for i, o in sizes)
        for layer in self.layers:
            layer.penalty.weight = weight
            nn.init.normal_(layer.e)

    def forward(self, x: Tensor, checkpointing: bool | None = None) -> Tensor:
        for layer in self.layers:
            base = x.new_zeros(*x.shape[:-1], layer.out_features)
            own = (checkpoint(layer, x, base, use_reentrant=checkpointing)) if checkpointing is not None else None
            x = layer(x, base) if own is None else own
        return x

    def one_by_one(self) -> list[Tensor]:
        """Gradients of the parameters with every penalty computed for itself."""
        for layer in self.layers:
            layer.penalty = Penalty(layer.penalty.function, layer.penalty.gradient, layer.penalty.weight)
        self(self.x()).square().sum().backward()
        return self.taken()

    def taken(self) -> list[Tensor]:
        found = [parameter.grad for parameter in self.parameters()]
        self.zero_grad()
        return found

    @staticmethod
    def x() -> Tensor:
        return torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6).requires_grad_()


def counted(model: Alike) -> list[int]:
    """How many penalties each later computation was for."""
    sizes: list[int] = []
    original = model.layers[0].penalty.together

    def together(pairs: list[list[Tensor]], factor: float) -> list[list[Tensor]]:
        sizes.append(len(pairs))
        return original(pairs, factor)

    for layer in model.layers:
        layer.penalty.together = together
    return sizes


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_of_penalties_that_are_alike_are_computed_together(checkpointing: bool | None) -> None:
    model = Alike()
    expected = copy.deepcopy(model).one_by_one()
    sizes = counted(model)
    for _ in range(2):
        model(model.x(), checkpointing).square().sum().backward()
        torch.testing.assert_close(model.taken(), expected, rtol=1e-12, atol=1e-12)
    # A forward that is checkpointed reentrantly makes a penalty due when it is repeated, one at a time.
    assert sizes == ([] if checkpointing else [4, 4])


def test_only_penalties_of_equal_weight_are_computed_together() -> None:
    model = Alike()
    model.layers[1].penalty.weight = 2.0
    expected = copy.deepcopy(model).one_by_one()
    sizes = counted(model)
    model(model.x()).square().sum().backward()
    torch.testing.assert_close(model.taken(), expected, rtol=1e-12, atol=1e-12)
    assert sizes == [3]


def test_a_penalty_outside_of_this_backward_is_left_to_its_own() -> None:
    """Two models were run; each goes backward with its own factor, and gets its penalty once."""
    models = [Alike(), Alike()]
    losses = []
    for model in models:
        losses.append(model(model.x()).square().sum())
    expected = copy.deepcopy(models[0]).one_by_one()
    for model, loss in zip(models, losses, strict=True):
        loss.backward()
        torch.testing.assert_close(model.taken(), expected, rtol=1e-12, atol=1e-12)
    loss = models[0](models[0].x()).square().sum()
    with torch.no_grad():
        models[1].layers[0].a.add_(1.0)
    loss.backward()
    torch.testing.assert_close(models[0].taken(), expected, rtol=1e-12, atol=1e-12)


def test_parameters_whose_memory_an_engine_has_taken_away_are_not_read() -> None:
    model = Alike()
    expected = copy.deepcopy(model).one_by_one()
    sizes = counted(model)
    loss = model(model.x()).square().sum()
    first = model.layers[0]
    kept = first.a.detach().clone()
    size = first.a.untyped_storage().size()
    first.a.untyped_storage().resize_(0)

    def back(gradient: Tensor) -> None:
        first.a.untyped_storage().resize_(size)
        first.a.data.copy_(kept)

    # Behind the other layers in the backward pass, and before the first.
    hooked = model.layers[1].e.register_hook(back)
    loss.backward()
    hooked.remove()
    torch.testing.assert_close(model.taken(), expected, rtol=1e-12, atol=1e-12)
    assert sizes[0] == 3


def test_no_more_is_computed_before_its_turn_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_loss, "TOGETHER", 45)
    model = Alike()
    expected = copy.deepcopy(model).one_by_one()
    sizes = counted(model)
    model(model.x()).square().sum().backward()
    torch.testing.assert_close(model.taken(), expected, rtol=1e-12, atol=1e-12)
    assert sizes == [2, 2]  # 24 + 20 numbers each
