"""Whether a delta from a file fits a model: decided without memory that follows the file's numbers."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

from torch import nn

from lightning_pet.errors import ArgumentError, DeltaFileError, TargetError
from lightning_pet.insertion.choice import misshapen
from lightning_pet.insertion.method import Method, key_of
from lightning_pet.insertion.prepare import Prepared, is_shared, prepare
from lightning_pet.layers.delta import wrong_kinds, wrong_names, wrong_shapes
from lightning_pet.model.adaptation import Adaptation, record_of
from lightning_pet.model.layer_kinds import weight_of
from lightning_pet.model.naming import by_delta, join, named_modules, named_tensors
from lightning_pet.model.outside import outside_parameters
from lightning_pet.model.structure import Target
from lightning_pet.model.unbuilt import filled_later, without_memory
from lightning_pet.operations.file_options import method_of
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import PathLike, Stored

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
