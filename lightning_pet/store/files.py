"""Files: their paths as people write them, and durable writes.

After a kill, a full disk or a power loss a file is the old one or the new one, never a torn one.
A save goes create (in the destination folder) → write → fsync → close → rename → fsync of the folder.
The temporary file lies beside its target because a rename is atomic within one file system only; a
temporary folder elsewhere turns the last step into a copy, which a kill tears.
"""

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final, cast

from lightning_pet.errors import ArgumentError, DeltaFileError

# --- paths ----------------------------------------------------------------------------------------


def expanded(path: str | bytes | os.PathLike[str]) -> str:
    """The path as text, with ``~`` for the home folder.

    >>> expanded("a/b"), expanded("~/x") == os.path.join(os.path.expanduser("~"), "x")
    ('a/b', True)

    Raises:
        ArgumentError: if it is no path at all.
        DeltaFileError: ``io`` for a path that no file can have.
    """
    try:
        text = os.fsdecode(os.path.expanduser(os.fspath(path)))
    except TypeError as error:
        raise ArgumentError(f"{path!r} is no path of a file: give one as text or as a pathlib.Path.") from error
    if "\0" in text:
        raise DeltaFileError(f"{text!r}: no file has a name with a NUL in it. Check the path.", "io")
    return text


def is_delta_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is to be read as a delta file; otherwise it is a training checkpoint."""
    # A .ckpt is a zip archive; everything else (a pipe, too) is for the strict reader to accept or refuse.
    try:
        if not os.path.isfile(expanded(path)):
            return True
        with open(expanded(path), "rb") as file:
            return file.read(2) != b"PK"
    except ValueError:  # no path of any file, such as one with a NUL
        return True
    except OSError as error:
        raise DeltaFileError(f"{path}: {error.strerror}. Give the path of a delta file or checkpoint.", "io") from error


# --- writes ---------------------------------------------------------------------------------------


STALE_AFTER_S: Final = 3600.0
_NAME_BYTES: Final = 200  # of the 255 that file systems allow; the rest is for pid, random part and suffix
_HEX: Final = frozenset("0123456789abcdef")
_MODE: Final = 0o666
_reaped: set[tuple[int, str]] = set()


class Disk:
    """The operating-system calls of a save, gathered so that a test can record and replay them."""

    def make_folder(self, folder: str) -> None:
        """Create ``folder`` and its missing parents, and make the new entries durable."""
        if os.path.isdir(folder):
            return
        parent = os.path.dirname(folder) or "."
        self.make_folder(parent)
        os.makedirs(folder, exist_ok=True)
        self.sync_folder(parent)

    def create(self, path: str, mode: int = _MODE) -> BinaryIO:
        """Open a new file for writing, of this mode less the umask; an existing one is an error."""
        return cast(BinaryIO, os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb"))

    def sync(self, file: BinaryIO) -> int:
        """Flush ``file`` down to the disk and return its size in bytes."""
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size

    def make_new_folder(self, path: str) -> None:
        """Create a folder, mode 0777 less the umask; an existing one is an error."""
        os.mkdir(path)

    def sync_tree(self, folder: str) -> None:
        """Make a folder durable with all files and folders in it."""
        for path, _, names in os.walk(folder, topdown=False):
            for name in names:
                with open(os.path.join(path, name), "rb") as file:
                    os.fsync(file.fileno())
            self.sync_folder(path)

    def remove_tree(self, folder: str) -> None:
        """Remove a folder with everything in it as part of cleaning up, as far as that is possible."""
        shutil.rmtree(folder, ignore_errors=True)

    def link(self, source: str, path: str) -> None:
        """Make ``path`` another name of the file ``source``."""
        os.link(source, path)

    def replace(self, source: str, path: str) -> None:
        """Rename ``source`` over ``path`` in one step."""
        os.replace(source, path)

    def unlink(self, path: str) -> None:
        """Remove ``path`` as part of cleaning up; what cannot be removed is left to :func:`reap_stale`."""
        with contextlib.suppress(OSError):
            os.unlink(path)

    def sync_folder(self, folder: str) -> None:
        """Make the entries of ``folder`` durable, where the file system offers it."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems have no such call; their renames are as durable as they get.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


DISK: Final = Disk()


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, disk: Disk = DISK) -> int:
    """Write a file so that at any moment its name holds the whole old or the whole new content.

    Missing parent folders are created. When this returns, the content survives a power loss.

    Args:
        path: local destination; an existing file (or symbolic link) of that name is replaced, and what it was not
            readable or writable for stays without it.
        write: called once with the open temporary file; what it returns is ignored.
        disk: the operating-system calls to use.

    Returns:
        The size of the file in bytes.

    Raises:
        DeltaFileError: code ``io``, if the operating system refuses, or ``path`` is no place for a file (a folder, a
            pipe, a device). What was there before is then untouched and no temporary file is left. Other exceptions of
            ``write`` propagate as they are, equally without a trace on disk.
    """
    target = _local(path)
    _check_replaceable(target)
    folder, temp = os.path.dirname(target) or ".", _temp_name(target)
    with _naming(target):
        disk.make_folder(folder)
        try:
            mode = _mode_of(target)
            with disk.create(temp) if mode == _MODE else disk.create(temp, mode) as file:
                write(file)
                size = disk.sync(file)
            disk.replace(temp, target)
        except BaseException:
            disk.unlink(temp)
            raise
        disk.sync_folder(folder)
    return size


