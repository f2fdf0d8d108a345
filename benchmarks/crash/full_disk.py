"""A disk that is full after ever so many bytes, by the limit that the operating system sets to the size of a file."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.crash.children import Child
from benchmarks.crash.writers import Checkpoint, Delta, Folder, Writer
from lightning_pet.errors import DeltaFileError

LIMITS = 81


def run(folder: Path, short: bool) -> Iterator[dict[str, Any]]:
    """One row for each writer."""
    for cls in (Delta, Checkpoint, Folder):
        writer = cls(folder / cls.name.replace(" ", "-"))
        count = 9 if short and cls is Folder else LIMITS
        child = Child(lambda say, writer=writer, count=count: say(json.dumps(sweep(writer, count))))
        assert child.finish() == 0, f"{writer.name}: the sweep failed"
        yield json.loads(child.lines[-1])


def sweep(writer: Writer, count: int) -> dict[str, Any]:
    """Save under ``count`` limits from nothing to more than enough: whole, or refused without a trace."""
    if writer.keeps_old:
        writer.save(1)
    size = writer.largest()
    seen = {"limits": 0, "refused": 0, "complete": 0, "unclear": 0, "torn": 0, "temporary": 0}
    for index in range(count):
        if isinstance(writer, Folder):
            writer.clear()
        else:
            writer.save(1)
        limit = index * size * 21 // (20 * (count - 1))
        error = _saved(writer, limit)
        seen["limits"] += 1
        seen["refused" if error else "complete"] += 1
        if error:
            fine = isinstance(error, DeltaFileError) and error.code == "io"
            text = str(error)
            seen["unclear"] += not (fine and str(writer.path) in text and "errno 27 (File too large)" in text)
        try:
            kept, new = (1, 2) if writer.keeps_old else (0, 1)
            seen["torn"] += writer.found() != (kept if error else new)
        except Exception:
            seen["torn"] += 1
        seen["temporary"] += len(writer.hidden())
    return {"writer": writer.name, **seen}


def _saved(writer: Writer, limit: int) -> Exception | None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        writer.save(2)
    except Exception as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return None
