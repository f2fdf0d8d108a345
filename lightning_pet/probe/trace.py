"""Run a model once on small inputs, write down what every module saw, and leave no trace of it."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_pet.model.named_roles import named_places

# --- small inputs for models that describe themselves (Hugging Face's ``PreTrainedModel`` and its like) ---


_TOKENS = 8
_SAMPLES = 4000


def is_self_describing(model: nn.Module) -> bool:
    """The model has the attributes from which inputs can be built."""
    return hasattr(model, "dummy_inputs") and hasattr(model, "main_input_name") and hasattr(model, "config")


def candidate_forwards(model: nn.Module) -> Iterator[Callable[[], Any]]:
    """Zero-argument forwards that may work, best first; the caller tries one after the other."""
    for arguments in candidate_inputs(model):
        yield _bind(model, arguments)


def random_batch(arguments: dict[str, Any], rows: int, length: int, seed: int) -> dict[str, Any]:
    """As many random rows like these arguments of one row.

    Args:
        arguments: one of :func:`candidate_inputs`.
        rows: of the batch.
        length: of each, where they are tokens.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def like(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if value.is_floating_point():
            shape = (rows, *value.shape[1:])
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(value.device, value.dtype)
        shape = (rows, length, *value.shape[2:]) if value.dim() > 1 else (rows,)
        chosen = torch.randint(value.numel(), shape, generator=generator)
        return value.flatten()[chosen.to(value.device)]

    return {name: like(value) for name, value in arguments.items()}


def candidate_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments of one row with which a forward may work, best first."""
    if not is_self_describing(model):
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    main = str(model.main_input_name)
    for inputs in _candidates(model, main, device, dtype):
        for extra in ({"use_cache": False, "return_dict": True}, {"return_dict": True}, {}):
            yield {**inputs, **extra}


class _NothingPadded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """On the meta device a mask has no values: asked whether all of it holds, it says yes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype is torch.bool:
            return True
        return func(*args, **(kwargs or {}))


def _bind(model: nn.Module, arguments: dict[str, Any]) -> Callable[[], Any]:
    def forward() -> Any:
        on_meta = any(isinstance(value, Tensor) and value.is_meta for value in arguments.values())
        with _NothingPadded() if on_meta else contextlib.nullcontext():  # type: ignore[no-untyped-call]
            return model(**arguments)

    return forward


def _candidates(model: nn.Module, main: str, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    ids = {"input_ids": _ids(model.config, device)}
    decoder = {"decoder_input_ids": _ids(model.config, device)}
    pixels = {"pixel_values": _pixels(model.config, device, dtype)}
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    if main == "pixel_values":
        yield pixels
        yield {**pixels, **ids}
        yield {**pixels, **decoder}
    elif main in ("input_features", "input_values"):
        for sound in _sounds(model.config, main, device, dtype):
            yield {**sound, **decoder} if encoder_decoder else sound
    else:
        yield {**ids, **decoder} if encoder_decoder else ids
        yield {**ids, **pixels}
        yield {**ids, "attention_mask": torch.ones(1, _TOKENS, dtype=torch.long, device=device)}
    dummy = model.dummy_inputs
    if isinstance(dummy, dict):
        yield {name: _move(value, device, dtype) for name, value in dummy.items()}


def _move(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def _setting(config: Any, *names: str) -> Any:
    """The first of these settings that is present, also in the nested text, vision or audio configuration."""
    parts = (config, *(getattr(config, f"{kind}_config", None) for kind in ("vision", "text", "audio", "encoder")))
    for name in names:
        for part in parts:
            value = getattr(part, name, None) if part is not None else None
            if value is not None:
                return value
    return None


def _ids(config: Any, device: torch.device) -> Tensor:
    """Eight distinct ordinary token ids: none that the configuration gives a special meaning."""
    special: set[int] = set()
    for part in (config, getattr(config, "text_config", None)):
        values = vars(part) if part is not None else {}
        for name, value in values.items():
            if name.endswith(("token_id", "token_index")):
                special.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    size = _setting(config, "vocab_size")
    size = size if isinstance(size, int) else 100
    ordinary = [i for i in range(min(size, 1000)) if i not in special][-_TOKENS:] or [0]
    row = [ordinary[i % len(ordinary)] for i in range(_TOKENS)]
    return torch.tensor([row], dtype=torch.long, device=device)


def _pixels(config: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    size = _setting(config, "image_size", "input_size", "img_size")
    if isinstance(size, dict):
        size = [size.get("height", 64), size.get("width", 64)]
    height, width = (size, size) if isinstance(size, int) else (size or (64, 64))[-2:]
    channels = _setting(config, "num_channels", "in_channels", "in_chans")
    frames = _setting(config, "num_frames")
    shape = (1, channels if isinstance(channels, int) else 3, int(height), int(width))
    if isinstance(frames, int):
        shape = (1, frames, *shape[1:])  # type: ignore[assignment]
    return torch.linspace(-1, 1, int(torch.Size(shape).numel()), device=device).reshape(shape).to(dtype)


def _sounds(config: Any, main: str, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    if main == "input_values":
        yield {main: torch.linspace(-1, 1, _SAMPLES, device=device).sin().reshape(1, -1).to(dtype)}
    bins = _setting(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feat_in", "input_dim")
    bins = bins if isinstance(bins, int) else 80
    positions = _setting(config, "max_source_positions")
    lengths = [2 * positions] if isinstance(positions, int) and main == "input_features" else []
    for frames in (*lengths, 64, _setting(config, "max_length")):
        if isinstance(frames, int):
            values = torch.linspace(-1, 1, bins * frames, device=device).to(dtype)
            yield {main: values.reshape(1, bins, frames)}
            yield {main: values.reshape(1, frames, bins)}


# --- large products at a fraction of their work, for a forward of which only the graph is read ----

# A graph tells which weight is applied to what; of the numbers, the readers look at where gradients are zero and at
# what is added to scores, and neither depends on which numbers a large weight holds.


_LARGE: Final = 1 << 18  # numbers of a weight from which on its product costs more than reading the graph
_COLUMNS: Final = 16  # side by side in memory: one fetch per row


def thinned(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A stand-in for what ``torch.nn.functional.linear`` of these arguments returns; ``None`` where it is not due."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    data, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    if type(data) is not Tensor or not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return None
    if weight.is_meta:
        return None
    if weight.dim() != 2 or weight.numel() < _LARGE or weight.shape[1] % _COLUMNS or data.shape[-1] != weight.shape[1]:
        return None
    if data.dtype is not weight.dtype or data.device != weight.device or not weight.is_floating_point():
        return None
    if torch.is_autocast_enabled(weight.device.type):
        return None
    return Linear.apply(data, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


class Linear(torch.autograd.Function):
    """One node of the graph with the operands and the shape of the whole product; its name says what it is.

    Each column stands for a part of the features, whose mean it is applied to: no feature is without a gradient. The
    factor makes of it a number of the size that the whole product has.
    """

    @staticmethod
    def forward(ctx: Any, data: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Product of some columns with means of features."""
        ctx.columns, ctx.shape = weight[:, :_COLUMNS], data.shape
        parts = data.reshape(*data.shape[:-1], _COLUMNS, -1)
        ctx.factor = math.sqrt(parts.shape[-1])
        return F.linear(parts.mean(-1).mul_(ctx.factor), ctx.columns, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of that; none of the weight, which nobody asks for."""
        (gradient,) = gradients
        parts = (gradient @ ctx.columns).div_(ctx.factor).unsqueeze(-1)
        return parts.expand(*parts.shape[:-1], ctx.shape[-1] // _COLUMNS).reshape(ctx.shape), None, None


# --- the trace ------------------------------------------------------------------------------------


_IDS = ("input_ids", "decoder_input_ids", "input", "x", "ids", "tokens")


@dataclass
class Call:
    """One call of one module.

    Attributes:
        path: first name of the module.
        depth: number of recorded calls around this one.
        start: sequence number before the call; nodes made inside carry ``start <= n < end``.
        end: sequence number after the call.
        input: ``grad_fn`` of the first tensor argument that has one.
        output: ``grad_fn`` of the first output tensor that has one.
        output_shape: shape of that output.
        takes_ids: the module was given integers, and its forward has an ``attention_mask``.
    """

    path: str
    depth: int
    start: int
    end: int = -1
    input: Node | None = None
    output: Node | None = None
    output_shape: tuple[int, ...] = ()
    takes_ids: bool = False


@dataclass
class Trace:
    """What one forward did.

    Attributes:
        calls: every call of a module, in order of entry.
        embedding: first ``nn.Embedding`` that was given integers.
        consumer: innermost module above that embedding that takes token ids and an attention mask.
        outputs: ``grad_fn`` of every differentiable tensor that the forward returned.
    """

    calls: list[Call] = field(default_factory=list)
    embedding: str | None = None
    consumer: str | None = None
    outputs: list[Node] = field(default_factory=list)


class Tracer:
    """Hooks on every module of ``model`` that fill a :class:`Trace`."""

    def __init__(self, model: nn.Module) -> None:
        self.trace = Trace()
        self._stack: list[Call] = []
        self._paths = {module: path for path, module in named_places(model).items()}

    def running(self) -> list[Call]:
        """Calls that have not returned yet, outermost first."""
        return list(self._stack)

    def path_of(self, module: nn.Module) -> str | None:
        """First name of a module, ``None`` if it is none of the model's."""
        return self._paths.get(module)

    @contextlib.contextmanager
    def attached(self) -> Iterator[Trace]:
        """Record every call until the block is left; the hooks are gone afterwards, whatever happens."""
        handles = []
        try:
            for module in self._paths:
                if not isinstance(module, torch.jit.ScriptModule):
                    handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leave))
            yield self.trace
        finally:
            for handle in handles:
                handle.remove()

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        changed = None
        if not self._stack:
            args, kwargs = changed = _differentiable(args, kwargs)
        call = Call(self._paths[module], len(self._stack), sequence_number())
        with torch._C.DisableTorchFunction():  # else a mode that watches the forward is asked about each attribute
            call.input = next((node for x in tensors((args, kwargs)) if (node := x.grad_fn) is not None), None)
            given = [x.dtype for x in (*args, *map(kwargs.get, _IDS)) if isinstance(x, Tensor)]
            ids = any([not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool) for dtype in given])
        if ids and self.trace.embedding is None and isinstance(module, nn.Embedding):
            self.trace.embedding = call.path
            self.trace.consumer = next((outer.path for outer in reversed(self._stack) if outer.takes_ids), None)
        call.takes_ids = ids and accepts_mask(module)
        self._stack.append(call)
        self.trace.calls.append(call)
        return changed

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self._paths[module]
        # A model may catch an exception of one of its parts; then calls above ours never came back.
        while self._stack:
            call = self._stack.pop()
            if call.path == path:
                break
        else:
            return
        call.end = sequence_number()
        with torch._C.DisableTorchFunction():
            for result in tensors(output):
                if (node := result.grad_fn) is not None:
                    call.output, call.output_shape = node, tuple(result.shape)
                    break


def accepts_mask(module: nn.Module) -> bool:
    """The module's forward has an argument ``attention_mask``."""
    try:
        return "attention_mask" in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False


def _differentiable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with float tensors inside the autograd graph, so that the first residual is seen.

    Masks stay as they are (a mask that requires gradient changes the attention kernel); one tensor
    given twice stays one tensor.
    """
    memo: dict[int, Tensor] = {}

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad or value.is_nested:
            return value
        if id(value) not in memo:
            memo[id(value)] = value.detach().clone().requires_grad_().clone()
        return memo[id(value)]

    named = {name: value if "mask" in name else convert(value) for name, value in kwargs.items()}
    return tuple(convert(value) for value in args), named


def sequence_number() -> int:
    """Number that the next node created in this thread will carry at least."""
    return int(torch._C._autograd._get_sequence_nr())


def tensors(nest: Any) -> Iterator[Tensor]:
    """All tensors in a nest of mappings, sequences and dataclass-like outputs, in order."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        for value in nest.values():
            yield from tensors(value)
    elif isinstance(nest, list | tuple | set | frozenset):
        for value in nest:
            yield from tensors(value)
    elif hasattr(nest, "__dataclass_fields__"):
        for name in nest.__dataclass_fields__:
            yield from tensors(getattr(nest, name))
