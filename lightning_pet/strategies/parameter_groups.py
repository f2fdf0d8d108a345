"""Parameter groups of the user's optimizers: who is where, groups of their own, and parameters that are exchanged.

Schedulers know groups by position, so whatever adds or removes one does the same to every list of theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_pet.errors import OptimizerMismatchError
from lightning_pet.model.naming import named_parameters
from lightning_pet.strategies import private

_LR_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr")
LR_LISTS = ("base_lrs", private.LAST_LR, "min_lrs", "max_lrs", "lr_lambdas")
"""Attributes in which schedulers keep one value per parameter group."""
_LISTS = ("params", "param_names")
_SHOWN = 6


@dataclass(frozen=True)
class Place:
    """One parameter group of one optimizer."""

    optimizer: int
    group: int


@dataclass(frozen=True, order=True)
class Wish:
    """How the group of a parameter should differ from the one it is in.

    Attributes:
        ratio: factor on every learning rate.
        options: options to set. A learning rate is meant absolutely; a schedule acts on it as on the others.
        run: of which of several runs the parameter is one; each has groups of its own, under its name.
        of_run: what that run would give the optimizer as its learning rate and weight decay. Groups that were given
            others keep those. If all were, those of the first group that are not 0 are meant, and others go with them.
    """

    ratio: float = 1.0
    options: tuple[tuple[str, float], ...] = ()
    run: str = ""
    of_run: tuple[tuple[str, float], ...] = ()

    def on(self, group: Mapping[str, Any], optimizer: Any = None) -> "Wish":
        """The part of it that a group can grant and does not grant already, with the learning rate as a ratio.

        Args:
            group: that the parameter is in.
            optimizer: whose it is.
        """
        wanted = {key: value for key, value in self.options if key in group and key != "lr" and group[key] != value}
        rate = dict(self.options).get("lr")
        start = float(group.get("initial_lr", group["lr"]))
        ratio = self.ratio if rate is None or start == 0 else rate / start
        for key, value in self.of_run:
            if key in group and key not in dict(self.options):
                present = _start(group, key)
                own = _of_run(present, value, optimizer.defaults[key], [_start(g, key) for g in optimizer.param_groups])
                if key == "lr":
                    ratio *= own / present if present else 1.0
                elif own != present:
                    wanted[key] = own
        return Wish(ratio, tuple(sorted(wanted.items())), self.run)


def _start(group: Mapping[str, Any], key: str) -> float:
    return float(group.get(f"initial_{key}", group[key]))


def _of_run(present: float, wanted: float, default: float, all_of_them: Sequence[float]) -> float:
    """What a group would have if the optimizer were made with another value."""
    if default in all_of_them:
        return wanted if present == default else present
    first = next((value for value in all_of_them if value), 0.0)
    return present * wanted / first if first else wanted


@dataclass(frozen=True)
class Exchange:
    """A parameter that another one takes the place of.

    Attributes:
        old: trained until now.
        new: trained from now on; ``None``: nothing is.
        places: flat indices of the entries of ``old`` that ``new`` goes on with.
    """

    old: nn.Parameter
    new: nn.Parameter | None = None
    places: Tensor | None = None


def names_of(module: nn.Module) -> dict[int, str]:
    """Return the first name of every parameter, by identity."""
    return {id(parameter): name for name, parameter in named_parameters(module)}


def trainable_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name."""
    return {name: p for name, p in named_parameters(module) if p.requires_grad}


def places_of(optimizers: list[Any], names: Mapping[int, str]) -> dict[str, Place]:
    """Return where the optimizers hold each parameter, by name."""
    return {
        names[id(parameter)]: Place(i, j)
        for i, optimizer in enumerate(optimizers)
        for j, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if id(parameter) in names
    }


