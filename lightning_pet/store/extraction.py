"""From a training checkpoint to a delta file, without the model."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_pet.errors import ArgumentError
from lightning_pet.store.archive import load_checkpoint
from lightning_pet.store.delta_file import write_delta
from lightning_pet.store.entry import written_by
from lightning_pet.store.paths import expanded
from lightning_pet.store.reader import PathLike, checkpoint_manifest, delta_of, is_delta_file


def extract_delta(checkpoint: PathLike, path: PathLike, *, notes: Mapping[str, str] | None = None) -> int:
    """Write the delta in a training checkpoint into a delta file. Neither the model nor Lightning is needed.

    The checkpoint is verified as for a load. The file holds the tensors as training holds them: what ``save_delta``
    adds to or takes out of some methods' deltas (folded prefixes, switched-off triplets of AdaLoRA) needs the model.
    Both load to the same values.

    Args:
        checkpoint: a training checkpoint of any engine.
        path: usually ends in ``.pet.safetensors``; an existing file is replaced.
        notes: free text for people, at most 4 KB; never interpreted.

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
    return write_delta_of(content, checkpoint, path, notes)


def _is_file(path: PathLike) -> bool:
    try:
        return os.path.isfile(expanded(path))
    except ValueError:  # no path of any file
        return False


def write_delta_of(
    checkpoint: Mapping[str, Any], source: PathLike, path: PathLike, notes: Mapping[str, str] | None = None
) -> int:
    """Write the delta in the contents of a training checkpoint; ``source`` names it in errors."""
    stored = delta_of(checkpoint, source)
    manifest = replace(checkpoint_manifest(checkpoint, source, notes), written_by=written_by())
    return write_delta(path, {name: tensor.cpu().contiguous() for name, tensor in stored.tensors.items()}, manifest)


def delta_path(checkpoint: PathLike) -> str:
    """Where the delta file of a checkpoint lies: beside it, ``x.pet.safetensors`` for ``x.ckpt``."""
    return f"{os.fspath(checkpoint).removesuffix('.ckpt')}.pet.safetensors"
