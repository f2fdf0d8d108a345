"""Whether what was planned can act: side by side on one layer, and at all. Said before anything is inserted."""

from collections.abc import Collection, Sequence

from torch import nn

from lightning_pet.errors import DeadSiteError, TargetError
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.delta import Delta
from lightning_pet.model.adaptation import deltas_in
from lightning_pet.model.structure import Structure, Target, overlap


def check_together(root: nn.Module, insertions: Sequence[Insertion], beside: Collection[str] = ()) -> None:
    """Refuse a delta that rescales the base product of a layer beside others that change what it returns.

    Args:
        root: the adapted root.
        insertions: what is to come beside what is there.
        beside: names of the deltas that it is to act with.

    Raises:
        TargetError: naming the layer.
    """
    coming = [(insertion.target, insertion.delta) for insertion in insertions]
    leaving = {key for insertion in insertions for key in insertion.replaces}
    _check([*_present(root, leaving, beside), *coming])


def check_acting(root: nn.Module, deltas: Collection[str]) -> None:
    """Refuse to let deltas act together that cannot.

    Raises:
        TargetError: naming the layer.
    """
    _check(_present(root, (), deltas))


def _check(places: Sequence[tuple[Target, Delta]]) -> None:
    if not any(delta.reads_weight for _, delta in places):
        return
    by_host: dict[str, list[tuple[Target, Delta]]] = {}
    for target, delta in places:
        if delta.path in ("activation", "weight"):
            by_host.setdefault(target.module, []).append((target, delta))
    for path, present in by_host.items():
        for index, (target, delta) in enumerate(present):
            others = [other for at, (other, _) in enumerate(present) if at != index]
            if delta.reads_weight and any(_meet(target, other) for other in others):
                raise TargetError(
                    f"{path!r} would have DoRA and another delta on the same outputs, but DoRA rescales the base's own "
                    "product by its weight's own norm. Set use_dora=False, or take the other delta off this layer "
                    "(exclude_modules)."
                )


def check_fires(insertions: Sequence[Insertion], structure: Structure) -> None:
    """Refuse deltas none of which would act in the forward that was looked at; single ones may be for other batches.

    Args:
        insertions: all that is to come.
        structure: as the forward showed it.

    Raises:
        DeadSiteError: naming the places.
    """
    if structure.called is None or not insertions:
        return
    for insertion in insertions:
        target, path = insertion.target, insertion.delta.path
        if path not in ("activation", "weight") or target.module in structure.called:
            return
        if path == "weight" and structure.reader(target.module, target.parameter) is not None:
            return
    shown = ", ".join(dict.fromkeys(insertion.target.path for insertion in insertions[:4]))
    raise DeadSiteError(
        f"none of the {len(insertions)} deltas would act: in the forward that was given, nobody called or read "
        f"{shown}{' …' if len(insertions) > 4 else ''}. Give a forward that runs them, or name other targets."
    )


def _meet(target: Target, other: Target) -> bool:
    return target.rows is None or other.rows is None or overlap(target.rows, other.rows)


def _present(root: nn.Module, leaving: Collection[str], deltas: Collection[str]) -> list[tuple[Target, Delta]]:
    return [
        (target, delta)
        for applied, target, _, delta, _ in deltas_in(root)
        if applied.key not in leaving and applied.delta in deltas
    ]
