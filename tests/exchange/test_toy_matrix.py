"""HF PEFT's matrix of toy models, of the methods that have a counterpart here: attached, trained, exchanged, merged."""

import pytest

from lightning_pet import PETError
from tests.exchange.toy_matrix import check, reason
from tests.exchange.toy_rows import ROWS, Row


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("row", [row for row in ROWS if not reason(row)], ids=lambda row: row.name)
def test_a_row_passes(row: Row) -> None:
    check(row)


@pytest.mark.parametrize("row", [row for row in ROWS if reason(row) not in ("", "not here")], ids=lambda row: row.name)
def test_what_does_not_pass_is_refused_by_name(row: Row) -> None:
    with pytest.raises(PETError):
        check(row)