def _check_replaceable(target: str) -> None:
    """A rename puts its file in the place of anything: of the machine's ``/dev/null``, if root asks for it."""
    try:
        mode = os.stat(target).st_mode
    except OSError:  # nothing there, or a link to nothing
        return
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise DeltaFileError(
            f"{target} is a {kind}, and a save would put a file in its place. Give the path of a file.", "io"
        )


def _mode_of(target: str) -> int:
    """Mode of a new file: no wider than that of the one whose place it takes."""
    try:
        return _MODE & os.stat(target).st_mode
    except OSError:
        return _MODE


def atomic_folder(path: str | os.PathLike[str], build: Callable[[str], object], *, disk: Disk = DISK) -> None:
    """Make a folder so that at any moment its name is absent or holds everything.

    Missing parent folders are created. When this returns, the folder survives a power loss.

    Args:
        path: local destination; nothing, or an empty folder, may be there.
        build: called once with the path of an empty folder beside the destination, which it fills; what it
            returns is ignored.
        disk: the operating-system calls to use.

    Raises:
        DeltaFileError: code ``io``, if the operating system refuses. Other exceptions of ``build`` propagate
            as they are. In all cases nothing is left on disk.
    """
    target = _local(path)
    parent, temp = os.path.dirname(target) or ".", _temp_name(target)
    with _naming(target):
        disk.make_folder(parent)
        try:
            disk.make_new_folder(temp)
            build(temp)
            disk.sync_tree(temp)
            disk.replace(temp, target)
        except BaseException:
            disk.remove_tree(temp)
            raise
        disk.sync_folder(parent)


def durable_link(source: str | os.PathLike[str], path: str | os.PathLike[str], *, disk: Disk = DISK) -> None:
    """Make ``path`` a second name of the file ``source``, replacing what ``path`` was in one step.

    A hard link where the file system has them, else a copy. A symbolic link would dangle as soon as
    its target is pruned.

    Args:
        source: an existing regular file that is already durable.
        path: the name to create or to replace.
        disk: the operating-system calls to use.

    Raises:
        DeltaFileError: code ``io``, if the operating system refuses; ``path`` is then as it was.
    """
    # link() does not follow symbolic links on Linux, and a link to a link is what is to be avoided.
    origin, target = os.path.realpath(_local(source)), _local(path)
    _check_replaceable(target)
    folder, temp = os.path.dirname(target) or ".", _temp_name(target)
    with _naming(target):
        disk.make_folder(folder)
        try:
            disk.link(origin, temp)
        except OSError:
            with open(origin, "rb") as original:
                atomic_write(target, lambda file: shutil.copyfileobj(original, file, 1 << 20), disk=disk)
            return
        try:
            disk.replace(temp, target)
        finally:
            # A rename between two names of one file does nothing and leaves both names.
            disk.unlink(temp)
        disk.sync_folder(folder)


def reap_once(folder: str | os.PathLike[str]) -> None:
    """Call :func:`reap_stale`, the first time that this process asks for a folder."""
    key = (os.getpid(), os.path.abspath(folder))
    if key not in _reaped:
        _reaped.add(key)
        reap_stale(folder)


def reap_stale(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Remove the temporary files and folders that killed processes left in ``folder``.

    Removed is what carries the name pattern of this module, belongs to no living process of this
    machine, and was last written more than an hour ago (it may belong to another machine).

    Returns:
        The paths removed, sorted; empty if the folder does not exist.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ()
    removed = []
    for path in (os.path.join(os.fspath(folder), name) for name in names if _is_abandoned(name)):
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if time.time() - status.st_mtime <= STALE_AFTER_S:
                continue
            if stat.S_ISREG(status.st_mode):
                os.unlink(path)
            elif stat.S_ISDIR(status.st_mode):
                shutil.rmtree(path)
            else:
                continue
            removed.append(path)
    return tuple(removed)


def _local(path: str | os.PathLike[str]) -> str:
    text = expanded(path)
    if "://" in text:
        raise DeltaFileError(
            f"{text}: found a URL, expected a local path: a rename is only atomic on a local file system. "
            "Save locally and upload the one file.",
            "io",
        )
    return text


def _temp_name(target: str) -> str:
    folder, name = os.path.split(target)
    # The operating system's randomness: a save must not advance the generators of a training run.
    short = os.fsdecode(os.fsencode(name)[:_NAME_BYTES])
    return os.path.join(folder, f".{short}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def _is_abandoned(name: str) -> bool:
    parts = name.rsplit(".", 3)
    if len(parts) != 4 or not parts[0].startswith(".") or parts[3] != "tmp":
        return False
    pid, token = parts[1], parts[2]
    if not (pid.isascii() and pid.isdigit() and 0 < len(pid) < 10 and len(token) == 8 and _HEX.issuperset(token)):
        return False
    return int(pid) > 0 and not _is_alive(int(pid))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it exists and belongs to somebody else
    return True


@contextlib.contextmanager
def _naming(target: str) -> Iterator[None]:
    """Turn a refusal of the operating system into an error that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save turns a write error in the middle of a file into a RuntimeError raised from it.
        cause = _refusal(error)
        if cause is None:
            raise
        reason = cause.strerror or str(cause)
        raise DeltaFileError(
            f"{target}: writing failed with errno {cause.errno} ({reason}). Free space or fix the permissions of the "
            "folder, then save again; a file that was there before is still whole.",
            "io",
        ) from error


def _refusal(error: BaseException | None) -> OSError | None:
    """The operating-system error that is, or lies behind, an exception."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
