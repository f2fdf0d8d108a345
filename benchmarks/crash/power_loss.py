"""Power loss, replayed: at every point of a save, whatever the disk had not been told to keep may be gone.

The model is that of a POSIX file system in the worst case. Of a file's bytes the ones before the last fsync survive,
of the later ones any part may (none, half and all are tried). Of a folder's changes the ones before its last fsync
survive; the later ones may be undone or kept, whatever the state of the data.
"""

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from lightning_pet.store.files import Disk, atomic_folder, atomic_write, durable_link

OLD, NEW = b"old content", b"new content, and longer"
WHOLE = {"weights": NEW, "more": {"config": OLD}}


@dataclass
class File:
    """Bytes, and how many of them are safe."""

    data: bytes = b""
    safe: int = 0


@dataclass
class Folder:
    """Entries as a process sees them, and as the disk keeps them."""

    now: dict[str, "File | Folder"] = field(default_factory=dict)
    kept: dict[str, "File | Folder"] = field(default_factory=dict)


class RecordingDisk(Disk):
    """Keeps a list of operations instead of carrying them out."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def make_folder(self, folder: str) -> None:
        """It is there."""

    def create(self, path: str) -> BinaryIO:
        """A file that records what is written."""
        self.log.append(("create", path))
        return cast(BinaryIO, _Recorded(self.log, path))

    def sync(self, file: BinaryIO) -> int:
        """Record; the size is that of what was written."""
        recorded = cast(_Recorded, file)
        self.log.append(("sync", recorded.path))
        return len(recorded.getvalue())

    def make_new_folder(self, path: str) -> None:
        """Record."""
        self.log.append(("mkdir", path))

    def sync_tree(self, folder: str) -> None:
        """Record."""
        self.log.append(("sync_tree", folder))

    def remove_tree(self, folder: str) -> None:
        """Record."""
        self.log.append(("unlink", folder))

    def link(self, source: str, path: str) -> None:
        """Record."""
        self.log.append(("link", source.rsplit("/", 1)[-1], path))  # durable_link makes paths absolute

    def replace(self, source: str, path: str) -> None:
        """Record."""
        self.log.append(("rename", source, path))

    def unlink(self, path: str) -> None:
        """Record."""
        self.log.append(("unlink", path))

    def sync_folder(self, folder: str) -> None:
        """Record."""
        self.log.append(("sync_folder", folder))


class _Recorded(io.BytesIO):
    def __init__(self, log: list[tuple[Any, ...]], path: str) -> None:
        super().__init__()
        self.log, self.path = log, path

    def write(self, data: Any) -> int:
        self.log.append(("write", self.path, bytes(data)))
        return super().write(data)


class NoFileSync(RecordingDisk):
    """Never flushes a file."""

    def sync(self, file: BinaryIO) -> int:
        """Leave it out."""
        return len(cast(_Recorded, file).getvalue())

    def sync_tree(self, folder: str) -> None:
        """Leave it out."""


class NoFolderSync(RecordingDisk):
    """Never flushes a folder."""

    def sync_folder(self, folder: str) -> None:
        """Leave it out."""


class LateFileSync(RecordingDisk):
    """Renames first and syncs afterwards."""

    def replace(self, source: str, path: str) -> None:
        """Change places with the sync before."""
        at = max(index for index, entry in enumerate(self.log) if entry[0] in ("sync", "sync_tree"))
        kind, _ = self.log.pop(at)
        self.log += [("rename", source, path), (kind, path)]


class InPlace(RecordingDisk):
    """Truncates and writes the target itself."""

    def create(self, path: str) -> BinaryIO:
        """Open the target."""
        self.log.append(("truncate", "target"))
        return cast(BinaryIO, _Recorded(self.log, "target"))

    def replace(self, source: str, path: str) -> None:
        """There is nothing to rename."""


class World:
    """A folder with a few files, and what operations make of it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        there: dict[str, File | Folder] = {name: File(data, len(data)) for name, data in files.items()}
        self.root = Folder(dict(there), dict(there))

    def _place(self, path: str) -> tuple[Folder, str]:
        *folders, name = path.split("/")
        here = self.root
        for part in folders:
            here = cast(Folder, here.now[part])
        return here, name

    def _at(self, path: str) -> Any:
        folder, name = self._place(path)
        return folder.now[name]

    def apply(self, entry: tuple[Any, ...]) -> None:
        """Carry out one operation."""
        match entry:
            case ("create", path):
                self._enter(path, File())
            case ("mkdir", path):
                self._enter(path, Folder())
            case ("link", source, path):
                self._enter(path, self._at(source))
            case ("write", path, data):
                self._at(path).data += data
            case ("truncate", path):
                file = self._at(path)
                file.data, file.safe = b"", 0
            case ("sync", path):
                file = self._at(path)
                file.safe = len(file.data)
            case ("sync_tree", path):
                _sync(self._at(path))
            case ("rename", source, path):
                moved = self._at(source)
                folder, name = self._place(path)
                if folder.now.get(name) is not moved:  # else POSIX demands that nothing happens
                    self._remove(source)
                    folder.now[name] = moved
            case ("unlink", path):
                self._remove(path)
            case ("sync_folder", path):
                folder = self.root if path == "." else self._at(path)
                folder.kept = dict(folder.now)

    def _enter(self, path: str, node: File | Folder) -> None:
        folder, name = self._place(path)
        folder.now[name] = node

    def _remove(self, path: str) -> None:
        folder, name = self._place(path)
        folder.now.pop(name, None)

    def after_power_loss(self) -> Iterator[dict[str, Any]]:
        """Every content that the disk may have now."""
        for renames, share in itertools.product((False, True), (0.0, 0.5, 1.0)):
            yield _content(self.root, renames, share)


