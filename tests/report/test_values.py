"""Delta files are verified and measured without torch as they are with it."""

import json
import math
import subprocess
import sys

import pytest
import torch

from lightning_pet.errors import DeltaFileError
from lightning_pet.report.delta_summary import verified_norms
from lightning_pet.store.delta_file import read_delta, write_delta
from lightning_pet.store.fingerprint import DTYPES
from lightning_pet.store.manifest import Manifest, MethodRecord


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t.{code}": (torch.randn(7, 5) * 9).to(dtype) for code, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(-2.0), "empty": torch.empty(0, 3)}
    write_delta(tmp_path / "d.safetensors", tensors, Manifest((MethodRecord("lora", "default"),)))
    return tmp_path / "d.safetensors"


def test_manifest_and_norms(path):
    manifest, norms = verified_norms(path)
    found = read_delta(path)
    assert manifest == found.manifest
    assert norms.keys() == found.tensors.keys()
    for name, tensor in found.tensors.items():
        assert math.isclose(norms[name], float(tensor.double().norm()), rel_tol=1e-14, abs_tol=0)


@pytest.mark.parametrize("place", range(-8, 0))
def test_damage_has_the_same_words(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    words = []
    for reader in (read_delta, verified_norms):
        with pytest.raises(DeltaFileError) as caught:
            reader(path)
        words.append((str(caught.value), caught.value.code))
    assert words[0] == words[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_has_the_same_words(tmp_path, monkeypatch, dtype, value):
    path = tmp_path / "d.safetensors"
    monkeypatch.setattr("lightning_pet.store.delta_file.require_finite", lambda *_, **__: None)
    write_delta(path, {"a": torch.tensor([1.0, value, value]).to(dtype)}, Manifest((MethodRecord("lora", "default"),)))
    monkeypatch.undo()
    words = []
    for reader in (read_delta, verified_norms):
        with pytest.raises(DeltaFileError, match="found 2 of 3 values") as caught:
            reader(path)
        words.append((str(caught.value), caught.value.code))
    assert words[0] == words[1]


def test_inspect_waits_for_neither_torch_nor_lightning(path):
    code = (
        "import sys; sys.argv = ['lightning-pet', 'inspect', sys.argv[1], '--json_output=true'];"
        "from lightning_pet.cli.main import main; main();"
        "print(sorted({'lightning', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    *summary, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    trained = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]  # places are no numbers
    assert json.loads("\n".join(summary))["parameters"] == 35 * len(trained) + 1
