"""A weight plus a gated difference, ``θ + z ⊙ w``, with gates that are drawn anew in every step.

One operator computes it and one its gradients, in pieces that stay in the processor's cache. Nothing of the
size of a large weight is kept for the backward pass: the gates are drawn again from the same seed. So gates are
also the same where a layer is called several times in a step or recomputed by gradient checkpointing, and in
every process of a distributed run.

A compiler sees torch operators, because seed and scale of the penalty change from step to step, and it would
bake those of the first step into the graph of an autograd function. Without one such a function takes their place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any, Final, Literal, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lightning_pet.errors import PETError
from lightning_pet.layers.hard_concrete import HardConcrete, mixed
from lightning_pet.layers.side_loss import Penalty
from lightning_pet.layers.transforms import is_ordinary, is_transformed

Form = Literal["product", "sum"]
KEPT: Final = 1 << 14
"""Gates of a weight of up to this many numbers wait for the backward pass: 128 KiB, less work than drawing again."""

_PIECE: Final = {"cpu": 1 << 15}
_PIECE_ELSEWHERE: Final = 1 << 24

_hardtanh_backward = torch.ops.aten.hardtanh_backward.default
_sigmoid_backward = torch.ops.aten.sigmoid_backward.default

_NOT_WHILE_DRAWN: Final = (
    "are not supported while the gates of diff pruning are drawn at random: their gradient is made in "
    "loss.backward(). Call model.eval(), in which gates take their typical values, or wait for the cut."
)

_keys = count()
_alive: WeakValueDictionary[int, "Gates"] = WeakValueDictionary()


class Gates:
    """Draws the gates of one weight, and knows their penalty.

    Outside of a Trainer the gates change with the first forward after a backward. A Trainer's glue says with
    :meth:`begin` which step it is, and then they depend on that alone.

    Args:
        law: distribution of every gate.
        penalty: the expected number of open gates, as a penalty; its own gradient is not asked for.
        form: how it counts (:func:`expected_open`).
        seed: tells these gates apart from those of other weights and runs.
    """

    def __init__(self, law: HardConcrete, penalty: Penalty, form: Form = "product", seed: int = 0) -> None:
        self.law = law
        self.penalty = penalty
        self.form = form
        self.seed = seed
        self.key = next(_keys)
        self._moment: tuple[int, ...] = (0,)
        self._counts = True
        self._used = False
        _define()
        _alive[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Gates, (self.law, self.penalty, self.form, self.seed)

    def begin(self, *moment: int) -> None:
        """From now on draw the gates of this step, until the next call."""
        self._moment, self._counts = moment, False

    def count(self) -> None:
        """From now on change the gates by themselves, after every backward."""
        self._counts = True

    def arm(self) -> None:
        """A forward begins; one inside of a backward is a recomputation."""
        self.penalty.arm()
        if self._counts and self._used and torch._C._current_graph_task_id() == -1:
            self._moment, self._used = (self._moment[0] + 1,), False

    @property
    def seed_now(self) -> int:
        """Of the random numbers of the present step."""
        return mixed(self.seed, *self._moment)

    def take(self) -> Tensor | float:
        """A backward begins; returns the factor of the penalty's gradient."""
        self._used = True
        return self.penalty.take()

    def generator(self, device: torch.device) -> torch.Generator:
        """The random numbers of the present step."""
        return torch.Generator(device).manual_seed(self.seed_now)


def expected_open(*parameters: Tensor, law: HardConcrete, per_weight: int = 1, form: Form = "product") -> Tensor:
    """Expected number of open gates: E‖z‖₀ of one weight, a tensor without dimensions.

    Args:
        *parameters: α of the weights, α of their group (one element), or both.
        law: their distribution.
        per_weight: weights that a group gate alone stands for; 1 where each has a gate of its own.
        form: with both kinds of gates ``"product"`` counts weights whose two gates are open, which is
            E‖z·z_g‖₀; ``"sum"`` counts open gates of either kind.
    """
    opens = [law.open(alpha).sum() for alpha in parameters]
    if len(opens) == 1:
        return opens[0] * per_weight
    return opens[0] * opens[1] if form == "product" else opens[0] + opens[1]


class _Group(NamedTuple):
    """The gate of the whole weight: z, dz/dα, P(z > 0): numbers on a CPU, where that costs less, else tensors."""

    z: Tensor | float
    slope: Tensor | float
    open: Tensor | float


def _group(gates: Gates, alpha: Tensor, generator: torch.Generator, dtype: torch.dtype) -> _Group:
    law = gates.law
    if is_ordinary(alpha) and alpha.is_cpu:
        u = torch.empty((), dtype=torch.float32).uniform_(generator=generator)
        return _Group(*_numbers_of_group(law, alpha.item(), u.item()))
    alpha = alpha.detach().reshape(()).to(dtype)
    s = law.draw(alpha, generator)
    moved = s * law.width + law.low
    inside = (moved > 0) & (moved < 1)
    return _Group(moved.clamp(0, 1), inside * s * (1 - s) * (law.width / law.temperature), law.open(alpha))


