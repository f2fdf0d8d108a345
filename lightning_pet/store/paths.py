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
