"""The short census: every method on architectures of all kinds and on plain torch either works or refuses by name."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SERVED = {"lora", "houlsby", "pfeiffer", "parallel", "prefix", "prompt"}
REFUSED = {
    ("xlnet", "houlsby"),  # its attention is written as sums of products whose residual sum does not show
    ("mpt", "prefix"),  # it counts its bias from the last key, so that a prefix would make it look ahead
}
RECURRENT_OR_CONVOLUTIONAL = {"convnext", "mamba", "resnet", "torch.cnn", "torch.lstm"}


@pytest.fixture(scope="module")
def census(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("census") / "census.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "census.py"), "--short", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text(encoding="utf-8"))


def outcomes(census: list[dict[str, Any]], status: str) -> dict[str, str]:
    return {
        f"{row['model']}, {method}": found["why"]
        for row in census
        for method, found in row["methods"].items()
        if found["status"] == status
    }


def test_forty_architectures_of_all_kinds_run(census: list[dict[str, Any]]) -> None:
    assert not [row for row in census if "kind" not in row]
    kinds = Counter(row["kind"] for row in census)
    assert sum(kinds.values()) >= 45
    assert {"causal", "encoder", "seq2seq", "vision", "audio", "plain torch"} <= kinds.keys()


def test_nothing_fails(census: list[dict[str, Any]]) -> None:
    assert outcomes(census, "failed") == {}


def test_what_is_refused_is_named(census: list[dict[str, Any]]) -> None:
    for place, why in outcomes(census, "refused").items():
        assert why.startswith(("TargetError: ", "ArgumentError: ")), (place, why)
        assert len(why.split()) > 8, (place, why)


def test_attention_models_are_served(census: list[dict[str, Any]]) -> None:
    refused = outcomes(census, "refused")
    text = {row["model"] for row in census if row["kind"] in ("causal", "encoder", "seq2seq")}
    for row in census:
        for method in SERVED & row["methods"].keys():
            expected = row["model"] in text if method == "prompt" else row["model"] not in RECURRENT_OR_CONVOLUTIONAL
            if expected and (row["model"], method) not in REFUSED:
                assert f"{row['model']}, {method}" not in refused, (row["model"], method, refused)
