"""Plan and build: everything that can fail, before anything is changed."""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.checks import check_together
from lightning_pet.insertion.host import check_attachable
from lightning_pet.insertion.method import Insertion, Method, delta_name, key_of
from lightning_pet.insertion.tasks.own_values import OwnValues, insertions_for, started, wants_own_values
from lightning_pet.layers.delta import Delta
from lightning_pet.model.adaptation import record_of
from lightning_pet.model.layer_kinds import is_made, reader_of
from lightning_pet.model.naming import is_below, join, module_at, named_modules, named_parameters
from lightning_pet.model.quantised import check_hosts, check_trains
from lightning_pet.model.structure import Structure, Target
from lightning_pet.model.structure import is_shared as is_shared
from lightning_pet.probe.host_inputs import Batches
from lightning_pet.targets.bases import Twins, bases_around, bases_of, frozen_by_user, twins_of
from lightning_pet.targets.heads import HEAD, find_heads, heads_of, last_layers, left_output, parameters_below
from lightning_pet.targets.patterns import KINDS, is_role, name_matcher
from lightning_pet.targets.targets import seen_reader


@dataclass(frozen=True)
class Prepared:
    """A planned and built method: all that could fail has been done, and nothing was changed yet.

    Attributes:
        method: the method.
        targets: places of the insertions, in their order, then those that train without a delta.
        insertions: the deltas and their places.
        readers: path of the module that reads each place's parameter, or ``None``.
        trained: base parameters that train as they are.
        readings: see :attr:`~lightning_pet.model.adaptation.Applied.readings`.
        scopes: the base of this method; the rest of the model is left to the user.
        apart: parts of the base that are left to the user, too.
    """

    method: Method
    targets: tuple[Target, ...]
    insertions: tuple[Insertion, ...]
    readers: tuple[str | None, ...]
    trained: tuple[str, ...]
    readings: Mapping[str, str | None]
    scopes: tuple[str, ...]
    apart: tuple[str, ...]

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
    scopes: Sequence[str | None] | None = None,
    stored: Collection[str] | None = None,
    acts: bool = True,
    batches: Batches | None = None,
) -> list[Prepared]:
    """Plan and build methods for a model, which stays untouched.

    Args:
        root: the adapted root.
        methods: what to apply, in order.
        structure: what is known about the model; only needed where ``resolved`` is not given.
        resolved: places found earlier (from a file), one tuple per method.
        scopes: the submodule of the root that each method is confined to; ``None``: the pretrained models in
            the root, else all of it.
        stored: names of the tensors of that file, where it is at hand.
        acts: they are to act beside the deltas that do.
        batches: the training data of the run, for methods that start from them.

    Raises:
        ArgumentError: if a method of this name is applied already.
        TargetError: if a place does not exist or cannot host the method.
    """
    record = record_of(root)
    taken = {applied.key for applied in record.applied} if record else set()
    prepared: list[Prepared] = []
    twins, states = twins_of(root), dict[str, Any]()
    for index, method in enumerate(methods):
        key = key_of(method)
        if key in taken:
            raise ArgumentError(
                f"two {type(method).__name__} are called {method.name!r}; give each its own, e.g. name='second'."
            )
        taken.add(key)
        scope = scopes[index] if scopes else None
        if resolved is not None:  # shared places are the method's own business
            targets = tuple(target for target in resolved[index] if not is_shared(target))
            bases = (scope,) if scope is not None else bases_around(root, bases_of(root), targets)
            targets = (*targets, *_stored_heads(root, method, targets, stored))
        else:
            targets, bases = _resolve(root, method, structure or Structure(), scope)
            awake = tuple(target for target in targets if is_shared(target) or not twins.hold(target.module))
            targets = awake if any(not is_shared(target) for target in awake) else targets
            method.spend_budget(root, targets)  # a file's options hold the width that was picked
            look = getattr(method, "look_at_data", None)  # of methods that start from data
            chosen = targets if look is None else look(root, targets, batches)
            targets = (*chosen, *_heads(root, method, targets, bases, structure))
        with started(method, states):
            item = _build(root, method, targets, bases, structure, stored, twins)
        if (as_alone := getattr(method, "as_alone", None)) is not None:
            as_alone(root, [target for target in targets if target.role != HEAD])
        prepared.append(replace(item, trained=_once(root, item.trained, prepared)))
    return _with_own_values(root, prepared, structure, record.active if record and acts else (), states)


