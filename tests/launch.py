"""Several processes of one distributed run, under pytest and without a launcher of their own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMBER = str(Path(__file__).with_name("member.py"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    argv: Sequence[str], n: int = 2, timeout: float = 120, env: Mapping[str, str] | None = None
) -> tuple[list[int], list[str]]:
    """Run ``python argv`` in ``n`` processes that form one process group; return exit codes and outputs.

    The variables of torchelastic are set, so that a Trainer joins the group and starts no processes.
    When the time is up, or one process has failed, the others are killed: the survivors of a failed
    collective may wait for ever.
    """
    port, processes = free_port(), []
    for rank in range(n):
        variables = dict(
            os.environ,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(n),
            LOCAL_WORLD_SIZE=str(n),
            GROUP_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="tests",
            GLOO_SOCKET_IFNAME="lo",
            OMP_NUM_THREADS="1",
            PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **(env or {}),
        )
        processes.append(
            subprocess.Popen(
                [sys.executable, MEMBER, *argv],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    with ThreadPoolExecutor(n) as readers:  # a full pipe would block its process
        outputs = [readers.submit(process.stdout.read) for process in processes]
        _wait(processes, timeout)
        return [process.wait() for process in processes], [output.result() for output in outputs]


def _wait(processes: Sequence[subprocess.Popen[str]], timeout: float, grace: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            deadline, grace = min(deadline, time.monotonic() + grace), timeout
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
            return
        time.sleep(0.05)
