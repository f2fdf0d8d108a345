"""What goes wrong in one process stops all of them, soon and with the reason."""

import json
from pathlib import Path

import pytest
from launch import launch

SCRIPT = str(Path(__file__).with_name("one_rank_runs.py"))
LIMIT = 30.0  # seconds
EXPECTED = {  # in the process where it happened, in the other
    "options": (
        "the methods differ between processes: process 0 has lora_default: r=4, process 1 has lora_default: r=2",
    )
    * 2,
    "places": ("the methods differ between processes: process 0 has lora_default: target_modules=['fc1', 'fc2']",) * 2,
    "insertion": ("RuntimeError: this process is out of memory", "inserting the deltas failed in process 1"),
    "start_from": ("absent.ckpt", "reading start_from failed in process 1"),
    "ckpt_path": ("bad.ckpt cannot be read", "failed in process 0, so that this one stops as well"),
    "death": ("MemoryError: too large", ""),
}


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_all_processes_stop(engine, tmp_path):
    _, outputs = launch([SCRIPT, str(tmp_path), engine], timeout=150)
    ranks = [{} for _ in outputs]
    for rank, output in zip(ranks, outputs, strict=True):
        for line in output.splitlines():
            if line.startswith("FOUND "):
                found = json.loads(line[6:])
                rank[found["case"]] = found
    for case, (where, elsewhere) in EXPECTED.items():
        broken = 0 if case == "ckpt_path" else 1
        assert case in ranks[0], outputs[0][-3000:]
        assert case in ranks[1], outputs[1][-3000:]
        assert where in ranks[broken][case]["error"]
        shared = engine != "ddp" and case == "ckpt_path"  # every process reads what the first one was given
        assert (where if shared else elsewhere) in ranks[1 - broken][case]["error"] != ""
        assert max(rank[case]["seconds"] for rank in ranks) < LIMIT, case
