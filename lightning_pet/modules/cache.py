"""Where artefacts that this package computes once are kept: built data sets, a small model trained on the spot."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """Folder of the cache: ``$LIGHTNING_PET_CACHE``, else ``~/.cache/lightning_pet``."""
    chosen = os.environ.get("LIGHTNING_PET_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lightning_pet"


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's folder ``name``; call ``build`` with an empty folder to fill it when it does not exist.

    The folder appears under its name only when ``build`` has finished and its files are on disk, so an
    interrupted run leaves nothing half-made. Of several processes that build at once, the first wins.

    Args:
        name: folder name; it must contain a key of everything that the contents depend on.
        build: writes the files.

    Returns:
        The complete folder.
    """
    folder = cache_root() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        build(unfinished)
        _flush(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # not another process that was faster, but a real failure
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _flush(folder: Path) -> None:
    # Without it a power cut after the rename could leave the final name with empty files.
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
