"""What a run compares before it uses a saved delta: its base, and the methods of a checkpoint."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, BaseMismatchError, DeltaFileError
from lightning_pet.insertion.method import METHODS
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.naming import canonical, named_tensors, split_below
from lightning_pet.model.outside import renormalised
from lightning_pet.store.entry import describe
from lightning_pet.store.fingerprint import Fingerprint, Verdict, compare, fingerprint

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
        record: what was applied to it.
        trained: leave out these trained parameters (default: all that the record has); others that it has
            count with their original values.
    """
    names = set(record.trained_names if trained is None else trained)
    skip = {id(tensor) for name, tensor in named_tensors(root) if name in names or name in set(record.delta_names)}
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
    return fingerprint(whole(base_parameters(root, record, [*record.trained_names, *saved])), exact)


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
