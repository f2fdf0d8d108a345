"""Plan and build: everything that can fail, before anything is changed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_pet.core.applied import record_of
from lightning_pet.core.insertion import check_attachable
from lightning_pet.core.method import Insertion, Method, key_of
from lightning_pet.core.naming import canonical, join, named_modules
from lightning_pet.core.parameters import seen_reader
from lightning_pet.core.quantised import check_hosts, check_trains
from lightning_pet.core.structure import Structure, Target
from lightning_pet.core.together import check_together
from lightning_pet.errors import ArgumentError


@dataclass(frozen=True)
class Prepared:
    """A planned and built method: all that could fail has been done, and nothing was changed yet.

    Attributes:
        method: the method.
        targets: places of the insertions, in their order, then those that train without a delta.
        insertions: the deltas and their places.
        readers: path of the module that reads each place's parameter, or ``None``.
        trained: base parameters that train as they are.
        scope: submodule that the method is confined to.
    """

    method: Method
    targets: tuple[Target, ...]
    insertions: tuple[Insertion, ...]
    readers: tuple[str | None, ...]
    trained: tuple[str, ...]
    scope: str

    @property
    def key(self) -> str:
        """Name of this method's deltas among those of a host."""
        return key_of(self.method)


def prepare(
    root: nn.Module,
    methods: Sequence[Method],
    structure: Structure | None,
    *,
    resolved: Sequence[tuple[Target, ...]] | None = None,
    scopes: Sequence[str] | None = None,
) -> list[Prepared]:
    """Plan and build methods for a model, which stays untouched.

    Args:
        root: the adapted root.
        methods: what to apply, in order.
        structure: what is known about the model; only needed where ``resolved`` is not given.
        resolved: places found earlier (from a file), one tuple per method.
        scopes: the submodule of the root that each method is confined to; default: the whole root.

    Raises:
        ArgumentError: if a method of this name is applied already.
        TargetError: if a place does not exist or cannot host the method.
    """
    record = record_of(root)
    taken = {applied.key for applied in record.applied} if record else set()
    prepared: list[Prepared] = []
    for index, method in enumerate(methods):
        key = key_of(method)
        if key in taken:
            raise ArgumentError(
                f"two {type(method).__name__} are called {method.name!r}; give each its own, e.g. name='second'."
            )
        taken.add(key)
        scope = scopes[index] if scopes else ""
        if resolved is not None:  # shared places are the method's own business
            targets = tuple(target for target in resolved[index] if not is_shared(target))
        else:
            targets = _resolve(root, method, structure or Structure(), scope)
            method.spend_budget(root, targets)  # a file's options hold the width that was picked
        prepared.append(_build(root, method, targets, scope, structure))
    check_together(root, [insertion for item in prepared for insertion in item.insertions])
    return prepared


def _resolve(root: nn.Module, method: Method, structure: Structure, scope: str) -> tuple[Target, ...]:
    found = method.resolve(named_modules(root)[scope], structure.within(scope))
    return tuple(
        replace(
            target,
            module=join(scope, target.module),
            reads=None if target.reads is None else join(scope, target.reads),
        )
        for target in found
    )


def is_shared(target: Target) -> bool:
    """The place of a shared delta: the root, without a role of its own."""
    return not target.path and target.role is None


def _build(
    root: nn.Module, method: Method, targets: tuple[Target, ...], scope: str, structure: Structure | None
) -> Prepared:
    insertions = tuple(method.insertions(root, targets))
    modules = named_modules(root)
    for insertion in insertions:
        target, key = insertion.target, delta_key(method, insertion)
        check_attachable(modules[target.module], target, key)
        if target.reads is not None:
            check_attachable(modules[target.reads], target, key)
        check_hosts(insertion.delta, modules[target.module], target.path, target.parameter)
    trained = method.trained(root, targets)
    parameters = {canonical(name): p for name, p in root.named_parameters(remove_duplicate=False)}
    for name in trained:
        check_trains(name, parameters[name])
    places = [insertion.target for insertion in insertions]
    # Places without a delta are kept, so that loading finds again what trains as it is.
    places += [t for t in targets if t not in places and not is_shared(t) and _trains(trained, t)]
    return Prepared(
        method=method,
        targets=tuple(places),
        insertions=insertions,
        readers=tuple(
            seen_reader(root, insertion.target, structure) if insertion.target.parameter else None
            for insertion in insertions
        ),
        trained=trained,
        scope=scope,
    )


def _trains(trained: Sequence[str], target: Target) -> bool:
    return any(f"{name}.".startswith(f"{target.path}.") for name in trained)


def delta_key(method: Method, insertion: Insertion) -> str:
    """Name of a delta among those of its host."""
    return "_".join(part for part in (method.method, method.name, insertion.suffix) if part)
