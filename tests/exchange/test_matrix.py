"""Every method and option of the exchange with HF PEFT on some architectures and on every kind of layer.

All architectures are measured by ``benchmarks/exchange.py``, which writes the tables of ``docs/exchange.md``.
"""

import pytest

from tests.exchange.matrix import Outcome, read, written
from tests.exchange.matrix_cases import CASES, Case
from tests.exchange.places import Place, in_architectures, of_kinds

ARCHITECTURES = in_architectures()
KINDS = [next(place for place in places if place.architecture == "plain torch") for places in of_kinds().values()]


def some(case: Case) -> list[Place]:
    """Three architectures, others for each case, and plain torch with each kind of layer."""
    first = 3 * CASES.index(case)
    chosen = [ARCHITECTURES[(first + step) % len(ARCHITECTURES)] for step in range(3)]
    if not case.layers:
        return [*ARCHITECTURES] if case.float32 else [*chosen, ARCHITECTURES[-1]]
    return [*chosen, *KINDS]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_are_equal_or_somebody_refuses(case: Case) -> None:
    found: dict[str, Outcome] = {}
    for place in some(case):
        outcomes = (read(case, place), *written(case, place))
        for direction, outcome in zip(("read", "written", "in transformers"), outcomes, strict=True):
            found[f"{direction}: {place.architecture}, {place.kind}"] = outcome
    apart = {where: outcome.difference for where, outcome in found.items() if (outcome.difference or 0) > case.bound}
    assert not apart
    for direction, there in (("read", case.theirs), ("written", case.ours)):
        equal = [where for where, outcome in found.items() if where.startswith(direction) and not outcome.by]
        assert equal or there is None
