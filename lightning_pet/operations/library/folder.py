"""Delta files in a folder: found by name, verified when they are first read, read plainly while they stay the same."""

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from lightning_pet.errors import DeltaFileError
from lightning_pet.operations.library.forms import Form, Forms
from lightning_pet.store.delta_file import Stamp, Verified, read_again, read_delta, stamp_of
from lightning_pet.store.files import expanded
from lightning_pet.store.manifest import Fingerprint
from lightning_pet.store.reader import Stored

SUFFIX: Final = ".pet.safetensors"


class Changes(NamedTuple):
    """What has become of the files of a folder since it was last looked at.

    Attributes:
        new: names of files that came.
        changed: of those that were replaced or written into, and had been read.
        gone: of those that are no longer there.
    """

    new: tuple[str, ...]
    changed: tuple[str, ...]
    gone: tuple[str, ...]


class Volume(NamedTuple):
    """A delta as it was read.

    Attributes:
        stored: what the file holds; without what it says in its notes.
        form: what it has in common with others.
        stamp: of the file.
    """

    stored: Stored
    form: Form
    stamp: Stamp | None


class _Known(NamedTuple):
    verified: Verified
    form: Form
    base: Fingerprint | None


class Folder:
    """The files whose names end in ``.pet.safetensors``, by what is before that.

    Attributes:
        path: where they are.
        forms: of those that were read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(expanded(path))
        self.forms = Forms()
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._names: set[str] = set(self._listed())

    @property
    def names(self) -> tuple[str, ...]:
        """Of the files, in order."""
        with self._lock:
            return tuple(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def has(self, name: object) -> bool:
        """Whether there is a file of this name; one that came since the last look is found, too."""
        if not isinstance(name, str) or not _is_plain(name):
            return False
        if name not in self._names and os.path.isfile(self.file(name)):
            with self._lock:
                self._names.add(name)
        return name in self._names

    def file(self, name: str) -> Path:
        """The path of a file."""
        return self.path / f"{name}{SUFFIX}"

    def stamp(self, name: str) -> Stamp | None:
        """The stamp of a file; ``None`` if it is gone."""
        try:
            return stamp_of(self.file(name))
        except OSError:
            return None

    def read(self, name: str) -> tuple[Volume, bool]:
        """A delta, and whether each of its bytes was verified now, and not when it was read before.

        Raises:
            DeltaFileError: if the file is gone, damaged or not ours.
        """
        path, known = self.file(name), self._known.get(name)
        if known is not None and (tensors := read_again(path, known.verified)) is not None:
            form = known.form
            return Volume(Stored(path, form.methods, tensors, known.base, form.root), form, known.verified.stamp), False
        found = read_delta(path)
        manifest = found.manifest
        stored = Stored(path, manifest.methods, dict(found.tensors), manifest.base, manifest.root)
        form = self.forms.of(stored, found.verified.entries if found.verified is not None else ())
        base = form.same_base(manifest.base)
        stored = replace(stored, methods=form.methods, base=base)
        if found.verified is not None:
            self._known[name] = _Known(found.verified._replace(entries=form.entries), form, base)
        return Volume(stored, form, None if found.verified is None else found.verified.stamp), True

    def look(self) -> Changes:
        """Look at the folder again."""
        present = set(self._listed())
        with self._lock:
            new, gone = present - self._names, self._names - present
            self._names = present
        read = {name: known.verified.stamp for name, known in list(self._known.items()) if name in present}
        changed = [name for name, stamp in read.items() if self.stamp(name) != stamp]
        for name in (*changed, *gone):
            self._known.pop(name, None)
        return Changes(tuple(sorted(new)), tuple(sorted(changed)), tuple(sorted(gone)))

    def _listed(self) -> Iterator[str]:
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.endswith(SUFFIX) and _is_plain(entry.name) and entry.is_file():
                        yield entry.name.removesuffix(SUFFIX)
        except OSError as error:
            raise DeltaFileError(
                f"{self.path}: {error.strerror}. Give a folder that holds delta files (*{SUFFIX}).", "io"
            ) from error


def _is_plain(name: str) -> bool:
    """Whether a name stays in the folder: it may be what a user of a service has typed."""
    return bool(name) and not name.startswith(".") and not {"/", "\\", "\0"} & set(name)
