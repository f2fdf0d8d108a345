"""What is written for HF PEFT, key by key: a change of it, here or in a release of PEFT, shows as a difference.

``python -m tests.exchange.test_golden_folders`` writes it down anew.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lightning_pet import PETError, export_delta
from tests.exchange.matrix import base_of, here, there
from tests.exchange.matrix_cases import CASES, Case
from tests.exchange.places import in_architectures

GOLDEN = Path(__file__).parents[1] / "reference" / "peft_folders.json"
PLACE = next(place for place in in_architectures() if place.architecture == "Llama")


def described(folder: Path) -> dict[str, Any]:
    """Names with their shapes, those of one layer, and the configuration."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {key: str(list(tensor.shape)) for key, tensor in sorted(tensors.items()) if ".layers.1." not in key}
    named = {key: sorted(value) if isinstance(value, list) else value for key, value in sorted(config.items())}
    return {"tensors": shapes, "config": named}


def both(case: Case, parent: Path) -> dict[str, Any]:
    """What is written here, and the names that PEFT writes."""
    base, found = base_of(case, PLACE), {}
    if case.ours is not None:
        try:
            export_delta(here(base, case.ours(PLACE)), parent / "ours")
        except PETError as error:
            found["ours"] = {"refused": str(error).partition(":")[0]}
        else:
            found["ours"] = described(parent / "ours")
    if case.theirs is not None:
        there(base, case.theirs(PLACE), parent / "theirs")
        theirs = described(parent / "theirs")
        found["theirs"] = {"tensors": theirs["tensors"], "options": sorted(theirs["config"])}
    return found


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_folder_is_as_it_was(case: Case, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert both(case, tmp_path) == golden[case.name]


if __name__ == "__main__":
    written: dict[str, Any] = {}
    for one in CASES:
        with tempfile.TemporaryDirectory() as place:
            written[one.name] = both(one, Path(place))
    GOLDEN.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
