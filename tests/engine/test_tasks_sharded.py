"""Several tasks on every engine that shares parameters, two processes, some without rows of a task in a step."""

from pathlib import Path

import pytest
import torch
from models import Net
from tasks_sharded_runs import GAP, TASKS, run
from two_processes import on_engine

from lightning_pet import Adapted, load_delta

SCRIPT = str(Path(__file__).with_name("tasks_sharded_runs.py"))
SLOW = [("fsdp", "lora"), ("zero3", "lora"), ("zero1", "lora"), ("zero2", "heads"), ("fsdp2-early", "lora")]


@pytest.mark.parametrize(
    ("engine", "method"), [("fsdp2", "heads"), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_two_processes_train_what_one_trains(engine, method, tmp_path):
    single = tmp_path / "one"
    one, gap = run(single, None, method), run(tmp_path / "gap", None, method, trained=GAP)
    (folder := tmp_path / "two").mkdir()
    _, ranks = on_engine(SCRIPT, engine, single, folder, timeout=300, words=(method,))
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one.losses, rel=1e-5)
        assert rank["again"] == rank["noisy"][3:], "exact, also where a process has had no row of a task"
        assert rank["deltas"] == list(TASKS)
        if engine.startswith("zero"):
            assert "no process has a row of 'even' in step 4" in rank["gap"]
        else:
            assert rank["gap"] == pytest.approx(gap.losses, rel=1e-5)
        assert "process 0: odd; process 1: even" in rank["seen"]
    net, x = Net(dropout=0.0).eval(), torch.randn(4, 6)
    for task in TASKS:
        load_delta(net, folder / "plain" / "tasks" / f"{task}.pet.safetensors")
        with Adapted(net).using(task), Adapted(one.eval()).using(task), torch.no_grad():
            assert torch.allclose(net(x), one(x), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_heads_are_refused_by_name_where_weights_are_taken_away(engine, tmp_path):
    (folder := tmp_path / "two").mkdir()
    _, ranks = on_engine(SCRIPT, engine, tmp_path, folder, timeout=300, words=("heads", "refused"))
    assert all("each task has its own head" in rank["refused"] for rank in ranks)
