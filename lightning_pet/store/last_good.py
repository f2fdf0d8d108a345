"""The checkpoint to go on from after a crash."""

import contextlib
import logging
import os
from pathlib import Path
from typing import Final

from torch import nn

from lightning_pet.errors import DeltaFileError
from lightning_pet.model.naming import named_parameters
from lightning_pet.store.archive import load_checkpoint
from lightning_pet.store.fingerprint import Verdict, compare
from lightning_pet.store.paths import expanded
from lightning_pet.store.reader import Stored, delta_of, is_delta_file, read

_LOOKS: Final = 3  # into the folder, as long as files vanish meanwhile
_log = logging.getLogger(__name__)


def last_good(folder: str | os.PathLike[str], model: nn.Module | None = None) -> Path | None:
    """Find the newest training checkpoint that verifies: complete, undamaged, and with everything to go on from.

    Why a newer file is passed over is logged as a warning.

    Args:
        folder: searched with everything below it for ``*.ckpt``.
        model: the LightningModule with its base weights; checkpoints of another base are then passed over as
            well. Without it a checkpoint of another base is found, and refused when the run reads it.

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
    for _ in range(_LOOKS):
        reasons: list[str] = []
        vanished = False
        for path in _newest_first(folder):
            reason = _unfit(path, model)
            if reason is None:
                return path
            # A run that is still writing removes old files while they are looked at: it has made newer ones.
            vanished = vanished or not os.path.lexists(path)
            reasons.append(f"{path.name}: {reason}")
            _log.warning("passed over %s: %s", path, reason)
        if not vanished:
            break
    if reasons:
        raise DeltaFileError(
            f"{folder}: none of {len(reasons)} checkpoints can be resumed. {' '.join(reasons[:4])} Restore one from a "
            "copy, or give another folder to start anew.",
            "corrupt",
        )
    return None


def _newest_first(folder: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints below a folder; of links that dangle, and files that vanish meanwhile, the own time or none."""
    found: dict[Path, float] = {}
    for parent, folders, files in os.walk(expanded(folder)):
        for path in (Path(parent, name) for name in (*files, *folders) if name.endswith(".ckpt")):
            found[path] = -1
            with contextlib.suppress(OSError):
                found[path] = path.lstat().st_mtime_ns
                found[path] = path.stat().st_mtime_ns
    return sorted(found, key=lambda path: (found[path], path.name), reverse=True)


def _unfit(path: Path, model: nn.Module | None) -> str | None:
    """Why a run cannot be resumed from a file; ``None`` if it can."""
    if path.is_symlink() and not path.exists():
        return f"it is a link to {os.readlink(path)}, which is gone."
    try:
        if is_delta_file(path):
            read(path)
            return "it is a delta file, which holds only weights."
        content = load_checkpoint(path)
        stored = delta_of(content, path)
    except (DeltaFileError, OSError) as error:
        return str(error)
    missing = [key for key in ("loops", "optimizer_states", "lr_schedulers") if key not in content]
    if missing:
        return f"it holds only weights ({', '.join(missing)} are missing)."
    return None if model is None else _other_base(stored, model)


def _other_base(stored: Stored, model: nn.Module) -> str | None:
    if not any(True for _ in model.parameters()):  # it is built later, and compared when the run reads the file
        return None
    try:
        root = model.get_submodule(stored.root)
    except AttributeError:
        return f"it was trained in a module with {stored.root!r}, which this {type(model).__name__} does not have."
    # What trains is in the file, and not part of the fingerprint.
    named = dict(named_parameters(root))
    found = compare(stored.base, ((n, p) for n, p in named.items() if n not in stored.tensors)) if stored.base else None
    if found is None or found.verdict is not Verdict.DIFFERENT:
        return None
    return f"it was trained on another base model: {found.explanation}"
