"""Parts of the base that the user gave to no optimizer: what a method has planned there stays as it is.

A loss network, a critic or a teacher that nobody froze may lie in the base. The optimizers tell that it is not to
train: the user gave them other parts, and nothing of this one.
"""

from collections.abc import Collection, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.insertion.method import key_of
from lightning_pet.insertion.prepare import target_patterns
from lightning_pet.model.adaptation import Adaptation, Applied, record_of
from lightning_pet.model.naming import CHILD, delta_prefix, is_below, join, named_parameters
from lightning_pet.model.structure import Target
from lightning_pet.strategies.parameter_groups import shown
from lightning_pet.targets.heads import HEAD, is_small, parameters_below


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