def shown(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def regroup(optimizers: list[Any], schedulers: list[Any], module: nn.Module, wishes: Mapping[str, Wish]) -> None:
    """Move parameters with a wish to groups of their own, in an order that only places and wishes decide.

    Raises:
        OptimizerMismatchError: if a learning rate is wished for in an optimizer that steps one group only.
    """
    moving: dict[tuple[int, int, Wish], list[str]] = {}
    for name, place in places_of(optimizers, names_of(module)).items():
        optimizer = optimizers[place.optimizer]
        wish = wishes.get(name, Wish()).on(optimizer.param_groups[place.group], optimizer)
        if wish != Wish():
            moving.setdefault((place.optimizer, place.group, wish), []).append(name)
    parameters = trainable_of(module)
    for (i, j, wish), names in sorted(moving.items()):
        optimizer = optimizers[i]
        if private.uses_first_group_only(optimizer):
            raise OptimizerMismatchError(
                f"{type(optimizer).__name__} steps one parameter group only, so {shown(names)} cannot have "
                f"{wish.ratio} times the learning rate of the others. Set the ratio to 1, or use another optimizer."
            )
        chosen = {name: parameters[name] for name in names}
        _leave(optimizer.param_groups[j], {id(parameter) for parameter in chosen.values()})
        _add_group(optimizer, _of(schedulers, optimizer), j, chosen, wish)


def exchange(optimizers: list[Any], schedulers: list[Any], exchanges: Sequence[Exchange], names: Sequence[str]) -> None:
    """Let new parameters take the places of old ones; a group that is left without any is removed.

    The optimizer's state of the entries that go on goes on with them, if the optimizer keeps one number per
    entry (as Adam does); otherwise it starts anew.

    Args:
        optimizers: the optimizers of the Trainer, without wrappers.
        schedulers: their schedulers.
        exchanges: what for what.
        names: names of the new parameters, in the order of ``exchanges`` (unused where there is none).
    """
    by_old = {id(change.old): (change, name) for change, name in zip(exchanges, names, strict=True)}
    for optimizer in optimizers:
        for index in reversed(range(len(optimizer.param_groups))):
            group = optimizer.param_groups[index]
            if not any(id(parameter) in by_old for parameter in group["params"]):
                continue
            for position, parameter in enumerate(group["params"]):
                change, name = by_old.get(id(parameter), (None, ""))
                if change is None or change.new is None:
                    continue
                _carry_state(optimizer, change)
                group["params"][position] = change.new
                if "param_names" in group:
                    group["param_names"][position] = name
            _leave(group, by_old.keys())
            if not group["params"]:
                _remove_group(optimizer, _of(schedulers, optimizer), index)
        for change in exchanges:
            optimizer.state.pop(change.old, None)
        if any(
            id(change.new) in {id(p) for group in optimizer.param_groups for p in group["params"]}
            for change in exchanges
        ):
            private.forget_joint_state(optimizer)


def _carry_state(optimizer: Any, change: Exchange) -> None:
    old, new, places = change.old, change.new, change.places
    state = optimizer.state.get(old, {})
    large = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
    if not state or places is None or any(value.shape != old.shape for value in large.values()):
        return
    taken = {key: value.reshape(-1)[places.to(value.device)] for key, value in large.items()}
    optimizer.state[new] = {**state, **taken}


def _of(schedulers: list[Any], optimizer: Any) -> list[Any]:
    chosen = [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]
    return [inner for outer in chosen for inner in private.nested_schedulers(outer)]


def _leave(group: dict[str, Any], leaving: Any) -> None:
    kept = [id(parameter) not in leaving for parameter in group["params"]]
    # In place: an optimizer, or the user, may hold this very list.
    for key in _LISTS:
        if key in group:
            group[key][:] = [item for item, keep in zip(group[key], kept, strict=True) if keep]


def _add_group(
    optimizer: Any, schedulers: list[Any], source: int, parameters: Mapping[str, nn.Parameter], wish: Wish
) -> None:
    original = optimizer.param_groups[source]
    group = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in original.items()
        if key not in _LISTS
    }
    for key in _LR_KEYS:
        if isinstance(group.get(key), (int, float, Tensor)):
            group[key] = group[key] * wish.ratio
    group |= dict(wish.options)
    if wish.run:
        taken = {other.get("name") for other in optimizer.param_groups}
        names = (wish.run, *(f"{wish.run}/{number}" for number in range(2, len(taken) + 3)))
        group["name"] = next(name for name in names if name not in taken)
    named = "param_names" in original
    optimizer.add_param_group({**group, "params": list(parameters.items() if named else parameters.values())})
    groups = len(optimizer.param_groups) - 1
    for scheduler in schedulers:
        for attribute in LR_LISTS:
            values = getattr(scheduler, attribute, None)
            if isinstance(values, list) and len(values) == groups:
                values.append(values[source] if attribute == "lr_lambdas" else values[source] * wish.ratio)


def _remove_group(optimizer: Any, schedulers: list[Any], index: int) -> None:
    groups = len(optimizer.param_groups)
    del optimizer.param_groups[index]
    for scheduler in schedulers:
        for attribute in LR_LISTS:
            values = getattr(scheduler, attribute, None)
            if isinstance(values, list) and len(values) == groups:
                del values[index]


def groups_of(optimizers: Sequence[Any], parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The groups that hold any of these parameters."""
    wanted = {id(parameter) for parameter in parameters}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [group for group in groups if any(id(parameter) in wanted for parameter in group["params"])]


def set_option(group: dict[str, Any], key: str, value: float) -> None:
    """Set an option of a group that is in use; one that is kept as a tensor is filled, as kernels hold it."""
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def clip_norm(trainer: pl.Trainer, optimizer: Any, parameters: Sequence[nn.Parameter], norm: float) -> None:
    """Clip the gradients of some parameters to a norm, before the optimizer steps."""
    nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], scaled_norm(trainer, optimizer, norm))


def scaled_norm(trainer: pl.Trainer, optimizer: Any, norm: float) -> float:
    """What a norm of gradients is where the optimizer itself will unscale them."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return norm * float(scaler.get_scale()) if scaler is not None and private.unscales_itself(optimizer) else norm
