"""Reading a delta from a delta file or a checkpoint, taking it out of one, and the one to go on from after a crash."""

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.model.naming import as_base_names, in_file, named_parameters, split_below
from lightning_pet.model.naming import delta_of as name_of_delta
from lightning_pet.store.delta_file import read_delta, write_delta
from lightning_pet.store.entry import (
    MARK,
    check_tensors,
    deltas_in_entry,
    load_checkpoint,
    methods_of,
    read_entry,
    saved_fingerprint,
    written_by,
)
from lightning_pet.store.files import expanded, is_delta_file
from lightning_pet.store.fingerprint import Verdict, compare, describe
from lightning_pet.store.manifest import Fingerprint, Manifest, MethodRecord, read_manifest
from lightning_pet.store.strict_json import fault

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Stored:
    """A delta as it was read, from a delta file or from a training checkpoint.

    Attributes:
        path: the file.
        methods: short name, user's name, options and places of every method.
        tensors: by name from the adapted root.
        base: fingerprint of the base it was trained on.
        root: path of the adapted root in the LightningModule that wrote it.
        beside: tensors of that LightningModule beside the root, by name; a training checkpoint has them.
        notes: free text for people.
    """

    path: Path
    methods: tuple[MethodRecord, ...]
    tensors: dict[str, Tensor]
    base: Fingerprint | None
    root: str = ""
    beside: dict[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def read(path: PathLike, delta: str | None = None) -> Stored:
    """Read and verify a delta file or a training checkpoint.

    Args:
        path: of the file.
        delta: which, of a checkpoint in which several have trained together.

    Raises:
        DeltaFileError: if it is damaged or not ours, or holds several deltas and none of this name.
    """
    if is_delta_file(path):
        found = read_delta(path)
        manifest = found.manifest
        return Stored(
            Path(path), manifest.methods, dict(found.tensors), manifest.base, manifest.root, notes=manifest.notes
        )
    return delta_of(load_checkpoint(path), path, delta)


def delta_of(checkpoint: Mapping[str, Any], path: PathLike, delta: str | None = None) -> Stored:
    """Verify the delta in the contents of a training checkpoint.

    Args:
        checkpoint: its contents.
        path: names it in errors.
        delta: which, of several that have trained together.

    Raises:
        DeltaFileError: if it is damaged or not ours, or holds several deltas and none of this name.
    """
    entry = read_entry(checkpoint, path)
    check_tensors(checkpoint, entry, path)
    several = deltas_in_entry(entry)
    if several and delta not in several:
        known = ", ".join(map(repr, several))
        raise DeltaFileError(
            f"{path} holds the deltas of {len(several)} tasks: {known}. Say which one is meant, by its name: "
            f"load_delta(model, path, name={several[0]!r}), or --delta={several[0]} on the command line; "
            "load_from_checkpoint loads all of them.",
            "mismatch",
        )
    tensors, rest = split_below(checkpoint["state_dict"], entry["root"])
    tensors.pop(MARK, None)  # of a checkpoint that was not read but is about to be written
    if several:
        tensors = {name: tensor for name, tensor in tensors.items() if name_of_delta(name) in (None, delta)}
    tensors = in_file(as_base_names(tensors))  # of a run among other deltas
    if odd := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise fault(f"{path}: {odd[0]}", f"found {type(tensors[odd[0]]).__name__}, expected a tensor.")
    beside = {name: tensor for name, tensor in rest.items() if name != MARK and isinstance(tensor, Tensor)}
    base = saved_fingerprint(entry, path)
    methods = methods_of(entry, path, delta if several else None)
    return Stored(Path(path), methods, tensors, base, entry["root"], beside)


def deltas_of_checkpoint(checkpoint: Mapping[str, Any], path: PathLike) -> tuple[str, ...]:
    """Names of the deltas that trained together in the run of a checkpoint; none if there was one."""
    return deltas_in_entry(read_entry(checkpoint, path))


def manifest_of(path: PathLike, delta: str | None = None) -> Manifest:
    """What a delta file or a training checkpoint says of itself.

    Of a delta file no values are read; a checkpoint can only be read as a whole.

    Raises:
        DeltaFileError: if it is damaged or not ours.
    """
    return (
        read_manifest(path) if is_delta_file(path) else _checkpoint_manifest(load_checkpoint(path), path, delta=delta)
    )


def _checkpoint_manifest(
    checkpoint: Mapping[str, Any],
    path: PathLike,
    notes: Mapping[str, str] | None = None,
    delta: str | None = None,
) -> Manifest:
    """What the contents of a training checkpoint say of their delta."""
    stored, step = delta_of(checkpoint, path, delta), checkpoint.get("global_step")
    return Manifest(
        methods=stored.methods,
        tensors=describe(stored.tensors),
        base=stored.base,
        root=stored.root,
        step=step if type(step) is int and 0 <= step < 2**63 else None,
        notes=dict(notes or {}),
        written_by=read_entry(checkpoint, path)["written_by"],
    )


# --- from a training checkpoint to a delta file, without the model --------------------------------


def extract_delta(
    checkpoint: PathLike, path: PathLike, *, notes: Mapping[str, str] | None = None, delta: str | None = None
) -> int:
    """Write the delta in a training checkpoint into a delta file. Neither the model nor Lightning is needed.

    The checkpoint is verified as for a load. The file holds the tensors as training holds them: what ``save_delta``
    adds to or takes out of some methods' deltas (folded prefixes, switched-off triplets of AdaLoRA) needs the model.
    Both load to the same values.

    Args:
        checkpoint: a training checkpoint of any engine.
        path: usually ends in ``.pet.safetensors``; an existing file is replaced.
        notes: free text for people, at most 4 KB; never interpreted.
        delta: which, of a checkpoint in which the deltas of several tasks have trained together.

    Returns:
        Bytes written.

    Raises:
        ArgumentError: if ``checkpoint`` is a delta file already, or ``path`` is the checkpoint itself.
        DeltaFileError: if the checkpoint is damaged or not ours, or a tensor holds NaN or infinity; ``io`` if there
            is no such checkpoint or the disk refuses; ``unsafe`` if it is a pipe or device, which is never waited
            for. A file that was there before is untouched then.
    """
    if _is_file(checkpoint) and is_delta_file(checkpoint):
        raise ArgumentError(f"{checkpoint} is no training checkpoint (.ckpt); a delta file can be copied as it is.")
    content = load_checkpoint(checkpoint)
    if os.path.exists(expanded(path)) and os.path.samefile(expanded(checkpoint), expanded(path)):
        raise ArgumentError(f"{path} is the checkpoint itself; give the delta file another name.")
    return write_delta_of(content, checkpoint, path, notes, delta)


def _is_file(path: PathLike) -> bool:
    try:
        return os.path.isfile(expanded(path))
    except ValueError:  # no path of any file
        return False


def write_delta_of(
    checkpoint: Mapping[str, Any],
    source: PathLike,
    path: PathLike,
    notes: Mapping[str, str] | None = None,
    delta: str | None = None,
) -> int:
    """Write the delta in the contents of a training checkpoint; ``source`` names it in errors."""
    stored = delta_of(checkpoint, source, delta)
    manifest = replace(_checkpoint_manifest(checkpoint, source, notes, delta), written_by=written_by())
    return write_delta(path, {name: tensor.cpu().contiguous() for name, tensor in stored.tensors.items()}, manifest)


def delta_path(checkpoint: PathLike, delta: str = "") -> str:
    """Where the delta file of a checkpoint lies: beside it, ``x.pet.safetensors`` for ``x.ckpt``.

    >>> delta_path("x.ckpt"), delta_path("x.ckpt", "sst2")
    ('x.pet.safetensors', 'x.sst2.pet.safetensors')
    """
    return f"{os.fspath(checkpoint).removesuffix('.ckpt')}{'.' * bool(delta)}{delta}.pet.safetensors"


# --- the checkpoint to go on from after a crash ---------------------------------------------------


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
        stored = delta_of(content, path, next(iter(deltas_of_checkpoint(content, path)), None))
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
