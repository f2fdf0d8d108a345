"""Paths as people write them."""

import os

from lightning_pet.errors import ArgumentError, DeltaFileError


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