def _numbers_of_group(law: HardConcrete, alpha: float, u: float) -> tuple[float, float, float]:
    """The same of a uniform number, on a CPU."""
    s, opened = law.one(alpha, u)
    stretched = s * law.width + law.low
    slope = s * (1 - s) * (law.width / law.temperature)
    return min(max(stretched, 0.0), 1.0), slope if 0 < stretched < 1 else 0.0, opened


def _group_gradient(group: Tensor, whole: _Group, flow: Tensor, opened: Tensor | float, factor: Any) -> Tensor:
    """Of α_g: what flows through z_g, and of the penalty, in which it counts so many gates."""
    if isinstance(whole.open, float) and not isinstance(factor, Tensor):
        opened = opened.item() if isinstance(opened, Tensor) else opened
        slope = whole.open * (1 - whole.open) * factor * opened
        return torch.full_like(group, flow.item() * whole.slope + slope)
    slope = whole.open * (1 - whole.open) * factor * opened
    found: Tensor = flow * whole.slope + slope
    return found.to(group.dtype).view(group.shape)


@dataclass
class _Drawn:
    """What a forward leaves to its backward: the group's gate, and s and z of the other gates of a small weight."""

    group: _Group | None = None
    s: Tensor | None = None
    z: Tensor | None = None


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same places of all, which are flat, some at a time."""
    size, device = tensors[0].numel(), tensors[0].device
    step = _PIECE.get(device.type, _PIECE_ELSEWHERE)
    if size <= step:
        yield tensors
        return
    for start in range(0, size, step):
        yield tuple(tensor[start : start + step] for tensor in tensors)


def _forward(
    gates: Gates, weight: Tensor, w: Tensor, alpha: Tensor | None, group: Tensor | None, drawn: _Drawn | None = None
) -> Tensor:
    law, generator = gates.law, gates.generator(w.device)
    whole = None if group is None else _group(gates, group, generator, w.dtype)
    by = 1.0 if whole is None else whole.z
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    flat = (w.reshape(-1), weight.reshape(-1), out.view(-1), *(() if alpha is None else (alpha.reshape(-1),)))
    if drawn is not None:
        drawn.group = whole
    for difference, base, result, *gate in _pieces(*flat):
        if isinstance(by, Tensor):
            difference = difference * by
        factor = 1.0 if isinstance(by, Tensor) else by
        # Added in the precision of w, and rounded once: as merging does.
        summed = result if weight.dtype == w.dtype else torch.empty_like(difference)
        if not gate:
            torch.add(base, difference, alpha=factor, out=summed)
        else:
            s = law.draw(gate[0].to(w.dtype), generator)
            if drawn is not None and s.numel() == w.numel() <= KEPT:
                drawn.s, drawn.z = s, z = s, law.stretched(s)
            else:
                z = law.stretched_(s)
            torch.addcmul(base.to(w.dtype), z, difference, value=factor, out=summed)
        if summed is not result:
            result.copy_(summed)
    return out


def _is_light(weight: Tensor, w: Tensor, alpha: Tensor | None) -> bool:
    """Whether the work is little beside what it costs to ask for it."""
    if alpha is None or w.numel() > KEPT or not w.is_cpu:
        return False
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in (weight, w, alpha))


def _light_forward(
    gates: Gates, weight: Tensor, w: Tensor, alpha: Tensor, group: Tensor | None
) -> tuple[Tensor, _Drawn]:
    """:func:`_forward` in as few steps as there are; its random numbers are the same, drawn all at once."""
    law, drawn = gates.law, _Drawn()
    u = torch.empty(w.numel() + (group is not None)).uniform_(generator=gates.generator(w.device))
    factor = 1.0
    if group is not None:
        numbers = _numbers_of_group(law, group.item(), u[0].item())
        u, factor, drawn.group = u[1:], numbers[0], _Group(*numbers)
    low, high, _ = _constants(law)
    drawn.s = s = law.concrete_(alpha, u.view_as(w))
    drawn.z = z = torch.lerp(low, high, s).clamp_(0, 1)
    return torch.addcmul(weight, z, w, value=factor), drawn


@cache
def _constants(law: HardConcrete) -> tuple[Tensor, Tensor, Tensor]:
    """Ends and shift as tensors: half of the time of an operation on few numbers goes into making one of a number."""
    with torch.inference_mode(False):
        low, high, shift = torch.tensor([law.low, law.high, law.shift]).unbind()
        return low, high, shift


def _light_backward(
    gates: Gates, g: Tensor, w: Tensor, alpha: Tensor, group: Tensor | None, drawn: _Drawn
) -> list[Tensor]:
    """:func:`_backward` after it."""
    law, s, z, factor = gates.law, drawn.s, drawn.z, gates.take()
    assert s is not None and z is not None  # noqa: PT018
    factor = factor.item() if isinstance(factor, Tensor) else factor
    z_group, slope, open_group = cast(tuple[float, float, float], drawn.group or (1.0, 0.0, 1.0))
    product = gates.form == "product"
    g = g.contiguous()
    moved, dw, steepness = g * w, g * z, z_group * law.width / law.temperature
    dalpha = _hardtanh_backward(_sigmoid_backward(moved, s), z, 0, 1)  # 0 where z is clamped
    if group is not None:
        slope *= torch.dot(moved.view(-1), z.view(-1)).item()
        dw.mul_(z_group)
    if factor:
        p = torch.sub(alpha, _constants(law)[2]).sigmoid_()
        if group is not None:
            slope += open_group * (1 - open_group) * factor * (p.sum().item() if product else 1.0)
        spread = p.addcmul_(p, p, value=-1).mul_(factor * open_group if product else factor)
        dalpha = spread.add_(dalpha, alpha=steepness)
    else:
        dalpha.mul_(steepness)
    return [dw, dalpha] if group is None else [dw, dalpha, torch.full_like(group, slope)]


def _backward(
    gates: Gates, g: Tensor, w: Tensor, alpha: Tensor | None, group: Tensor | None, drawn: _Drawn | None = None
) -> list[Tensor]:
    generator = gates.generator(w.device)
    drawn = drawn or _Drawn()
    factor = gates.take()
    if isinstance(factor, Tensor):
        factor = factor.item() if w.is_cpu else factor.to(w.device, w.dtype)
    whole = drawn.group
    if group is not None:
        if whole is None:
            whole = _group(gates, group, generator, w.dtype)
        else:
            torch.empty((), dtype=torch.float32, device=w.device).uniform_(
                generator=generator
            )  # the other gates come behind it
    g = g.reshape(-1)
    if alpha is None:
        assert group is not None
        assert whole is not None
        flow = torch.dot(g.to(w.dtype), w.reshape(-1))
        dw = (g * whole.z).to(w.dtype).view(w.shape)
        return [dw, _group_gradient(group, whole, flow, float(w.numel()), factor)]
    product = whole is not None and gates.form == "product"
    own = factor * whole.open if whole is not None and product else factor
    dw, dalpha, flow, opened = _of_weights(gates, g, w, alpha, generator, drawn, whole, own)
    if group is None or whole is None:
        return [dw, dalpha]
    return [dw, dalpha, _group_gradient(group, whole, flow, opened if product else 1.0, factor)]


def _of_weights(
    gates: Gates,
    g: Tensor,
    w: Tensor,
    alpha: Tensor,
    generator: torch.Generator,
    drawn: _Drawn,
    whole: _Group | None,
    factor: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w and α, Σ g w z, and the expected number of open gates."""
    law = gates.law
    dw, dalpha = torch.empty_like(w), torch.empty_like(alpha)
    flow, opened = (torch.zeros((), dtype=w.dtype, device=w.device) for _ in range(2))
    flat = (g, w.reshape(-1), alpha.reshape(-1), dw.view(-1), dalpha.view(-1))
    for up, difference, a, to_w, to_alpha in _pieces(*flat):
        a, up = a.to(w.dtype), up.to(w.dtype)
        s, z = drawn.s, drawn.z
        if s is None or z is None:
            s = law.draw(a, generator)
            z = law.stretched(s)
        moved = up * difference
        slope = _hardtanh_backward(_sigmoid_backward(moved, s), z, 0, 1)  # 0 where z is clamped
        if whole is not None:
            flow += torch.dot(moved, z)
            slope.mul_(whole.z * (law.width / law.temperature))
            torch.mul(up, z, out=to_w).mul_(whole.z)
        else:
            slope.mul_(law.width / law.temperature)
            torch.mul(up, z, out=to_w)
        p = law.open(a)
        opened += p.sum()
        spread = p.addcmul_(p, p, value=-1)
        if isinstance(factor, Tensor):
            to_alpha.copy_(slope.addcmul_(spread, factor))
        elif to_alpha.dtype == slope.dtype:
            torch.add(slope, spread, alpha=factor, out=to_alpha)
        else:
            to_alpha.copy_(slope.add_(spread, alpha=factor))
    return dw, dalpha, flow, opened


