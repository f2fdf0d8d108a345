"""Hard-concrete gates: closed forms against Monte-Carlo, the fused operator against plain autograd."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_pet.errors import ArgumentError, PETError
from lightning_pet.layers import gated_weight as fused
from lightning_pet.layers.gated_weight import Gates, expected_open, gated_weight
from lightning_pet.layers.hard_concrete import EPSILON, HardConcrete, mixed
from lightning_pet.layers.side_loss import Penalty, forget_scale, measure

LAWS = [HardConcrete(), HardConcrete(-0.1, 1.1, 2 / 3), HardConcrete(-1.5, 1.5, 0.5)]
D = torch.float64


def draw(law: HardConcrete, alpha: Tensor, u: Tensor) -> Tensor:
    """The definition, with its logarithms."""
    s = torch.sigmoid((u.log() - (1 - u).log() + alpha) / law.temperature)
    return (s * law.width + law.low).clamp(0, 1)


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("alpha", [5.0, 0.0, -3.0])
def test_closed_forms_against_monte_carlo(law: HardConcrete, alpha: float) -> None:
    u = torch.rand(2_000_000, generator=torch.Generator().manual_seed(1), dtype=D)
    z, a = draw(law, torch.tensor(alpha, dtype=D), u), torch.tensor(alpha, dtype=D)
    assert (z > 0).double().mean().item() == pytest.approx(law.open(a).item(), abs=1.5e-3)
    assert (z == 1).double().mean().item() == pytest.approx(law.full(a).item(), abs=1.5e-3)


def test_probabilities_at_the_start_of_the_paper() -> None:
    law, alpha = HardConcrete(), torch.tensor(5.0, dtype=D)
    assert law.open(alpha).item() == pytest.approx(0.9933, abs=5e-5)
    assert law.full(alpha).item() == pytest.approx(0.9674, abs=5e-5)
    thousand, one = torch.full((1000,), 5.0, dtype=D), torch.full((1,), 5.0, dtype=D)
    assert expected_open(thousand, one, law=law).item() == pytest.approx(986.66, abs=5e-3)
    assert expected_open(thousand, one, law=law, form="sum").item() == pytest.approx(994.30, abs=5e-3)
    u = torch.rand(2000, 1001, generator=torch.Generator().manual_seed(2), dtype=D)
    z = draw(law, alpha, u)
    assert (z[:, :1] * z[:, 1:] > 0).sum(1).double().mean().item() == pytest.approx(986.66, abs=8)
    assert expected_open(one, law=law, per_weight=1000).item() == pytest.approx(993.31, abs=5e-3)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_form_without_logarithms_is_the_definition(law: HardConcrete) -> None:
    u = torch.rand(1000, dtype=D).clamp(EPSILON, 1 - EPSILON)
    alpha = torch.linspace(-40, 40, 1000, dtype=D)
    s = torch.sigmoid((u.log() - (1 - u).log() + alpha) / law.temperature)
    assert (law.concrete(alpha, u) - s).abs().max() < 1e-12
    extreme = torch.tensor([-1e4, 1e4], dtype=D)
    assert law.concrete(extreme, torch.tensor([0.5, 0.5], dtype=D)).tolist() == [0, 1]


# --- the operator --------------------------------------------------------------------------------


def gates(form: str = "product", weight: float = 0.0, law: HardConcrete = LAWS[0], seed: int = 3) -> Gates:
    made = Gates(law, Penalty(partial(expected_open, law=law, form=form), weight=weight), form, seed)
    made.begin(1, 2)
    return made


def tensors(dtype: torch.dtype = D, shape: tuple[int, ...] = (3, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    weight, w, alpha = (torch.randn(shape, generator=generator, dtype=D).to(dtype) for _ in range(3))
    return [weight, w.requires_grad_(), (alpha * 2).requires_grad_(), torch.tensor([0.3], dtype=dtype).requires_grad_()]


def reference(weight: Tensor, w: Tensor, alpha: Tensor | None, group: Tensor | None, made: Gates) -> Tensor:
    """The definition, drawn in the same order, by plain autograd."""
    generator, law = made.generator(w.device), made.law
    z_g = torch.ones(())
    if group is not None:
        z_g = draw(law, group, law.uniform(group.detach().reshape(()).to(w.dtype), generator))
    z = torch.ones(())
    if alpha is not None:
        a = alpha.to(w.dtype)
        u = torch.cat([law.uniform(p, generator) for p in a.detach().flatten().split(1 << 15)])
        z = draw(law, a, u.view(a.shape))
    return weight + z * z_g * w


@pytest.mark.parametrize("form", ["product", "sum"])
@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)], ids=["both", "weights", "group"])
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_value_and_gradients_are_those_of_the_definition(
    law: HardConcrete, kinds: tuple[bool, bool], form: str
) -> None:
    weight, w, alpha, group = tensors()
    alpha, group = alpha if kinds[0] else None, group if kinds[1] else None
    made = gates(form, 0.7, law)
    given = [p for p in (w, alpha, group) if p is not None]
    out = gated_weight(weight, w, alpha, group, made)
    expected = reference(weight, w, alpha, group, made)
    assert (out - expected).abs().max() < 1e-14
    direction = torch.linspace(-1, 1, out.numel(), dtype=D).view_as(out)
    found = torch.autograd.grad((out * direction).sum(), given)
    count = expected_open(*given[1:], law=law, per_weight=1 if kinds[0] else w.numel(), form=form)
    truth = torch.autograd.grad((expected * direction).sum() + 0.7 * count, given)
    for ours, theirs in zip(found, truth, strict=True):
        assert (ours - theirs).abs().max() < 1e-13
    again = torch.autograd.grad((gated_weight(weight, w, alpha, group, made) * direction).sum(), given)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("form", ["product", "sum"])
@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_small_weights_take_a_shorter_way_to_the_same(
    law: HardConcrete, group: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, w, alpha, whole = tensors(torch.float32, (37, 43))
    given = [w, alpha, *([whole] if group else [])]
    direction = torch.linspace(-1, 1, w.numel()).view(43, 37).t()  # gradients come in any order of memory
    made = gates(form, 0.7, law)
    found = []
    for kept in (fused.KEPT, 0):
        monkeypatch.setattr(fused, "KEPT", kept)
        assert fused._is_light(weight, w, alpha) == bool(kept)
        out = gated_weight(weight, w, alpha, whole if group else None, made)
        found.append([out, *torch.autograd.grad((out * direction).sum(), given)])
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-6)
    assert torch.equal(found[0][0] == weight, found[1][0] == weight)  # the very same gates are closed
    expected = reference(weight.double(), w.double(), alpha.double(), whole.double() if group else None, made)
    torch.testing.assert_close(found[0][0].double(), expected, rtol=1e-5, atol=1e-5)


def test_pieces_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, w, alpha, group = tensors(torch.float32, (2, (1 << 15) + 7))
    made = gates(weight=0.1)
    out = gated_weight(weight, w, alpha, group, made)
    assert torch.allclose(out, reference(weight, w, alpha, group, made), atol=1e-6)
    found = torch.autograd.grad(out.square().sum(), [w, alpha, group])
    count = expected_open(alpha, group, law=made.law)
    truth = torch.autograd.grad(
        reference(weight, w, alpha, group, made).square().sum() + 0.1 * count, [w, alpha, group]
    )
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_open_gates_give_the_difference_itself_and_closed_ones_the_base() -> None:
    weight, w, alpha, group = tensors(torch.float32, (40, 50))
    with torch.no_grad():
        alpha.fill_(30)
        group.fill_(30)
    made = gates(weight=1.0)
    out = gated_weight(weight, w, alpha, group, made)
    assert torch.equal(out, weight + w)
    direction = torch.randn(out.shape)
    dw, dalpha, dgroup = torch.autograd.grad((out * direction).sum(), [w, alpha, group])
    assert torch.equal(dw, direction)
    assert dalpha.abs().max() < 1e-12
    assert dgroup.abs().max() < 1e-9
    with torch.no_grad():
        alpha.fill_(-30)
    made.penalty.weight = 0.0
    out = gated_weight(weight, w, alpha, group, made)
    assert torch.equal(out, weight)
    dw, dalpha, dgroup = torch.autograd.grad((out * direction).sum(), [w, alpha, group])
    assert dw.count_nonzero() == dalpha.count_nonzero() == dgroup.count_nonzero() == 0


def test_gates_that_went_away() -> None:
    out = gated_weight(*tensors(), gates())
    with pytest.raises(PETError, match="between forward and backward"):
        out.sum().backward()


def test_no_gradient_where_a_gate_is_clamped() -> None:
    weight, w, alpha, _ = tensors(shape=(30, 30))
    made = gates()
    moved = gated_weight(torch.zeros_like(weight), torch.ones_like(w), alpha, None, made).detach()
    (dalpha,) = torch.autograd.grad(gated_weight(weight, w, alpha, None, made).sum(), [alpha])
    clamped = (moved == 0) | (moved == 1)
    assert 100 < clamped.sum() < 800
    assert dalpha[clamped].count_nonzero() == 0
    assert (dalpha[~clamped] != 0).all()


def test_other_derivatives_are_refused_while_gates_are_drawn() -> None:
    weight, *rest = tensors()
    made = gates()
    values = [p.detach() for p in rest]

    def moved(w: Tensor, alpha: Tensor, group: Tensor) -> Tensor:
        return gated_weight(weight, w, alpha, group, made)

    for call in (
        lambda: torch.func.jvp(moved, tuple(values), tuple(values)),
        lambda: torch.func.grad(lambda w: moved(w, *values[1:]).sum())(values[0]),
        lambda: torch.func.vmap(lambda w: moved(w, *values[1:]))(values[0][None]),
    ):
        with pytest.raises(PETError, match="eval"):
            call()
    slopes = torch.autograd.grad(moved(*rest).square().sum(), rest, create_graph=True)
    with pytest.raises(PETError, match="second derivatives"):
        sum(slope.sum() for slope in slopes).backward()


def test_half_precision() -> None:
    weight, w, alpha, group = tensors(torch.float32)
    made = gates()
    full = gated_weight(weight.bfloat16(), w, alpha, group, made)
    assert full.dtype == torch.bfloat16
    assert torch.equal(full, reference(weight.bfloat16().float(), w, alpha, group, made).bfloat16())
    full.float().sum().backward()
    assert {p.grad.dtype for p in (w, alpha, group)} == {torch.float32}
    small = alpha.detach().bfloat16().requires_grad_()
    gated_weight(weight, w, small, group, made).sum().backward()
    assert small.grad.dtype == torch.bfloat16


# --- which gates, when ---------------------------------------------------------------------------


def ones(made: Gates, alpha: Tensor) -> Tensor:
    """The gates themselves."""
    return gated_weight(torch.zeros_like(alpha), torch.ones_like(alpha), alpha, None, made)


def test_a_step_has_its_own_gates_in_every_process_and_dtype() -> None:
    alpha = torch.zeros(100, requires_grad=True)
    made = gates()
    first = ones(made, alpha)
    made.begin(1, 3)
    second = ones(made, alpha)
    made.begin(1, 2)
    assert torch.equal(ones(made, alpha), first)
    assert not torch.equal(first, second)
    assert not torch.equal(ones(gates(seed=4), alpha), first)
    assert torch.allclose(ones(made, alpha.double()).float(), first, atol=1e-6)
    assert mixed(3, 1, 2) == 7632093772040280075


def test_without_a_trainer_gates_change_after_every_backward() -> None:
    alpha = torch.zeros(100, requires_grad=True)
    made = gates()
    made.count()
    first = ones(made, alpha)
    assert torch.equal(ones(made, alpha), first)
    first.sum().backward()
    second = ones(made, alpha)
    assert not torch.equal(second, first)
    second.sum().backward()
    assert not torch.equal(ones(made, alpha), second)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("preserve", [True, False])
def test_recomputation_draws_the_same_gates(reentrant: bool, preserve: bool, pinned: bool) -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ gated_weight(weight, w, alpha, group, made)).tanh()

    found = []
    for checkpointing in (False, True):
        weight, w, alpha, group = tensors(shape=(5, 5))
        made = gates(weight=0.3)
        if not pinned:
            made.count()
        for _ in range(3):
            x = torch.linspace(-1, 1, 10, dtype=D).view(2, 5).requires_grad_()
            for _ in range(2):
                if checkpointing:
                    x = checkpoint(run, x, weight, use_reentrant=reentrant, preserve_rng_state=preserve)
                else:
                    x = run(x, weight)
            x.square().sum().backward()
            made.begin(1, 5) if pinned else None
        found.append([w.grad, alpha.grad, group.grad])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_the_penalty_is_scaled_as_the_loss_is() -> None:
    weight, w, alpha, group = tensors()
    made = gates(weight=0.5)
    plain = torch.autograd.grad(gated_weight(weight, w, alpha, group, made).sum(), [w, alpha, group])
    loss = gated_weight(weight, w, alpha, group, made).sum()
    measure(loss)
    scaled = torch.autograd.grad(loss * 1024, [w, alpha, group])
    forget_scale()
    torch.testing.assert_close([g / 1024 for g in scaled], list(plain))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    weight, w, alpha, group = tensors()
    made = gates(weight=0.5)

    def run() -> Tensor:
        return gated_weight(weight, w, alpha, group, made).square().sum()

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for step in range(3):  # gates or a scale that were baked in would stay
        made.begin(step)
        results = []
        for function in (compiled, run):
            loss = function()
            measure(loss)
            results.append((loss, torch.autograd.grad(loss * (step + 1), [w, alpha, group])))
        torch.testing.assert_close(*results)
    forget_scale()


def test_copies_draw_the_same_gates_apart() -> None:
    made = gates()
    alpha = torch.zeros(10, requires_grad=True)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin.key != made.key
        twin.begin(1, 2)
        assert torch.equal(ones(twin, alpha), ones(made, alpha))
    assert fused._alive[made.key] is made


@pytest.mark.parametrize("options", [(0.1, 1.5, 1), (-1, 1, 1), (-1, 1.5, 0), (float("nan"), 2, 1)])
def test_stretch_out_of_range(options: tuple[float, ...]) -> None:
    with pytest.raises(ArgumentError, match="stretch"):
        HardConcrete(*options)
