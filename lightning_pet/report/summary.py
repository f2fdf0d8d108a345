"""What a delta file or checkpoint holds, for people and for programs."""

import os
from typing import Any

from lightning_pet.exchange.source import is_foreign, read_source
from lightning_pet.report.delta_summary import described, norm, summarize_delta
from lightning_pet.report.delta_summary import print_summary as print_summary
from lightning_pet.store.files import is_delta_file
from lightning_pet.store.fingerprint import describe
from lightning_pet.store.manifest import Manifest


def summarize(path: str | os.PathLike[str], delta: str | None = None) -> dict[str, Any]:
    """Read a file or folder completely (every digest that there is is verified) and describe it in plain types.

    Args:
        path: of it.
        delta: which, of a checkpoint in which several have trained together.

    Returns:
        What :func:`~lightning_pet.report.delta_summary.described` does.

    Raises:
        DeltaFileError: if the file is damaged or not ours.
    """
    if not is_foreign(path) and is_delta_file(path):
        return summarize_delta(path)
    stored = read_source(path, delta=delta)
    norms = {name: norm(tensor.detach().double().numpy()) for name, tensor in stored.tensors.items()}
    return described(path, Manifest(stored.methods, describe(stored.tensors), stored.base, stored.root), norms)
