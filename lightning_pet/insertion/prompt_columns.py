"""Columns of virtual tokens that are put before those of a batch, and cut off again.

All rows may have the same prompt, or each its own: shorter ones, and rows without any, have hidden columns in front,
which no mask shows and no position counts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.model.tokens import IGNORED

CACHES = ("past_key_values", "cache_params", "mems", "past_buckets_states", "state")
MASKS = ("attention_mask",)
POSITIONS = ("position_ids", "cache_position")
OTHERS_LENGTH = ("encoder_hidden_states", "encoder_attention_mask", *CACHES)


class Columns:
    """Those of one prompt, the same in every row.

    Attributes:
        length: how many there are.
        first: the id of the first one.
        hides: some of them are hidden in some rows.
        told: positions have to be passed, as the model would count hidden columns.
    """

    hides = False
    told = False

    def __init__(self, length: int, first: int) -> None:
        self.length, self.first = length, first

    def ids(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The ids, batch × P."""
        return torch.arange(self.first, self.first + self.length, device=device, dtype=dtype).expand(batch, -1)

    def visible(self, mask: Tensor) -> Tensor:
        """What a batch × size mask says of them."""
        return mask.new_ones(mask.shape[0], self.length)

    def moved(self, positions: Tensor) -> Tensor:
        """Positions (… × size) of what comes behind them."""
        return positions + self.length

    def counted(self, positions: Tensor) -> Tensor:
        """Their own, from 0 on, for the rows of these positions."""
        return torch.arange(self.length, device=positions.device, dtype=positions.dtype)

    def among(self, place: Tensor, ids: Tensor) -> Tensor:
        """Ids (rows × size) with the virtual ones where a place is one of theirs."""
        return torch.where((place >= 0) & (place < self.length), self.first + place, ids)


