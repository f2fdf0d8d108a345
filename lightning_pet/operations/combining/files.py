"""Arithmetic on delta files: several deltas of one base become one, without the base.

What is added is the change that a delta makes to the base, not its parameters: ``Σ w ΔW``. A method without a rule
(:data:`~lightning_pet.operations.combining.rules.RULES`) has no arithmetic without the base, and is refused.
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_pet.arguments import is_whole
from lightning_pet.errors import ArgumentError, BaseMismatchError, DeltaFileError
from lightning_pet.layers import combining as arithmetic
from lightning_pet.model.naming import by_delta
from lightning_pet.operations.combining.rules import (
    DENSITIES,
    ELECTING,
    ENTRYWISE,
    HOWS,
    OF_A_RANK,
    RULES,
    WITH_BASE,
    Combination,
    How,
    Options,
    Originals,
    Result,
    combined_change,
)
from lightning_pet.store.delta_file import write_delta
from lightning_pet.store.entry import written_by
from lightning_pet.store.files import expanded
from lightning_pet.store.manifest import Manifest
from lightning_pet.store.reader import PathLike, Stored, read


def combine_deltas(
    sources: Sequence[PathLike],
    path: PathLike,
    *,
    weights: Sequence[float] | None = None,
    how: How = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    notes: Mapping[str, str] | None = None,
) -> Combination:
    """Combine delta files (or training checkpoints) of one base into a delta file. No model is needed.

    * LoRA (also PiSSA, OLoRA and AdaLoRA): everything, on ``ΔW = s B A``. ``"linear"`` (or ``"cat"``) is exact and
      adds up ranks; ``"svd"`` is the best approximation of a rank; ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` and
      ``"magnitude_prune"`` work on the entries of ΔW, and the result is approximated by a rank. ``"peft_linear"`` and
      ``"peft_ties"`` repeat what HF PEFT calls so, on A and B apart.
    * (IA)³ and fixed diff pruning: ``"linear"``, exactly.
    * Adapters, AdapterBias, Compacter: ``"linear"`` with weights that are not negative and sum to one: an average of
      parameters, which means something for runs from one initialisation only.
    * Prefixes and prompts: ``"cat"``, one behind the other.
    * Trained heads, biases and other weights of the base: their average, for every ``how``. Weights that do not sum
      to one need the base's own values, and are refused unless all files hold the same.

    Args:
        sources: the files; one is enough to scale, prune or approximate it.
        path: the file to write; replaced if it exists, but not one of the sources.
        weights: a number for each file, negative to unlearn; default: equal ones that sum to one.
        how: what to do.
        rank: of the result where it is an approximation; default: the largest of the files for ``"svd"``, else as many
            as ``"linear"`` has.
        density: share of entries that is kept; default: 0.2 for TIES, else 0.5.
        seed: of DARE.
        notes: free text for people, beside what is noted of the sources.

    Returns:
        What was written, with the error of the approximation.

    Raises:
        ArgumentError: if an argument is out of range, or means nothing for the methods in the files.
        BaseMismatchError: if they were trained on different bases.
        DeltaFileError: if a file is damaged, or they hold what cannot be combined.
    """
    if isinstance(sources, str | os.PathLike):
        raise ArgumentError(f"sources={os.fspath(sources)!r}: expected a list of paths of delta files.")
    options = checked_options(len(sources), weights, how, rank, density, seed)
    if any(_same_file(source, path) for source in sources):
        raise ArgumentError(f"{path} is one of the files that are combined; give the result another name.")
    files = [read(source) for source in sources]
    _check_methods(files)
    _check_trained(files)
    _check_bases(files)
    stored, made = by_rules(files, options)
    noted = {**(notes or {}), "combined": provenance(files, options)}
    manifest = Manifest(stored.methods, base=stored.base, root=stored.root, notes=noted, written_by=written_by())
    size = write_delta(path, {name: tensor.contiguous() for name, tensor in stored.tensors.items()}, manifest)
    return replace(made, path=os.fspath(path), size=size)


def by_rules(
    files: Sequence[Stored], options: Options, originals: Originals | None = None
) -> tuple[Stored, Combination]:
    """Combine deltas of the same methods by what they hold.

    Args:
        files: the deltas.
        options: what to do.
        originals: the base's own values, where it is at hand.

    Raises:
        ArgumentError: if that means nothing for one of the methods.
        DeltaFileError: if they hold what cannot be combined so.
    """
    made = Combination()
    result = Result(files, options, made)
    records = tuple(result.add(index) for index in range(len(files[0].methods)))
    if originals is None:
        values = _values(files, options, result.values)
    else:
        values = values_over(originals, [by_delta(file.tensors).get("", {}) for file in files], options)
    stored = replace(files[0], methods=records, tensors=result.tensors | values, notes={})
    return stored, replace(made, error=result.error)


# --- what is refused -----------------------------------------------------------------------------


def checked_options(
    count: int,
    weights: Sequence[float] | None,
    how: How,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    word: str = "how",
) -> Options:
    """Refuse what is out of range.

    Args:
        count: how many deltas there are.
        weights: a number for each.
        how: what to do.
        rank: of the result.
        density: share of entries that is kept.
        seed: of DARE.
        word: what the caller calls ``how``.

    Raises:
        ArgumentError: naming the argument.
    """
    _check_kinds(weights, density, seed, "file" if word == "how" else "delta")
    return replace(_checked(count, weights, how, rank, density, seed, word), word=word)


def _check_kinds(weights: Any, density: Any, seed: Any, each: str) -> None:
    try:
        if isinstance(weights, str):
            raise TypeError
        if any(isinstance(weight, bool) for weight in (() if weights is None else weights)):
            raise TypeError
        [float(weight) for weight in (() if weights is None else weights)]
    except (TypeError, ValueError):
        raise ArgumentError(f"weights={weights!r}: expected a list with one number for each {each}.") from None
    if density is not None and not isinstance(density, Real):
        raise ArgumentError(f"density={density!r}: expected a number in (0, 1].")
    if not is_whole(seed):
        raise ArgumentError(f"seed={seed!r}: expected an integer.")


def _checked(
    count: int, weights: Sequence[float] | None, how: How, rank: int | None, density: float | None, seed: int, word: str
) -> Options:
    if how not in HOWS:
        raise ArgumentError(f"{word}={how!r}: use one of {', '.join(HOWS)}.")
    if count < 1:
        raise ArgumentError("there is nothing to combine: give one or more delta files, or names of deltas.")
    if weights is not None and len(weights) != count:
        raise ArgumentError(f"{len(weights)} weights for {count} files: give one for each.")
    own = tuple(float(weight) for weight in weights) if weights is not None else (1 / count,) * count
    if not all(math.isfinite(weight) for weight in own):
        raise ArgumentError(f"weights={list(own)}: every weight must be a finite number.")
    if how in ELECTING and how != "peft_ties" and (min(own) < 0 or not any(own)):
        raise ArgumentError(
            f"weights={list(own)}: {how} takes the mean of the entries that agree, for which weights have to be at "
            f"least zero and not all zero. Use {word}='linear' to subtract."
        )
    if rank is not None and (how not in OF_A_RANK or not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ArgumentError(
            f"rank={rank!r} with {word}={how!r}: a positive integer, with one of {', '.join(OF_A_RANK)}."
        )
    if density is not None and (how not in DENSITIES or not 0 < density <= 1):
        raise ArgumentError(f"density={density!r} with {word}={how!r}: in (0, 1], with one of {', '.join(DENSITIES)}.")
    return Options(how, own, weights is not None, rank, density or DENSITIES.get(how, 1.0), seed)


def _same_file(source: PathLike, path: PathLike) -> bool:
    try:
        return os.path.samefile(expanded(source), expanded(path))
    except (OSError, ValueError):
        return False


def _check_bases(files: Sequence[Stored]) -> None:
    known = [file for file in files if file.base is not None]
    for file in known[1:]:
        first, other = known[0].base, file.base
        assert first is not None
        assert other is not None
        if (first.structure, first.sample) != (other.structure, other.sample):
            what = "values" if first.structure == other.structure else "names or shapes"
            raise BaseMismatchError(
                f"{file.path} and {known[0].path} were trained on bases that differ in their {what}, or train other "
                "parts of one base: changes of different weights cannot be added. Combine deltas of one base."
            )


def _check_methods(files: Sequence[Stored]) -> None:
    def named(file: Stored) -> list[str]:
        return [f"{record.method}:{record.name}" for record in file.methods]

    for file in files[1:]:
        if named(file) != named(files[0]):
            raise DeltaFileError(
                f"{files[0].path} holds {', '.join(named(files[0]))}, {file.path} holds {', '.join(named(file))}: "
                f"only files of the same methods and names are combined without the base. {WITH_BASE}",
                "mismatch",
            )
    for record in files[0].methods:
        if record.method not in RULES:
            raise DeltaFileError(
                f"{files[0].path} holds {record.method}:{record.name}, which has no arithmetic on files: it is not "
                f"linear in what it holds. Combined are {', '.join(RULES)}. {WITH_BASE}",
                "mismatch",
            )


def _check_trained(files: Sequence[Stored]) -> None:
    shapes = [{name: t.shape for name, t in by_delta(file.tensors).get("", {}).items()} for file in files]
    for file, own in zip(files[1:], shapes[1:], strict=True):
        if odd := sorted(dict(own.items() ^ shapes[0].items())):
            raise DeltaFileError(
                f"{odd[0]} trains in one of {files[0].path} and {file.path} only, or has another shape: heads of "
                "different tasks are no sum. Combine deltas that train the same parts of the base (modules_to_save), "
                "with heads of one size.",
                "mismatch",
            )


def provenance(files: Sequence[Stored], options: Options) -> str:
    """What a delta was made of, for people: how, and weight, name and digest of each part."""

    def digest(file: Stored) -> str:
        text = "".join(f"{name}{tuple(tensor.shape)}" for name, tensor in sorted(file.tensors.items()))
        found = hashlib.sha256(text.encode())
        for _, tensor in sorted(file.tensors.items()):
            found.update(
                tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            )
        return found.hexdigest()[:12]

    parts = [f"{w:g} x {f.path.name} ({digest(f)})" for w, f in zip(options.weights, files, strict=True)]
    extra = f", density {options.density:g}" if options.how in DENSITIES else ""
    extra += f", seed {options.seed}" if options.how.startswith("dare") else ""
    return f"{options.how}{extra}: {' + '.join(parts)}"[:2048]


def _values(files: Sequence[Stored], options: Options, names: set[str]) -> dict[str, Tensor]:
    """Trained parts of the base: ``Σ w θ`` is ``θ0 + Σ w (θ − θ0)`` where the weights sum to one."""
    found: dict[str, Tensor] = {}
    for name in sorted(names):
        tensors = [file.tensors[name] for file in files]
        if all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]) and len(tensors) > 1:
            found[name] = tensors[0]
        elif not tensors[0].is_floating_point() or not math.isclose(sum(options.weights), 1, rel_tol=1e-6):
            raise ArgumentError(
                f"weights={list(options.weights)}: {name} trains as a part of the base, and its change is not known "
                f"without the base. Give weights that sum to one, for the average of the values. {WITH_BASE}"
            )
        else:
            mean = arithmetic.weighted_sum([tensor.double() for tensor in tensors], options.weights)
            found[name] = mean.to(tensors[0].dtype)
    return found


def values_over(originals: Originals, values: Sequence[Mapping[str, Tensor]], options: Options) -> dict[str, Tensor]:
    """Trained parts of the base, where the base's own values are known: what is combined is the change of each.

    Args:
        originals: the base's own values.
        values: of each delta; a part that one of them does not train is the base's there.
        options: what to do.

    Raises:
        ArgumentError: for buffers, whose values have no change that could be added.
        DeltaFileError: for heads of different sizes.
    """
    found: dict[str, Tensor] = {}
    for name in sorted({name for own in values for name in own}):
        present = [own[name] for own in values if name in own]
        original = originals.values.get(name)
        tensors = [own.get(name, original) for own in values]
        whole = [tensor for tensor in tensors if tensor is not None]
        if len({tensor.shape for tensor in whole}) > 1 or len(whole) < len(tensors):
            raise DeltaFileError(
                f"{name} is trained in some of the deltas only, and has another shape than in the base, or in another "
                "of them: heads of different tasks are no sum. Combine deltas with heads of one size, or load them "
                "with heads=False.",
                "mismatch",
            )
        whole = [tensor.to(present[0].device) for tensor in whole]
        if len(present) == len(values) > 1 and all(torch.equal(tensor, whole[0]) for tensor in whole[1:]):
            found[name] = whole[0]
            continue
        average = math.isclose(sum(options.weights), 1, rel_tol=1e-6) and options.how not in ENTRYWISE
        if name in originals.buffers and not (average and min(options.weights) >= 0 and whole[0].is_floating_point()):
            raise ArgumentError(
                f"weights={list(options.weights)}: the buffer {name} is not the same in these deltas, and has no "
                "change that could be added. Give weights that are not negative and sum to one, and no entries to cut."
            )
        if average or original is None or original.shape != whole[0].shape:
            if not average:
                raise ArgumentError(
                    f"weights={list(options.weights)}: {name} is not in the base in this shape, so that its change is "
                    "not known. Give weights that sum to one, for the average of the values."
                )
            mean = arithmetic.weighted_sum([tensor.double() for tensor in whole], options.weights)
        else:
            start = original.to(whole[0].device).double()
            mean = start + combined_change(options, name, [tensor.double() - start for tensor in whole])
        found[name] = mean.to(present[0].dtype)
    return found
