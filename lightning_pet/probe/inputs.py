"""Small inputs for models that describe themselves (Hugging Face's ``PreTrainedModel`` and its like)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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
