"""How the benchmarks measure: steps in turns, and the peak of a process of its own."""

import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Step = Callable[[], object]
K = TypeVar("K")
# So that freed tensors go back to the system at once, and the peak is that of what is alive.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def cpu_seconds(step: Step) -> float:
    """CPU time of one call."""
    start = time.process_time()
    step()
    return time.process_time() - start


def take_turns(steps: Mapping[K, Step], turns: int) -> dict[K, list[float]]:
    """CPU seconds of each step in every turn: what else runs on the machine only ever adds, and adds to all alike."""
    seconds: dict[K, list[float]] = {key: [] for key in steps}
    for turn in range(turns + 1):
        # Forwards and backwards in turn, so that nobody always follows the same neighbour.
        for key in steps if turn % 2 else list(reversed(steps)):
            taken = cpu_seconds(steps[key])
            if turn:  # the first is for warming up
                seconds[key].append(taken)
        gc.collect()
    return seconds


def best(steps: Mapping[K, Step], turns: int) -> dict[K, float]:
    """CPU seconds of each one's best turn; short steps take more of them, about a second in all."""
    found = {key: min(seconds) for key, seconds in take_turns(steps, turns).items()}
    more = min(40 * turns, int(turns / max(found.values()) / 10))
    if more > turns > 2:
        again = take_turns(steps, more)
        found = {key: min(found[key], *again[key]) for key in steps}
    return found


def resident(field: str) -> float:
    """A field of this process's memory status in MiB: ``VmRSS`` (now) or ``VmHWM`` (highest so far)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_above(before: float, work: Step) -> float:
    """Most MiB of this process while some work runs, above what it held at a time before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    work()
    return resident("VmHWM") - before


def in_new_process(script: str, *words: str, python: str = sys.executable) -> Any:
    """What :func:`answered` gives in a fresh process of a script, which gives freed memory back at once.

    Raises:
        RuntimeError: The process failed; with the end of what it said.
    """
    command = [python, script, "--child", *words]
    done = subprocess.run(command, env=os.environ | GIVES_BACK, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_a_copy(function: Callable[..., Any], *words: str) -> Any:
    """What a function returns in a copy of this process, which has imported everything but computed nothing yet.

    Raises:
        RuntimeError: The copy failed; it has said why.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    if (copied := os.fork()) == 0:
        code = 1
        try:
            os.write(writing, json.dumps(function(*words)).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as answer:
        text = answer.read()
    if os.waitpid(copied, 0)[1]:
        raise RuntimeError(f"{function.__name__}{words} failed in a process of its own")
    return json.loads(text)


def gives_back() -> None:
    """Start this script anew if freed tensors do not go back to the system at once."""
    if any(os.environ.get(name) != value for name, value in GIVES_BACK.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | GIVES_BACK)


def answered(function: Callable[..., Any]) -> bool:
    """Whether this process was started by :func:`in_new_process`; if so, it prints what the function returns."""
    if sys.argv[1:2] != ["--child"]:
        return False
    import torch

    torch.set_num_threads(1)
    print(json.dumps(function(*sys.argv[2:])))
    return True
