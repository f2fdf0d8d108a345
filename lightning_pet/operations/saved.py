"""What is saved of one delta: its tensors as a model and as files hold them, the base they belong to, the file."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, BaseMismatchError, DeltaFileError, PETError
from lightning_pet.insertion.checks import check_intact
from lightning_pet.insertion.method import METHODS
from lightning_pet.insertion.tasks.own_values import is_own, own_places
from lightning_pet.layers.rows import ranges_of
from lightning_pet.layers.sharding import holds_parts, whole
from lightning_pet.model.adaptation import Adaptation, record_at, record_of
from lightning_pet.model.naming import (
    as_base_names,
    canonical,
    check_known,
    delta_of,
    in_file,
    join,
    named_tensors,
    split_below,
    tensors_at,
)
from lightning_pet.model.outside import changed_buffers, changed_outside, outside_parameters, renormalised
from lightning_pet.store.delta_file import write_delta
from lightning_pet.store.entry import described_methods, written_by
from lightning_pet.store.fingerprint import Verdict, compare, digest, fingerprint
from lightning_pet.store.manifest import Fingerprint, Manifest, MethodRecord
from lightning_pet.store.reader import PathLike
from lightning_pet.strategies.agreement import together
from lightning_pet.strategies.strategy import StrategyAdapter

# --- what belongs to a delta ----------------------------------------------------------------------


def meant(record: Adaptation, name: str | None = None) -> str:
    """The delta that is meant: that of this name; without one, the only one there is, or that trains.

    Raises:
        ArgumentError: if there is none of this name, or several may be meant.
    """
    if name is not None:
        check_known((name,), record.names)
        return name
    for names in (record.names, [name for name in record.names if name not in record.waiting]):
        if len(names) == 1:
            return names[0]
    raise ArgumentError(
        f"this model has the deltas {', '.join(map(repr, record.names))}; say which one is meant: adapted[name], or "
        "name=…."
    )


def tensors_of(root: nn.Module, record: Adaptation, delta: str) -> dict[str, Tensor]:
    """The tensors of a delta, what it has of its own in place of the base's, and what has changed besides.

    Returns:
        References (not copies) by canonical name relative to the root.
    """
    own = [name for name in record.delta_names if delta_of(name) == delta]
    if delta in record.values:
        found = {name: tensor.detach() for name, tensor in tensors_at(root, own).items()}
        return found | record.values[delta]
    base = [name for name in record.of(delta).trained_names if name not in record.claims.get(delta, ())]
    tensors = dict(named_tensors(root))
    found = {name: tensors[name].detach() for name in (*own, *base)}
    return found | {name: tensor.detach() for name, tensor in changed_besides(root, record, delta).items()}


def changed_besides(root: nn.Module, record: Adaptation, delta: str) -> dict[str, Tensor]:
    """Buffers, and parameters beside the base, that have changed under an active delta, or that it has brought."""
    changed: dict[str, Tensor] = {**changed_buffers(root), **changed_outside(root)}
    mine = record.claims.get(delta, frozenset())
    others = record.held_by(name for name in record.names if name not in (delta, *record.together))
    keeps = delta == record.keeper or delta in record.together
    found = {name: t for name, t in changed.items() if name in mine or (keeps and name not in others)}
    return found | tensors_at(root, mine - found.keys())


def packed(root: nn.Module, record: Adaptation, delta: str) -> dict[str, Tensor]:
    """A delta as files hold it: each part in its own form and under its own name, and what trains of the base."""
    tensors = {name: t for name, t in tensors_of(root, record, delta).items() if delta_of(name) is None}
    for inserted in record.of(delta).deltas(root):
        tensors |= {join(inserted.path, name): tensor for name, tensor in inserted.delta.packed().items()}
    return in_file(as_base_names(tensors))


def check_fit(
    root: nn.Module,
    record: Adaptation,
    deltas: Iterable[str],
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None = None,
) -> None:
    """The key set and every shape must be those of some deltas.

    Args:
        root: the adapted root.
        record: of it.
        deltas: their names.
        tensors: all of them, whole, by name from the root.
        own: the root's tensors by name, in full shape, where an engine changed the shapes of its own.

    Raises:
        DeltaFileError: (``mismatch``) naming missing, extra and misshapen tensors.
    """
    own = dict(named_tensors(root)) if own is None else own
    view = record.of(*deltas)
    required = {*view.delta_names, *view.trained_names}
    optional = {n for n, t in named_tensors(root) if not isinstance(t, nn.Parameter)} - {*record.delta_names}
    optional |= outside_parameters(root, record).keys()
    problems = [f"missing {name}" for name in sorted(required - set(tensors))]
    problems += [f"unexpected {name}" for name in sorted(set(tensors) - required - optional)]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise DeltaFileError(
            f"the delta does not fit the model: {shown}. Apply the same methods with the same "
            "arguments that the delta was trained with, to the same kind of model.",
            "mismatch",
        )


# --- what a run compares before it uses a saved delta: its base, and the methods of a checkpoint ---


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
    names |= own_places(record)
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
    named = base_parameters(root, record, [*record.trained_names, *saved])
    found = fingerprint(whole(named), exact, _replaced(root, record, named))
    beside = {name: own for delta in record.names for name, own in record.beside.get(delta, {}).items()}
    return replace(found, beside=beside) if beside else found


def _replaced(root: nn.Module, record: Adaptation, named: Sequence[tuple[str, Tensor]]) -> dict[str, list[list[int]]]:
    """Rows of the base of which the deltas leave nothing, so that they may be any."""
    names = {id(tensor): name for name, tensor in named}
    rows: dict[str, set[int]] = {}
    for inserted in record.deltas(root, pass_over_gone=True):
        own = inserted.host._parameters.get(inserted.target.parameter) if inserted.delta.replaced else None
        if own is not None and id(own) in names:
            rows.setdefault(names[id(own)], set()).update(inserted.delta.replaced)
    return {name: ranges_of(own) for name, own in rows.items()}


def check_methods(entry: Mapping[str, Any], record: Adaptation, path: object) -> None:
    """The methods of the run must be those of the checkpoint: same names, order, places and sizes.

    Raises:
        DeltaFileError: (``mismatch``) naming the first difference.
    """
    saved, here = entry["methods"], described_methods(record)
    labels = [[_labelled(method) for method in methods] for methods in (saved, here)]
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


def _labelled(method: Mapping[str, Any]) -> str:
    return f"{method['method']}:{method['name']}" + (f" of {method['delta']}" if "delta" in method else "")


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
    """One digest of a delta's tensors, by their names in files; of parts, every process must ask for it together."""
    parts = (f"{name}\0{digest(whole(tensor))}\n" for name, tensor in sorted(tensors.items()))
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


