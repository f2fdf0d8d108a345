"""What stays frozen beside what trains: parts that the user left out, other deltas, and both in averaged weights."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, UnsupportedStrategyError
from lightning_pet.insertion.choice import let_train, place
from lightning_pet.insertion.method import key_of
from lightning_pet.insertion.prepare import target_patterns
from lightning_pet.model.adaptation import Adaptation, Applied, deltas_in, record_at, record_of
from lightning_pet.model.naming import CHILD, delta_prefix, is_below, join, named_parameters
from lightning_pet.model.structure import Target
from lightning_pet.operations.saved import digest_of, packed
from lightning_pet.strategies import private
from lightning_pet.strategies.parameter_groups import shown
from lightning_pet.targets.heads import HEAD, is_small, parameters_below

# --- parts of the base that the user gave to no optimizer -----------------------------------------

# A loss network, a critic or a teacher that nobody froze may lie in the base. The optimizers tell that it is not to
# train: the user gave them other parts, and nothing of this one.


def left_out(root: nn.Module, optimizers: Sequence[Any], methods: Sequence[Any]) -> tuple[str, ...]:
    """Names, from the root, of what is planned in parts that the user left out of all optimizers.

    A part is what the root holds under one name. It is left out if the user did not freeze it, no optimizer holds any
    of it, and one holds something of the same method elsewhere: optimizers that hold only a head, or nothing of what
    a method adapts, leave it to the method. Full fine-tuning trains what the user trains, to the single parameter.
    What ``modules_to_save`` names trains in any case, and so do places that the user names by their whole path and
    heads that the root itself holds.

    Args:
        root: the adapted root.
        optimizers: as the user made them, before anything leaves or joins them.
        methods: the callbacks.
    """
    record = record_of(root)
    if record is None:
        return ()
    ids = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    held = {name for name, p in named_parameters(root, every_name=True) if id(p) in ids}
    parts = {_part(name) for name in held}
    unfrozen = {_part(name) for name, trains in record.flags.items() if trains}
    by_key = {key_of(method): method for method in methods}
    found: dict[str, None] = {}
    for applied in record.applied:
        method = by_key.get(applied.key)
        own = _own(root, record, applied, method)
        if getattr(method, "thaws", True):
            left = [name for name in own if _part(name) in unfrozen - parts]
        else:
            left = [name for name in own if name not in held]
        if len(left) < len(own):
            found |= dict.fromkeys(left)
    return tuple(found)


def _own(root: nn.Module, record: Adaptation, applied: Applied, method: Any) -> list[str]:
    """What a method plans to train, without what trains in any case."""
    saved = getattr(method, "modules_to_save", None) or ()
    sure = set(parameters_below(root, saved, "modules_to_save"))
    heads = {target.module for target in applied.targets if target.role == HEAD}
    named = target_patterns(method)
    prefixes = {
        path
        for target, path in zip(applied.targets, applied.paths, strict=False)
        if target.module and not any(_is_path_of(pattern, target) for pattern in named)
    }
    names = [*applied.trained, *(name for name in record.delta_names if delta_prefix(name) in prefixes)]
    trains = set(record.trainable_names)
    return [name for name in names if name in trains and name not in sure and _part(name) not in heads]


def _is_path_of(pattern: str, target: Target) -> bool:
    """Whether a pattern is the whole path of a place: from the root, or from the LightningModule."""
    whole = any(pattern == path or pattern.endswith(f".{path}") for path in (target.module, target.path))
    return whole and not pattern.startswith("re:") and not set(pattern) & set("*?[")


def warn_of_frozen_base(root: nn.Module, prefix: str, methods: Sequence[Any]) -> None:
    """A frozen base is ready to be adapted, or a teacher beside the network that was meant: say which was taken."""
    record = record_of(root)
    if record is None or "" in record.scopes or any(method.module is not None for method in methods):
        return
    if any(record.flags[name] for name in record.of_base(record.flags)):
        return
    networks = [
        name
        for name, child in root.named_children()
        if not any(is_below(scope, name) for scope in record.scopes)
        and any(p.requires_grad and p.dim() > 1 for p in child.parameters())
        and not is_small(child)
    ]
    if networks:
        children = dict(root.named_children())
        networks.sort(key=lambda name: -sum(p.numel() for p in children[name].parameters()))
        largest = join(prefix, networks[0])
        rank_zero_warn(
            f"{shown(record.scopes)}, which you froze, is what is adapted; {shown(networks)} trains as without a "
            f"callback. If {largest} is what you mean to adapt, name it: module={largest!r}."
        )


def _part(name: str) -> str:
    return name.partition(".")[0]


def warn_left_out_deltas(root: nn.Module, left: Collection[str]) -> None:
    """Say which deltas do not train, and what to do."""
    record = record_of(root)
    deltas = [name for name in left if record is not None and name in set(record.delta_names)]
    if deltas:
        parts = list(dict.fromkeys(_part(name) for name in deltas))
        places = list(dict.fromkeys(delta_prefix(name).partition(f".{CHILD}.")[0] for name in deltas))
        rank_zero_warn(
            f"{shown(parts)}: no optimizer of yours holds any of it, so it stays as it is, and {len(places)} deltas in "
            f"it do not train: {shown(places)}. Leave it out with exclude_modules={parts!r}, or name the part to adapt "
            "(module='…'); or give its parameters to an optimizer in configure_optimizers."
        )


# --- other deltas ---------------------------------------------------------------------------------


def train_beside(root: nn.Module, deltas: Collection[str]) -> None:
    """Let these deltas train and act, beside those that act already, which are noted as a part of their base.

    Raises:
        ArgumentError: if one that acts has its own values for what these train.
    """
    record = record_at(root)
    others = tuple(name for name in record.active if name not in deltas)
    if set(record.names) <= set(deltas):
        record.beside = {name: own for name, own in record.beside.items() if name not in deltas}
        return
    place(root, (*others, *(name for name in record.names if name in deltas)))
    let_train(root, deltas)
    mine = set(record.trained_names)
    held = {name: owners for name, owners in record.held_by(others).items() if name in mine}
    if held:
        name, (owner, *_) = next(iter(held.items()))
        raise ArgumentError(
            f"the delta {owner!r}, which acts, has its own values for {name}, and this run trains it. Let it not act "
            "meanwhile: adapted.activate() before the fit lets none act, adapted.activate(…) those that are meant."
        )
    found = {}
    for name in others:
        tensors = packed(root, record, name)
        if not any(tensor.is_meta for tensor in tensors.values()):
            found[name] = digest_of(tensors)
    for name in deltas:
        if found:
            record.beside[name] = dict(found)
        else:
            record.beside.pop(name, None)


def let_rest(root: nn.Module) -> None:
    """Deltas that do not train draw nothing at random: they are what they are when they are evaluated."""
    waiting = record_at(root).waiting
    for inserted in deltas_in(root) if waiting else ():
        if inserted.method.delta in waiting and inserted.delta.training:
            inserted.delta.eval()


# --- averages (EMA, SWA): only what trains is averaged --------------------------------------------


_AVERAGING = (WeightAveraging, StochasticWeightAveraging)


def refuse_averaging_first(callbacks: Sequence[pl.Callback], first: object) -> None:
    """Averaging callbacks copy the model in ``setup``, so the delta must be in it by then.

    Raises:
        UnsupportedStrategyError: if one is listed before the first PET callback.
    """
    for callback in callbacks:
        if callback is first:
            return
        if isinstance(callback, _AVERAGING):
            raise UnsupportedStrategyError(
                f"{type(callback).__name__} is listed before {type(first).__name__}: it would copy the model before "
                "the delta is in it. List the PET callbacks first."
            )


def refuse_averages(callbacks: Iterable[pl.Callback], method: str) -> None:
    """A method that exchanges parameters during the fit leaves nothing that could be averaged over it.

    Raises:
        UnsupportedStrategyError: if a callback averages.
    """
    for callback in callbacks:
        if isinstance(callback, _AVERAGING):
            raise UnsupportedStrategyError(
                f"{type(callback).__name__} averages over steps, and {method} exchanges parameters between them. "
                "Leave one of the two out."
            )


def refuse_outdated_averages(callbacks: Iterable[pl.Callback], module: nn.Module) -> None:
    """The copies must have the delta.

    Raises:
        UnsupportedStrategyError: if a callback copied the model before the delta came.
    """
    names = {name for name, _ in module.named_parameters()}
    for callback in callbacks:
        average = private.average_of(callback) if isinstance(callback, _AVERAGING) else None
        if average is not None and {name for name, _ in average.named_parameters()} != names:
            raise UnsupportedStrategyError(
                f"{type(callback).__name__} copied {type(module).__name__} before the delta was in it, because the "
                "module builds or changes its model in setup or configure_model, or a precision plug-in replaces "
                f"layers. Build the model in __init__, or leave {type(callback).__name__} out."
            )


def share_frozen(callbacks: Iterable[pl.Callback], module: nn.Module) -> None:
    """Let the averages use the very tensors of the frozen base.

    The average of a constant is that constant, but not in floating point: an EMA would move the base a
    little at every step. Sharing it also spares its copy in memory.
    """
    for callback in callbacks:
        if not isinstance(callback, _AVERAGING):
            continue
        average = private.average_of(callback)
        if average is None:
            continue
        for mean, parameter in zip(average.parameters(), module.parameters(), strict=True):
            if not parameter.requires_grad:
                mean.data = parameter.data
        private.wrap_average(callback, _skip_shared)


def _skip_shared(original: Any, mean: Tensor, parameter: Tensor, count: Any) -> Tensor:
    averaged: Tensor = mean if mean.data_ptr() == parameter.data_ptr() else original(mean, parameter, count)
    return averaged
