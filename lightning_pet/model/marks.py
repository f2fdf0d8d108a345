"""What tensors held at one moment, remembered without keeping them.

A version counter would be free, but writes through ``.data``, as averages of weights are usually kept, do not
count. So the values are read: once, at the speed of memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lightning_pet.layers.sharding import is_sharded, ordinary_parts

_ROW: Final = 8192  # bytes that are summed into one number
_SMALL: Final = 2 * _ROW  # bytes up to which a tensor is kept as it is

Form = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class Mark:
    """What one tensor held: its bytes if they are few, else their sums row by row, as whole numbers.

    Of a tensor that an engine has split, it is about the part that this process holds.
    """

    forms: tuple[Form, ...]
    sums: tuple[Tensor, ...]


def mark(tensor: Tensor) -> Mark | None:
    """Remember what a tensor holds; ``None`` if its values cannot be read."""
    parts = _parts(tensor)
    return Mark(tuple(map(_form, parts)), tuple(map(_sums, parts))) if parts else None


def compare(pairs: Iterable[tuple[Tensor, Mark | None]]) -> list[bool | None]:
    """Whether each tensor holds something else than when it was marked.

    ``None`` where that cannot be told: it was not marked, or has another form now (an engine has split or gathered
    it, it was cast).
    """
    answers: list[bool | None] = []
    found: list[Tensor] = []
    places: list[int] = []
    for tensor, before in pairs:
        parts = _parts(tensor)
        comparable = before is not None and bool(parts) and before.forms == tuple(map(_form, parts))
        answers.append(False if comparable else None)
        if comparable and before is not None:
            for part, sums in zip(parts, before.sums, strict=True):
                found.append((_sums(part) != sums.to(part.device)).any())
                places.append(len(answers) - 1)
    # All at once: reading one answer of a GPU waits for it.
    devices = {flag.device for flag in found}
    for device in devices:
        here = [i for i, flag in enumerate(found) if flag.device == device]
        for i, flag in zip(here, torch.stack([found[i] for i in here]).tolist(), strict=True):
            answers[places[i]] = bool(answers[places[i]]) or flag
    return answers


def _parts(tensor: Tensor) -> list[Tensor]:
    # ZeRO-3 keeps a process's part beside the parameter, which is empty or whole as the engine needs it.
    held: Tensor = getattr(tensor, "ds_tensor", tensor)
    return ordinary_parts(held.detach().to_local() if is_sharded(held) else held)  # type: ignore[attr-defined]


def _form(part: Tensor) -> Form:
    return part.shape, part.dtype


@torch.no_grad()
def _sums(part: Tensor) -> Tensor:
    data = part.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() <= _SMALL:
        return data.clone()
    if data.storage_offset() % 8:
        data = data.clone()
    rows, words = data.numel() // _ROW, data.numel() // 8
    numbers = data[: words * 8].view(torch.int64)
    whole = rows * (_ROW // 8)
    return torch.cat([numbers[:whole].view(rows, -1).sum(1), numbers[whole:], data[words * 8 :].to(torch.int64)])
