"""The wrapper around transformers' table of attention functions.

transformers' models call ``AttentionInterface.get_interface(...)(module, query, key, value, mask, ...)``. The
wrapper puts the prefix of ``module`` in front of key and value. That is after the cache was updated, so a
prefix enters no cache and moves no position. The table keeps its names: which masks a model builds depends on
them.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_pet.attention.masks import causal, each_for, seen_by_rows, wider
from lightning_pet.errors import TargetError
from lightning_pet.model.call import HERE


class LivePrefix:
    """Keys and values of one host while it runs.

    Attributes:
        key: heads × l × features.
        value: heads × l × features.
        used: an attention has had them.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key = key
        self.value = value
        self.used = False

    @property
    def length(self) -> int:
        """Positions."""
        return self.key.shape[-2]

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The given keys and values (… × heads × positions × features) with the prefix in front."""
        self.used = True
        return _joined(self.key, key), _joined(self.value, value)


class RowPrefixes(LivePrefix):
    """Keys and values of one host's prefixes, of which each row of the batch has its own.

    Attributes:
        visible: rows × l, which of the positions there are; ``None``: all.
    """

    def __init__(self, key: Tensor, value: Tensor, visible: Tensor | None) -> None:
        super().__init__(key, value)  # rows × heads × l × features
        self.visible = visible


def _joined(prefix: Tensor, real: Tensor) -> Tensor:
    heads, _, features = prefix.shape[-3:]
    shape = real.shape
    if len(shape) < 4 or shape[-3] != heads or shape[-1] != features:
        raise TargetError(
            f"prefix tuning: this attention was called with keys or values of shape {tuple(shape)}; its prefix "
            f"is for {heads} heads of {features} features. Exclude this site."
        )
    prefix = prefix if prefix.dtype == real.dtype else prefix.to(real.dtype)
    if prefix.dim() == 4:
        prefix = each_for(prefix, real)
    return torch.cat([prefix.expand(*shape[:-3], -1, -1, -1), real], dim=-2)


class InterfaceObserver(Protocol):
    """Sees what is asked of the interface."""

    def interface(
        self, attend: Callable[[], Any], module: nn.Module, key: Tensor, value: Tensor, biases: Sequence[Any] = ()
    ) -> Any:
        """Look at one attention, and run it by ``attend()``."""
        ...


_LOCK = threading.Lock()
_table: Callable[..., Any] | None = None  # transformers' own
_wanted = {"prefixes": 0, "observers": 0}  # by whom the wrapper is wanted, and how often


def install() -> None:
    """Wrap the table for the rest of the process."""
    _want("prefixes", 1)


def _want(who: str, change: int) -> None:
    global _table
    from transformers.modeling_utils import AttentionInterface

    with _LOCK:
        before = any(_wanted.values())
        _wanted[who] += change
        if any(_wanted.values()) and not before:
            _table = AttentionInterface.get_interface
            AttentionInterface.get_interface = _get_interface
        elif before and not any(_wanted.values()):
            AttentionInterface.get_interface = _table


@contextlib.contextmanager
def observed(observer: InterfaceObserver) -> Iterator[None]:
    """Show the observer every attention of this thread within the block; the table is then as it was before."""
    call = HERE.call
    outer, known = call.observer, "transformers.modeling_utils" in sys.modules
    if known:
        _want("observers", 1)
    call.observer = observer
    try:
        yield
    finally:
        call.observer = outer
        if known:
            _want("observers", -1)


def _get_interface(table: Any, attn_implementation: Any, default: Any) -> Any:
    assert _table is not None
    attend = _table(table, attn_implementation, default)
    kind = "eager" if attend is default else str(attn_implementation)
    return partial(_attend, attend, kind)


def _live_prefixes(module: nn.Module) -> list[LivePrefix]:
    """The prefixes of a module that is running."""
    pet = module._modules.get("pet")
    if pet is None:
        return []
    around = HERE.call.around  # nothing runs around anything almost always: no need to ask what acts
    if not around:
        return []
    owner, live = around[-1]
    if len(pet._modules) == 1 and owner in pet._modules.values() and isinstance(live, LivePrefix):
        return [live]  # the only one, and it runs
    if (rows := HERE.call.held_by(pet)) is not None:
        return [rows]
    found = [getattr(delta, "live", None) for delta in pet.active("around")]  # type: ignore[operator]
    return [live for live in found if live is not None]


def _attend(
    attend: Callable[..., Any],
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    prefixes = _live_prefixes(module)
    observer: InterfaceObserver | None = HERE.call.observer
    if prefixes and observer is None:
        return _attend_with(prefixes, attend, kind, module, query, key, value, attention_mask, *args, **kwargs)
    if observer is not None:
        call = partial(_attend_with, prefixes, attend, kind) if prefixes else attend
        call = partial(call, module, query, key, value, attention_mask, *args, **kwargs)
        return observer.interface(call, module, key, value, (attention_mask, kwargs.get("position_bias")))
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


def _attend_with(
    prefixes: list[LivePrefix],
    attend: Callable[..., Any],
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    length, positions = 0, key.shape[-2]
    _refuse(kind, positions, kwargs)
    attention_mask = _mask(kind, module, query, key, attention_mask, prefixes, kwargs)
    for live in prefixes:
        if isinstance(live, RowPrefixes) and live.visible is not None:
            attention_mask = seen_by_rows(attention_mask, live.visible, query, key, kind)
        key, value = live.before(key, value)
        length += live.length
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = torch.nn.functional.pad(bias, (length, 0))
    out = attend(module, query, key, value, attention_mask, *args, **kwargs)
    shares = out[1] if isinstance(out, tuple) and len(out) > 1 else None
    if shares is None or shares.dim() < 4 or shares.shape[-1] != positions + length:
        return out
    return (out[0], shares[..., length:], *out[2:])


def _mask(
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    prefixes: list[LivePrefix],
    kwargs: dict[str, Any],
) -> Any:
    """The mask with the prefixes, and ``is_causal`` set to what goes with it."""
    length = prefixes[0].length if len(prefixes) == 1 else sum(live.length for live in prefixes)
    if kind == "eager" or "flash" in kind or "flex" in kind:
        return wider(mask, length, query, key)  # eager and flex look at the mask alone; flash aligns at the end
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    kwargs["is_causal"] = False
    if mask is None and is_causal and query.shape[-2] > 1:
        return causal(length, query, key)[None, None]
    return wider(mask, length, query, key)


def _refuse(kind: str, positions: int, kwargs: dict[str, Any]) -> None:
    """Raise where the function would not do with a prefix what it does without."""
    if kwargs.get("cache") is not None:
        raise TargetError("prefix tuning: paged caches (continuous batching) are not supported; use generate.")
    if "flash" not in kind:
        return
    window = kwargs.get("sliding_window")
    if window is not None and positions > window:
        raise TargetError(
            f"prefix tuning: {kind} with a sliding window of {window} would push the prefix out of sight after "
            f"{window} positions. Load the model with attn_implementation='sdpa'."
        )
    if kwargs.get("cu_seq_lens_q") is not None:
        raise TargetError(
            f"prefix tuning: {kind} on packed sequences is not supported. Load the model with "
            "attn_implementation='sdpa', or do not pack."
        )
