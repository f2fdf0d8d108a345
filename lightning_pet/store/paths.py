"""Paths as people write them."""

import os


def expanded(path: str | os.PathLike[str]) -> str:
    """The path as text, with ``~`` for the home folder.

    >>> expanded("a/b"), expanded("~/x") == os.path.join(os.path.expanduser("~"), "x")
    ('a/b', True)
    """
    return os.path.expanduser(os.fspath(path))
