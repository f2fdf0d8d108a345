"""Children that are forked from a process that has imported everything, so that hundreds of lives take minutes."""

import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial

from launch import free_port

SURVIVOR_LIMIT_S = 60.0
Say = Callable[[object], None]


class Child:
    """A forked process that does some work and reports in lines.

    Args:
        work: runs in the child; what it says can be read here at once, also after the child was killed.
        quiet: leave out the traceback of work that fails.
    """

    def __init__(self, work: Callable[[Say], None], quiet: bool = False) -> None:
        self._reader, writer = os.pipe()
        self._rest, self.lines = b"", []
        self.code: int | None = None
        self.hung = False
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reader)
            code = 1
            try:
                work(lambda text: os.write(writer, f"{text}\n".encode()))
                code = 0
            except BaseException:
                if not quiet:
                    traceback.print_exc()
            finally:
                threading._shutdown()  # as an interpreter does: a thread that does not end keeps its process
                os._exit(code)
        os.close(writer)
        self.lines: list[str]

    def wait_for(self, count: int, timeout: float = 120) -> bool:
        """Read until there are ``count`` lines; whether they came before the child ended or the time was up."""
        deadline = time.monotonic() + timeout
        while len(self.lines) < count:
            ready, _, _ = select.select([self._reader], [], [], max(0.0, deadline - time.monotonic()))
            if not ready or not self._take():
                return False
        return True

    def kill(self) -> None:
        """Kill the child, unless it ended, and read what it had said."""
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
        self.finish()

    def finish(self, timeout: float = 600) -> int:
        """Read to the end; the exit code, or minus the signal's number. After the timeout it is killed, and hung."""
        deadline = time.monotonic() + timeout
        if self.code is None:
            self.wait_for(1 << 62, timeout)
            while not (ended := os.waitpid(self.pid, os.WNOHANG))[0] and time.monotonic() < deadline:
                time.sleep(0.005)
            if not ended[0]:
                self.hung = True
                os.kill(self.pid, signal.SIGKILL)
                ended = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(ended[1])
            os.close(self._reader)
        return self.code

    def _take(self) -> bool:
        part = os.read(self._reader, 1 << 16)
        *lines, self._rest = (self._rest + part).split(b"\n")
        self.lines += [line.decode() for line in lines]
        return bool(part)


class Pair:
    """Two children that form a process group; the first one speaks for both."""

    def __init__(self, work: Callable[[Say], None]) -> None:
        port = free_port()
        self.members = [Child(partial(_join, work, rank, port), quiet=True) for rank in (0, 1)]
        self.survived_s: float | None = None

    @property
    def lines(self) -> list[str]:
        """What the first one said."""
        return self.members[0].lines

    @property
    def hung(self) -> bool:
        """Whether one did not end by itself."""
        return any(member.hung for member in self.members)

    def wait_for(self, count: int) -> bool:
        """As for one child."""
        return self.members[0].wait_for(count)

    def kill(self, victims: tuple[int, ...] = (0, 1)) -> None:
        """Kill some, and see how long the others go on."""
        for rank in victims:
            if self.members[rank].code is None:
                os.kill(self.members[rank].pid, signal.SIGKILL)
        start = time.monotonic()
        for member in self.members:
            member.finish(SURVIVOR_LIMIT_S)
        if len(victims) == 1:
            self.survived_s = time.monotonic() - start

    def finish(self, timeout: float = 600) -> int:
        """The exit code of the whole: of a killed one, else of one that failed, else 0."""
        codes = [member.finish(timeout) for member in self.members]
        return min(codes) if min(codes) < 0 else max(codes)


def _join(work: Callable[[Say], None], rank: int, port: int, say: Say) -> None:
    os.environ.update(group_variables(rank, port))
    work(say if rank == 0 else lambda _: None)


def group_variables(rank: int, port: int, size: int = 2) -> dict[str, str]:
    """What a launcher tells a member of a process group."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "crash",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
