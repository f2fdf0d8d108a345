"""Up to a hub and down again, by the hub's real client, against a stand-in of its routes on this machine."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lightning_pet import ArgumentError, DeltaFileError, LoRACallback, apply, load_delta, save_delta
from tests.exchange.peft_models import bert, made
from tests.exchange.stand_in_hub import Hub, running

_HEAD = """
import copy, sys
import torch
from lightning_pet import LoRACallback, apply, load_delta, push_to_hub, DeltaFileError
from tests.exchange.peft_models import bert, made, output_of
base = made(bert)
model = copy.deepcopy(base)
apply(model, LoRACallback(r=2))
torch.manual_seed(1)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))
model.eval()
"""


def client(code: str, address: str, home: Path, **more: str) -> str:
    """Run code in a process of its own, as the client reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": address, "HF_TOKEN": "secret", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | settings | more
    done = subprocess.run(
        [sys.executable, "-c", _HEAD + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_up_down_and_offline_again(tmp_path: Path) -> None:
    with running() as (hub, address):
        shown = client(
            """
            print(push_to_hub(model, "me/topics", metrics={"accuracy": 0.9375}, base_model="them/bert"))
            other = copy.deepcopy(base)
            load_delta(other, "me/topics", name="topics")
            assert torch.equal(output_of(other), output_of(model))
            print(push_to_hub(model, "me/theirs", to="peft"))
            third = copy.deepcopy(base)
            load_delta(third, "me/theirs", base_check="off")
            torch.testing.assert_close(output_of(third), output_of(model), rtol=0, atol=1e-12)
            try:
                load_delta(copy.deepcopy(base), "me/nothing")
            except DeltaFileError as error:
                print(error.code, error)
            """,
            address,
            tmp_path / "home",
        )
        assert "/me/topics/commit/" in shown
        assert "io me/nothing: there is no such file or folder here" in shown
        text = hub.files["me/topics"]["README.md"].decode()
        for line in ("library_name: lightning_pet", "base_model: them/bert", "- lora", "| accuracy | 0.9375 |"):
            assert line in text
        assert 'load_delta(model, "me/topics")' in text
        assert "library_name: peft" in hub.files["me/theirs"]["README.md"].decode()
    client(
        """
        other = copy.deepcopy(base)
        load_delta(other, "me/topics")
        assert torch.equal(output_of(other), output_of(model))
        """,
        address,
        tmp_path / "home",
        HF_HUB_OFFLINE="1",
    )


def test_a_broken_download_is_tried_again_and_never_half_there(tmp_path: Path) -> None:
    with running() as (hub, address):
        client('push_to_hub(model, "me/topics")', address, tmp_path / "first")
        hub.failing = 1
        client(
            """
            other = copy.deepcopy(base)
            for attempt in range(3):
                try:
                    load_delta(other, "me/topics")
                    break
                except DeltaFileError as error:
                    assert error.code == "io", error
            assert torch.equal(output_of(other), output_of(model))
            """,
            address,
            tmp_path / "second",
        )
        assert hub.failing == 0


def test_a_wrong_token_is_one_error(tmp_path: Path) -> None:
    with running() as (hub, address):
        shown = client(
            """
            try:
                push_to_hub(model, "me/topics")
            except DeltaFileError as error:
                print(error.code, error)
            """,
            address,
            tmp_path,
            HF_TOKEN="wrong",
        )
        assert shown.startswith("io me/topics: the hub did not take it")
        assert not hub.files


def test_nothing_is_asked_of_a_hub_for_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    model = made(bert)
    apply(model, LoRACallback(r=2))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    save_delta(model, "runs/topics")
    load_delta(made(bert), "runs/topics")
    with pytest.raises(DeltaFileError):
        load_delta(made(bert), "runs/missing.ckpt")
    with pytest.raises(ArgumentError, match="revision='main' is for a repository"):
        load_delta(made(bert), "runs/topics", revision="main")
    assert not hub.requests
    assert torch.is_grad_enabled()
