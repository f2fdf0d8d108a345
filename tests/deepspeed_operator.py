"""DeepSpeed in tests: what it needs, and its operator for the CPU, which is built once and cached."""

import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

OPERATOR = "deepspeed_shm_comm"
BUILD = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
STALE = 600  # seconds after which a build has ended, one way or the other


def require_deepspeed() -> None:
    """Skip where the operator cannot be built; build it if this is the first run on this machine.

    Without DeepSpeed itself, which the test extra holds, the tests that call this fail.
    """
    if not can_build():
        pytest.skip(f"DeepSpeed builds an operator at its first run: needs Linux and a C++ compiler ({_compiler()})")
    _build()


def can_build() -> bool:
    """Whether the operator can be built here."""
    return sys.platform.startswith("linux") and shutil.which(_compiler()) is not None


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


@functools.cache
def _build() -> None:
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(OPERATOR, verbose=False))
    lock = folder / "lock"
    # Whoever builds holds torch's lock, and the others wait: for ever, if its holder was killed.
    if lock.exists() and time.time() - lock.stat().st_mtime > STALE:
        lock.unlink(missing_ok=True)
    if not (folder / f"{OPERATOR}.so").exists():
        done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, timeout=STALE)
        assert done.returncode == 0, f"DeepSpeed's operator was not built:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
