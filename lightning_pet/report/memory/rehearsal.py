"""A training step without values: what it would allocate, found by running it on tensors that have only shapes.

Nothing of the model's size is allocated. The step runs as it will (attention kernels, autocast,
checkpointing, the deltas' own autograd functions), so no formula has to know the architecture.
"""

import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_pet.layers.delta import Delta

_aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """Bytes that one training step holds at its worst, above the parameters and the optimizer's state.

    Attributes:
        forward: at the worst moment of the forward, gradients of the step before not counted.
        backward: likewise of the backward, with the gradients that are there by then.
        working: of both together, where the gradients of a unit of parameters leave as soon as all of them are there,
            by way of one copy.
    """

    forward: int
    backward: int
    working: int

    def beside(self, gradients: int) -> int:
        """What the step needs on top of all gradients, where they live until the backward begins."""
        return max(self.forward, self.backward - gradients, 0)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage made within it, while it lives; each storage counts once.

    Questions about values, which such tensors cannot answer, get the answer of an ordinary batch: two
    tensors are equal, a mask keeps everything, a number is one.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.working = self.gradients = 0
        self.peak = self.peak_working = 0
        self._kinds: dict[int, str] = {}
        self._refs: dict[int, Any] = {}
        self._kept = [tensor.untyped_storage() for tensor in known]
        self._known = {id(storage) for storage in self._kept}

    def restart(self) -> None:
        """Forget the highest so far."""
        self.peak, self.peak_working = self.working + self.gradients, self.working

    def gradients_made(self, parameters: Sequence[Tensor]) -> None:
        """These parameters' gradients are complete, and a sharding engine would send them: they are no temporaries."""
        storages = [p.grad.untyped_storage() for p in parameters if p.grad is not None]
        moved = [storage for storage in storages if self._kinds.get(id(storage)) == "working"]
        size = sum(storage.nbytes() for storage in moved)
        self.peak_working = max(self.peak_working, self.working + size)
        self._kinds |= dict.fromkeys(map(id, moved), "gradients")
        self.working -= size
        self.gradients += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(func)
        out = func(*args, **(kwargs or {})) if answer is None else answer(func, args)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known or key in self._kinds:
            return
        size = storage.nbytes()
        self._kinds[key] = "working"
        self._refs[key] = weakref.ref(storage, lambda _: self._leave(key, size))
        self.working += size
        self.peak = max(self.peak, self.working + self.gradients)
        self.peak_working = max(self.peak_working, self.working)

    def _leave(self, key: int, size: int) -> None:
        kind = self._kinds.pop(key)
        del self._refs[key]
        setattr(self, kind, getattr(self, kind) - size)


def _scalar(func: Any, args: Any) -> Any:
    dtype = args[0].dtype
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def _nonzero(func: Any, args: Any) -> Tensor:
    return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)  # type: ignore[no-any-return]


def _index(func: Any, args: Any) -> Any:
    """Masks among the indices become as many positions as the mask has."""
    indices: list[Any] = []
    for index in args[1]:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        places = [index.new_zeros(index.numel(), dtype=torch.long) for _ in range(index.dim())] if masks else [index]
        indices += places
    return func(args[0], indices, *args[2:])


_ANSWERS: dict[Any, Callable[[Any, Any], Any]] = {
    _aten._local_scalar_dense.default: _scalar,
    _aten.equal.default: lambda func, args: True,
    _aten.nonzero.default: _nonzero,
    _aten.masked_select.default: lambda func, args: args[0].new_empty(args[0].numel()),
    _aten.index.Tensor: _index,
    _aten.index_put_.default: lambda func, args: args[0],
    _aten.index_put.default: lambda func, args: args[0].clone(),
}


@contextmanager
def _gpu_kernels() -> Iterator[None]:
    """Within the block attention and dropout need memory as they do on a GPU; the tensors themselves are on the CPU.

    The functions are exchanged, because no mode of torch is active while a checkpointed layer runs again.
    """
    real_attention, real_dropout = F.scaled_dot_product_attention, F.dropout

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *a: Any, **k: Any) -> Any:
        if has_torch_function((query, key, value)):  # prefix tuning takes part in the call, and comes here again
            return real_attention(query, key, value, attn_mask, *a, **k)
        return _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    F.scaled_dot_product_attention, F.dropout = attention, dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = real_attention, real_dropout


