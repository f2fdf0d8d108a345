"""The optimizer holds exactly what trains, whoever built it and when.

Post-processing of what ``configure_optimizers`` returned, a check after set-up, and optimizer states
that are matched by parameter name instead of by position. All names are canonical and relative to the
LightningModule (:func:`lightning_pet.model.naming.canonical`).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import OptimizerMismatchError
from lightning_pet.model.adaptation import adapted_root, record_of
from lightning_pet.model.naming import named_parameters
from lightning_pet.strategies import private
from lightning_pet.strategies.parameter_groups import Place, Wish, names_of, places_of, regroup, shown, trainable_of

T = TypeVar("T")


def hold_delta(
    returned: T,
    module: nn.Module,
    delta: Mapping[str, nn.Parameter],
    host_of: Mapping[str, str],
    lr_ratio: Mapping[str, float],
    options: Mapping[str, Mapping[str, float]] | None = None,
    runs: Mapping[str, tuple[str, Mapping[str, float]]] | None = None,
) -> T:
    """Let the optimizers hold what is planned, and nothing else of the base; call after freezing.

    * Frozen parameters of the base, and parameters that ``module`` no longer has, are dropped in place.
    * An absent delta parameter joins the group of its host, which keeps layer-wise learning rates; if no
      optimizer held the host, the first group of the only optimizer. So does any other parameter of the base that
      trains and that no optimizer holds (a head).
    * Parameters beside the base stay where the user put them, frozen or not, and join nothing.
    * Delta parameters with a ratio other than 1, or with options, move to a new group, a copy of theirs with
      every learning rate scaled and the options set; the schedulers of that optimizer are extended.

    Args:
        returned: what ``configure_optimizers`` returned, in any form that Lightning accepts.
        module: the LightningModule.
        delta: the delta's parameters by name; frozen ones may be among them.
        host_of: name of the host's base parameter, by delta name.
        lr_ratio: factor on the host's learning rate, by delta name; 1 where absent.
        options: options of an optimizer's group, by delta name; those that the optimizer does not have are left out.
        runs: by delta name, which of several runs it is a part of, with the learning rate and decay of that run; see
            :class:`~lightning_pet.strategies.parameter_groups.Wish`.

    Returns:
        ``returned`` itself; the optimizers in it have been changed in place.

    Raises:
        OptimizerMismatchError: if a trainable parameter has no optimizer to join, or an optimizer cannot
            have another group.
    """
    optimizers, schedulers = collect(returned, "param_groups"), collect(returned, "step", "optimizer")
    if not optimizers:
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise OptimizerMismatchError(
                "configure_optimizers returned no optimizer, so the delta would not be trained. Return one from "
                f"{type(module).__name__}.configure_optimizers, for example torch.optim.AdamW(self.parameters())."
            )
        return returned
    names = names_of(module)
    delta_names = {names.get(id(parameter), name): name for name, parameter in delta.items()}
    aliases = {name: names[id(p)] for name, p in named_parameters(module, every_name=True)}
    places = places_of(optimizers, names)
    beside = beside_base(module)
    _drop_frozen_and_stale(optimizers, module, names, beside)
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trainable_of(module).items():
        if id(parameter) not in held and id(parameter) not in beside:
            host = host_of.get(delta_names.get(name, name), "")
            place = places.get(aliases.get(host, host))
            _join(optimizers, place or _only_place(optimizers, name), name, parameter)
    wishes = {}
    for name, own in delta_names.items():
        run, of_run = (runs or {}).get(own, ("", {}))
        options_of = tuple(sorted((options or {}).get(own, {}).items()))
        wishes[name] = Wish(lr_ratio.get(own, 1.0), options_of, run, tuple(sorted(of_run.items())))
    regroup(optimizers, schedulers, module, wishes)
    _warn_empty(optimizers)
    return returned


def check(optimizers: Iterable[Any], module: nn.Module, delta: Mapping[str, nn.Parameter] | None = None) -> None:
    """After set-up, what trains must be in exactly one group, and nothing frozen of the base in any.

    What lies beside the base is the user's: it may be in no group, and frozen in one.

    Args:
        optimizers: the optimizers of the Trainer.
        module: the LightningModule.
        delta: the delta's parameters by name, where they may not be parameters of ``module`` any more.

    Raises:
        OptimizerMismatchError: naming the parameters at fault.
    """
    times: dict[int, int] = {}
    frozen, beside = 0, beside_base(module)
    for parameter in (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
        times[id(parameter)] = times.get(id(parameter), 0) + 1
        frozen += not parameter.requires_grad and id(parameter) not in beside
    names = names_of(module)
    outside = {n: p for n, p in (delta or {}).items() if p.requires_grad and id(p) not in names}
    trainable = trainable_of(module) | outside
    absent = [name for name, parameter in trainable.items() if id(parameter) not in times.keys() | beside]
    twice = [name for name, parameter in trainable.items() if times.get(id(parameter), 0) > 1]
    if absent:
        raise OptimizerMismatchError(
            f"{len(absent)} of {len(trainable)} trainable parameters are in no optimizer: {shown(absent)}. They were "
            "added or unfrozen after configure_optimizers ran; do that in setup or configure_model."
        )
    if twice:
        raise OptimizerMismatchError(
            f"{len(twice)} parameters are in more than one group and would be stepped twice: {shown(twice)}. "
            "Give each parameter to one group in configure_optimizers."
        )
    if frozen:
        raise OptimizerMismatchError(
            f"The optimizers hold {frozen} frozen parameters. They were frozen after configure_optimizers ran; freeze "
            "in setup or configure_model."
        )


def parameter_names(optimizers: Iterable[Any], module: nn.Module) -> list[list[list[str]]]:
    """Return the names of the parameters of each group of each optimizer, as plain lists for the checkpoint.

    Raises:
        OptimizerMismatchError: if an optimizer holds a parameter that the module does not have.
    """
    names = names_of(module)
    result = []
    for index, optimizer in enumerate(optimizers):
        groups = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
        unknown = sum(
            p.requires_grad and id(p) not in names for group in optimizer.param_groups for p in group["params"]
        )
        if unknown:
            raise OptimizerMismatchError(
                f"Optimizer {index} ({type(optimizer).__name__}) holds {unknown} tensors that are not parameters of "
                f"{type(module).__name__}; its state could not be matched on resume. Register them in the module."
            )
        result.append(groups)
    return result


def reorder_state(
    optimizer_states: Sequence[Mapping[str, Any]],
    saved_names: Sequence[Sequence[Sequence[str]]],
    current_names: Sequence[Sequence[Sequence[str]]],
) -> list[dict[str, Any]]:
    """Bring saved optimizer states, which know parameters by position, into the present order by name.

    Args:
        optimizer_states: state dicts of the optimizers as saved; not changed.
        saved_names: what :func:`parameter_names` returned at the save.
        current_names: what it returns now.

    Returns:
        State dicts to be loaded into the present optimizers. Group options (learning rates, betas) follow
        the parameters.

    Raises:
        OptimizerMismatchError: if parameters were added or removed, if parameters whose groups have
            different options are now in one group, or if the order cannot be changed.
    """
    if not len(optimizer_states) == len(saved_names) == len(current_names):
        raise OptimizerMismatchError(
            f"The checkpoint holds {len(optimizer_states)} optimizers (names for {len(saved_names)}), this run has "
            f"{len(current_names)}. Resume with the configure_optimizers that wrote it."
        )
    return [
        _reorder(index, state, saved, current)
        for index, (state, saved, current) in enumerate(zip(optimizer_states, saved_names, current_names, strict=True))
    ]


def pass_over_empty(module: pl.LightningModule, optimizers: Callable[[], Iterable[Any]]) -> Callable[[], None]:
    """In manual optimization, let the turn of an optimizer pass of which nothing trains; returns what undoes it.

    While it is toggled, nothing requires a gradient, and torch would refuse the backward pass.
    """

    def backward(original: Callable[..., None], loss: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(loss, Tensor) and not loss.requires_grad and any(map(_is_empty, optimizers())):
            return
        original(loss, *args, **kwargs)

    return private.replace_method(module, "manual_backward", backward)


def _is_empty(optimizer: Any) -> bool:
    return not any(group["params"] for group in optimizer.param_groups)


# ---- holding -----------------------------------------------------------------------------------------


def collect(value: Any, *attributes: str) -> list[Any]:
    """Return the distinct objects with all these attributes in nested lists, tuples and dicts, in order."""
    found: dict[int, Any] = {}

    def walk(item: Any) -> None:
        if isinstance(item, Mapping):
            for part in item.values():
                walk(part)
        elif isinstance(item, (list, tuple)):
            for part in item:
                walk(part)
        elif all(hasattr(item, attribute) for attribute in attributes):
            found[id(item)] = item

    walk(value)
    return list(found.values())


def beside_base(module: nn.Module) -> set[int]:
    """Identities of the parameters that are neither planned for nor in the base, and of those left out: the user's own.

    In a module that nothing was applied to there are none.
    """
    found = adapted_root(module)
    if found is None:
        return set()
    path, root = found
    record = record_of(root)
    assert record is not None
    prefix = f"{path}." if path else ""
    ours, left = {*record.delta_names, *record.planned_names}, set(record.left)
    mine: set[int] = set()
    beside: set[int] = set()
    named = named_parameters(module, every_name=True)
    base = record.of_base([name.removeprefix(prefix) for name, _ in named])
    for name, parameter in named:
        own = name.removeprefix(prefix)
        inside = name.startswith(prefix) and own not in left and (own in ours or own in base)
        (mine if inside else beside).add(id(parameter))
    return beside - mine


def _drop_frozen_and_stale(
    optimizers: list[Any], module: nn.Module, names: Mapping[int, str], beside: Collection[int]
) -> None:
    strangers: list[str] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [(p.requires_grad or id(p) in beside) and id(p) in names for p in group["params"]]
            for parameter, keep in zip(group["params"], kept, strict=True):
                if not keep:
                    optimizer.state.pop(parameter, None)
                    if parameter.requires_grad:
                        strangers.append(f"{tuple(parameter.shape)}")
            # In place: an optimizer, or the user, may hold this very list.
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [item for item, keep in zip(group[key], kept, strict=True) if keep]
    if strangers:
        rank_zero_warn(
            f"Dropped {len(strangers)} tensors from the optimizers that are not parameters of {type(module).__name__}, "
            f"of shapes {shown(strangers)}. If they are meant to be trained, register them in the module."
        )


def _only_place(optimizers: list[Any], name: str) -> Place:
    if len(optimizers) > 1:
        raise OptimizerMismatchError(
            f"The trainable parameter {name!r} is in none of the {len(optimizers)} optimizers, nor was its host, "
            "so it cannot be told which one should train it. Give it, or its host's parameters, to one of them in "
            "configure_optimizers."
        )
    return Place(0, 0)


def _join(optimizers: list[Any], place: Place, name: str, parameter: nn.Parameter) -> None:
    group = optimizers[place.optimizer].param_groups[place.group]
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(name)


def _warn_empty(optimizers: list[Any]) -> None:
    for index, optimizer in enumerate(optimizers):
        if _is_empty(optimizer):
            rank_zero_warn(
                f"Optimizer {index} ({type(optimizer).__name__}) holds no trainable parameter any more: all that it "
                "was given is frozen as part of the base. If it is to train as it is, name the part to adapt instead "
                "(module=...), or give it to modules_to_save."
            )


# ---- state by name -----------------------------------------------------------------------------------


def _reorder(
    index: int, state: Mapping[str, Any], saved: Sequence[Sequence[str]], current: Sequence[Sequence[str]]
) -> dict[str, Any]:
    if [list(group) for group in saved] == [list(group) for group in current]:
        return dict(state)
    _same_names(index, saved, current)
    groups: list[dict[str, Any]] = list(state.get("param_groups", ()))
    if not groups or any(isinstance(key, str) for group in groups for key in group["params"]):
        return dict(state)  # kept by another rank, or by name already
    positions = {
        name: position
        for names, group in zip(saved, groups, strict=True)
        for name, position in zip(names, group["params"], strict=True)
    }
    if any("old_dirs" in entry for entry in state["state"].values()):
        raise OptimizerMismatchError(
            f"Optimizer {index} keeps one joint state for all parameters (LBFGS), and their order has changed since "
            "the checkpoint. Resume with the callbacks, targets and parameter groups in the order of the checkpoint."
        )
    source = {name: number for number, names in enumerate(saved) for name in names}
    counter = count()
    new_groups, new_state = [], {}
    for number, names in enumerate(current):
        options = _options(index, number, {source[name] for name in names} or {number}, groups)
        new_positions = [next(counter) for _ in names]
        named = {"param_names": list(names)} if "param_names" in options else {}
        new_groups.append({**options, **named, "params": new_positions})
        for name, position in zip(names, new_positions, strict=True):
            if positions[name] in state["state"]:
                new_state[position] = state["state"][positions[name]]
    _same_positions(index, groups, new_groups)
    return {**state, "state": new_state, "param_groups": new_groups}


def _same_names(index: int, saved: Sequence[Sequence[str]], current: Sequence[Sequence[str]]) -> None:
    then, now = ([name for group in names for name in group] for names in (saved, current))
    gone, new = [n for n in then if n not in set(now)], [n for n in now if n not in set(then)]
    if gone or new:
        raise OptimizerMismatchError(
            f"The state of optimizer {index} belongs to other parameters: the checkpoint has {shown(gone) or 'no'} "
            f"that are absent now, and lacks {shown(new) or 'none'} of the present ones. Resume with the callbacks "
            "and targets of the checkpoint, or load the delta only and start a new run."
        )


def _options(index: int, number: int, sources: set[int], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options of the saved groups that the parameters of a present group come from."""
    found = [_without_params(groups[source]) for source in sorted(sources) if source < len(groups)]
    if not found or any(not _equal(found[0], other) for other in found[1:]):
        raise OptimizerMismatchError(
            f"Group {number} of optimizer {index} holds parameters that had different options (such as the learning "
            "rate) in the checkpoint. Resume with the parameter groups of the checkpoint."
        )
    return found[0]


def _same_positions(index: int, saved: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> None:
    # Schedulers know groups by position, so a group may only take the place of one with equal options.
    if len(saved) != len(new) or not all(
        _equal(_without_params(a), _without_params(b)) for a, b in zip(saved, new, strict=True)
    ):
        raise OptimizerMismatchError(
            f"Optimizer {index} had {len(saved)} parameter groups in the checkpoint and has {len(new)} now, or they "
            "have changed places; schedulers know groups by place. Resume with the parameter groups of the checkpoint."
        )


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    left, right = ({key: value for key, value in group.items() if key != "param_names"} for group in (a, b))
    return left.keys() == right.keys() and all(bool(left[key] == right[key]) for key in left)
