"""Sizing a method by a share of the base: the largest width that spends no more than that."""

from collections.abc import Callable, Sequence

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_pet.errors import ArgumentError
from lightning_pet.insertion.method import Insertion
from lightning_pet.model.adaptation import record_of
from lightning_pet.model.naming import canonical
from lightning_pet.model.quantised import numbers_in


def base_numbers(root: nn.Module) -> int:
    """Numbers in the base model without deltas; a tied tensor counts once."""
    record = record_of(root)
    own = set(record.delta_names) if record else set()
    return sum(numbers_in(p) for name, p in root.named_parameters() if canonical(name) not in own)


def delta_numbers(root: nn.Module, build: Callable[[], Sequence[Insertion]]) -> int:
    """Trained numbers of the deltas that ``build`` returns; a shared parameter counts once.

    Shapes only: nothing is allocated, computed or drawn, so asking for many widths is cheap on a large model.
    """
    if any(parameter.is_meta for parameter in root.parameters()):
        insertions = build()  # there is no memory to save, and fake tensors cannot stand for meta tensors
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            insertions = build()
    trained = {id(p): p for i in insertions for p in i.delta.parameters() if p.requires_grad}
    return sum(parameter.numel() for parameter in trained.values())


def widest(numbers: Callable[[int], int | None], limit: int) -> int:
    """The largest width, from 1, whose numbers are within a limit.

    Args:
        numbers: trained numbers at a width, not falling with it; ``None`` where the width is impossible.
        limit: numbers that may be spent; those at width 1 are within it.

    >>> widest(lambda width: 10 * width + 3, 95)
    9
    """
    smallest = numbers(1) or 0
    low, high, probe = 1, 0, 2
    while high == 0 or high - low > 1:
        found = numbers(probe)
        if found is None or found > limit:
            high = probe
        elif found <= smallest:
            break  # nothing at all depends on the width
        else:
            low = probe
        if high:
            probe = (low + high) // 2
        elif found is not None:
            # Most methods grow in proportion, so that the first jump lands on the answer.
            probe = low + max(1, (limit - found) * (low - 1) // (found - smallest))
    return low


def affordable(budget: float, base: int) -> int:
    """Numbers that a share of the base pays for."""
    return int(budget * base * (1 + 1e-12))  # a share such as 0.07 of 100 must not fall to 6 by rounding


def check_affordable(smallest: int, base: int, budget: float, width: str) -> None:
    """Refuse a budget that does not pay for the smallest width.

    Raises:
        ArgumentError: naming the smallest budget that does.
    """
    if smallest > affordable(budget, base):
        raise ArgumentError(
            f"budget={budget}: {width} costs {smallest:,} numbers, which is more than that share of the base's "
            f"{base:,}. The smallest budget that works is {smallest_share(smallest, base)}; or leave targets out."
        )


def smallest_share(numbers: int, base: int) -> float:
    """A short decimal, rounded up, that is enough for so many numbers.

    >>> smallest_share(1, 3)
    0.334
    """
    scale = 1000
    while numbers * scale < 100 * base:  # three significant digits
        scale *= 10
    return -(-numbers * scale // base) / scale
