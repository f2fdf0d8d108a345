"""SIGKILL at every system call of a save, one after the other, by strace; and the order of the calls."""

import ctypes
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.crash.children import Child, Say
from benchmarks.crash.writers import Checkpoint, Delta, Folder, Writer

CHANGES = {"openat", "write", "pwrite64", "fsync", "close", "mkdir", "rename", "unlink", "rmdir", "ftruncate", "copy"}
_CALL = re.compile(r"^(\w+)\((.*)")


def unavailable() -> str:
    """Why this campaign cannot run here; empty if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    child = Child(lambda say: (say("here"), time.sleep(20)))
    child.wait_for(1)
    tracer = subprocess.Popen(["strace", "-qq", "-o", os.devnull, "-p", str(child.pid)], stderr=subprocess.PIPE)
    attached = _wait_for_tracer(child.pid, tracer)
    child.kill()
    said = tracer.communicate()[1].decode().strip()
    return "" if attached else f"strace cannot attach: {said}"


def run(folder: Path, short: bool) -> Iterator[dict[str, Any]]:
    """One row for each writer."""
    if reason := unavailable():
        yield {"writer": "", "unavailable": reason}
        return
    for cls in (Delta, Checkpoint) if short else (Delta, Checkpoint, Folder):
        yield kill_everywhere(cls(folder / cls.name.replace(" ", "-")), changes_only=short or cls is Folder)


def kill_everywhere(writer: Writer, changes_only: bool) -> dict[str, Any]:
    """Save over generation 1, killed at each call in turn.

    Args:
        writer: what saves.
        changes_only: leave out the calls that change nothing on the disk (reading, memory, clocks).
    """
    if writer.keeps_old:
        writer.save(1)
    calls = traced(writer)
    order = in_order(writer, calls)
    counts = Counter(name for name, _ in calls if not changes_only or name in CHANGES)
    seen = {"points": 0, "killed": 0, "old": 0, "new": 0, "torn": 0, "lost": 0}
    for name, count in counts.items():
        for index in range(1, count + 1):
            _reset(writer)
            acknowledged, killed = saved_under(writer, ["-e", f"trace={name}", "-e", _inject(name, index)])
            seen["points"] += 1
            seen["killed"] += killed
            try:
                found = writer.found()
            except Exception:
                seen["torn"] += 1
                continue
            new = found == (2 if writer.keeps_old else 1)
            seen["new" if new else "old"] += 1
            seen["lost"] += acknowledged and not new
    return {"writer": writer.name, "calls": len(calls), **seen, "order": order}


def _inject(name: str, index: int) -> str:
    return f"inject={name}:signal=KILL:when={index}"


def _reset(writer: Writer) -> None:
    for name in writer.hidden():
        path = writer.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if isinstance(writer, Folder):
        writer.clear()
    else:
        writer.save(1)


def traced(writer: Writer) -> list[tuple[str, str]]:
    """Name and arguments of the calls of a save that nobody disturbs."""
    log = writer.folder.with_name(f"{writer.folder.name}.strace")
    acknowledged, _ = saved_under(writer, ["-y", "-s", "0", "-o", str(log)])
    assert acknowledged
    lines = (_CALL.match(line) for line in log.read_text(errors="replace").splitlines())
    calls = [(match[1], match[2]) for match in lines if match]
    said = max(index for index, (name, _) in enumerate(calls) if name == "write")
    return calls[:said]  # what comes before the word of success


def saved_under(writer: Writer, options: list[str]) -> tuple[bool, bool]:
    """Save generation 2 in a child under strace; whether it was acknowledged, and whether the child was killed."""
    here, there = os.pipe()

    def work(say: Say) -> None:
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: strace may attach
        say("ready")
        os.read(here, 1)
        writer.save(2)
        say("saved")

    child = Child(work)
    child.wait_for(1)
    tracer = subprocess.Popen(
        ["strace", "-qq", "-p", str(child.pid), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert _wait_for_tracer(child.pid, tracer), "strace did not attach"
    os.write(there, b"x")
    code = child.finish()
    tracer.wait()
    os.close(here)
    os.close(there)
    assert code in (0, -9), code
    return "saved" in child.lines, code == -9


def _wait_for_tracer(pid: int, tracer: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and tracer.poll() is None:
        status = Path(f"/proc/{pid}/status").read_text()
        if not re.search(r"^TracerPid:\t0$", status, re.M):
            return True
        time.sleep(0.002)
    return False


def in_order(writer: Writer, calls: list[tuple[str, str]]) -> bool:
    """Whether a save goes: new file beside its target, write, fsync, rename, fsync of the folder."""
    wanted = [
        ("openat" if writer.keeps_old else "mkdir", r"\.tmp"),
        ("write", r"\.tmp"),
        ("fsync", r"\.tmp"),
        ("rename", rf"\.tmp.*{re.escape(writer.path.name)}\""),
        ("fsync", re.escape(f"{writer.folder.name}>")),
    ]
    for name, arguments in calls:
        if wanted and name == wanted[0][0] and re.search(wanted[0][1], arguments):
            wanted.pop(0)
    return not wanted
