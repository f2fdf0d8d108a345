"""Several processes of one distributed run, under pytest and without a launcher of their own.

Importing takes longer than most of these runs, so they are forked off interpreters that did nothing but import. There
are two of these, with hash seeds of their own: members of a process group see sets in different orders, as they do when
they are started.
"""

import atexit
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

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
    group = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    members = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})} for rank in range(n)]
    return run(argv, members, timeout)


def run(
    argv: Sequence[str],
    environments: Sequence[Mapping[str, str]] = ({},),
    timeout: float = 120,
    cwd: str | os.PathLike[str] = ".",
) -> tuple[list[int], list[str]]:
    """Run ``python argv`` in one new process with each of these added to the environment, all at once."""
    while len(_parents) < 2:  # both import at the same time
        _parents.append(Parent())
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{rank}.txt") for rank in range(len(environments))]
        processes = []
        for rank, (more, file) in enumerate(zip(environments, files, strict=True)):
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}
            processes.append(Child(_parents[rank % 2], argv, env, str(file), os.path.abspath(cwd)))
        _wait(processes, timeout)
        return [process.wait() for process in processes], [file.read_text(errors="replace") for file in files]


def _wait(processes: "Sequence[Child]", timeout: float, grace: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            deadline, grace = min(deadline, time.monotonic() + grace), timeout
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
            return
        time.sleep(0.05)


class Parent:
    """An interpreter that forks itself on request."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(random.SystemRandom().randrange(2**32))}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()
        atexit.register(self._process.kill)

    def ask(self, **request: Any) -> Any:
        """Its answer to a request."""
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


class Child:
    """``python member.py argv``, whose output goes into a file; what is needed of :class:`subprocess.Popen`."""

    def __init__(self, parent: Parent, argv: Sequence[str], env: Mapping[str, str], output: str, cwd: str) -> None:
        self._parent = parent
        self.returncode: int | None = None
        self.pid: int = parent.ask(argv=list(argv), env=dict(env), output=output, cwd=cwd)

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        if self.returncode is None:
            self.returncode = self._parent.ask(ended=self.pid)
        return self.returncode

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


_parents: list[Parent] = []


# --- in the parent, and in what it forks -----------------------------------------------------------------------------


def _serve() -> None:
    for name in ("torch.distributed.fsdp", "lightning.pytorch", "transformers", "lightning_pet"):
        import_module(name)

    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else [""]
    assert len(threads) == 1, "a process with threads cannot be forked"
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            _become(**request)
        print(json.dumps(answer), flush=True)


def _become(argv: list[str], env: dict[str, str], output: str, cwd: str) -> None:
    import numpy

    code = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(nothing, 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
        random.seed()
        numpy.random.seed()
        sys.argv = [MEMBER, *argv]
        runpy.run_path(MEMBER, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
