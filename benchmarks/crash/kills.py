"""SIGKILL at random moments of saves that follow each other without pause."""

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.crash.children import Child, Say
from benchmarks.crash.writers import Checkpoint, Delta, Folder, Stock, Writer
from lightning_pet.store.files import reap_stale

KILLS = 200


def run(folder: Path, short: bool) -> Iterator[dict[str, Any]]:
    """One row for each writer, and for one that is not durable."""
    for cls in (Delta, Checkpoint, Folder) if short else (Delta, Checkpoint, Folder, Stock):
        yield kill_saves(cls(folder / cls.name.replace(" ", "-")), 12 if short else KILLS)


def kill_saves(writer: Writer, kills: int, seed: int = 1) -> dict[str, Any]:
    """Kill a child that saves generation after generation, again and again."""
    draw, generation, seen = random.Random(seed), 1, {"kills": 0, "saves": 0, "hits": 0, "torn": 0, "lost": 0}
    for _ in range(kills):
        child = Child(lambda say, first=generation: save_on(writer, first, say))
        child.wait_for(1)
        start = time.monotonic()
        child.wait_for(2)
        time.sleep(draw.uniform(0, 1.5 * (time.monotonic() - start)))
        child.kill()
        acknowledged = int(child.lines[-1])
        seen["kills"] += 1
        seen["saves"] += len(child.lines)
        seen["hits"] += bool(writer.hidden())
        for name in writer.hidden():  # what is an hour old goes at the next start
            os.utime(writer.folder / name, (0, 0))
        try:
            if writer.keeps_old:
                seen["lost"] += writer.found() not in (acknowledged, acknowledged + 1)
            else:
                found = whole_folders(writer)
                seen["lost"] += not found >= set(range(generation, acknowledged + 1))
        except Exception:
            seen["torn"] += 1
        generation = acknowledged + 2
    reap_stale(writer.folder)
    left = len(writer.hidden())
    return {"writer": writer.name, **seen, "left": left}


def save_on(writer: Writer, generation: int, say: Say) -> None:
    """Save without pause; writers that make new names get a new one each time."""
    while True:
        if not writer.keeps_old:
            writer.path = writer.folder / str(generation)
        writer.save(generation)
        say(generation)
        generation += 1


def whole_folders(writer: Writer) -> set[int]:
    """Numbers of the folders that are there and whole; they make room for the next."""
    found = set()
    for path in writer.folder.iterdir():
        if not path.name.startswith("."):
            writer.path = path
            assert writer.found() == 1
            found.add(int(path.name))
            shutil.rmtree(path)
    return found
