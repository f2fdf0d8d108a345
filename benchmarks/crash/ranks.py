"""One of two processes is killed: the other one must end by itself, and the run must go on from what is on the disk."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import free_port

from benchmarks.crash import ROOT
from benchmarks.crash.children import Pair, group_variables
from lightning_pet import last_good
from lightning_pet.store.reader import load_checkpoint

STEPS = 6
JOIN_LIMIT_S = 5
LIMIT_S, START_S = 120.0, 600.0
PHASES = ("joining", "setup", "first step", "within a step", "save", "validation", "end")
LEAST = {"within a step": 3, "save": 2, "validation": 3, "end": STEPS}
"""Step of the last checkpoint that must be there; the fourth may have been saved before the validation, or not."""


@dataclass(frozen=True)
class Kill:
    """Which process of which engine dies when, and who started them.

    Attributes:
        engine: ``"ddp"``, ``"fsdp2"`` or ``"zero2"``.
        phase: one of :data:`PHASES`.
        victim: rank of the process that dies.
        launcher: ``"fork"`` (of a process that has imported everything) or ``"hand"`` (both are started one by one;
            nobody watches), ``"lightning"`` (rank 0 starts the other) or ``"torchrun"``.
    """

    engine: str
    phase: str
    victim: int
    launcher: str = "fork"


SHORT = [Kill("ddp", "within a step", 1, "hand"), Kill("fsdp2", "save", 0), Kill("ddp", "validation", 0)]
FULL = [
    *(Kill("ddp", phase, victim) for phase in PHASES for victim in (0, 1)),
    *(Kill(engine, phase, victim) for engine in ("fsdp2", "zero2") for phase in PHASES[3:6] for victim in (0, 1)),
    *(Kill("ddp", "within a step", victim, "hand") for victim in (0, 1)),
    *(Kill("ddp", "joining", victim, launcher) for launcher in ("lightning", "torchrun") for victim in (0, 1)),
]


def run(folder: Path, short: bool) -> Iterator[dict[str, Any]]:
    """One row for each kill."""
    for number, kill in enumerate(SHORT if short else FULL):
        yield survive(kill, folder / str(number), resume=not short or kill.engine == "ddp")


def survive(kill: Kill, folder: Path, resume: bool) -> dict[str, Any]:
    """Start, kill, wait for the survivor, look at the disk, resume."""
    folder.mkdir(parents=True)
    codes, hung, ended = _forked(kill, folder) if kill.launcher == "fork" else _started(kill, folder)
    # A process that was still importing when the other one died has not waited for it yet.
    ended_s = ended - max(path.stat().st_mtime for path in (folder / "killed", *folder.glob("started-*")))
    good = last_good(folder)
    step = load_checkpoint(good)["global_step"] if good else 0
    row = {
        "engine": kill.engine,
        "launcher": kill.launcher,
        "phase": kill.phase,
        "victim": kill.victim,
        "survivor_s": round(ended_s, 1),
        "hung": hung,
        "codes": codes,
        # Whoever outlives the last collective of a run has nothing left to fail at.
        "noticed": all(code != 0 for code in codes) or kill.phase == "end",
        "step": step,
        "kept": step >= LEAST.get(kill.phase, 0),
    }
    if resume:
        row["resumed"] = _resumes(kill, folder)
    return row


def _forked(kill: Kill, folder: Path) -> tuple[list[int], bool, float]:
    """Exit codes, whether one had to be killed, and when the last one ended."""
    from benchmarks.crash import member

    pair = Pair(lambda _: member.train(folder, kill.engine, kill.phase, kill.victim))
    pair.members[kill.victim].finish(START_S)
    codes = [pair.members[rank].finish(LIMIT_S) for rank in (kill.victim, 1 - kill.victim)]
    return codes[:: 1 - 2 * kill.victim], pair.hung, time.time()


def _started(kill: Kill, folder: Path) -> tuple[list[int], bool, float]:
    """Likewise, for processes that begin with their imports and end as an interpreter does."""
    processes = _start(kill, folder)
    _wait_for_kill(folder, processes)
    hung, ended = _wait_for_end(folder), time.time()
    return [process.wait() for process in processes], hung, ended


def _start(kill: Kill, folder: Path) -> list[subprocess.Popen[str]]:
    """Both processes, or the one that starts the other; outputs go to files, so that none waits for a reader."""
    argv = ["-m", "benchmarks.crash.member", str(folder), kill.engine, kill.phase, str(kill.victim)]
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ours = {"CRASH_RUN": str(folder)}  # by which survivors are found
    port = free_port()
    if kill.launcher == "hand":
        return [
            _popen([sys.executable, *argv], {**base, **group_variables(rank, port), **ours}, folder / f"{rank}.log")
            for rank in (0, 1)
        ]
    variables = {**base, **ours, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", *argv]
    command = [sys.executable, *(torchrun if kill.launcher == "torchrun" else argv)]
    return [_popen(command, variables, folder / "0.log")]


def _popen(command: list[str], variables: dict[str, str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as output:
        return subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def _wait_for_kill(folder: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + START_S
    while not (folder / "killed").exists():
        ended = all(process.poll() is not None for process in processes) and not (folder / "killed").exists()
        if ended or time.monotonic() > deadline:
            raise RuntimeError(f"nobody was killed: {(folder / '0.log').read_text()[-2000:]}")
        time.sleep(0.02)


def _wait_for_end(folder: Path) -> bool:
    """Wait until no process of the run is left; whether they had to be killed."""
    deadline = time.monotonic() + LIMIT_S
    while left := _processes_of(folder):
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return True
        time.sleep(0.1)
    return False


def _processes_of(folder: Path) -> list[int]:
    """Living processes of a run, those that a launcher started included: they carry its folder in their environment."""
    wanted, found = f"CRASH_RUN={folder}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            zombie = re.search(r"^State:\tZ", (entry / "status").read_text(), re.M)
            if not zombie and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _resumes(kill: Kill, folder: Path) -> bool:
    """Whether two new processes bring the run to its end."""
    from benchmarks.crash import member

    again = Pair(lambda say: say(member.train(folder, kill.engine, "", -1)))
    return again.finish() == 0 and again.lines == [str(STEPS)]


def unavailable() -> str:
    """Why this campaign cannot run here; empty if it can."""
    return "" if Path("/proc/self/environ").exists() else "there is no /proc"
