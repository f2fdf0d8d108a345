"""Penalties of a method's own, beside the user's loss, without the user's loss knowing of them.

A delta passes a tensor through :func:`with_penalty`: an identity whose backward adds the gradient of a
penalty to some parameters. The gradient is scaled as the user's loss is (the factor of a gradient scaler,
of accumulation, of an engine): the factor is *measured* on the loss by :func:`measure`, which the Trainer's
glue calls. Without it, as in a plain loop, the factor is 1.

Once per forward pass: a module that is called several times, is shared, or is recomputed by gradient
checkpointing adds its penalty once. One whose forward does not run adds none.

A compiler sees torch operators, as it would bake the factor of the first step into an autograd function's
graph. Without one an autograd function takes their place, which costs a third of the time.

The gradients of penalties that are alike are computed together, at the first of them that a backward pass
reaches, a bounded number of parameters at a time.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lightning_pet.errors import PETError
from lightning_pet.layers.sharding import is_partition
from lightning_pet.layers.transforms import is_ordinary, is_transformed

Function = Callable[..., Tensor]
Gradient = Callable[..., Sequence[Tensor]]
Gradients = Callable[[Sequence[Sequence[Tensor]], Tensor | float], list[Sequence[Tensor]]]

TOGETHER: Final = 1 << 20
"""Numbers in the parameters of penalties whose gradients are computed together: what is ready before its turn."""

_keys = count()
_alive: WeakValueDictionary[int, "Penalty"] = WeakValueDictionary()


class _Held(NamedTuple):
    """The parameters of a penalty that is due.

    Attributes:
        parameters: as the forward saw them.
        place: device or stream whose work they belong to.
    """

    parameters: Sequence[Tensor]
    place: Any

    @property
    def is_whole(self) -> bool:
        """Whether no engine has taken the memory of one away since."""
        return all(parameter.untyped_storage().size() for parameter in self.parameters)


class Penalty:
    """A scalar function of some parameters, to be minimised beside the loss.

    A delta makes one in its ``__init__`` and keeps it as an attribute; copies and pickles of the delta get
    one of their own. Parameters of less than 32 bits reach the functions as float32.

    Args:
        function: ``function(*parameters)`` returns the penalty as a tensor without dimensions.
        gradient: ``gradient(*parameters)`` returns its gradient with respect to each of them, where a
            closed form is cheaper than differentiating ``function`` (the default).
        weight: factor on both; may be changed at any time.
        together: ``together(parameters of each, factor)`` returns the gradients of several penalties with this very
            function, times a factor, where that is cheaper than one after the other.

    >>> w = torch.tensor([3.0], requires_grad=True)
    >>> decay = Penalty(lambda w: w.square().sum(), weight=0.1)
    >>> with_penalty(2 * w, [w], decay).sum().backward()
    >>> w.grad  # 2 of the loss, 0.1 · 2 · 3 of the penalty
    tensor([2.6000])
    """

    def __init__(
        self,
        function: Function,
        gradient: Gradient | None = None,
        weight: float = 1.0,
        together: Gradients | None = None,
    ) -> None:
        self.function = function
        self.gradient = gradient
        self.weight = weight
        self.together = together
        self.key = next(_keys)
        self._held: _Held | None = None  # while it is due, and others may compute its gradient
        self._ready: tuple[int, Sequence[Tensor]] | None = None  # another did, in this backward pass
        self._due = False  # a forward with gradients has used it since the last backward
        self._deferred = False  # one without gradients has, which a backward may run again, with gradients
        _define()
        _alive[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Penalty, (self.function, self.gradient, self.weight, self.together)

    def __call__(self, *parameters: Tensor) -> Tensor:
        """The weighted penalty, detached: for logging."""
        with torch.no_grad():
            return self.weight * self.function(*(_wide(parameter) for parameter in parameters))

    def arm(self, with_gradients: bool = True) -> None:
        """Note that a forward pass has used it. A forward that runs inside of a backward is a recomputation.

        Args:
            with_gradients: whether that forward was recorded. Reentrant checkpointing records none but the
                recomputation, which then makes the penalty due; after an evaluation none will.
        """
        if torch._C._current_graph_task_id() != -1:
            self._due, self._deferred = self._due or self._deferred, False
        elif with_gradients:
            self._due = True
        else:
            self._deferred = True

    def take(self) -> Tensor | float:
        """The factor of the gradient in this backward pass: 0 if it was taken already since the last forward."""
        due, self._due, self._deferred, self._held = self._due, False, False, None
        return self.weight * _loss.scale if due else 0.0

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The scaled gradient with respect to each parameter, in its dtype; zeros if it was taken already."""
        return self._due_gradients(parameters) or [torch.zeros_like(parameter) for parameter in parameters]

    def within(self, gradient: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The same for the backward of a node with this gradient; ``None`` if it was taken already."""
        if torch.is_grad_enabled():  # the operator refuses to be differentiated
            found: list[Tensor] = torch.ops.lightning_pet.side_gradients(gradient, list(parameters), self.key)
            return found
        return self._due_gradients(parameters)

    def _due_gradients(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        if self._held is not None:
            self._compute_together(self._held.place)
        ready, self._ready = self._ready, None
        factor = self.take()
        if isinstance(factor, float) and factor == 0:
            return None
        if ready is not None and ready[0] == torch._C._current_graph_task_id():
            return [g if g.dtype == p.dtype else g.to(p.dtype) for g, p in zip(ready[1], parameters, strict=True)]
        values = [_wide(parameter) for parameter in parameters]
        if self.gradient is not None:
            found = self.gradient(*values)
        else:
            found = torch.func.grad(self.function, argnums=tuple(range(len(values))))(*values)
        return [(g * factor).to(p.dtype) for g, p in zip(found, parameters, strict=True)]

    def hold(self, parameters: Sequence[Tensor]) -> None:
        """Let others compute the gradient, if these are ordinary parameters that stay where they are."""
        self._held = None
        if self.together is None or any(type(p) is not nn.Parameter or is_partition(p) for p in parameters):
            return
        device = parameters[0].device
        if device.type in ("cpu", "cuda"):
            self._held = _Held(parameters, device if device.type == "cpu" else torch.cuda.current_stream(device))

    def _compute_together(self, place: Any) -> None:
        """Get the gradients ready of this penalty and of others that are due, unless another has in this pass."""
        task = torch._C._current_graph_task_id()
        if task == -1 or not self.weight or (self._ready is not None and self._ready[0] == task):
            return
        members: list[Penalty] = []
        parameters, size, weight = [], 0, self.weight
        for penalty in (self, *filter(None, (reference() for reference in reversed(_alive.valuerefs())))):
            held = penalty._held
            if held is None or penalty.function is not self.function or penalty.weight != weight:
                continue
            if held.place != place or not held.is_whole or penalty in members[:1]:
                continue
            size += sum(parameter.numel() for parameter in held.parameters)
            if members and size > TOGETHER:
                break
            members.append(penalty)
            parameters.append([_wide(parameter) for parameter in held.parameters])
        if len(members) > 1:
            assert self.together is not None
            for penalty, found in zip(members, self.together(parameters, self.weight * _loss.scale), strict=True):
                penalty._ready = task, found


class _Loss:
    """What is known of the loss whose backward pass runs."""

    scale: Tensor | float = 1.0  # d(what backward is called on) / d(the user's loss)


_loss = _Loss()


def measure(loss: Tensor) -> None:
    """Scale the penalties of the coming backward pass as this loss will be scaled.

    Call it on the user's loss, before anything multiplies it. A plain loop needs it only with a gradient
    scaler or with accumulation.
    """
    if loss.requires_grad:
        loss.register_hook(_note_scale)  # type: ignore[no-untyped-call]


def forget_scale() -> None:
    """Go back to the factor 1."""
    _loss.scale = 1.0


def _note_scale(gradient: Tensor) -> None:
    _loss.scale = gradient.detach().float().reshape(())


def with_penalty(value: Tensor, parameters: Sequence[Tensor], penalty: Penalty, training: bool = True) -> Tensor:
    """Return ``value``; its backward adds the penalty's gradient to the parameters.

    Call it without asking whether gradients are recorded: the first forward of a layer that is checkpointed
    reentrantly records none, and counts.

    Args:
        value: any tensor that the loss depends on; a copy is made, so choose a small one.
        parameters: arguments of the penalty's function, in its order.
        penalty: what to add.
        training: whether the module is in training mode: a compiled evaluation has no use for the operator.

    Returns:
        A tensor equal to ``value``.

    Raises:
        PETError: within ``torch.func`` or forward-mode differentiation, where nothing could add the penalty.
    """
    with_gradients = torch.is_grad_enabled()
    if is_transformed():
        if not with_gradients:
            return value
        raise PETError(
            "a method's penalty is added in loss.backward(), which torch.func and forward-mode differentiation do not "
            "run: they would leave it out. Set its weight to 0 (orth_reg_weight, regularization), or, if no gradient "
            "of the parameters is wanted, call this under torch.no_grad()."
        )
    if not with_gradients and not torch.compiler.is_compiling():
        penalty.arm(with_gradients)
        return value
    if not with_gradients and not training:
        return value
    passed: Tensor
    if is_ordinary(value):
        passed = _pass(value, penalty, *parameters)
    else:
        passed = torch.ops.lightning_pet.side(value, list(parameters), penalty.key, with_gradients)
    return passed


class _Side(torch.autograd.Function):
    """The operators without a compiler."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, penalty: Penalty, *parameters: Tensor) -> Tensor:
        penalty.arm()
        penalty.hold(parameters)
        ctx.penalty = penalty
        ctx.save_for_backward(*parameters)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors  # may run the forward again
        found = ctx.penalty.within(gradient, parameters)
        return gradient, None, *(found or [None] * len(parameters))


# Past what ``Function.apply`` does for torch.func, which does not come here.
_pass: Callable[..., Tensor] = super(torch.autograd.Function, _Side).apply


def _wide(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.float() if value.dtype.itemsize < 4 else value


# --- the operators; defined with the first penalty, as that takes milliseconds ----------------------


@cache
def _define() -> None:
    side = torch.library.custom_op("lightning_pet::side", _side, mutates_args=())
    side.register_fake(_fake_side)
    side.register_autograd(_backward, setup_context=_keep)
    gradients = torch.library.custom_op("lightning_pet::side_gradients", _side_gradients, mutates_args=())
    gradients.register_fake(_fake_gradients)
    gradients.register_autograd(_second_derivative)


def _side(value: Tensor, parameters: list[Tensor], key: int, with_gradients: bool) -> Tensor:
    if (penalty := _alive.get(key)) is not None:
        penalty.arm(with_gradients)
    return value.clone()


def _fake_side(value: Tensor, parameters: list[Tensor], key: int, with_gradients: bool) -> Tensor:
    return torch.empty_like(value)


def _side_gradients(gradient: Tensor, parameters: list[Tensor], key: int) -> list[Tensor]:
    if (penalty := _alive.get(key)) is not None:
        return penalty.gradients(parameters)
    return [torch.zeros_like(parameter) for parameter in parameters]


def _fake_gradients(gradient: Tensor, parameters: list[Tensor], key: int) -> list[Tensor]:
    return [torch.empty_like(parameter) for parameter in parameters]


def _second_derivative(ctx: Any, *gradients: Any) -> None:
    raise PETError(
        "a method's penalty has no second derivatives. Set its weight to 0 (orth_reg_weight, regularization) where "
        "gradients of gradients are taken."
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parameters, ctx.key, _ = inputs
    ctx.save_for_backward(*parameters)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[Tensor], None, None]:
    found = torch.ops.lightning_pet.side_gradients(gradient, list(ctx.saved_tensors), ctx.key)
    return gradient, found, None, None