def _sync(node: File | Folder) -> None:
    if isinstance(node, File):
        node.safe = len(node.data)
        return
    for below in node.now.values():
        _sync(below)
    node.kept = dict(node.now)


def _content(node: File | Folder, renames: bool, share: float) -> Any:
    if isinstance(node, File):
        return node.data[: node.safe + int(share * (len(node.data) - node.safe))]
    entries = node.now if renames else node.kept
    return {name: _content(below, renames, share) for name, below in entries.items()}


# ---- what is saved -----------------------------------------------------------------------------------


def save(disk: Disk) -> None:
    """A file over an older one, in two parts."""

    def write(file: BinaryIO) -> None:
        file.write(NEW[:7])
        file.write(NEW[7:])

    assert atomic_write("target", write, disk=disk) == len(NEW)


def link(disk: Disk) -> None:
    """A second name of a file, over an older file."""
    durable_link("source", "target", disk=disk)


def folder(disk: Disk) -> None:
    """A folder with a folder in it, written by a library that flushes nothing."""

    def build(path: str) -> None:
        disk.make_new_folder(f"{path}/more")
        for name, data in (("weights", NEW), ("more/config", OLD)):
            with disk.create(f"{path}/{name}") as file:
                file.write(data)

    atomic_folder("folder", build, disk=disk)


def prune(disk: Disk) -> None:
    """A new checkpoint, and the removal of the one that it makes superfluous."""
    atomic_write("next", lambda file: file.write(NEW), disk=disk)
    disk.unlink("target")
    disk.sync_folder(".")


def _newest(content: dict[str, Any]) -> Any:
    return content.get("next", content.get("target"))


Look = Callable[[dict[str, Any]], Any]
SCENARIOS: dict[str, tuple[Callable[[Disk], None], Look, Any, Any]] = {
    "file over an older one": (save, lambda content: content.get("target"), OLD, NEW),
    "second name": (link, lambda content: content.get("target"), OLD, NEW),
    "folder": (folder, lambda content: content.get("folder"), None, WHOLE),
    "save, then prune": (prune, _newest, OLD, NEW),
}


def states(log: list[tuple[Any, ...]], look: Look) -> list[Any]:
    """What may be found after losing power at the end of a list of operations."""
    world = World({"target": OLD, "source": NEW})
    for entry in log:
        world.apply(entry)
    return [look(content) for content in world.after_power_loss()]


def faults(scenario: str, disk: RecordingDisk) -> dict[str, int]:
    """Number of states, of torn ones, and of those in which an acknowledged save is lost."""
    action, look, old, new = SCENARIOS[scenario]
    action(disk)
    found = [state for end in range(len(disk.log) + 1) for state in states(disk.log[:end], look)]
    lost = sum(state != new for state in states(disk.log, look))
    return {"states": len(found), "torn": sum(state not in (old, new) for state in found), "lost": lost}


def run(_: Path, short: bool) -> Iterator[dict[str, Any]]:
    """One row for each scenario, and for what the model finds in writers that are not durable."""
    for scenario in SCENARIOS:
        yield {"saved": scenario, "writer": "ours", **faults(scenario, RecordingDisk())}
    for cls in (NoFileSync, NoFolderSync, LateFileSync, InPlace):
        yield {"saved": "file over an older one", "writer": cls.__name__, **faults("file over an older one", cls())}
