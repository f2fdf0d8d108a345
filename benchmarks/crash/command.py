"""``lightning-pet fit --ckpt_path=last-good``, the same command again and again, killed at random moments."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.crash import ROOT
from lightning_pet.store.reader import last_good, load_checkpoint

EPOCHS, KILLS = 25, 8  # of eight steps


def run(folder: Path, short: bool) -> Iterator[dict[str, Any]]:
    """One row; nothing in the short mode, whose time the starts of the command would use up."""
    if not short:
        yield chain(folder)


def chain(folder: Path, seed: int = 1) -> dict[str, Any]:
    """Kill the command until it has run so often; then let it end, and compare it with one that was left alone."""
    alone, killed = folder / "alone", folder / "killed"
    assert _start(alone).wait() == 0, (alone / "log").read_text()[-2000:]
    draw, seen = random.Random(seed), {"kills": 0, "starts": 1, "lost": 0}
    before = 0
    for _ in range(KILLS):
        process = _start(killed)
        aim = before + draw.randint(5, 8 * EPOCHS // KILLS - 5)
        while process.poll() is None and _newest(killed) < aim:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        seen["kills"] += process.wait() == -9
        seen["starts"] += 1
        reached = _newest(killed)
        seen["lost"] += reached < before
        before = reached
    code = _start(killed).wait()
    log = (killed / "log").read_text()
    return {
        "subject": "command line",
        "steps": 8 * EPOCHS,
        **seen,
        "went_on": log.count("going on from"),
        "code": code,
        "identical": _same(_final(alone), _final(killed)),
    }


def _start(folder: Path) -> subprocess.Popen[bytes]:
    (folder / "c").mkdir(parents=True, exist_ok=True)
    saver = ["dirpath=c", "filename='{step}'", "every_n_train_steps=1", "save_last=true"]
    arguments = [
        "fit",
        "--ckpt_path=last-good",
        "--seed_everything=1",
        "--model=user_code.Net",
        "--data=user_code.Data",
        "--pet+=LoRACallback",
        "--pet.dropout=0.2",
        "--pet.target_modules=[net.0,net.2]",
        f"--trainer.max_epochs={EPOCHS}",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=ModelCheckpoint",
        *(f"--trainer.callbacks.{option}" for option in saver),
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cli")])
    start = "import sys; from lightning_pet.cli.main import main; main(sys.argv[1:])"
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", start, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _newest(folder: Path) -> int:
    found = (re.search(r"step=(\d+)", path.name) for path in (folder / "c").glob("*.ckpt"))
    return max((int(match[1]) for match in found if match), default=0)


def _final(folder: Path) -> dict[str, Any]:
    path = last_good(folder / "c")
    assert path is not None
    return load_checkpoint(path)


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    first, second = a["state_dict"], b["state_dict"]
    equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return equal and a["global_step"] == b["global_step"] == 8 * EPOCHS
