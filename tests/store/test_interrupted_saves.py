"""Saves that are killed, and saves that run out of space, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_pet

HERE = Path(__file__).parent


def run(*arguments: object) -> dict:
    paths = [str(HERE), str(Path(lightning_pet.__path__[0]).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "saving_child.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_kills(folder: Path, count: int, seed: int) -> None:
    found = run("kill", folder, count, seed)
    assert found["kills"] == count
    assert (found["torn"], found["lost"]) == (0, 0), found
    assert found["left"] == 0, "abandoned temporary files were not reaped"
    assert found["saves"] > count, "no child came to its second save; nothing was tested"
    assert found["temps"] > 0, "no kill hit a save; nothing was tested"
    assert not found["lightning"], "the store imported Lightning"


def test_a_kill_during_a_save_tears_and_loses_nothing(tmp_path):
    check_kills(tmp_path, 40, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_hundreds_of_kills(tmp_path, seed):
    check_kills(tmp_path, 200, seed)


def test_a_full_disk_keeps_the_last_good_file(tmp_path):
    found = run("fill", tmp_path)
    for kind in ("delta", "ckpt"):
        assert found[kind]["limits"] >= 80
        assert found[kind]["refused"] >= 70
        assert found[kind]["complete"] >= 1
        assert found[kind]["wrong"] == 0
