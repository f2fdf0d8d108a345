"""Prepending virtual tokens inside a model, so that nobody outside notices.

The *consumer* is the innermost module that takes token ids (and a mask). Around its call, ids that exist in
the delta only are put before the batch, masks, positions and token types are extended, and what comes
out is cut back: labels, logits and heads see the positions they expect. ``generate`` keeps its own
account of lengths, caches and masks, so there the call is left alone and ``generate`` itself is wrapped:
it gets the prompt's length in valid ids, which the consumer overwrites when they come by.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.layers.delta import Delta, the_first_for_all
from lightning_pet.layers.prompt import VirtualTokens
from lightning_pet.model.call import HERE

IDS = ("input_ids", "ids", "tokens", "input", "x")
CACHES = ("past_key_values", "cache_params", "mems", "past_buckets_states", "state")
_MASKS = ("attention_mask",)
_POSITIONS = ("position_ids", "cache_position")
_OTHERS_LENGTH = ("encoder_hidden_states", "encoder_attention_mask", *CACHES)
IGNORED = -100
"""Label of positions that no loss counts."""


class PromptCall(Delta):
    """Around the consumer: the virtual tokens come first.

    Args:
        rows: the delta on the token table.
        table: the token table.
        names: names of the consumer's positional arguments, in order.
        cuts: cut the prompt's positions off the output (not those of an encoder whose output a decoder reads).
        limit: positions that the consumer has; 0: no limit.
    """

    path = "around"

    def __init__(
        self, rows: VirtualTokens, table: nn.Module, names: Sequence[str], cuts: bool = True, limit: int = 0
    ) -> None:
        super().__init__()
        self.length = rows.length
        self.names, self.cuts, self.limit = tuple(names), cuts, limit
        self.ids_name = next(name for name in (*IDS, *names) if name in names)
        self.__dict__ |= {"rows": rows, "table": table, "host": None}

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the consumer on the prompt and the batch."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = given.get(self.ids_name)
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            return call(*args, **kwargs)
        starts = HERE.call.held_by(self)
        if starts is not None:
            return call(**self._placed(given, starts))
        seen = _cached_length(given)
        batch, size = tokens.shape[:2]
        self._check_limit(seen + size)
        if seen:
            return call(**self._continued(given, seen, size))
        starts = self._starts(given, batch, size)
        output = call(**self._extended(given, batch, size, starts))
        return _cut(output, self.length, batch, size, starts) if self.cuts else output

    @staticmethod
    def row_form(deltas: Sequence["PromptCall | None"], ids: Tensor, owner: Any) -> Callable[..., Any] | None:
        """The first one's call, in which every row gets its own prompt's ids; all are of one length."""
        own = [delta for delta in deltas if delta is not None]
        if len(own) < len(deltas) or len({delta.length for delta in own}) > 1:
            return None
        first = own[0]
        begin = first.__dict__["rows"].first
        shifts = torch.tensor([delta.__dict__["rows"].first - begin for delta in own], device=ids.device)[ids]

        def run(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            def with_own(*args: Any, **kwargs: Any) -> Any:
                given = {**dict(zip(first.names, args, strict=False)), **kwargs}
                tokens = given.get(first.ids_name)
                if not isinstance(tokens, Tensor) or tokens.shape[0] % len(shifts):
                    raise TargetError(
                        "rows with different prompts need token ids (not inputs_embeds), and one name per row."
                    )
                shift = shifts.to(tokens.device).repeat_interleave(tokens.shape[0] // len(shifts))[:, None]
                virtual = (tokens >= begin) & (tokens < begin + first.length)
                return call(**given | {first.ids_name: torch.where(virtual, tokens + shift.to(tokens.dtype), tokens)})

            return first(with_own, *args, **kwargs)

        return run

    def _starts(self, given: dict[str, Any], batch: int, size: int) -> Tensor | None:
        """The column of each row's first real token; ``None``: no row has padding on the left.

        Behind the padding the prompt is as near as without any, which sliding windows and rotary positions see. The
        decoder that reads an encoder expects the prompt in front.
        """
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if not self.cuts or not isinstance(mask, Tensor) or mask.shape != (batch, size):
            return None
        if isinstance(positions, Tensor) and (positions.ndim != 2 or positions.shape[1] != size):
            return None
        return mask.bool().int().argmax(1)

    def virtual(self, like: Tensor, batch: int) -> Tensor:
        """The prompt's ids, batch × P."""
        first = self.__dict__["rows"].first
        dtype = torch.long if like.is_floating_point() else like.dtype
        return torch.arange(first, first + self.length, device=like.device, dtype=dtype).expand(batch, -1)

    def embedded(self, like: Tensor, batch: int) -> Tensor:
        """The prompt's vectors, batch × P × width."""
        vectors: Tensor = self.__dict__["table"](self.virtual(like, batch))
        return vectors.to(like.dtype)

    def _check_limit(self, size: int) -> None:
        if self.limit and size + self.length > self.limit:
            raise ArgumentError(
                f"{size} tokens and a prompt of {self.length} are more than the {self.limit} positions of the model. "
                f"Cut the inputs to {max(self.limit - self.length, 0)} tokens, or shorten the prompt."
            )

    def _extended(self, given: dict[str, Any], batch: int, size: int, starts: Tensor | None) -> dict[str, Any]:
        """The arguments of a call that starts a sequence; the prompt comes before these columns."""
        extended = dict(given)
        for name, value in given.items():
            if name == self.ids_name and value is not None:
                extended[name] = _placed_before(value, self.virtual(value, batch), starts)
            elif name == "inputs_embeds" and value is not None:
                extended[name] = _placed_before(value, self.embedded(value, batch), starts)
            elif name in _MASKS and value is not None:
                extended[name] = _with_ones(value, self.length, starts)
            elif name in _POSITIONS and value is not None:
                extended[name] = _with_positions(value, self.length, starts)
            elif name not in _OTHERS_LENGTH and _is_aligned(value, batch, size):
                fill = IGNORED if name == "labels" else 0
                columns = value.new_full((value.shape[0], self.length, *value.shape[2:]), fill)
                extended[name] = _placed_before(value, columns, starts)
        return extended

    def _continued(self, given: dict[str, Any], seen: int, size: int) -> dict[str, Any]:
        """The arguments of a call with a cache that holds the prompt already."""
        continued = dict(given)
        for name, value in given.items():
            if value is None:
                continue
            if name in _MASKS and isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] < seen + size:
                continued[name] = _with_ones(value, self.length, value.bool().int().argmax(1) if self.cuts else None)
            elif name in _POSITIONS:
                continued[name] = value + self.length
        return continued

    def _placed(self, given: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """Within ``generate``: the ids that stand in for the prompt become the virtual ones."""
        ids = given.get(self.ids_name)
        if not isinstance(ids, Tensor) or ids.shape[1] == 1:  # a step of cached decoding
            return given
        # One of each row of the user's batch; beams repeat each row.
        starts = rows.to(ids.device).repeat_interleave(ids.shape[0] // rows.shape[0])
        begin = starts + self._before() - _cached_length(given)
        place = torch.arange(ids.shape[1], device=ids.device) - begin[:, None]
        first = self.__dict__["rows"].first
        return given | {self.ids_name: torch.where((place >= 0) & (place < self.length), first + place, ids)}

    def _before(self) -> int:
        """Positions of the prompts that act and come before this one on the same host."""
        before = 0
        for other in () if self.__dict__["host"] is None else self.__dict__["host"].pet.active("around"):
            inner = other._modules.get("_fsdp_wrapped_module") or other
            if inner is self:
                break
            before += inner.length if isinstance(inner, PromptCall) else 0
        return before

    @contextmanager
    def placing(self, starts: Tensor) -> Iterator[None]:
        """Within the block ``generate`` has made room for the prompt, at these columns."""
        here = HERE.call
        before = here.around
        here.around = (*before, (self, starts))
        try:
            yield
        finally:
            here.around = before


class PromptMemory(Delta):
    """Around a decoder: its encoder's output is longer than the mask that the user gave.

    Args:
        length: the prompt's length.
        names: names of the decoder's positional arguments, in order.
    """

    path = "around"

    def __init__(self, length: int, names: Sequence[str]) -> None:
        super().__init__()
        self.length, self.names = length, tuple(names)

    row_form = staticmethod(the_first_for_all)

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Extend the mask where it is shorter than what it masks."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if isinstance(states, Tensor) and isinstance(mask, Tensor) and mask.shape[-1] + self.length == states.shape[1]:
            given["encoder_attention_mask"] = _with_ones(mask, self.length)
        return call(**given)


class PromptGenerate(Delta):
    """Around ``generate``: room for the prompt before the ids, which is taken off again.

    Args:
        consumer: the delta that overwrites this room.
        decoder: the prompt is in the decoder of an encoder-decoder.
        known: whether its account of lengths is that of transformers; other classes' is unknown.
    """

    path = "generate"

    def __init__(self, consumer: PromptCall, decoder: bool = False, known: bool = True) -> None:
        super().__init__()
        self.decoder, self.known = decoder, known
        self.__dict__ |= {"consumer": consumer, "host": None}

    row_form = staticmethod(the_first_for_all)

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Generate; the result holds the user's ids and the new ones."""
        if not self.known:
            raise TargetError(
                f"{type(self.__dict__['host']).__name__} has a generate of its own, in which a prompt has no known "
                "place. Call its forward, or adapt it with another method."
            )
        names = ("inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        consumer: PromptCall = self.__dict__["consumer"]
        starts = self._decoder_room(given) if self.decoder else self._room(given)
        self._lengths(given, consumer.length)
        if starts is None:
            with consumer.placing(torch.zeros(1, dtype=torch.long)):
                return call(**given)
        with consumer.placing(starts):
            result = call(**given)
        if isinstance(result, Tensor):
            return _without_columns(result, starts, consumer.length)
        result.sequences = _without_columns(result.sequences, starts, consumer.length)
        return result

    def _room(self, given: dict[str, Any]) -> Tensor | None:
        """Put the prompt's length before the first real ids; the columns, where the result has them."""
        consumer: PromptCall = self.__dict__["consumer"]
        embeds = given.get("inputs_embeds")
        if isinstance(embeds, Tensor):
            given["inputs_embeds"] = torch.cat([consumer.embedded(embeds, embeds.shape[0]), embeds], 1)
            _extend_aligned(given, consumer.length, embeds.shape[:2], None)
            return None
        key = "inputs" if given.get("inputs") is not None else "input_ids"
        ids = given.get(key)
        if ids is None:
            ids = self._start(1, given, ("bos_token_id",))
        # Behind the padding on the left, so that the prompt is as near as in training (sliding windows).
        starts = self._real(ids, given).int().argmax(1)
        # Copies of a token that is there anyway: penalties on what occurs see nothing new.
        stand_in = ids.gather(1, starts[:, None]).expand(-1, consumer.length)
        given[key] = _with_columns(ids, starts, stand_in)
        _extend_aligned(given, consumer.length, ids.shape[:2], starts)
        return starts

    def _decoder_room(self, given: dict[str, Any]) -> Tensor:
        consumer: PromptCall = self.__dict__["consumer"]
        ids = given.get("decoder_input_ids")
        if ids is None:
            source = given.get("inputs")
            names = ("input_ids", "inputs_embeds", "input_features", "pixel_values", "input_values")
            source = next((given[n] for n in names if given.get(n) is not None), None) if source is None else source
            batch = given["encoder_outputs"][0].shape[0] if source is None else source.shape[0]
            ids = self._start(batch, given, ("decoder_start_token_id", "bos_token_id"))
        given["decoder_input_ids"] = torch.cat([ids[:, :1].expand(-1, consumer.length), ids], 1)
        if given.get("decoder_attention_mask") is not None:
            given["decoder_attention_mask"] = _with_ones(given["decoder_attention_mask"], consumer.length)
        return torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)

    def _start(self, batch: int, given: dict[str, Any], names: Sequence[str]) -> Tensor:
        host: Any = self.__dict__["host"]
        for name in names:
            for config in (given.get("generation_config"), host.generation_config):
                token = given.get(name, getattr(config, name, None))
                if isinstance(token, int):
                    return torch.full((batch, 1), token, device=host.device)
        raise ArgumentError(f"generate got no ids, and the model has no {names[0]}: pass input_ids.")

    def _real(self, ids: Tensor, given: dict[str, Any]) -> Tensor:
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor):
            return mask.bool()
        pad = getattr(self.__dict__["host"].generation_config, "pad_token_id", None)
        return ids != pad if isinstance(pad, int) else torch.ones_like(ids, dtype=torch.bool)

    def _lengths(self, given: dict[str, Any], length: int) -> None:
        """Limits that count the whole sequence, and functions that look at it, do not see the prompt."""
        stored = self.__dict__["host"].generation_config
        config = given.get("generation_config")
        for name in ("max_length", "min_length"):
            other = name.replace("_", "_new_").replace("length", "tokens")
            value = given.get(name)
            if value is None and given.get(other) is None and getattr(config, other, None) is None:
                value = getattr(config, name, None)
                value = getattr(stored, name, None) if value is None else value
            if value is not None:
                given[name] = value + length
        for name in ("logits_processor", "stopping_criteria"):
            if given.get(name) is not None:
                given[name] = type(given[name])(partial(_unaware, item, length) for item in given[name])
        if given.get("prefix_allowed_tokens_fn") is not None:
            given["prefix_allowed_tokens_fn"] = partial(_allowed, given["prefix_allowed_tokens_fn"], length)


def _unaware(function: Callable[..., Any], length: int, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
    return function(input_ids[:, length:], scores, **kwargs)


def _allowed(function: Callable[..., Any], length: int, batch: int, ids: Tensor) -> Any:
    return function(batch, ids[length:])


# --- pieces ---------------------------------------------------------------------------------------


def _cached_length(given: dict[str, Any]) -> int:
    """Positions in the cache that a call was given; 1 where a cache is in use but does not count them."""
    for name in CACHES:
        cache = given.get(name)
        if cache is None:
            continue
        if not hasattr(cache, "get_seq_length"):
            return 1
        try:
            return int(cache.get_seq_length())
        except ValueError:  # a cache without attention layers
            return int(cache.has_previous_state())
    return 0


def _with_ones(mask: Any, length: int, starts: Tensor | None = None) -> Tensor:
    """A batch × size mask with the prompt's positions before these columns, which are always visible."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"of type {type(mask).__name__}"
        raise ArgumentError(f"attention_mask {kind}: a prompt needs a mask of shape (batch, tokens), or none.")
    return _placed_before(mask, mask.new_ones(mask.shape[0], length), starts)


def _is_aligned(value: Any, batch: int, size: int) -> bool:
    """One entry per token, for every row or for all rows alike."""
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] in (1, batch) and value.shape[1] == size


def _with_positions(positions: Tensor, length: int, starts: Tensor | None = None) -> Tensor:
    """Positions along the last dimension: the prompt takes the first, the others move behind it."""
    own = torch.arange(length, device=positions.device, dtype=positions.dtype)
    if starts is None or positions.ndim != 2:
        return torch.cat([positions.amin(-1, keepdim=True) + own, positions + length], -1)
    positions = positions.expand(len(starts), -1)
    first = positions.gather(1, starts.to(positions.device)[:, None])
    return _with_columns(positions + length, starts, first + own)


def _placed_before(value: Tensor, columns: Tensor, starts: Tensor | None) -> Tensor:
    """Columns (B × P × …) before column ``starts[b]`` of every row b, or in front; one row of either goes for all."""
    batch = max(value.shape[0], columns.shape[0]) if starts is None else len(starts)
    value, columns = (x.expand(batch, *x.shape[1:]) if x.shape[0] != batch else x for x in (value, columns))
    return torch.cat([columns, value], 1) if starts is None else _with_columns(value, starts, columns)


def _cut(output: Any, length: int, batch: int, size: int, starts: Tensor | None = None) -> Any:
    """An output without the prompt's positions, in whatever nest of tensors it comes."""
    if isinstance(output, Tensor):
        return _cut_tensor(output, length, batch, length + size, starts)
    if isinstance(output, dict):
        for name, value in output.items():
            if name not in CACHES and not name.startswith("encoder_"):
                output[name] = _cut(value, length, batch, size, starts)
        return output
    if isinstance(output, tuple | list):
        values = [_cut(value, length, batch, size, starts) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return output


def _cut_tensor(value: Tensor, length: int, batch: int, total: int, starts: Tensor | None) -> Tensor:
    if value.ndim == 4 and value.shape[-2:] == (total, total):  # attention probabilities
        rows = _without(value.transpose(1, 2), length, starts)
        return _without(rows.transpose(1, 3), length, starts).permute(0, 2, 3, 1)
    if value.ndim >= 3 and value.shape[:2] == (batch, total):
        return _without(value, length, starts)
    if value.ndim == 2 and value.shape[0] == batch * total:  # router logits of flattened tokens
        return _without(value.view(batch, total, -1), length, starts).flatten(0, 1)
    return value


def _without(value: Tensor, length: int, starts: Tensor | None) -> Tensor:
    """A B × T × … tensor without the prompt's columns."""
    if starts is None:
        return value[:, length:]
    column = torch.arange(value.shape[1] - length, device=value.device)
    kept = torch.where(column < starts.to(value.device)[:, None], column, column + length)
    return value[torch.arange(value.shape[0], device=value.device)[:, None], kept]


def _extend_aligned(given: dict[str, Any], length: int, shape: Sequence[int], starts: Tensor | None) -> None:
    """Arguments of ``generate`` that are aligned with the ids."""
    for name, value in given.items():
        if not isinstance(value, Tensor) or name in ("inputs", "input_ids", "inputs_embeds"):
            continue
        if name in _POSITIONS:
            given[name] = _with_positions(value, length)
        elif name not in _OTHERS_LENGTH and tuple(value.shape[:2]) == tuple(shape):
            fill = (value.new_ones if name in _MASKS else value.new_zeros)((shape[0], length, *value.shape[2:]))
            given[name] = torch.cat([fill, value], 1) if starts is None else _with_columns(value, starts, fill)


def _with_columns(value: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """Insert columns (B × P × …) before column ``starts[b]`` of every row b of a B × T × … tensor."""
    size, length = value.shape[1], columns.shape[1]
    starts = starts.to(value.device)[:, None]
    column = torch.arange(size + length, device=value.device)
    moved = torch.where(column < starts, column, column - length)
    # Among the columns of both side by side.
    index = torch.where((column >= starts) & (column < starts + length), size + column - starts, moved)
    both = torch.cat([value, columns.to(value.dtype)], 1)
    return both[torch.arange(both.shape[0], device=value.device)[:, None], index]


def _without_columns(value: Tensor, starts: Tensor, length: int) -> Tensor:
    """Take P columns out of a B·n × T tensor, from column ``starts[b]`` on; the n rows of b are alike."""
    starts = starts.to(value.device).repeat_interleave(value.shape[0] // starts.shape[0])[:, None]
    kept = torch.arange(value.shape[1] - length, device=value.device)
    return value.gather(1, torch.where(kept < starts, kept, kept + length))
