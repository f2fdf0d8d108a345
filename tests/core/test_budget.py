"""The search for the widest delta that a budget pays for."""

import pytest

from lightning_pet.callbacks.base import affordable, check_affordable, smallest_share, widest
from lightning_pet.errors import ArgumentError


@pytest.mark.parametrize(
    "numbers",
    [lambda w: 7 * w, lambda w: 7 * w + 11, lambda w: 3 * w * w, lambda w: 5 * (w // 2) + 18, lambda w: 40 + w**3],
)
@pytest.mark.parametrize("limit", [50, 97, 1000, 123_456])
def test_widest_is_the_largest_that_fits(numbers: object, limit: int) -> None:
    width = widest(numbers, limit)
    assert numbers(width) <= limit < numbers(width + 1)


def test_few_questions_where_numbers_grow_in_proportion() -> None:
    asked = []
    assert widest(lambda w: asked.append(w) or 1_000 * w + 17, 5_000_500) == 5000
    assert len(asked) <= 4


def test_impossible_widths_end_the_search() -> None:
    assert widest(lambda w: 10 * w if w <= 16 else None, 10_000) == 16


def test_a_width_without_an_effect_stays_small() -> None:
    assert widest(lambda w: 10, 10_000) == 1


@pytest.mark.parametrize(("numbers", "base"), [(1, 3), (7, 100), (123, 4567), (17, 1_000_003), (5, 7_000_000_000)])
def test_the_share_in_the_message_works_and_is_not_much_more(numbers: int, base: int) -> None:
    share = smallest_share(numbers, base)
    assert numbers <= affordable(share, base)
    assert share <= 1.011 * numbers / base
    with pytest.raises(ArgumentError, match=str(share)):
        check_affordable(numbers, base, numbers / base * 0.98, "r=1")