# --- into a file; gathered by all processes and written by one, where an engine has sharded it ----


def save(
    model: nn.Module,
    root_path: str,
    root: nn.Module,
    path: PathLike,
    *,
    name: str | None = None,
    notes: Mapping[str, str] | None = None,
    exact: bool = False,
) -> int:
    """Write a delta file; see :func:`lightning_pet.save_delta`.

    Args:
        model: what was given: the root, or what contains it.
        root_path: path of the root in it.
        root: the adapted root.
        path: of the file.
        name: of the delta.
        notes: for people.
        exact: digest every byte of the base.
    """
    record = record_at(root)
    delta = meant(record, name)
    view = record.of(delta)
    methods = tuple(MethodRecord(a.method, a.name, a.config, a.targets) for a in view.applied if not is_own(a))
    noted = {"combined": record.combined[delta]} if delta in record.combined else {}
    manifest = Manifest(methods, root=root_path, notes={**noted, **(notes or {})}, written_by=written_by())
    if (adapter := _gathering_adapter(model)) is not None:
        return _save_gathered(adapter, root, view, path, manifest, exact)
    if holds_parts(root):
        raise PETError(
            f"this process holds parts of the delta only, and this {type(model).__name__} does not say which Trainer "
            "has the others. Pass the LightningModule, in every process; or use trainer.save_checkpoint, whose file "
            "load_delta reads without any engine."
        )
    check_intact(root, record)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in packed(root, record, delta).items()}
    manifest = replace(manifest, base=base_fingerprint(root, view, tensors, exact))
    return write_delta(path, tensors, manifest)


def _gathering_adapter(model: nn.Module) -> StrategyAdapter[Any] | None:
    """The adapter of the engine that shards a model; ``None`` if none does, or its Trainer is not known."""
    if not isinstance(model, pl.LightningModule):
        return None
    try:
        strategy = model.trainer.strategy
    except RuntimeError:  # it was never attached to a Trainer
        return None
    adapter = StrategyAdapter.installed(strategy)
    return adapter if adapter is not None and adapter.shards else None


def _save_gathered(
    adapter: StrategyAdapter[Any],
    root: nn.Module,
    record: Adaptation,
    path: PathLike,
    manifest: Manifest,
    exact: bool,
) -> int:
    """Gather the delta tensor by tensor, and write it in one process; every process calls this.

    Args:
        adapter: of the engine.
        root: the sharded model.
        record: of the delta, which trains.
        path: the first process's counts.
        manifest: without the base.
        exact: digest every byte of the base, which is gathered tensor by tensor as well.

    Returns:
        Bytes written, in every process.
    """
    if adapter.several:
        together("save_delta")
    strategy = adapter.strategy
    path = strategy.broadcast(path)
    if any(delta in record.waiting for delta in record.names):
        raise ArgumentError(
            f"the delta {record.names[0]!r} does not train in this run, and the engine gathers those that do. Save it "
            "in a process that holds the model as a whole."
        )
    # As for a checkpoint: outside of the writing process nothing but shapes is kept.
    tensors, _ = split_below(strategy.lightning_module_state_dict(), manifest.root)
    own = {n: value for n, value in tensors.items() if delta_of(n) in (None, *record.names)}
    tensors = in_file(as_base_names(own))
    manifest = replace(manifest, base=base_fingerprint(root, record, tensors, exact, adapter.whole))
    write = strategy.is_global_zero
    size = adapter.agreed(f"saving {path}", lambda: write_delta(path, tensors, manifest) if write else 0)
    return int(strategy.broadcast(size))