class _FusedAttention(torch.autograd.Function):
    """What flash and memory-efficient attention keep and make: no scores, but their sums, and a float32 accumulator."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        # Heads lie beside each other, as the next layer wants them.
        shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1])
        out = query.new_empty(shape).transpose(-3, -2)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, *_ = ctx.saved_tensors
        accumulator = query.new_empty(query.shape, dtype=torch.float32)
        found = [torch.empty_like(tensor) for tensor in (query, key, value)]
        del accumulator
        return (*found, torch.empty_like(mask) if ctx.needs_input_grad[3] else None)


@contextmanager
def _not_traced() -> Iterator[None]:
    """Within the block transformers treats tensors without values as tensors, and not as a graph that is traced.

    Otherwise it would write out masks that it leaves out when it trains.
    """
    utilities: Any = sys.modules.get("transformers.utils.import_utils")
    original = getattr(utilities, "is_fake_tensor", None)
    if original is None:
        yield
        return
    utilities.is_fake_tensor = lambda tensor: False
    try:
        yield
    finally:
        utilities.is_fake_tensor = original


class Stage:
    """Where a model is rehearsed: makes twins of models and batches that have shapes but no values.

    Args:
        gpu: count as a GPU's kernels need; otherwise as a CPU's.
    """

    def __init__(self, gpu: bool = True) -> None:
        self.gpu = gpu
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def entered(self, known: Iterable[Tensor] = (), *, kernels: bool = True) -> Iterator[Ledger]:
        """Within the block tensors have no values, and what is made is counted.

        Args:
            known: tensors that are there already, and are not counted.
            kernels: on a GPU, count as its kernels do. Their graph is not the one that the structure is read from.
        """
        counted = _gpu_kernels() if self.gpu and kernels else nullcontext()
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for context in (_not_traced(), counted, self.mode):
                stack.enter_context(context)
            yield stack.enter_context(Ledger(known))

    def shape_of(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the same shape and strides, on the CPU, without values."""
        with self.mode:
            found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(found, tensor.requires_grad)
        return found

    def twin(self, model: nn.Module, shared: Iterable[object] = (), base: torch.dtype | None = None) -> nn.Module:
        """A copy of the model in which every tensor has only a shape.

        Args:
            model: the model, anywhere, also on the meta device.
            shared: objects that the copy refers to as the model does (a Trainer).
            base: type of the base's floating-point tensors in the copy; default: as they are.
        """
        memo: dict[int, Any] = {id(thing): thing for thing in shared}
        for module in model.modules():
            if (dense := self._dense(module)) is not None:
                memo[id(module)] = dense
        deltas = {id(t) for m in model.modules() if isinstance(m, Delta) for t in (*m.parameters(), *m.buffers())}
        for tensor in (*model.parameters(), *model.buffers()):
            cast = base if tensor.is_floating_point() and id(tensor) not in deltas else None
            memo.setdefault(id(tensor), self.shape_of(tensor, cast))
        return copy.deepcopy(model, memo)  # what else there is (states of metrics) is small, and keeps its values

    def _dense(self, module: nn.Module) -> nn.Module | None:
        """An ordinary linear layer in place of a quantised one, whose kernels need values."""
        weight = module._parameters.get("weight")
        sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if weight is None or None in sizes or not is_packed(weight):
            return None
        bias = module._parameters.get("bias")
        dtype = getattr(module, "compute_dtype", None) or (weight.dtype if weight.is_floating_point() else None)
        dtype = dtype or (bias.dtype if bias is not None else torch.get_default_dtype())
        with self.mode:
            dense = nn.Linear(*sizes, bias=bias is not None, device="cpu", dtype=dtype)  # type: ignore[arg-type]
        return dense.requires_grad_(False).train(module.training)

    def batch(self, batch: Any) -> Any:
        """The batch, without values."""
        return apply_to_collection(batch, Tensor, self.shape_of)


def is_packed(tensor: Tensor) -> bool:
    """Whether a parameter is stored in another form than its numbers: quantised."""
    return hasattr(tensor.data, "__tensor_flatten__") or not (tensor.is_floating_point() or tensor.is_complex())


def rehearse(stage: Stage, model: nn.Module, loss: Callable[[], Any], units: Mapping[int, int] | None = None) -> Step:
    """Run one forward and backward.

    Args:
        stage: where the model's twin was made.
        model: the twin, with its deltas; parameters that train have no gradient yet.
        loss: runs the forward and returns the loss.
        units: number of the unit that a parameter is in, by ``id``; 0 for those that are not named.
    """
    members: dict[int, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members.setdefault((units or {}).get(id(parameter), 0), []).append(parameter)
    with stage.entered((*model.parameters(), *model.buffers())) as ledger:
        hooks = [hook for unit in members.values() for hook in _when_complete(unit, ledger.gradients_made)]
        try:
            value = loss()
            forward, working = ledger.peak, ledger.peak_working
            ledger.restart()
            value.backward()
            del value
        finally:
            for hook in hooks:
                hook.remove()
        return Step(forward, ledger.peak, max(working, ledger.peak_working))


def _when_complete(unit: list[nn.Parameter], act: Callable[[Sequence[Tensor]], None]) -> Iterator[Any]:
    """Hooks that act once every parameter of a unit has its gradient."""
    waiting = {id(parameter) for parameter in unit}

    def made(parameter: Tensor) -> None:
        waiting.discard(id(parameter))
        if not waiting:
            act(unit)

    for parameter in unit:
        yield parameter.register_post_accumulate_grad_hook(made)  # type: ignore[no-untyped-call]


def rehearse_optimizer(stage: Stage, optimizer: torch.optim.Optimizer) -> tuple[dict[int, int], int]:
    """Take one optimizer step.

    Returns:
        Bytes of its state by ``id`` of the parameter, and bytes that the step needs for a moment.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = stage.shape_of(parameter.detach())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    with stage.entered((*parameters, *gradients)) as ledger:
        optimizer.step()
        state = {id(p): sum(_sizes(values)) for p, values in optimizer.state.items()}
        ledger.restart()
        optimizer.step()
        return state, max(ledger.peak - sum(state.values()), 0)


def _sizes(state: Any) -> Iterator[int]:
    found = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tree_iter(state) if isinstance(t, Tensor)}
    yield from found.values()
