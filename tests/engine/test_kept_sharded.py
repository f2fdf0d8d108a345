"""Averages that a module keeps itself, and a base that begins to change, in two processes on every engine."""

import re
from pathlib import Path

import pytest
import torch
from kept_runs import Averaged, Zipped
from models import Data, Net, cosine, fit, lora
from two_processes import on_engine

from lightning_pet.operations.delta import load_delta

SCRIPT = str(Path(__file__).with_name("kept_runs.py"))
ENGINES = ["ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.slow), "zero3"]


@pytest.fixture(scope="module", params=ENGINES)
def two(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return on_engine(SCRIPT, request.param, folder, folder, timeout=200)


@pytest.mark.parametrize(("kind", "base"), [("beside", Averaged), ("zipped", Zipped)])
def test_they_are_saved_and_come_back(two, kind, base):
    folder, ranks = two
    assert ranks[0][kind][0] == ranks[0][kind][1] == ranks[1][kind][1]
    states = [
        torch.load(folder / name / "last.ckpt", weights_only=True)["state_dict"] for name in (kind, f"{kind}-again")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    module = base(Net(), cosine)
    load_delta(module, folder / kind / "last.ckpt")
    own = dict(module.named_parameters())
    slow = [name for name in states[0] if name.startswith("slow.")]
    assert len(slow) >= 4
    assert all(torch.equal(own[name], states[0][name]) for name in slow)
    options = {"module": "net"} if kind == "beside" else {"modules_to_save": []}
    again = base(Net(), cosine)
    fit(again, lora(**options), ckpt=folder / kind / "step=3.ckpt", data=Data(batch_size=2), max_epochs=1)
    assert len(again.losses) == 7, "ten batches of two, three steps of which were made"


def test_a_base_that_begins_to_change_is_an_error_in_each_process(two):
    found = [rank["meddled"] for rank in two[1]]
    assert all(re.search(r"net\.fc1\.weight.*ing\.on_train_batch_end", text) for text in found), found
