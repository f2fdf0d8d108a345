"""The short campaigns of ``benchmarks/crash``: kills, power loss, full disks, damage, and going on from all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CAMPAIGNS = (
    "chain", "command", "damage", "full_disk", "interruptions", "kills", "pairs", "power_loss", "ranks", "syscalls"
)  # fmt: skip

OURS = ("ours", "delta file", "checkpoint", "merged folder")


@pytest.fixture(scope="module", params=["short", pytest.param("full", marks=pytest.mark.slow)])
def campaigns(request, tmp_path_factory):
    """What the command says, and what it keeps; it fails if a figure is not as it must be."""
    folder = tmp_path_factory.mktemp("crash")
    command = [sys.executable, "-m", "benchmarks.crash", *(["--short"] if request.param == "short" else [])]
    command += ["--results", str(folder / "results.json"), "--page", str(folder / "page.md")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "RANK"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=7200)
    return request.param, done, folder


def test_nothing_is_torn_lost_or_different(campaigns):
    mode, done, folder = campaigns
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    ran = {name for name, found in results.items() if found["rows"]}
    assert ran == set(CAMPAIGNS) - ({"command"} if mode == "short" else set())
    page = (folder / "page.md").read_text(encoding="utf-8")
    shown = [name for name in ran if "unavailable" not in results[name]["rows"][0]]  # strace may be missing
    assert page.count("\n| ---") >= len(shown)


def test_the_rules_find_faults(campaigns):
    """Each campaign's figures, made worse, are refused: the rules look at them."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.crash.verdict import faults

    _, _, folder = campaigns
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert faults(results) == []
    worse = {
        "torn": 1, "lost": 1, "from_zero": 1, "losses_differ": 1, "hung": 1, "identical": False, "kept": False,
        "noticed": False, "resumed": False, "survivor_s": 31.0, "unclear": 1, "temporary": 2, "wrong": 1, "raised": 0,
        "same": -1, "pairs_same": -1, "order": False, "left": 1, "elsewhere": 1, "restarts_wrong": 1,
    }  # fmt: skip
    for name, found in results.items():
        for row in found["rows"]:
            for key in worse.keys() & row.keys():
                changed = {name: {"rows": [{**row, key: worse[key]}]}}
                comparison = name in ("kills", "power_loss") and row["writer"] not in OURS
                assert comparison or faults(changed), (name, key)
