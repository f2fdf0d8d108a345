"""A process of its own that kills saving children, or saves until a size limit stops it; prints JSON.

python saving_child.py kill FOLDER COUNT SEED
python saving_child.py fill FOLDER
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import lightning_pet_alone  # noqa: F401  (first: it leaves the package's own imports out)
import torch
from store_samples import SUFFIX, manifest_of, same, tensors_of

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.delta_file import read_delta, write_delta
from lightning_pet.store.writer import atomic_write, durable_link, reap_stale

WIDTH = 4000


def save(path: Path, generation: int) -> None:
    write_delta(path, tensors_of(generation, WIDTH), manifest_of(generation))


def generation_in(path: Path) -> int:
    found = read_delta(path)
    same(found.tensors, tensors_of(found.manifest.step, WIDTH))
    return found.manifest.step


def save_until_killed(path: Path, generation: int, acknowledge: int) -> None:
    last = path.with_name("last" + SUFFIX)
    while True:
        save(path, generation)
        durable_link(path, last)
        os.write(acknowledge, b"%d\n" % generation)
        generation += 1


def kill(folder: Path, count: int, seed: int) -> dict[str, int]:
    draw = random.Random(seed)
    path, generation = folder / f"x{SUFFIX}", 0
    seen = {"kills": 0, "torn": 0, "lost": 0, "saves": 0, "temps": 0}
    for _ in range(count):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            save_until_killed(path, generation, writing)
        os.close(writing)
        acknowledged = os.read(reading, 20)  # the child is at its second save now
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while part := os.read(reading, 4096):
            acknowledged += part
        os.close(reading)
        newest = int(acknowledged.split()[-1])
        seen["kills"] += 1
        seen["saves"] += newest - generation + 1
        for name in ("x", "last"):
            try:
                found = generation_in(folder / f"{name}{SUFFIX}")
                seen["lost"] += found not in (newest, newest + 1)
            except Exception:
                seen["torn"] += 1
        generation = newest + 2
    hidden = [item for item in os.listdir(folder) if item.startswith(".")]
    for item in hidden:
        os.utime(folder / item, (0, 0))
    reap_stale(folder)
    return {**seen, "temps": len(hidden), "left": len(os.listdir(folder)) - 2}


def fill(folder: Path) -> dict[str, dict[str, int]]:
    """Save under a growing limit of the file size: every save succeeds whole or fails without a trace."""
    checkpoint = {"state_dict": tensors_of(2, 400), "epoch": 3}
    writers = {
        "delta": lambda path: write_delta(path, tensors_of(2, 400), manifest_of(2)),
        "ckpt": lambda path: atomic_write(path, lambda file: torch.save(checkpoint, file)),
    }
    return {name: sweep(folder / name, writer) for name, writer in writers.items()}


def sweep(folder: Path, writer) -> dict[str, int]:
    path = folder / "x"
    folder.mkdir()
    writer(path)
    whole = path.read_bytes()
    seen = {"limits": 0, "refused": 0, "complete": 0, "wrong": 0}
    for limit in range(0, len(whole) + 600, max(1, len(whole) // 84)):
        path.write_bytes(b"old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            writer(path)
            kind, fine = "complete", path.read_bytes() == whole
        except DeltaFileError as error:
            kind, fine = "refused", error.code == "io" and str(path) in str(error) and "errno 27" in str(error)
            fine = fine and path.read_bytes() == b"old"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        seen["limits"] += 1
        seen[kind] += 1
        seen["wrong"] += not fine or os.listdir(folder) != ["x"]
    return seen


def main() -> None:
    torch.set_num_threads(1)
    command, folder, *numbers = sys.argv[1:]
    found = kill(Path(folder), *map(int, numbers)) if command == "kill" else fill(Path(folder))
    print(json.dumps({**found, "lightning": "lightning" in sys.modules}))


if __name__ == "__main__":
    main()
