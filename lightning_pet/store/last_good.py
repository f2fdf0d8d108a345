"""The checkpoint to go on from after a crash."""

import logging
import os
from pathlib import Path

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.reader import load_checkpoint, read

_log = logging.getLogger(__name__)


def last_good(folder: str | os.PathLike[str]) -> Path | None:
    """Find the newest training checkpoint that verifies: complete, undamaged, and with everything to go on from.

    Why a newer file is passed over is logged as a warning.

    Args:
        folder: searched with everything below it for ``*.ckpt``.

    Returns:
        The path for ``trainer.fit(ckpt_path=…)``; ``None`` if there is no checkpoint yet, so that one script
        serves the first start and every restart.

    Raises:
        DeltaFileError: (``corrupt``) if there are checkpoints and none verifies. Starting from step 0 would
            overwrite what may still be repaired.

    Example:
        >>> from lightning_pet import last_good
        >>> last_good("a_folder_without_checkpoints") is None
        True
    """
    found = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.ckpt")}
    reasons = []
    for path in sorted(found, key=lambda path: (found[path], path.name), reverse=True):
        reason = _unfit(path)
        if reason is None:
            return path
        reasons.append(f"{path.name}: {reason}")
        _log.warning("passed over %s: %s", path, reason)
    if reasons:
        raise DeltaFileError(
            f"{folder}: none of {len(reasons)} checkpoints can be resumed. {' '.join(reasons[:4])} Restore one from a "
            "copy, or give another folder to start anew.",
            "corrupt",
        )
    return None


def _unfit(path: Path) -> str | None:
    """Why a run cannot be resumed from a file; ``None`` if it can."""
    try:
        read(path)
        missing = [key for key in ("loops", "optimizer_states", "lr_schedulers") if key not in load_checkpoint(path)]
    except (DeltaFileError, OSError) as error:
        return str(error)
    return f"it holds only weights ({', '.join(missing)} are missing)." if missing else None
