"""A batch once for every run: its rows again and again, in blocks."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_pet.errors import ArgumentError

_SIMPLE = (str, bytes, bool, int, float, complex, type(None))


def rows_of(batch: Any) -> int:
    """Number of rows of a batch: the first dimension of all its tensors; one that is 1 holds for all rows.

    Raises:
        ArgumentError: naming the tensors, if they do not agree, or the batch has none.
    """
    sizes = {place: len(leaf) for place, leaf in _leaves(batch, "batch") if _has_rows(leaf)}
    if not sizes:
        raise ArgumentError(
            f"every row goes to every run, and the batch ({type(batch).__name__}) has no tensor with a first dimension "
            "to tell its rows by. Let the loader give tensors whose first dimension is the batch."
        )
    counted = Counter(size for size in sizes.values() if size != 1) or Counter(sizes.values())
    size = counted.most_common(1)[0][0]
    wrong = {place: other for place, other in sizes.items() if other not in (size, 1)}
    if wrong:
        place, other = next(iter(wrong.items()))
        like = next(place for place, own in sizes.items() if own == size)
        raise ArgumentError(
            f"every row goes to every run, and it does not show what a row is: {like} has {size}, {place} has {other}. "
            "The first dimension of every tensor of the batch must be its rows; compute what has none in the module."
        )
    return size


def repeated(batch: Any, times: int) -> Any:
    """The rows of a batch ``times`` times, in blocks: first all rows once, then all rows again.

    Containers keep their kinds; numbers, texts and tensors without dimensions, or with one entry for all rows, stay as
    they are.

    >>> repeated({"x": torch.tensor([[1], [2]]), "name": ["a", "b"], "epoch": 3}, 2)
    {'x': tensor([[1],
            [2],
            [1],
            [2]]), 'name': ['a', 'b', 'a', 'b'], 'epoch': 3}

    Raises:
        ArgumentError: naming what cannot be repeated.
    """
    return _repeated(batch, times, rows_of(batch), "batch")


def _repeated(value: Any, times: int, rows: int, place: str) -> Any:
    if isinstance(value, Tensor):
        if value.dim() == 0 or (len(value) == 1 and rows != 1):
            return value
        return value.repeat(times, *[1] * (value.dim() - 1))
    if isinstance(value, np.ndarray):
        return value if value.ndim == 0 or (len(value) == 1 and rows != 1) else np.concatenate([value] * times)
    if isinstance(value, _SIMPLE):
        return value
    if _is_column(value):
        if len(value) not in (rows, 0):
            raise ArgumentError(
                f"every row goes to every run, and {place} is a {type(value).__name__} of {len(value)} entries in a "
                f"batch of {rows} rows: whose are they? Leave it out of the batch, or give one per row."
            )
        return type(value)(list(value) * times)
    children = dict(_children(value, place))
    made = {key: _repeated(item, times, rows, name) for key, (name, item) in children.items()}
    return _rebuilt(value, made, place)


def _rebuilt(value: Any, made: dict[Any, Any], place: str) -> Any:
    if is_dataclass(value) and not isinstance(value, Mapping):
        return replace(value, **made)  # type: ignore[type-var]
    if isinstance(value, Mapping):
        try:
            return type(value)(made)  # type: ignore[call-arg]
        except TypeError as error:
            raise _unknown(value, place) from error
    return type(value)(*made.values()) if hasattr(value, "_fields") else type(value)(made.values())


def _children(value: Any, place: str) -> Iterator[tuple[Any, tuple[str, Any]]]:
    """Of a container, (key, (what messages call it, item)).

    Raises:
        ArgumentError: if it is none whose parts are known.
    """
    if isinstance(value, PackedSequence) or (isinstance(value, Tensor) and value.layout != torch.strided):
        raise _unknown(value, place)
    if isinstance(value, Mapping):
        yield from ((key, (f"{place}[{key!r}]", item)) for key, item in value.items())
    elif is_dataclass(value) and not isinstance(value, type):
        own = [field.name for field in fields(value) if field.init]
        yield from ((name, (f"{place}.{name}", getattr(value, name))) for name in own)
    elif isinstance(value, list | tuple):
        yield from ((key, (f"{place}[{key}]", item)) for key, item in enumerate(value))
    else:
        raise _unknown(value, place)


def _unknown(value: Any, place: str) -> ArgumentError:
    return ArgumentError(
        f"every row goes to every run, and {place} is a {type(value).__module__}.{type(value).__name__}, whose rows "
        "are not known. Use tensors whose first dimension is the batch, in dicts, lists, tuples or dataclasses."
    )


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor | np.ndarray):
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
            raise _unknown(value, place)
        yield place, value
    elif not isinstance(value, _SIMPLE) and not _is_column(value):
        for name, item in dict(_children(value, place)).values():
            yield from _leaves(item, name)


def _has_rows(leaf: Tensor | np.ndarray[Any, Any]) -> bool:
    return leaf.ndim > 0


def _is_column(value: Any) -> bool:
    """One entry per row, as texts are: a list in which there is no tensor, however deep."""
    return isinstance(value, list | tuple) and not hasattr(value, "_fields") and all(map(_is_plain, value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, _SIMPLE):
        return True
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return isinstance(value, list | tuple) and all(map(_is_plain, value))