def _with_own_values(
    root: nn.Module,
    prepared: list[Prepared],
    structure: Structure | None,
    acting: Sequence[str],
    states: dict[str, Any],
) -> list[Prepared]:
    """What each of several deltas trains in place of tensors of the base; and a check of those that act together."""
    alone = dict.fromkeys(delta_name(item.method) for item in prepared if wants_own_values(item.method))
    for delta in alone:
        mine = [item for item in prepared if delta_name(item.method) == delta]
        check_together(root, [insertion for item in mine for insertion in item.insertions], {delta})
        names = [name for item in mine for name in item.trained]
        if names or getattr(mine[0].method, "outputs", None) is not None:  # without a head, their number is an error
            with started(mine[0].method, states):
                prepared.append(_own_values(root, mine[0], delta, names, mine, structure))
    together = [item for item in prepared if delta_name(item.method) not in alone]
    beside = {*acting, *(delta_name(item.method) for item in together)}
    check_together(root, [insertion for item in together for insertion in item.insertions], beside)
    return [replace(item, trained=(), readings={}) if wants_own_values(item.method) else item for item in prepared]


def _own_values(
    root: nn.Module,
    first: Prepared,
    delta: str,
    names: Sequence[str],
    items: Sequence[Prepared],
    structure: Structure | None,
) -> Prepared:
    targets = [target for item in items for target in item.targets]
    saved = [getattr(item.method, "modules_to_save", None) or () for item in items]
    targets += [Target(path, "", HEAD) for path in named_modules(root) for own in saved if _names(own, path)]
    outputs: int | None = getattr(first.method, "outputs", None)
    insertions, readers = insertions_for(root, names, targets, structure, outputs)
    for insertion in insertions:
        host = module_at(root, insertion.target.module)
        check_attachable(host, insertion.target, insertion.key(cast(Method, OwnValues(delta))))
        check_hosts(insertion.delta, host, insertion.target.path, insertion.target.parameter)
        _check_weight(insertion.delta, host, insertion.target)
    return Prepared(
        method=cast(Method, OwnValues(delta)),
        targets=tuple(insertion.target for insertion in insertions),
        insertions=tuple(insertions),
        readers=tuple(readers),
        trained=(),
        readings={},
        scopes=first.scopes,
        apart=first.apart,
    )


def _names(patterns: Sequence[str], path: str) -> bool:
    return any(path == pattern or path.endswith(f".{pattern}") for pattern in patterns)


# --- where -----------------------------------------------------------------------------------------