class RowColumns(Columns):
    """Those of rows with a prompt each.

    Args:
        lengths: of each row's prompt, 0 where there is none.
        firsts: the id of its first token.
        told: see above.
        filler: id of hidden columns.
    """

    def __init__(self, lengths: Tensor, firsts: Tensor, told: bool, filler: int) -> None:
        super().__init__(int(lengths.max()), 0)
        self.lengths, self.firsts, self.filler = lengths, firsts, filler
        self.hides = bool((lengths < self.length).any())
        self.told = told and self.hides

    def _each(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Length and first id for each row of a batch, batch × 1; beams repeat each row."""
        rows = len(self.lengths)
        if batch < rows or batch % rows:
            raise TargetError(f"rows with different prompts: {rows} names for a batch of {batch}. Give one per row.")
        lengths, firsts = (x.to(device).repeat_interleave(batch // rows)[:, None] for x in (self.lengths, self.firsts))
        return lengths, firsts

    def _places(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The number of each column's token in the row's prompt, negative where it is hidden; and first ids."""
        lengths, firsts = self._each(batch, device)
        return torch.arange(self.length, device=device) - (self.length - lengths), firsts

    def ids(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The ids, batch × P."""
        places, firsts = self._places(batch, device)
        return torch.where(places >= 0, firsts + places, self.filler).to(dtype)

    def visible(self, mask: Tensor) -> Tensor:
        """What a batch × size mask says of them."""
        return (self._places(max(mask.shape[0], len(self.lengths)), mask.device)[0] >= 0).to(mask.dtype)

    def moved(self, positions: Tensor) -> Tensor:
        """Positions of what comes behind them: batch × size, or those of columns, size."""
        if positions.dim() == 1:
            return super().moved(positions)
        if positions.dim() != 2:
            raise TargetError(
                f"rows with different prompts: positions of shape {tuple(positions.shape)} are not known."
            )
        return positions + self._each(max(positions.shape[0], len(self.lengths)), positions.device)[0]

    def counted(self, positions: Tensor) -> Tensor:
        """Their own, from 0 on, for the rows of these positions."""
        if positions.dim() == 1:
            return super().counted(positions)
        batch = max(positions.shape[0], len(self.lengths))
        return self._places(batch, positions.device)[0].clamp(min=0).to(positions.dtype)

    def among(self, place: Tensor, ids: Tensor) -> Tensor:
        """Ids with the virtual ones where a place is one of theirs; hidden ones stay."""
        lengths, firsts = self._each(ids.shape[0], ids.device)
        own = place - (self.length - lengths)
        return torch.where((own >= 0) & (place < self.length), firsts + own, ids)


def extended(
    given: dict[str, Any], columns: Columns, ids_name: str, batch: int, size: int, starts: Tensor | None, embedded: Any
) -> dict[str, Any]:
    """The arguments of a call that starts a sequence; the prompt comes before these columns.

    Args:
        given: the arguments by name.
        columns: of the prompt.
        ids_name: which of them are the ids.
        batch: rows.
        size: tokens of each.
        starts: a column of each row; ``None``: the first.
        embedded: gives the vectors of the prompt, like others.
    """
    given = with_told(given, columns, ids_name, batch, size, 0)
    result = dict(given)
    for name, value in given.items():
        if name == ids_name and value is not None:
            dtype = torch.long if value.is_floating_point() else value.dtype
            result[name] = placed_before(value, columns.ids(batch, value.device, dtype), starts)
        elif name == "inputs_embeds" and value is not None:
            result[name] = placed_before(value, embedded(value), starts)
        elif name in MASKS and value is not None:
            result[name] = with_ones(value, columns, starts)
        elif name in POSITIONS and value is not None:
            result[name] = with_positions(value, columns, starts)
        elif name not in OTHERS_LENGTH and is_aligned(value, batch, size):
            fill = IGNORED if name == "labels" else 0
            more = value.new_full((value.shape[0], columns.length, *value.shape[2:]), fill)
            result[name] = placed_before(value, more, starts)
    return result


def with_told(
    given: dict[str, Any], columns: Columns, ids_name: str, batch: int, size: int, seen: int
) -> dict[str, Any]:
    """With the mask, and the positions, that hidden columns need; ``seen``: tokens in a cache."""
    tokens = given.get(ids_name)
    if not columns.hides or not isinstance(tokens, Tensor):
        return given
    more = {}
    if given.get(MASKS[0]) is None:
        more[MASKS[0]] = torch.ones(batch, seen + size, dtype=torch.long, device=tokens.device)
    if columns.told and given.get(POSITIONS[0]) is None:
        positions = torch.arange(seen, seen + size, device=tokens.device)
        more[POSITIONS[0]] = positions.expand(batch, -1)
    return given | more


def cached_length(given: dict[str, Any]) -> int:
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


def with_ones(mask: Any, columns: Columns, starts: Tensor | None = None) -> Tensor:
    """A batch × size mask with the prompt's columns before these."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"of type {type(mask).__name__}"
        raise ArgumentError(f"attention_mask {kind}: a prompt needs a mask of shape (batch, tokens), or none.")
    return placed_before(mask, columns.visible(mask), starts)


def is_aligned(value: Any, batch: int, size: int) -> bool:
    """One entry per token, for every row or for all rows alike."""
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] in (1, batch) and value.shape[1] == size


def with_positions(positions: Tensor, columns: Columns, starts: Tensor | None = None) -> Tensor:
    """Positions along the last dimension: the prompt takes the first, the others move behind it."""
    own, moved = columns.counted(positions), columns.moved(positions)
    if starts is None or positions.ndim != 2:
        first = positions.amin(-1, keepdim=True) + own
        return torch.cat([first.expand(*moved.shape[:-1], -1), moved], -1)
    positions, moved = positions.expand(len(starts), -1), moved.expand(len(starts), -1)
    first = positions.gather(1, starts.to(positions.device)[:, None])
    return with_columns(moved, starts, first + own)


def placed_before(value: Tensor, columns: Tensor, starts: Tensor | None) -> Tensor:
    """Columns (B × P × …) before column ``starts[b]`` of every row b, or in front; one row of either goes for all."""
    batch = max(value.shape[0], columns.shape[0]) if starts is None else len(starts)
    value, columns = (x.expand(batch, *x.shape[1:]) if x.shape[0] != batch else x for x in (value, columns))
    return torch.cat([columns, value], 1) if starts is None else with_columns(value, starts, columns)


def cut(output: Any, length: int, batch: int, size: int, starts: Tensor | None = None) -> Any:
    """An output without the prompt's positions, in whatever nest of tensors it comes."""
    if isinstance(output, Tensor):
        return _cut_tensor(output, length, batch, length + size, starts)
    if isinstance(output, dict):
        for name, value in output.items():
            if name not in CACHES and not name.startswith("encoder_"):
                output[name] = cut(value, length, batch, size, starts)
        return output
    if isinstance(output, tuple | list):
        values = [cut(value, length, batch, size, starts) for value in output]
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


def extend_aligned(given: dict[str, Any], columns: Columns, shape: Sequence[int], starts: Tensor | None) -> None:
    """Arguments of ``generate`` that are aligned with the ids."""
    for name, value in given.items():
        if not isinstance(value, Tensor) or name in ("inputs", "input_ids", "inputs_embeds"):
            continue
        if name in POSITIONS:
            given[name] = with_positions(value, columns)
        elif name not in OTHERS_LENGTH and tuple(value.shape[:2]) == tuple(shape):
            fill = columns.visible(value) if name in MASKS and value.dim() == 2 else None
            if fill is None:
                make = value.new_ones if name in MASKS else value.new_zeros
                fill = make((shape[0], columns.length, *value.shape[2:]))
            given[name] = torch.cat([fill, value], 1) if starts is None else with_columns(value, starts, fill)


def with_columns(value: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """Insert columns (B × P × …) before column ``starts[b]`` of every row b of a B × T × … tensor."""
    size, length = value.shape[1], columns.shape[1]
    starts = starts.to(value.device)[:, None]
    column = torch.arange(size + length, device=value.device)
    moved = torch.where(column < starts, column, column - length)
    # Among the columns of both side by side.
    index = torch.where((column >= starts) & (column < starts + length), size + column - starts, moved)
    both = torch.cat([value, columns.to(value.dtype)], 1)
    return both[torch.arange(both.shape[0], device=value.device)[:, None], index]


def without_columns(value: Tensor, starts: Tensor, length: int) -> Tensor:
    """Take P columns out of a B·n × T tensor, from column ``starts[b]`` on; the n rows of b are alike."""
    starts = starts.to(value.device).repeat_interleave(value.shape[0] // starts.shape[0])[:, None]
    kept = torch.arange(value.shape[1] - length, device=value.device)
    return value.gather(1, torch.where(kept < starts, kept, kept + length))
