"""Two gloo processes with several tasks: a process without rows of a task waits for nobody, and nothing differs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from models import Net
from tasks_runs import batches, run
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))
from launch import launch

from lightning_pet import Adapted, load_delta

SCRIPT = str(Path(__file__).with_name("tasks_runs.py"))


def found_by(strategy, folder):
    codes, outputs = launch([SCRIPT, str(folder), strategy], timeout=200)
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return [json.loads(output.split("FOUND ")[1].splitlines()[0]) for output in outputs]


def test_two_processes_train_what_one_trains(tmp_path):
    ranks = found_by("ddp", tmp_path / "two")
    assert ranks[0] == ranks[1]
    assert ranks[0]["digest"] == ranks[0]["again"]
    assert ranks[0]["files"] == ["even.pet.safetensors", "odd.pet.safetensors"]
    try:
        one, fitted, _ = run(tmp_path / "one", None)
        for task in Adapted(one):
            net = Net(dropout=0)
            load_delta(net, tmp_path / "two" / "tasks" / f"{task}.pet.safetensors")
            rows = [(b["x"][i], b["y"][i]) for b in batches(None) for i in range(6) if b["task"][i] == task]
            x, y = (torch.stack(column) for column in zip(*rows, strict=True))
            with Adapted(one).using(task), torch.no_grad():
                assert torch.allclose(net(x), one(x), rtol=1e-10)
                loss = float(nn.functional.cross_entropy(one(x), y))
            assert ranks[0]["figures"][f"val_loss/{task}"] == pytest.approx(loss)
            assert float(fitted.callback_metrics[f"val_loss/{task}"]) == pytest.approx(loss)
    finally:
        torch.set_default_dtype(torch.float32)
