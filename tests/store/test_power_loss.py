"""Power loss, replayed: at every point of a save, whatever the disk had not been told to keep may be gone.

The model is that of a POSIX file system in the worst case. Of a file's bytes the ones before the last
fsync survive, of the later ones any part may (none, half and all are tried). Of a folder's changes
the ones before its last fsync survive; the later ones may be undone or kept, whatever the state of the data.
"""

import io
import itertools

import pytest

from lightning_pet.store.writer import Disk, atomic_write, durable_link

OLD, NEW = b"old content", b"new content, and longer"


class Recorded(io.BytesIO):
    def __init__(self, disk, inode):
        super().__init__()
        self.disk, self.inode = disk, inode

    def write(self, data):
        self.disk.log.append(("write", self.inode, bytes(data)))
        return super().write(data)


class RecordingDisk(Disk):
    """Keeps a list of operations instead of carrying them out."""

    def __init__(self):
        self.log = []
        self.inodes = {"target": 0, "source": 1}

    def make_folder(self, folder):
        pass

    def create(self, path):
        self.inodes[path] = len(self.inodes)
        self.log.append(("name", path, self.inodes[path]))
        return Recorded(self, self.inodes[path])

    def sync(self, file):
        self.log.append(("sync", file.inode))
        return len(file.getvalue())

    def link(self, source, path):
        self.inodes[path] = self.inodes["source"]
        self.log.append(("name", path, self.inodes[path]))

    def replace(self, source, path):
        self.log.append(("rename", source, path))

    def unlink(self, path):
        self.log.append(("unlink", path))

    def sync_folder(self, folder):
        self.log.append(("sync_folder",))


class NoFileSync(RecordingDisk):
    def sync(self, file):
        return len(file.getvalue())


class NoFolderSync(RecordingDisk):
    def sync_folder(self, folder):
        pass


class LateFileSync(RecordingDisk):
    """Renames first and syncs afterwards."""

    def replace(self, source, path):
        at = max(index for index, entry in enumerate(self.log) if entry[0] == "sync")
        sync = self.log.pop(at)
        self.log += [("rename", source, path), sync]


class InPlace(RecordingDisk):
    """Truncates and writes the target itself."""

    def create(self, path):
        self.log.append(("truncate", 0))
        return Recorded(self, 0)

    def replace(self, source, path):
        pass


def after_power_loss(log):
    """Every content that the target may have after losing power at the end of ``log``."""
    bytes_of, synced, names = {0: OLD, 1: NEW}, {0: len(OLD), 1: len(NEW)}, {"target": 0, "source": 1}
    durable = dict(names)
    for entry in log:
        match entry:
            case ("name", path, inode):
                names[path] = inode
                bytes_of.setdefault(inode, b"")
                synced.setdefault(inode, 0)
            case ("write", inode, data):
                bytes_of[inode] += data
            case ("truncate", inode):
                bytes_of[inode], synced[inode] = b"", 0
            case ("sync", inode):
                synced[inode] = len(bytes_of[inode])
            case ("rename", source, path):
                if names[source] != names[path]:  # else POSIX demands that nothing happens
                    names[path] = names.pop(source)
            case ("unlink", path):
                names.pop(path, None)
            case ("sync_folder",):
                durable = dict(names)
    for tree, kept in itertools.product((durable, names), (0.0, 0.5, 1.0)):
        inode = tree["target"]
        safe = synced[inode]
        yield bytes_of[inode][: safe + int(kept * (len(bytes_of[inode]) - safe))]


def write_in_two_parts(file):
    file.write(NEW[:7])
    file.write(NEW[7:])


def faults(disk, save):
    """Number of states, number of torn ones, and number of acknowledged saves that may be lost."""
    save(disk)
    states = [state for end in range(len(disk.log) + 1) for state in after_power_loss(disk.log[:end])]
    torn = sum(state not in (OLD, NEW) for state in states)
    lost = sum(state != NEW for state in after_power_loss(disk.log))
    return len(states), torn, lost


def saving(disk):
    assert atomic_write("target", write_in_two_parts, disk=disk) == len(NEW)


def linking(disk):
    durable_link("source", "target", disk=disk)


def test_a_save_survives_a_power_loss_anywhere():
    states, torn, lost = faults(RecordingDisk(), saving)
    assert states >= 42
    assert (torn, lost) == (0, 0)


def test_a_link_survives_a_power_loss_anywhere():
    states, torn, lost = faults(RecordingDisk(), linking)
    assert states >= 24
    assert (torn, lost) == (0, 0)


@pytest.mark.parametrize(
    ("disk", "tears", "loses"),
    [(NoFileSync, True, True), (NoFolderSync, False, True), (LateFileSync, True, False), (InPlace, True, False)],
)
def test_the_model_finds_writers_that_are_not_durable(disk, tears, loses):
    _, torn, lost = faults(disk(), saving)
    assert bool(torn) is tears
    assert bool(lost) is loses


@pytest.mark.parametrize("failing", ["sync", "replace", "sync_folder"])
def test_a_failing_call_leaves_the_old_or_the_new_file(failing):
    disk = RecordingDisk()

    def refuse(*_):
        raise OSError(5, "Input/output error")

    setattr(disk, failing, refuse)
    with pytest.raises(ValueError, match="errno 5"):
        saving(disk)
    assert set(after_power_loss(disk.log)) <= {OLD, NEW}
    assert failing == "sync_folder" or disk.log[-1][0] == "unlink"
