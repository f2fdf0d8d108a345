"""Delta files combined with their base at hand, where the files alone do not say what they change."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_pet.errors import ArgumentError
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.combining.in_model import combine
from lightning_pet.operations.combining.rules import Combination, How
from lightning_pet.operations.delta import load_delta, load_model
from lightning_pet.store.reader import PathLike


def combine_on_base(
    sources: Sequence[PathLike],
    path: PathLike,
    base: Path,
    *,
    model_class: str = "auto",
    weights: Sequence[float] | None = None,
    how: How = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Combination:
    """Combine delta files in a transformers model; see :meth:`lightning_pet.Adapted.combine`.

    Args:
        sources: the files.
        path: the file to write.
        base: local folder of the base that they were trained on.
        model_class: class of transformers; ``"auto"``: the first architecture in the base's ``config.json``.
        weights: a number for each file.
        how: what to do.
        rank: of the result, where it is approximated.
        density: share of entries that is kept.
        seed: of DARE.

    Raises:
        ArgumentError: if an argument means nothing for these files.
        BaseMismatchError: if one was trained on another base.
        DeltaFileError: if one is damaged or does not fit, or they cannot be combined.
    """
    if weights is not None and len(weights) != len(sources):
        raise ArgumentError(f"{len(weights)} weights for {len(sources)} files: give one for each.")
    model = load_model(base, model_class)
    names = [f"{index + 1}-{_plain(source)}"[:64] for index, source in enumerate(sources)]
    for name, source in zip(names, sources, strict=True):
        load_delta(model, source, name=name)
    meant = names if weights is None else dict(zip(names, weights, strict=True))
    made = combine(model, "result", meant, how, rank, density, seed)
    size = Adapted(model)["result"].save(path)
    return replace(made, path=str(path), size=size)


def _plain(source: PathLike) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).name.split(".")[0]) or "delta"
