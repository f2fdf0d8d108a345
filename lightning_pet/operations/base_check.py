"""What a run compares before it uses a saved delta: its base, and the methods of a checkpoint."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, BaseMismatchError, DeltaFileError
from lightning_pet.insertion.method import METHODS
from lightning_pet.model.adaptation import Adaptation, record_of
from lightning_pet.model.naming import canonical, named_tensors, split_below
from lightning_pet.model.outside import renormalised
from lightning_pet.operations.contents import packed
from lightning_pet.store.entry import describe
from lightning_pet.store.fingerprint import Verdict, compare, fingerprint
from lightning_pet.store.remembered import Fingerprint
from lightning_pet.store.tensors import digest

POLICIES: Final = ("error", "exact", "warn", "off")
Named = Iterable[tuple[str, Tensor]]
Whole = Callable[[Named], Named]
"""Gives each of the named tensors whole, one after the other, where processes hold parts of them."""


def base_parameters(
    root: nn.Module, record: Adaptation, trained: Iterable[str] | None = None
) -> list[tuple[str, Tensor]]:
    """The frozen base: every parameter that is neither a delta nor trained, each tied tensor once.

    Tables that renormalise themselves are left out: a pristine one and one that was used are the same base.

    Args:
        root: the adapted root.
        record: what was applied to it, or one delta of it.
        trained: leave out these trained parameters (default: all that the record has); others that it has
            count with their original values.
    """
    names = {*(record.trained_names if trained is None else trained), *record.delta_names}
    names |= {*(record_of(root) or record).delta_names}  # of others, that are no base of this one
    skip = {id(tensor) for name, tensor in named_tensors(root) if name in names}
    skip |= renormalised(root)
    return [
        (canonical(name), record.originals.get(canonical(name), parameter))
        for name, parameter in root.named_parameters()
        if id(parameter) not in skip
    ]


def base_fingerprint(
    root: nn.Module, record: Adaptation, saved: Iterable[str], exact: bool = False, whole: Whole = iter
) -> Fingerprint:
    """Fingerprint of the frozen base.

    Args:
        root: the adapted root.
        record: what was applied to it.
        saved: tensors that the file holds; the base is the rest.
        exact: add a digest of every byte.
        whole: gathers what processes hold parts of.
    """
    found = fingerprint(whole(base_parameters(root, record, [*record.trained_names, *saved])), exact)
    beside = {name: own for delta in record.names for name, own in record.beside.get(delta, {}).items()}
    return replace(found, beside=beside) if beside else found


def check_methods(entry: Mapping[str, Any], record: Adaptation, path: object) -> None:
    """The methods of the run must be those of the checkpoint: same names, order, places and sizes.

    Raises:
        DeltaFileError: (``mismatch``) naming the first difference.
    """
    saved, here = entry["methods"], [describe(applied) for applied in record.applied]
    labels = [[f"{m['method']}:{m['name']}" for m in methods] for methods in (saved, here)]
    if labels[0] != labels[1]:
        raise DeltaFileError(
            f"{path} holds the methods {labels[0]}, this run has {labels[1]}: give the same callbacks in the same "
            "order.",
            "mismatch",
        )
    for then, now in zip(saved, here, strict=True):
        free = METHODS[now["method"]].may_change
        differing = {
            option: (then["config"].get(option), value)
            for option, value in now["config"].items()
            if option not in free and then["config"].get(option) != value
        }
        if differing:
            shown = ", ".join(f"{o}={a!r} there and {b!r} here" for o, (a, b) in differing.items())
            raise DeltaFileError(
                f"{path}: {now['method']}:{now['name']} was trained with other options: {shown}. Give those of the "
                "checkpoint, or start a new run.",
                "mismatch",
            )
        # Heads are told apart by their tensors: earlier releases did not note them here.
        places = [[t for t in m["targets"] if t["role"] != "head"] for m in (then, now)]
        if places[0] != places[1]:
            there, present = ({t["module"] for t in targets} for targets in places)
            only = sorted(there ^ present)[:4] or ["the same modules, but other roles or rows"]
            raise DeltaFileError(
                f"{path}: {now['method']}:{now['name']} was trained on {len(there)} places, this run has "
                f"{len(present)}; "
                f"they differ in {', '.join(only)}. Give the target_modules of the checkpoint, or start a new run.",
                "mismatch",
            )


def check_base(
    saved: Fingerprint,
    root: nn.Module,
    record: Adaptation,
    path: object,
    policy: str,
    trained: Iterable[str] | None = None,
    whole: Whole = iter,
    within: str = "",
    back: Callable[[str], str | None] | None = None,
) -> None:
    """The base must be the one that the delta was trained on.

    Args:
        saved: fingerprint that was stored with the delta.
        root: the adapted root.
        record: what was applied to it.
        path: the file, for messages.
        policy: ``"error"``, ``"exact"``, ``"warn"`` or ``"off"``: the caller's choice, never the file's.
        trained: base parameters that the stored delta trained (default: those of the record).
        whole: gathers what processes hold parts of.
        within: path of the part of the root that was the whole root then.
        back: gives the name that a tensor had then, or ``None`` if it was not there.

    Raises:
        ArgumentError: if there is no such policy.
        BaseMismatchError: if it is another one and the policy is ``"error"`` or ``"exact"``; if the
            policy is ``"exact"`` and that cannot be told.
    """
    if policy not in POLICIES:  # "off" by a slip of the pen would be silence
        raise ArgumentError(f"base_check={policy!r}: use one of {', '.join(map(repr, POLICIES))}.")
    if policy == "off":
        return
    named = base_parameters(root, record, trained)
    if within:
        named = list(split_below(dict(named), within)[0].items())
    if back is not None:
        named = [(then, tensor) for name, tensor in named if (then := back(name)) is not None]
    result = compare(saved, whole(named), exact=policy == "exact")
    if policy == "exact" and result.verdict not in (Verdict.EXACT, Verdict.DIFFERENT):
        raise BaseMismatchError(
            f"{path}: base_check='exact' cannot be answered: {result.explanation} Save with exact=True (or train with "
            "base_check='exact'), or use base_check='error'."
        )
    if result.verdict is Verdict.DIFFERENT:
        message = f"{path} was trained on another base model: {result.explanation}"
        if policy in ("error", "exact"):
            raise BaseMismatchError(
                f"{message} Load the base it was trained on, or pass base_check='warn' if you are sure."
            )
        rank_zero_warn(message)
    elif result.verdict is Verdict.UNVERIFIED:
        rank_zero_warn(f"{path}: the base model could not be compared with the one trained on: {result.explanation}")


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """One digest of a delta's tensors, by their names in files."""
    parts = (f"{name}\0{digest(tensor)}\n" for name, tensor in sorted(tensors.items()))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def check_beside(saved: Fingerprint, root: nn.Module, record: Adaptation, path: object, policy: str) -> None:
    """The deltas that acted when a delta was trained are a part of its base: they must be in the model.

    Args:
        saved: fingerprint that was stored with the delta.
        root: the adapted root.
        record: what was applied to it.
        path: the file, for messages.
        policy: the caller's choice.

    Raises:
        BaseMismatchError: naming the delta that is not there, unless the policy is ``"warn"`` or ``"off"``.
    """
    if not saved.beside or policy == "off":
        return
    present = {digest_of(packed(root, record, name)) for name in record.names}
    absent = [name for name, own in saved.beside.items() if own not in present]
    if not absent:
        return
    message = (
        f"{path} was trained while the delta {absent[0]!r} acted, and no delta in this model has its values "
        f"({', '.join(map(repr, record.names)) or 'there is none'})."
    )
    if policy in ("error", "exact"):
        raise BaseMismatchError(
            f"{message} Load that one first, load_delta(model, path, name={absent[0]!r}), and let both act: "
            "adapted.activate(…); or pass base_check='warn' if you are sure."
        )
    rank_zero_warn(message)
