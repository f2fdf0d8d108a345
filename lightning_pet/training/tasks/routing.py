"""Which row of a batch belongs to which task, and the part of a batch that belongs to one."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from lightning_pet.errors import ArgumentError

Key = str | int | Callable[[Any], Any]


def named_rows(found: Any, tasks: Sequence[str]) -> list[str] | str:
    """The task of each row, or the one task of all rows, by name.

    Args:
        found: what a batch says: one or one per row, by name or by number.
        tasks: all names.

    Raises:
        ArgumentError: naming what is no task, with the nearest that is.
    """
    if hasattr(found, "tolist"):  # tensors and arrays
        found = found.tolist()
    if isinstance(found, str | int):
        return _name(found, tasks)
    if not isinstance(found, list | tuple) or not found:
        raise ArgumentError(
            f"the tasks of a batch are {found!r}; expected the name or the number of one task, or one for each row."
        )
    return [_name(one, tasks) for one in found]


def _name(found: Any, tasks: Sequence[str]) -> str:
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, str) and found in tasks:
        return found
    if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(tasks):
        return tasks[found]
    known = ", ".join(map(repr, tasks))
    if isinstance(found, int) and not isinstance(found, bool):
        raise ArgumentError(f"a batch names the task {found}; there are {len(tasks)}, numbered from 0: {known}.")
    near = get_close_matches(str(found), tasks, 1, 0.5)
    raise ArgumentError(
        f"a batch names the task {found!r}, and TasksCallback has {known}."
        + (f" Did you mean {near[0]!r}?" if near else " Add it to `tasks`, or leave its rows out of the data.")
    )


def taken(batch: Any, key: Key) -> tuple[Any, Any]:
    """What a batch says of its tasks, and the batch without that.

    Modules know nothing of tasks: ``self.model(**batch)`` would meet an argument that it does not have.

    Raises:
        ArgumentError: if the batch says nothing, naming what is in it.
    """
    if callable(key):
        return key(batch), batch
    if isinstance(batch, Mapping):
        if key not in batch:
            raise ArgumentError(
                f"key={key!r}: the batch has no such entry, it has {', '.join(map(repr, batch))}. Let the data give "
                "the task of each row under this name, name another key, or give a function of the batch."
            )
        return batch[key], _without(batch, key)
    if type(batch) in (tuple, list) and isinstance(key, int):
        if not -len(batch) <= key < len(batch):
            raise ArgumentError(f"key={key}: the batch is a {type(batch).__name__} of {len(batch)} entries.")
        place = key % len(batch)
        return batch[place], type(batch)(item for index, item in enumerate(batch) if index != place)
    if isinstance(key, str) and hasattr(batch, key):
        return getattr(batch, key), batch
    raise ArgumentError(
        f"key={key!r}: the batch is a {type(batch).__name__}"
        + (f" of {len(batch)} entries" if isinstance(batch, tuple | list) else "")
        + ", which has nothing of this name. Give the position of the tasks in it (key=2), or a function of the batch."
    )


def _without(batch: Mapping[Any, Any], key: Any) -> Any:
    if type(batch) is dict:
        return {name: value for name, value in batch.items() if name != key}
    rest: Any = copy(batch)
    if hasattr(rest, "data") and isinstance(rest.data, dict):  # a UserDict, as tokenizers return
        rest.data = {name: value for name, value in rest.data.items() if name != key}
        return rest
    del rest[key]
    return rest


def size_of(batch: Any) -> int | None:
    """The number of rows: what the first dimensions of its tensors agree on, else that of the first."""
    sizes = [leaf.shape[0] for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return sizes[0] if sizes else None


def check_size(batch: Any, rows: int) -> None:
    """Refuse another number of tasks than rows.

    Raises:
        ArgumentError: saying both.
    """
    sizes = {leaf.shape[0] for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if sizes and rows not in sizes:
        raise ArgumentError(
            f"a batch names the tasks of {rows} rows, and its tensors have {' or '.join(map(str, sorted(sizes)))}. "
            "Give one task per row, or one for the whole batch."
        )


def leaves(value: Any) -> list[Any]:
    """Everything in a batch that holds nothing else."""
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in leaves(item)]
    if is_dataclass(value) and not isinstance(value, type):
        return [leaf for field in fields(value) for leaf in leaves(getattr(value, field.name))]
    return [value]


def part_of(value: Any, index: Sequence[int], rows: int) -> Any:
    """The part of a batch that belongs to some rows: of each tensor, list or tuple that has one entry per row.

    Args:
        value: the batch, or something in it.
        index: the rows.
        rows: of the batch.
    """
    if isinstance(value, Tensor):
        whole = value.dim() and value.shape[0] == rows
        return value.index_select(0, torch.tensor(index, device=value.device)) if whole else value
    if isinstance(value, Mapping):
        own = {name: part_of(item, index, rows) for name, item in value.items()}
        if type(value) is dict:
            return own
        changed: Any = copy(value)
        if hasattr(changed, "data") and isinstance(changed.data, dict):
            changed.data = own
        else:
            changed.update(own)
        return changed
    if isinstance(value, tuple | list):
        if len(value) == rows and not any(isinstance(item, Tensor) and item.dim() for item in value):
            return type(value)(value[i] for i in index)
        items = [part_of(item, index, rows) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: part_of(getattr(value, field.name), index, rows) for field in fields(value) if field.init}
        return replace(value, **own)
    return value


def joined(parts: Sequence[Any], index: Sequence[Sequence[int]], rows: int) -> Any:
    """What a step returned for parts of a batch, as it would have for all of it.

    Tensors and lists with an entry per row are put in the order of the rows, numbers are averaged by rows. Where rows
    of different tasks have different shapes, there is a list with one tensor per row.

    Args:
        parts: of each task.
        index: its rows.
        rows: of the batch.
    """
    first = parts[0]
    if len(parts) == 1 or any(part is None for part in parts):
        return first if len(parts) == 1 else None
    counts = [len(own) for own in index]
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts], index, rows) for name in first}
    order = [row for own in index for row in own]
    places = sorted(range(rows), key=order.__getitem__)
    if all(isinstance(part, Tensor) for part in parts):
        if all(part.dim() and part.shape[0] == count for part, count in zip(parts, counts, strict=True)):
            if len({part.shape[1:] for part in parts}) == 1:
                return torch.cat(list(parts)).index_select(0, torch.tensor(places, device=first.device))
            flat = [row for part in parts for row in part]
            return [flat[place] for place in places]
        if all(part.dim() == 0 for part in parts):
            return weighted(parts, counts)
        return list(parts)
    if all(isinstance(part, list) and len(part) == count for part, count in zip(parts, counts, strict=True)):
        flat = [row for part in parts for row in part]
        return [flat[place] for place in places]
    if isinstance(first, tuple):
        return tuple(joined(list(column), index, rows) for column in zip(*parts, strict=True))
    return list(parts)


def weighted(values: Sequence[Any], counts: Sequence[int]) -> Any:
    """The mean of some numbers, by rows."""
    total = sum(counts)
    return sum(value * (count / total) for value, count in zip(values, counts, strict=True))
