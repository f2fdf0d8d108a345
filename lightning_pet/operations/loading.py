"""A stored delta into a model: checked completely before the model changes, and taken out again if anything fails."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.errors import ArgumentError, DeltaFileError, TargetError
from lightning_pet.exchange.peft import settled
from lightning_pet.exchange.source import is_foreign, local, read_source
from lightning_pet.insertion.choice import LOCK, exchange, misshapen, owned, show_in_blocks
from lightning_pet.insertion.commit import commit, copy_in, renew, undo
from lightning_pet.insertion.method import Method, key_of
from lightning_pet.insertion.prepare import Prepared, is_shared, prepare
from lightning_pet.insertion.tasks.own_values import as_own, is_own
from lightning_pet.insertion.widening import widen
from lightning_pet.layers.delta import Delta, filled_later, without_memory, wrong_kinds, wrong_names, wrong_shapes
from lightning_pet.layers.sharding import without_values
from lightning_pet.model.adaptation import Adaptation, Applied, record_at, record_of
from lightning_pet.model.call import between_forwards, set_gate
from lightning_pet.model.layer_kinds import weight_of
from lightning_pet.model.naming import (
    by_delta,
    check_delta_name,
    check_known,
    delta_of,
    join,
    named_modules,
    named_tensors,
    tensors_at,
)
from lightning_pet.model.outside import note_changed, outside_parameters
from lightning_pet.model.structure import Target
from lightning_pet.operations.file_terms import Rename, back, check_rename, for_model, method_of, note_of, without_heads
from lightning_pet.operations.roots import base_of, root_of
from lightning_pet.operations.saved import check_base, check_beside
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import PathLike, Stored, read
from lightning_pet.strategies.strategy import accompany_runs

# --- whether it fits: decided without memory that follows the numbers of the file -----------------


_UNHELD: Final = 64 << 20
_SHARE: Final = 8


@dataclass(frozen=True)
class Fit:
    """A delta of a file that fits a model.

    Attributes:
        root: the model's adapted root, still untouched.
        methods: the methods of the file.
        places: of each, as the file names them.
        scopes: submodule that each is confined to.
        stored: names of the tensors in the file.
        trained: base parameters that the file brings values of.
        acts: the delta is to act beside those that do.
    """

    root: nn.Module
    methods: tuple[Method, ...]
    places: tuple[tuple[Target, ...], ...]
    scopes: tuple[str | None, ...]
    stored: frozenset[str]
    trained: tuple[str, ...]
    acts: bool = True

    def build(self) -> list[Prepared]:
        """Build the deltas, for the values of the file to be copied into them."""
        with filled_later():
            return _prepared(self.root, self.methods, self.places, self.scopes, self.stored, self.acts)


@contextmanager
def faults_of(path: PathLike, what: str) -> Iterator[None]:
    """Whatever goes wrong with what a file says is a fault of the file: an error that names it.

    Args:
        path: the file.
        what: what is wrong then, as a phrase.
    """
    try:
        yield
    except DeltaFileError:
        raise
    except TargetError as error:
        raise DeltaFileError(f"{path} {what}: {error}", "mismatch") from error
    except Exception as error:
        name = "" if isinstance(error, ArgumentError) else f"{type(error).__name__}: "
        text = (str(error).strip().splitlines() or [""])[0][:400]
        raise DeltaFileError(f"{path} {what}: {name}{text}", "schema") from error


def methods_of(stored: Stored, delta: str) -> tuple[Method, ...]:
    """The methods of a file, as those of a delta of this name."""
    methods = tuple(method_of(record, stored.path) for record in stored.methods)
    for method in methods:
        cast(Any, method).delta = delta
    return methods


def fitted(
    root: nn.Module, stored: Stored, methods: tuple[Method, ...], *, acts: bool = True, other_sizes: bool = False
) -> Fit:
    """Check that exactly the tensors of these methods on this model are in a file. Nothing is changed.

    Args:
        root: the adapted root, or what would be.
        stored: what was read, under the names of this model.
        methods: its methods.
        acts: the delta is to act beside those that do.
        other_sizes: trained heads may have another number of outputs.

    Raises:
        ArgumentError: if a method of this name is in the model already.
        DeltaFileError: naming what does not fit.
    """
    _refuse_taken(root, methods)
    modules = named_modules(root)
    missing = [t.path for m in stored.methods for t in m.targets if not _has(modules, t)]
    if missing:
        raise DeltaFileError(
            f"{stored.path} was trained on a model with {missing[0]}, which this {type(root).__name__} does not have "
            f"({len(missing)} places are missing). Load it into the kind of model it was trained on.",
            "mismatch",
        )
    for method in stored.methods:
        _refuse_twice(method, stored.path)
    places, scopes = tuple(m.targets for m in stored.methods), tuple(_scope(m, stored, modules) for m in methods)
    with faults_of(stored.path, f"does not fit this {type(root).__name__}"), without_memory():
        names = frozenset(stored.tensors)
        prepared = _prepared(root, methods, places, scopes, names, acts)
        after = Adaptation(
            scopes=tuple(scope for item in prepared for scope in item.scopes),
            apart=tuple(path for item in prepared for path in item.apart),
        )
        outside = set(outside_parameters(root, after))
        _check(root, prepared, stored, outside, other_sizes)
    trained = [*(name for item in prepared for name in item.trained), *(n for n in outside if n in names)]
    return Fit(root, methods, places, scopes, names, tuple(trained), acts)


def _prepared(
    root: nn.Module,
    methods: Sequence[Method],
    places: Sequence[tuple[Target, ...]],
    scopes: Sequence[str | None],
    names: frozenset[str],
    acts: bool,
) -> list[Prepared]:
    return prepare(root, methods, None, resolved=places, scopes=scopes, stored=names, acts=acts)


def _refuse_taken(root: nn.Module, methods: Sequence[Method]) -> None:
    record = record_of(root)
    taken = {applied.key for applied in record.applied} if record else set()
    for method in methods:
        if key_of(method) in taken:
            raise ArgumentError(
                f"{method.method}:{method.name} is in this model already. Load the file as a delta of its own, "
                "load_delta(model, path, name='second'), or remove that one first."
            )


def _refuse_twice(record: MethodRecord, path: PathLike) -> None:
    own = [target for target in record.targets if not is_shared(target)]
    places = Counter((target.path, target.role) for target in own)
    for (place, role), count in places.most_common(1):
        if count > 1:
            raise DeltaFileError(
                f"{path}: {record.method}:{record.name} names {place!r} ({role}) {count} times, expected each place "
                "once. Ask for the file as save_delta wrote it.",
                "schema",
            )


def _scope(method: Method, stored: Stored, modules: Mapping[str, nn.Module]) -> str | None:
    """The submodule that a method is confined to, from the root; ``None`` if it is not."""
    if method.module is None:
        return None
    named = method.module
    scope = "" if named == stored.root else named.removeprefix(f"{stored.root}." if stored.root else "")
    if scope not in modules:
        kind = type(modules[""]).__name__
        raise DeltaFileError(
            f"{stored.path}: {method.method}:{method.name} is confined to {scope!r}, which this {kind} does not have. "
            "Load it into the kind of model it was trained on.",
            "mismatch",
        )
    return scope


def _has(modules: Mapping[str, nn.Module], target: Target) -> bool:
    module = modules.get(target.module)
    if module is None or (target.reads is not None and target.reads not in modules):
        return False
    return not target.parameter or weight_of(module, target.parameter) is not None


def _check(root: nn.Module, prepared: Sequence[Prepared], stored: Stored, outside: set[str], other_sizes: bool) -> None:
    """Exactly the tensors of these methods on this model: nothing missing, and no weight of the base."""
    own = dict(named_tensors(root))
    trained = {name for item in prepared for name in item.trained}
    record = record_of(root)
    others = set(record.delta_names if record else ())
    optional = {name for name, tensor in own.items() if not isinstance(tensor, nn.Parameter)} - others
    problems: list[str] = []
    found, unheld = by_delta(stored.tensors), 0
    for item in prepared:
        for insertion in item.insertions:
            prefix = insertion.path(item.method)
            tensors = found.pop(prefix, {})
            problems += [join(prefix, text) for text in insertion.delta.misfits(tensors)]
            unheld += insertion.delta.unheld(tensors)
    left = {join(prefix, name): tensor for prefix, tensors in found.items() for name, tensor in tensors.items()}
    problems += wrong_names(trained, left.keys() - ((optional | outside) - trained))
    other = {name: tensor for name, tensor in left.items() if name in own and own[name].shape != tensor.shape}
    free = trained | outside if other_sizes and other else set()
    fixed = {*(other.keys() - free), *misshapen(root, {name: other[name] for name in other.keys() & free})}
    problems += wrong_shapes(own, {name: tensor for name, tensor in other.items() if name in fixed})
    problems += wrong_kinds(own, left)
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise DeltaFileError(
            f"{stored.path} does not fit this {type(root).__name__}: {'; '.join(problems[:4])}{more}. Load it into the "
            "kind of model it was trained on.",
            "mismatch",
        )
    _check_memory(root, stored, unheld)


def _check_memory(root: nn.Module, stored: Stored, unheld: int) -> None:
    """A folded prefix comes without its network, whose size is then a mere number of the file."""
    room = max(_UNHELD, sum(p.numel() * p.element_size() for p in root.parameters()) // _SHARE)
    if unheld > room:
        raise DeltaFileError(
            f"{stored.path}: its options ask for {unheld:,} bytes of tensors that it does not hold, expected at most "
            f"{room:,} for this {type(root).__name__}. Ask for the file as save_delta wrote it, with every tensor.",
            "limit",
        )


# --- into the model -------------------------------------------------------------------------------


def load(
    model: nn.Module,
    source: PathLike,
    base_check: str = "error",
    *,
    name: str | None = None,
    heads: bool = True,
    rename: Rename | None = None,
    revision: str | None = None,
) -> nn.Module:
    """Read a delta from wherever it comes, and insert it; arguments and errors as :func:`insert`."""
    source = local(source, revision)
    known = not is_foreign(source)  # names of other libraries are exchanged before they are understood
    stored = read(source, name) if known else read_source(source, base_of(model), base_check, rename)
    return insert(model, stored, base_check, name=name, heads=heads, rename=rename if known else None)


def insert(
    model: nn.Module,
    stored: Stored,
    base_check: str = "error",
    *,
    name: str | None = None,
    heads: bool = True,
    rename: Rename | None = None,
    acts: bool | None = None,
) -> nn.Module:
    """Check a stored delta against a model, then insert and load it.

    Args:
        model: what it is for, or what contains that.
        stored: what was read.
        base_check: what to do if the base is another one.
        name: what the delta is called in the model.
        heads: with the heads that it has trained.
        rename: prefixes of paths that are others in this model.
        acts: it acts at once; default: if it is the first, or joins one that does.

    Returns:
        The adapted root.

    Raises:
        ArgumentError: if a delta of this name, or a method of this name of this delta, is in the model already, or
            ``heads`` is no truth value.
        DeltaFileError: if the delta is not sound, or does not fit. The model is untouched then.
    """
    if not isinstance(heads, bool):
        raise ArgumentError(f"heads={heads!r}: expected True or False; False leaves out all heads of the delta.")
    root_path, root = root_of(model)
    present = record_of(root) or Adaptation()
    delta = _name_of(present, stored, name)
    check_rename(rename, stored)
    stored = settled(for_model(stored, delta, rename), root)
    methods, left = methods_of(stored, delta), frozenset[str]()
    if not heads:
        stored, left = without_heads(root, stored, methods)
        methods = methods_of(stored, delta)
    acts = not present.applied or delta in present.active if acts is None else acts
    fit = fitted(root, stored, methods, acts=acts, other_sizes=name is not None or bool(present.applied))
    if stored.base is not None:
        trained = {*fit.trained, *left}
        check_base(stored.base, root, present, stored.path, base_check, trained, back=back(rename) if rename else None)
        check_beside(stored.base, root, present, stored.path, base_check)
    _warn_overwritten(present, delta, fit.trained, stored.path)
    with faults_of(stored.path, f"does not fit this {type(root).__name__}"):
        prepared = fit.build()
        accompany_runs()
        record = commit(root, prepared, acts=acts)
        if name is not None:
            set_gate(root)
        try:
            _fill(model, root, record, stored, fit, delta)
            if acts:
                _copy_beside(model, root_path, stored)
        except BaseException:
            undo(root, [item.key for item in prepared])
            raise
    return root


def _name_of(record: Adaptation, stored: Stored, name: str | None) -> str:
    if name is None:
        delta = note_of(stored)
        if delta in record.names and delta not in record.active:
            raise ArgumentError(
                f"{stored.path}: the delta {delta!r} is in this model already, and does not act. Load the file as a "
                "delta of its own: load_delta(model, path, name='second')."
            )
        return delta
    check_delta_name(name)
    if name in record.names:
        raise ArgumentError(
            f"name={name!r}: there is a delta of this name in this model already. Give this one another, remove that "
            f"one (adapted[{name!r}].remove()), or exchange its values: adapted.replace({name!r}, source)."
        )
    return name


def _warn_overwritten(record: Adaptation, delta: str, trained: Iterable[str], path: object) -> None:
    """A file that joins a delta, as it was given no name of its own, brings its own values of what that has trained."""
    if both := sorted(record.trained_by(delta).keys() & set(trained)):
        rank_zero_warn(
            f"{path}: {', '.join(both[:4])}{' …' * (len(both) > 4)} had values of the delta {delta!r}, which this file "
            "joins, and has those of the file from now on. To keep both, and choose, load the file as a delta of its "
            "own: load_delta(model, path, name='second'); or leave its heads out: heads=False."
        )


def _fill(model: nn.Module, root: nn.Module, record: Adaptation, stored: Stored, fit: Fit, delta: str) -> None:
    """Copy the values in: where they act now into the model, else into the record."""
    found = by_delta(stored.tensors)
    for method in fit.methods:
        for prefix, inserted in deltas_of(root, record, method).items():
            if prefix in found:
                inserted.unpack(found[prefix])
    renew(root)
    widen(root, names=_held_wider(stored), model=model)
    values = {name: tensor for name, tensor in stored.tensors.items() if delta_of(name) is None}
    own = tensors_at(root, values)
    for name in own.keys() - record.originals.keys():  # of what lies beside the base
        tensor = own[name]
        record.originals[name] = without_values(tensor) if tensor.is_meta else tensor.detach().to("cpu", copy=True)
    beside = values.keys() - record.trained_by(delta).keys()
    record.claims[delta] = record.claims.get(delta, frozenset()) | beside
    if delta not in record.active:
        record.values[delta] = {name: values[name].to(tensor.dtype) for name, tensor in own.items()}
    elif any(tensor.shape != values[name].shape for name, tensor in own.items()):
        exchange(root, record, values)
    else:
        copy_in(root, values)
    if delta in record.active:
        note_changed(root, values)
    _note(record, stored, delta)


def _note(record: Adaptation, stored: Stored, delta: str) -> None:
    """What a file says of where its values come from."""
    if stored.base is not None and stored.base.beside:
        record.beside[delta] = dict(stored.base.beside)
    if "combined" in stored.notes:
        record.combined[delta] = stored.notes["combined"]


def replace_values(root: nn.Module, delta: str, stored: Stored, base_check: str = "error") -> None:
    """Exchange the values of a delta for those of a file with the same methods, places and shapes.

    Everything is checked first. Forwards of other threads see the values before it or those after it, whole.

    Args:
        root: the adapted root.
        delta: name of the delta.
        stored: what was read.
        base_check: what to do if the base is another one.

    Raises:
        DeltaFileError: naming what is other than in the model, which is as it was then.
    """
    record = record_at(root)
    check_known((delta,), record.names)
    stored, view = for_model(stored, delta), record.of(delta)
    stored = replace(stored, tensors=as_own(stored.tensors, view))
    values = {name: tensor for name, tensor in stored.tensors.items() if delta_of(name) is None}
    there = {applied.key: applied for applied in view.applied if not is_own(applied)}
    coming = {key_of(method): own for method, own in zip(methods_of(stored, delta), stored.methods, strict=True)}
    found = by_delta(stored.tensors)
    differ = f"it holds {', '.join(sorted(coming))}, the model has {', '.join(sorted(there))}"
    problems = [differ] * (there.keys() != coming.keys())
    problems += [f"{key} has other options" for key in there.keys() & coming.keys() if _differ(there[key], coming[key])]
    problems += [
        join(inserted.path, text)
        for inserted in view.deltas(root)
        for text in inserted.delta.misfits(found.get(inserted.path, {}))
    ]
    own = record.values[delta] if delta in record.values else tensors_at(root, owned(root, record, delta))
    trained = record.trained_by(delta).keys()
    problems += [f"{name} is missing" for name in sorted(trained - values.keys())]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape) if name in own else 'none'}"
        for name, tensor in values.items()
        if name not in record.originals or (name in own and own[name].shape != tensor.shape)
    ]
    if problems:
        raise DeltaFileError(
            f"{stored.path} cannot replace {delta!r} in place: {'; '.join(problems[:4])}. Load it as another delta: "
            f"adapted.load('second', path).",
            "mismatch",
        )
    if stored.base is not None:
        check_base(stored.base, root, record, stored.path, base_check, values)
        check_beside(stored.base, root, record, stored.path, base_check)
    write_values(root, delta, stored)


def write_values(root: nn.Module, delta: str, stored: Stored) -> None:
    """The same without a look at the form, for values that are known to have that of the delta.

    Args:
        root: the adapted root.
        delta: name of the delta.
        stored: its values, under the names that they have in this model.
    """
    record = record_at(root)
    view, found = record.of(delta), by_delta(stored.tensors)
    values = {name: tensor for name, tensor in stored.tensors.items() if delta_of(name) is None}
    trained = record.trained_by(delta).keys()
    with between_forwards(root), LOCK:
        own = record.values[delta] if delta in record.values else tensors_at(root, owned(root, record, delta))
        for inserted in view.deltas(root):
            if inserted.path in found:
                inserted.delta.unpack(found[inserted.path])
        renew(root)
        gone = {name: record.originals[name] for name in own.keys() - values.keys()}
        if delta in record.values:
            record.values[delta] = {name: tensor.to(record.originals[name].dtype) for name, tensor in values.items()}
        else:
            exchange(root, record, gone | values)
        show_in_blocks(root, record, delta, gone | values)
    record.claims[delta] = frozenset(values.keys() - trained)
    record.beside.pop(delta, None)
    record.combined.pop(delta, None)
    _note(record, stored, delta)


def _differ(applied: Applied, record: MethodRecord) -> bool:
    return dict(applied.config) != dict(record.config) or set(applied.targets) != set(record.targets)


def deltas_of(root: nn.Module, record: Adaptation, method: Method) -> dict[str, Delta]:
    """Inserted deltas of one method by their path from the root."""
    key = key_of(method)
    return {inserted.path: inserted.delta for inserted in record.deltas(root) if inserted.method.key == key}


def _held_wider(stored: Stored) -> set[str]:
    """Base tensors that a file holds in more than the half precision of the base that it was trained on."""
    # Where all of the base trained, nothing is left that tells; a part may have stayed in half precision.
    half = stored.base is not None and (not stored.base.dtypes or stored.base.dtypes.keys() & {"BF16", "F16"})
    return {name for name, tensor in stored.tensors.items() if half and tensor.dtype.itemsize > 2}


def _copy_beside(model: nn.Module, root_path: str, stored: Stored) -> None:
    """Copy what a checkpoint holds of its LightningModule beside the root, if this is a module of that kind."""
    if root_path != stored.root:
        return
    own = dict(named_tensors(model))
    inside = f"{root_path}."
    fitting = {n: t for n, t in stored.beside.items() if n in own and own[n].shape == t.shape}
    copy_in(model, {name: tensor for name, tensor in fitting.items() if not name.startswith(inside)})
