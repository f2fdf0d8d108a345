"""Two gloo processes: penalties beside the loss, and diff pruning, whose parameters change in the middle of the fit."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from launch import launch

SCRIPT = str(Path(__file__).with_name("penalised_ddp.py"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    codes, outputs = launch([SCRIPT, str(tmp_path_factory.mktemp("ddp"))], timeout=240)
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return [json.loads(output.split("FOUND ")[1].splitlines()[0]) for output in outputs]


def test_the_gradient_is_that_of_a_penalty_added_by_hand(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["penalised"] == ranks[1]["penalised"]
    plain = ranks[0]["penalised"][0]
    for ours, *theirs in ranks[0]["penalised"]:
        (truth,) = theirs or [plain[1]]
        assert len(ours) == len(truth) > 100
        assert ours == pytest.approx(truth, rel=1e-4, abs=1e-6)


def test_diff_pruning_agrees_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["pruned"] for rank in ranks)
    assert first["digest"] == second["digest"]
    assert first["losses"] != second["losses"]  # each has its own data
    assert first["kept"] == 12  # a tenth of 128 weights


def test_diff_pruning_resumes_in_every_stage(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for again in rank["again"]:
            assert again["digest"] == rank["pruned"]["digest"]
            assert again["losses"] == rank["pruned"]["losses"][-len(again["losses"]) :]
