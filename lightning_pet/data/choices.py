"""Possible answers beside each source text: reading them from a table, and padding them to a batch."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from lightning_pet.data.tables import Table
from lightning_pet.errors import ArgumentError

_IGNORED = -100
KEYS = ("choices", "choice")
"""What a batch holds besides: (batch, choices, tokens) labels with -100 as padding, and the index of the right one."""


def choice_lists(table: Table, column: str) -> list[list[str]]:
    """The possible answers of every row: a list of texts, or such a list as a JSON text (in a CSV file).

    Raises:
        ArgumentError: a value is no list of distinct texts.
    """
    return [_parse(value, f"{table.source}: row {row + 1}") for row, value in enumerate(table.columns[column])]


def _parse(value: Any, where: str) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(found) < 2 or len(set(map(str, found))) < len(found) or not all(isinstance(v, str) and v for v in found):
        raise ArgumentError(f"{where} has the choices {value!r}, expected a list of at least two distinct texts")
    return found


def right_choices(choices: Sequence[Sequence[str]], targets: Sequence[str], source: object) -> list[int]:
    """Index of the target among the choices of each row.

    Raises:
        ArgumentError: a target is none of its choices.
    """
    for row, (options, target) in enumerate(zip(choices, targets, strict=True)):
        if target not in options:
            raise ArgumentError(
                f"{source}: row {row + 1} has the target {target!r}, which is none of its choices {list(options)}"
            )
    return [list(options).index(target) for options, target in zip(choices, targets, strict=True)]


class ChoiceCollator:
    """Pads the choices of a list of examples, and leaves the rest to another collator.

    Args:
        rest: pads everything else.
    """

    def __init__(self, rest: Any) -> None:
        self.rest = rest

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        """Make a batch; examples without choices stay without."""
        batch = self.rest([{k: v for k, v in example.items() if k not in KEYS} for example in examples])
        if "choices" in examples[0]:
            batch["choices"] = _padded([example["choices"] for example in examples])
        if "choice" in examples[0]:
            batch["choice"] = torch.tensor([example["choice"] for example in examples])
        return batch


def _padded(rows: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    tokens = max(len(ids) for row in rows for ids in row)
    padded = torch.full((len(rows), max(map(len, rows)), tokens), _IGNORED)
    for i, row in enumerate(rows):
        for j, ids in enumerate(row):
            padded[i, j, : len(ids)] = torch.tensor(ids)
    return padded