def gated_weight(weight: Tensor, w: Tensor, alpha: Tensor | None, group: Tensor | None, gates: Gates) -> Tensor:
    """``weight + z · z_g · w`` with gates drawn for this step.

    The backward adds the gradient of the gates' penalty to α, scaled as the loss is, once per forward pass
    (:mod:`lightning_pet.layers.side_loss`).

    Args:
        weight: θ, of any shape and floating dtype.
        w: difference of the same shape, float32 or float64; z and the sum are computed in its dtype.
        alpha: α of every weight, of the same shape; ``None``: all of these gates are 1.
        group: α_g of the whole weight, one element; ``None``: that gate is 1. One of the two must be given.
        gates: draws them.

    Returns:
        A new tensor like ``weight``.

    Raises:
        PETError: within ``torch.func`` or forward-mode differentiation.
    """
    if is_transformed():
        raise PETError(f"torch.func and forward-mode differentiation {_NOT_WHILE_DRAWN}")
    moved: Tensor
    if is_ordinary(weight) and is_ordinary(w):
        moved = _gate(weight, w, alpha, group, gates)
    else:
        moved = torch.ops.lightning_pet.gated_weight(weight, w, alpha, group, gates.key)
    return moved


class _Gated(torch.autograd.Function):
    """The operators without a compiler."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, w: Tensor, alpha: Tensor | None, group: Tensor | None, gates: Gates
    ) -> Tensor:
        gates.arm()
        ctx.key, ctx.light = gates.key, _is_light(weight, w, alpha)
        if ctx.light:
            assert alpha is not None
            out, drawn = _light_forward(gates, weight, w, alpha, group)
        else:
            drawn = _Drawn()
            out = _forward(gates, weight, w, alpha, group, drawn)
        ctx.save_for_backward(w, alpha, group, drawn.s, drawn.z)
        ctx.group = drawn.group
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        w, alpha, group, s, z = ctx.saved_tensors  # may run the forward again
        if torch.is_grad_enabled():  # the operator refuses to be differentiated
            found = torch.ops.lightning_pet.gated_weight_backward(gradient, w, alpha, group, ctx.key)
        else:
            backward = _light_backward if ctx.light else _backward
            found = backward(_of_key(ctx.key), gradient, w, alpha, group, _Drawn(ctx.group, s, z))
        dw, *rest = found
        dalpha, dgroup = (None if tensor is None else rest.pop(0) for tensor in (alpha, group))
        return gradient if ctx.needs_input_grad[0] else None, dw, dalpha, dgroup, None


# Past what ``Function.apply`` does for torch.func, which does not come here.
_gate: Callable[..., Tensor] = super(torch.autograd.Function, _Gated).apply


# --- the operators; defined with the first gates, as that takes milliseconds ------------------------


@cache
def _define() -> None:
    forward = torch.library.custom_op("lightning_pet::gated_weight", _gated_weight, mutates_args=())
    forward.register_fake(_fake_forward)
    forward.register_autograd(_differentiate, setup_context=_keep)
    backward = torch.library.custom_op("lightning_pet::gated_weight_backward", _gated_weight_backward, mutates_args=())
    backward.register_fake(_fake_backward)
    backward.register_autograd(_second_derivative)


def _of_key(key: int) -> Gates:
    if (gates := _alive.get(key)) is None:
        raise PETError("the gates of a weight were removed between forward and backward; remove a delta after both.")
    return gates


def _gated_weight(weight: Tensor, w: Tensor, alpha: Tensor | None, group: Tensor | None, key: int) -> Tensor:
    gates = _of_key(key)
    gates.arm()
    return _forward(gates, weight, w, alpha, group)


def _fake_forward(weight: Tensor, w: Tensor, alpha: Tensor | None, group: Tensor | None, key: int) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _gated_weight_backward(
    gradient: Tensor, w: Tensor, alpha: Tensor | None, group: Tensor | None, key: int
) -> list[Tensor]:
    return _backward(_of_key(key), gradient, w, alpha, group)


def _fake_backward(gradient: Tensor, w: Tensor, alpha: Tensor | None, group: Tensor | None, key: int) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (w, alpha, group) if tensor is not None]


def _second_derivative(ctx: Any, *gradients: Any) -> None:
    raise PETError(f"second derivatives {_NOT_WHILE_DRAWN}")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, w, alpha, group, ctx.key = inputs
    ctx.present = [tensor is not None for tensor in (alpha, group)]
    ctx.save_for_backward(w, *(tensor for tensor in (alpha, group) if tensor is not None))


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    w, *rest = ctx.saved_tensors
    alpha, group = (rest.pop(0) if present else None for present in ctx.present)
    dw, *found = torch.ops.lightning_pet.gated_weight_backward(gradient, w, alpha, group, ctx.key)
    dalpha, dgroup = (found.pop(0) if present else None for present in ctx.present)
    return gradient, dw, dalpha, dgroup, None