def _resolve(
    root: nn.Module, method: Method, structure: Structure, scope: str | None
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """The places of a method, and the base that they lie in."""
    bases = bases_of(root) if scope is None else (scope,)
    named = [p for p in target_patterns(method) if not is_role(p) and p not in ("all", *KINDS)]
    failures: list[TargetError] = []
    if len(bases) == 1 or not target_patterns(method):
        found: list[Target] = []
        for base in bases:
            try:
                found += _within(root, method, structure, base)
            except TargetError as error:  # another base, or a part of the user's own that is named, may have them
                failures.append(error)
        if found or not failures:
            return tuple(found), bases
        if scope is not None or bases == ("",):
            raise failures[0]
    found = _within(root, method, structure, "")
    matches = [name_matcher(pattern) for pattern in named]

    def wanted(target: Target) -> bool:
        names = [
            join(*at) for where in ((), (structure.prefix,)) for at in ((*where, target.module), (*where, target.path))
        ]
        return is_shared(target) or any(match(name) for match in matches for name in names)

    inside = [t for t in found if wanted(t) or any(is_below(t.module, base) for base in bases)]
    # What a place needs around the whole model (the call that a prompt is put before) comes with it.
    kept = [t for t in found if t in inside or not t.path] if inside else found
    return tuple(kept), bases_around(root, bases, kept)


def target_patterns(method: Any) -> tuple[str, ...]:
    """The patterns by which the user chose places, if the method takes any."""
    for option in ("target_modules", "biases"):
        value = getattr(method, option, None)
        if value is not None:
            return (value,) if isinstance(value, str) else tuple(value)
    return ()


def _within(root: nn.Module, method: Method, structure: Structure, scope: str) -> list[Target]:
    found = method.resolve(module_at(root, scope), structure.within(scope))
    return [
        replace(
            target,
            module=join(scope, target.module),
            reads=None if target.reads is None else join(scope, target.reads),
        )
        for target in found
    ]


# --- heads -----------------------------------------------------------------------------------------


def _heads(
    root: nn.Module, method: Method, targets: Sequence[Target], bases: Sequence[str], structure: Structure | None
) -> tuple[Target, ...]:
    if getattr(method, "modules_to_save", None) is not None:
        return ()
    in_place = bool(getattr(method, "in_place", False))
    found = [path for base in bases for path in heads_of(root, base, targets, structure, in_place)]
    return tuple(Target(path, "", HEAD) for path in dict.fromkeys(found))


def _apart(
    root: nn.Module,
    method: Method,
    targets: Sequence[Target],
    bases: Sequence[str],
    structure: Structure | None,
    twins: Twins,
) -> tuple[str, ...]:
    """Parts of the base that are left to the user: frozen twins, and what seems to be an own output layer."""
    if getattr(method, "modules_to_save", None) is not None or any(target.role == HEAD for target in targets):
        return twins.paths
    in_place = bool(getattr(method, "in_place", False))
    if structure is not None and structure.outputs:
        ends = [path for base in bases for path in last_layers(root, base, targets, structure, in_place)]
    else:
        ends = [path for path in [left_output(root, bases, targets, in_place)] if path is not None]
    return (*twins.paths, *ends)


def _stored_heads(
    root: nn.Module, method: Method, targets: Sequence[Target], stored: Collection[str] | None
) -> tuple[Target, ...]:
    """Heads of a file that does not name them: those of ours that it holds."""
    if getattr(method, "modules_to_save", None) is not None or any(target.role == HEAD for target in targets):
        return ()
    places = () if getattr(method, "in_place", False) else targets
    held = find_heads(root, places)
    if stored is not None:
        held = tuple(path for path in held if any(is_below(name, path) for name in stored))
    return tuple(Target(path, "", HEAD) for path in held)


# --- building --------------------------------------------------------------------------------------


def _build(
    root: nn.Module,
    method: Method,
    targets: tuple[Target, ...],
    bases: tuple[str, ...],
    structure: Structure | None,
    stored: Collection[str] | None,
    twins: Twins,
) -> Prepared:
    places = [target for target in targets if target.role != HEAD]
    copied = [target for target in places if _is_copied(target, places, twins)]
    insertions = tuple(method.insertions(root, [target for target in places if target not in copied]))
    insertions += _mirrored(root, method, insertions, bases, twins, None if stored is None else copied)
    for insertion in insertions:
        target, key = insertion.target, insertion.key(method)
        host = module_at(root, target.module)
        check_attachable(host, target, key)
        if target.reads is not None:
            check_attachable(module_at(root, target.reads), target, key)
        check_hosts(insertion.delta, host, target.path, target.parameter)
        _check_weight(insertion.delta, host, target)
    trained = _awake(root, method, method.trained(root, targets), stored)
    parameters = dict(named_parameters(root, every_name=True))
    for name in trained:
        check_trains(name, parameters[name])
    places = [insertion.target for insertion in insertions]
    readings = _readings(root, trained, targets, structure) if getattr(method, "thaws", True) else {}
    # Places without a delta are kept, so that loading finds again what trains as it is.
    inserted = set(places)
    bare = [t for t in targets if t not in inserted and not is_shared(t) and _trains(trained, t)]
    places += [_with_reader(root, target, readings.get(target.path)) for target in bare]
    return Prepared(
        method=method,
        targets=tuple(places),
        insertions=insertions,
        readers=tuple(
            seen_reader(root, insertion.target, structure) if insertion.target.parameter else None
            for insertion in insertions
        ),
        trained=trained,
        readings=readings,
        scopes=bases,
        apart=_apart(root, method, targets, bases, structure, twins),
    )


def _readings(
    root: nn.Module, trained: Sequence[str], targets: Sequence[Target], structure: Structure | None
) -> dict[str, str | None]:
    """Who reads what trains in place, as far as is known, and will be where a file is loaded."""
    called = None if structure is None else structure.called
    noted = {target.path: target.reads for target in targets if target.parameter}
    found: dict[str, str | None] = {}
    for name in trained:
        path, _, own = name.rpartition(".")
        plain = reader_of(root, Target(path, own), None)
        reader = noted.get(name)
        if reader is None:
            reader = seen_reader(root, Target(path, own), structure)
            by = path if reader is None else reader
            if not (by in called if called is not None else by):  # nothing tells by which of its methods a root is run
                continue
        if reader == plain or name in noted:
            found[name] = reader
    return found


def _with_reader(root: nn.Module, place: Target, reader: str | None) -> Target:
    """A place whose parameter is read by another module, of which only a forward tells."""
    if not place.parameter or reader is None or reader == reader_of(root, place, None):
        return place
    return replace(place, reads=reader)


def _check_weight(delta: Delta, host: nn.Module, target: Target) -> None:
    """Refuse a delta on a weight that is there during a call only, or whose gradient does not pass on to the delta."""
    if delta.path == "weight" and isinstance(host, nn.Embedding | nn.EmbeddingBag) and host.sparse:
        raise TargetError(
            f"{target.path}: the {type(host).__name__} has sparse=True, and a delta on its weight gets no gradient of "
            f"that form. Set {target.module or 'model'}.sparse = False, which the frozen table does not need, or leave "
            "it out with exclude_modules."
        )
    if delta.path == "weight" and getattr(host, "max_norm", None) is not None:  # which rows it has changed is chance
        raise TargetError(
            f"{target.path}: a table with max_norm changes while it is looked up, and a delta on its weight would read "
            f"other values before than after. Set {target.module or 'model'}.max_norm = None, use LoRA, or leave it "
            "out with exclude_modules."
        )
    if target.parameter == "weight" and is_made(host) and (delta.path == "weight" or delta.starts_from_weight):
        raise TargetError(
            f"{target.path} is made from other parameters for each call (weight norm and the like), so a delta can "
            "only add to what the layer returns, and this one needs the weight itself: it is DoRA, starts from it "
            "(init='pissa', 'olora'), or nobody calls the layer as it is. Use LoRA or (IA)³ without these, exclude it "
            "with exclude_modules, or name what the weight is made from ('parametrizations.weight')."
        )


def _is_copied(target: Target, places: Sequence[Target], twins: Twins) -> bool:
    """The place lies in a copy, and another of these in its original: the copy's delta is that one's."""
    originals = [original for copy, original in twins.copies.items() if is_below(target.module, copy)]
    return any(is_below(place.module, original) for original in originals for place in places)


def _mirrored(
    root: nn.Module,
    method: Method,
    insertions: Sequence[Insertion],
    bases: Sequence[str],
    twins: Twins,
    stored: Collection[Target] | None,
) -> tuple[Insertion, ...]:
    """The same deltas for the copies that the user keeps, not trained: both go on having the same parameters.

    So the user's averaging, parameter by parameter, averages the deltas as well.

    Raises:
        TargetError: if the method's deltas cannot be had twice.
    """
    found: list[Insertion] = []
    for copy, original in twins.copies.items():
        mine = [i for i in insertions if i.target.path and is_below(i.target.module, original)]
        places = [_moved(i.target, original, copy) for i in mine]
        if not mine or (stored is not None and not set(places) <= set(stored)):
            continue
        if not getattr(method, "mirrors", True) or any(is_shared(i.target) for i in insertions):
            if stored is None and any(is_below(copy, base) for base in bases):
                raise TargetError(
                    f"{copy!r} is a frozen copy of {original!r}: it needs the same deltas, untrained, so that both go "
                    f"on having the same parameters. The deltas of {type(method).__name__} share tensors or change in "
                    "the run and cannot be had twice. Use LoRACallback or AdapterCallback; or, if nothing goes through "
                    f"the parameters of both together, name the original: module={original!r}."
                )
            continue
        # Together: what they share stays shared. What they know of the original is that of the copy.
        modules, within = named_modules(root), named_modules(module_at(root, original))
        deltas = deepcopy([i.delta for i in mine], {id(m): modules[join(copy, path)] for path, m in within.items()})
        for place, insertion, delta in zip(places, mine, deltas, strict=True):
            found.append(replace(insertion, target=place, delta=delta.requires_grad_(False)))
    return tuple(found)


def _moved(target: Target, original: str, copy: str) -> Target:
    def move(path: str) -> str:
        return join(copy, path[len(original) :].removeprefix(".")) if is_below(path, original) else path

    return replace(target, module=move(target.module), reads=None if target.reads is None else move(target.reads))


def _awake(
    root: nn.Module, method: Method, trained: tuple[str, ...], stored: Collection[str] | None
) -> tuple[str, ...]:
    """What a method that trains the base in place may train: nothing that the user froze beside what he did not.

    A base that is frozen as a whole was made ready for us; full fine-tuning alone takes even that as it is.

    Raises:
        TargetError: if full fine-tuning has nothing to train.
    """
    if not getattr(method, "in_place", False):
        return trained
    if stored is not None:
        return tuple(name for name in trained if name in stored)
    saved = getattr(method, "modules_to_save", None) or ()
    named = set(parameters_below(root, saved, "modules_to_save"))
    frozen = frozen_by_user(root) - named
    awake = tuple(name for name in trained if name not in frozen)
    if awake or getattr(method, "thaws", True):
        return awake or trained
    raise TargetError(
        f"{type(method).__name__} trains what you train, and every parameter of {type(root).__name__} is frozen. Let "
        "some require a gradient, or name modules to thaw in modules_to_save."
    )


def _once(root: nn.Module, trained: Sequence[str], before: Sequence[Prepared]) -> tuple[str, ...]:
    """One name for each tensor: the one that an earlier method has given it, or the first of this method's."""
    parameters = dict(named_parameters(root, every_name=True))
    record = record_of(root)
    given = [*(record.trained_names if record else ()), *(name for item in before for name in item.trained)]
    names: dict[int, str] = {}
    for name in (*given, *trained):
        names.setdefault(id(parameters[name]), name)
    return tuple(dict.fromkeys(names[id(parameters[name])] for name in trained))


def _trains(trained: Sequence[str], target: Target) -> bool:
    return any(is_below(name, target.path) for name in trained)
