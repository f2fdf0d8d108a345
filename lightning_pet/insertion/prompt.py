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
from lightning_pet.insertion.prompt_columns import (
    MASKS,
    POSITIONS,
    Columns,
    RowColumns,
    cached_length,
    cut,
    extend_aligned,
    extended,
    with_columns,
    with_ones,
    with_told,
    without_columns,
)
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.prompt import VirtualTokens
from lightning_pet.model.call import HERE

IDS = ("input_ids", "ids", "tokens", "input", "x")


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
        return self._with(Columns(self.length, self.__dict__["rows"].first), call, args, kwargs)

    def _with(self, columns: Columns, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = given.get(self.ids_name)
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            return call(*args, **kwargs)
        starts = HERE.call.held_by(self)
        if starts is not None:
            return call(**self._placed(given, starts, columns))
        seen = cached_length(given)
        batch, size = tokens.shape[:2]
        self._check_limit(seen + size, columns.length)
        if seen:
            return call(**self._continued(given, seen, batch, size, columns))
        starts = self._starts(given, batch, size)

        def embedded(like: Tensor) -> Tensor:
            return self.embedded(like, batch)

        output = call(**extended(given, columns, self.ids_name, batch, size, starts, embedded))
        return cut(output, columns.length, batch, size, starts) if self.cuts else output

    @staticmethod
    def row_form(deltas: Sequence["PromptCall | None"], ids: Tensor, owner: Any) -> Callable[..., Any]:
        """The first one's call, in which every row gets its own prompt's ids."""
        own = next(delta for delta in deltas if delta is not None)
        columns = columns_of(deltas, ids, own.told(owner))

        def run(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = {**dict(zip(own.names, args, strict=False)), **kwargs}
            if not isinstance(given.get(own.ids_name), Tensor):
                raise TargetError("rows with different prompts need token ids (not inputs_embeds).")
            return own._with(columns, call, args, kwargs)

        return run

    @property
    def filler(self) -> int:
        """The id of hidden columns."""
        found = getattr(getattr(self.__dict__["host"], "config", None), "pad_token_id", None)
        return found if isinstance(found, int) and found >= 0 else 0

    def told(self, owner: Any) -> bool:
        """Whether the consumer has to be told positions where columns are hidden."""
        found = owner.rows()
        rows = None if found is None else found[1]
        return rows is not None and bool(rows.manners.told.get(rows.places.get(id(self.__dict__["host"]))))

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

    def embedded(self, like: Tensor, batch: int) -> Tensor:
        """The prompt's vectors, batch × P × width."""
        columns = Columns(self.length, self.__dict__["rows"].first)
        vectors: Tensor = self.__dict__["table"](columns.ids(batch, like.device, torch.long))
        return vectors.to(like.dtype)

    def _check_limit(self, size: int, length: int) -> None:
        if self.limit and size + length > self.limit:
            raise ArgumentError(
                f"{size} tokens and a prompt of {length} are more than the {self.limit} positions of the model. "
                f"Cut the inputs to {max(self.limit - length, 0)} tokens, or shorten the prompt."
            )

    def _continued(self, given: dict[str, Any], seen: int, batch: int, size: int, columns: Columns) -> dict[str, Any]:
        """The arguments of a call with a cache that holds the prompt already."""
        given = with_told(given, columns, self.ids_name, batch, size, seen - columns.length)
        continued = dict(given)
        for name, value in given.items():
            if value is None:
                continue
            if name in MASKS and isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] < seen + size:
                continued[name] = with_ones(value, columns, value.bool().int().argmax(1) if self.cuts else None)
            elif name in POSITIONS:
                continued[name] = columns.moved(value)
        return continued

    def _placed(self, given: dict[str, Any], rows: Tensor, columns: Columns) -> dict[str, Any]:
        """Within ``generate``: the ids that stand in for the prompt become the virtual ones."""
        ids = given.get(self.ids_name)
        if not isinstance(ids, Tensor) or ids.shape[1] == 1:  # a step of cached decoding
            return given
        # One of each row of the user's batch; beams repeat each row.
        starts = rows.to(ids.device).repeat_interleave(ids.shape[0] // rows.shape[0])
        begin = starts + self._before() - cached_length(given)
        place = torch.arange(ids.shape[1], device=ids.device) - begin[:, None]
        return given | {self.ids_name: columns.among(place, ids)}

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

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Extend the mask where it is shorter than what it masks."""
        return self._with(Columns(self.length, 0), call, args, kwargs)

    def _with(self, columns: Columns, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if columns.hides and mask is None and isinstance(states, Tensor):
            mask = torch.ones(states.shape[0], states.shape[1] - columns.length, dtype=torch.long, device=states.device)
        if not isinstance(states, Tensor) or not isinstance(mask, Tensor):
            return call(**given)
        if mask.shape[-1] + columns.length == states.shape[1]:
            given["encoder_attention_mask"] = with_ones(mask, columns)
        return call(**given)

    @staticmethod
    def row_form(deltas: Sequence["PromptMemory | None"], ids: Tensor, owner: Any) -> Callable[..., Any]:
        """The same with the prompt of each row."""
        own = next(delta for delta in deltas if delta is not None)
        columns = columns_of(deltas, ids)
        return lambda call, args, kwargs: own._with(columns, call, args, kwargs)


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

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Generate; the result holds the user's ids and the new ones."""
        consumer: PromptCall = self.__dict__["consumer"]
        return self._with(Columns(consumer.length, consumer.__dict__["rows"].first), call, args, kwargs)

    @staticmethod
    def row_form(deltas: Sequence["PromptGenerate | None"], ids: Tensor, owner: Any) -> Callable[..., Any]:
        """The same with room for the longest prompt of all rows."""
        own = next(delta for delta in deltas if delta is not None)
        columns = columns_of([None if delta is None else delta.__dict__["consumer"] for delta in deltas], ids)
        return lambda call, args, kwargs: own._with(columns, call, args, kwargs)

    def _with(self, columns: Columns, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.known:
            raise TargetError(
                f"{type(self.__dict__['host']).__name__} has a generate of its own, in which a prompt has no known "
                "place. Call its forward, or adapt it with another method."
            )
        names = ("inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        consumer: PromptCall = self.__dict__["consumer"]
        starts = self._decoder_room(given, columns) if self.decoder else self._room(given, columns)
        self._lengths(given, columns.length)
        if starts is None:
            with consumer.placing(torch.zeros(1, dtype=torch.long)):
                return call(**given)
        with consumer.placing(starts):
            result = call(**given)
        if isinstance(result, Tensor):
            return without_columns(result, starts, columns.length)
        result.sequences = without_columns(result.sequences, starts, columns.length)
        return result

    def _room(self, given: dict[str, Any], columns: Columns) -> Tensor | None:
        """Put the prompt's length before the first real ids; the columns, where the result has them."""
        consumer: PromptCall = self.__dict__["consumer"]
        embeds = given.get("inputs_embeds")
        if isinstance(embeds, Tensor):
            if isinstance(columns, RowColumns):
                raise TargetError("rows with different prompts need token ids (not inputs_embeds).")
            given["inputs_embeds"] = torch.cat([consumer.embedded(embeds, embeds.shape[0]), embeds], 1)
            extend_aligned(given, columns, embeds.shape[:2], None)
            return None
        key = "inputs" if given.get("inputs") is not None else "input_ids"
        ids = given.get(key)
        if ids is None:
            ids = self._start(1, given, ("bos_token_id",))
        # Behind the padding on the left, so that the prompt is as near as in training (sliding windows).
        real = self._real(ids, given)
        starts = real.int().argmax(1)
        if columns.hides and given.get(MASKS[0]) is None:
            given[MASKS[0]] = real.long()
        # Copies of a token that is there anyway: penalties on what occurs see nothing new.
        stand_in = ids.gather(1, starts[:, None]).expand(-1, columns.length)
        given[key] = with_columns(ids, starts, stand_in)
        extend_aligned(given, columns, ids.shape[:2], starts)
        return starts

    def _decoder_room(self, given: dict[str, Any], columns: Columns) -> Tensor:
        ids = given.get("decoder_input_ids")
        if ids is None:
            source = given.get("inputs")
            names = ("input_ids", "inputs_embeds", "input_features", "pixel_values", "input_values")
            source = next((given[n] for n in names if given.get(n) is not None), None) if source is None else source
            batch = given["encoder_outputs"][0].shape[0] if source is None else source.shape[0]
            ids = self._start(batch, given, ("decoder_start_token_id", "bos_token_id"))
        given["decoder_input_ids"] = torch.cat([ids[:, :1].expand(-1, columns.length), ids], 1)
        if columns.hides and given.get("decoder_attention_mask") is None:
            given["decoder_attention_mask"] = torch.ones_like(ids)
        if given.get("decoder_attention_mask") is not None:
            given["decoder_attention_mask"] = with_ones(given["decoder_attention_mask"], columns)
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


def columns_of(deltas: Sequence[PromptCall | PromptMemory | None], ids: Tensor, told: bool = False) -> RowColumns:
    """The columns of rows with the prompts of these groups; ``None``: no prompt.

    Args:
        deltas: one per group of rows.
        ids: of each row, its group.
        told: the model has to be told positions where columns are hidden.
    """
    calls = [delta for delta in deltas if isinstance(delta, PromptCall)]
    lengths = [0 if delta is None else delta.length for delta in deltas]
    firsts = [delta.__dict__["rows"].first if isinstance(delta, PromptCall) else 0 for delta in deltas]
    length, first = (torch.tensor(numbers, device=ids.device)[ids] for numbers in (lengths, firsts))
    return RowColumns(length, first, told, calls[0].filler if calls else 0)
