"""Rows of one batch with different deltas: taken apart and joined again.

The rule is batch-major: a list of B names belongs to any tensor whose first dimension is k · B, where k consecutive
entries belong to one row (beams, windows, tokens that were flattened). B is known from the list, never guessed from a
tensor. Deltas that change what a host returns act on its one product: all groups at once where their kind has such a
form, else group by group. Where the parameters themselves differ, or the call is wrapped, each group has a call of
its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_pet.errors import TargetError
from lightning_pet.insertion.slot import KEPT, Acting, Deltas, Kept, of_host
from lightning_pet.layers.delta import Delta
from lightning_pet.model.call import HERE, Rows
from lightning_pet.model.naming import CHILD
from lightning_pet.probe.row_leaves import ROWS, SHARED, Key, tensors_in

Found = tuple[int, Rows]

_SIMPLE = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


def differing_at(module: nn.Module) -> Found | None:
    """The choice of rows, if attributes of this module are not the same for all of them."""
    kept: Kept | None = module.__dict__.get(KEPT)
    if kept is None:
        return None
    selection = of_host(module).get(kept.switch.number)
    if selection is None or selection.rows is None or selection.rows.differing.isdisjoint(kept.names.values()):
        return None
    return kept.switch.number, selection.rows


class Division:
    """How the first dimension of a tensor is divided among groups of rows.

    Attributes:
        index: of each group, where its entries are.
        inverse: where each entry is in what the groups give, one after the other.
    """

    def __init__(self, rows: Rows, each: int, device: torch.device) -> None:
        ids = torch.tensor(rows.ids).repeat_interleave(each)
        groups = [(ids == group).nonzero()[:, 0] for group in range(len(rows.names))]
        self.index = [index.to(device) for index in groups]
        self.inverse = torch.cat(groups).argsort().to(device)


def division(rows: Rows, size: int, device: torch.device, what: nn.Module) -> Division:
    """The division of this many entries.

    Raises:
        TargetError: if they are not a multiple of the rows.
    """
    batch = len(rows.ids)
    if size < batch or size % batch:
        raise TargetError(
            f"{named(rows, what)} was called with {size} rows, but rows were chosen for a batch of {batch}. Give one "
            "name per row of the batch; the first dimension of what this module gets must be a multiple of it."
        )
    key = (size // batch, device)
    if key not in rows.known:
        rows.known[key] = Division(rows, size // batch, device)
    found: Division = rows.known[key]
    return found


def row_ids(rows: Rows, device: torch.device) -> Tensor:
    """Of each row of the batch, the number of its group."""
    if device not in rows.known:
        rows.known[device] = torch.tensor(rows.ids, device=device)
    found: Tensor = rows.known[device]
    return found


def named(rows: Rows, module: nn.Module) -> str:
    """What messages call a module."""
    path = rows.places.get(id(module))
    return f"{type(module).__name__}" if path is None else f"{path!r} ({type(module).__name__})"


# --- a call for each group ----------------------------------------------------------------------------------


def apart(
    module: nn.Module, chosen: Found | Deltas, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run each group of rows alone, and join what they give.

    Raises:
        TargetError: if the call cannot be taken apart.
    """
    found = chosen.rows() if isinstance(chosen, Deltas) else chosen
    assert found is not None
    number, rows = found
    tensors = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
    if not tensors:
        raise TargetError(
            f"{named(rows, module)} was called without any tensor that has rows, and what it gives is not the same "
            "for all rows. Use these deltas one after the other: `adapted.using(name)`."
        )
    _refuse_objects(rows, module, (args, kwargs))
    _refuse_checkpoints(rows, module)
    alone = tensors[0].shape[0] == 1 and is_shared(rows, module)
    if len(rows.parts) > 1:
        pick = _shares(rows, module, *(_for_each((args, kwargs), len(rows.ids)) if alone else (args, kwargs)))
    else:  # of one group all is its own
        _ = alone or division(rows, tensors[0].shape[0], tensors[0].device, module)
        pick = partial(_whole, (args, kwargs))
    here = HERE.call
    handed, outputs = len(here.handed), []
    for group, part in enumerate(rows.parts):
        own, named_own = pick(group)
        with here.only(number, part):
            outputs.append(call(*own, **named_own))
    if len(here.handed) > handed:
        raise TargetError(
            f"{named(rows, module)} hands its input on to a delta outside of it, and cannot be taken apart. Use "
            "these deltas one after the other: `adapted.using(name)`."
        )
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(module, nn.RNNBase):
        return _recurrent_joined(outputs, rows, module)
    return _joined(outputs, rows, module, _sides_of_outputs(rows, module, outputs), ("gives",))


def _whole(given: Any, group: int) -> Any:
    return given


def _shares(rows: Rows, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[int], Any]:
    """What gives a group's share of the arguments.

    Raises:
        TargetError: if one of them may belong to rows, or to all of them.
    """
    given = tensors_in({"gets": (args, kwargs)})
    leaves = {key: tensor for key, tensor in given.items() if tensor.dim()}
    dims = dict.fromkeys(leaves, 0)
    if isinstance(module, nn.RNNBase):  # recurrent states are layers × rows × features
        dims = {key: 0 if key[1:3] in ((0, 0), (1, "input")) else leaves[key].dim() - 2 for key in leaves}
        belong = list(leaves)
    else:
        belong = _belonging(rows, module, leaves)
    several = [key for key in belong if leaves[key].shape[dims[key]] != 1] or belong[:1]  # the others are for all rows
    divided = {key: division(rows, leaves[key].shape[dims[key]], leaves[key].device, module) for key in several}

    def share(group: int, value: Any, key: Key) -> Any:
        if key in divided:
            return value.index_select(dims[key], divided[key].index[group])
        if type(value) is dict:
            return {name: share(group, item, (*key, name)) for name, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(share(group, item, (*key, place)) for place, item in enumerate(value))
        return value

    return lambda group: share(group, (args, kwargs), ("gets",))


def _belonging(rows: Rows, module: nn.Module, leaves: dict[Key, Tensor]) -> list[Key]:
    """Which arguments have rows.

    Raises:
        TargetError: if nobody knows.
    """
    sides, path = rows.manners.sides, rows.places.get(id(module))
    found = {key: sides.of(path, key) for key in leaves}
    if not sides.known(path):  # the rule alone: what comes first has rows
        found[next(iter(leaves))] = ROWS
    belong = [key for key, side in found.items() if side == ROWS]
    sizes = {leaves[key].shape[0] for key in belong} | {len(rows.ids)}
    for key, tensor in leaves.items():
        if found[key] is None and (tensor.shape[0] in sizes or not belong) and key[-1] != "cache_position":
            place = f"argument {key[2]}" if key[1] == 0 else f"argument {key[2]!r}"
            raise TargetError(
                f"{named(rows, module)} is run once for each delta, and its {place} of shape {tuple(tensor.shape)} may "
                f"have a part for each of {len(rows.ids)} rows, or be the same for all: what was seen of this module "
                "does not tell. Use these deltas one after the other: `adapted.using(name)`."
            )
    if not belong:
        raise TargetError(
            f"{named(rows, module)} is run once for each delta, and nothing that it gets has rows. Use these deltas "
            "one after the other: `adapted.using(name)`."
        )
    return belong


def _sides_of_outputs(rows: Rows, module: nn.Module, outputs: list[Any]) -> Callable[[Key], str | None]:
    sides, path = rows.manners.sides, rows.places.get(id(module))
    first = next(iter(tensors_in({"gives": outputs[0]})), None)
    known = sides.known(path)
    return lambda key: ROWS if not known and key == first else sides.of(path, key)


def _recurrent_joined(outputs: list[Any], rows: Rows, module: nn.Module) -> Any:
    """Recurrent states are layers × rows × features."""

    def has_rows(key: Key) -> str | None:
        return ROWS

    first = _joined([output[0] for output in outputs], rows, module, has_rows, ())
    rest = [_moved(output[1]) for output in outputs]
    return first, _moved(_joined(rest, rows, module, has_rows, ()))


def _refuse_objects(rows: Rows, module: nn.Module, given: Any) -> None:
    """A cache, or whatever else may hold something of all rows, cannot be divided."""
    for leaf in _leaves(given):
        if not isinstance(leaf, _SIMPLE):
            raise TargetError(
                f"{named(rows, module)} is run once for each delta, and was given a {type(leaf).__name__}, which "
                "cannot be divided by rows. Use these deltas one after the other: `adapted.using(name)`."
            )


def _refuse_checkpoints(rows: Rows, module: nn.Module) -> None:
    """What checkpointing inside of the call would repeat, it would repeat with all rows' deltas."""
    if torch.is_grad_enabled() and module.training:
        for inner in module.modules():
            if inner.__dict__.get("gradient_checkpointing") is True:
                raise TargetError(
                    f"{named(rows, module)} is run once for each delta, and checkpoints inside of it would be repeated "
                    "with the wrong ones. Switch gradient checkpointing off, or use these deltas one after the other."
                )


def is_shared(rows: Rows, module: nn.Module) -> bool:
    """Whether a module is known to compute once what all rows of any batch get, such as embeddings of positions."""
    return rows.places.get(id(module)) in rows.manners.shared and len(rows.ids) > 1


def _for_each(value: Any, batch: int) -> Any:
    """The same with one entry per row in place of one for all."""
    if isinstance(value, Tensor):
        return value.expand(batch, *value.shape[1:]) if value.dim() and value.shape[0] == 1 else value
    if type(value) is dict:
        return {key: _for_each(item, batch) for key, item in value.items()}
    return type(value)(_for_each(item, batch) for item in value) if type(value) in (tuple, list) else value


def _leaves(value: Any) -> list[Any]:
    if type(value) is dict:
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if type(value) in (tuple, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _moved(value: Any) -> Any:
    """Recurrent states with their rows first, or back."""
    return tuple(x.transpose(0, 1) for x in value) if isinstance(value, tuple) else value.transpose(0, 1)


def _joined(outputs: list[Any], rows: Rows, module: nn.Module, side: Callable[[Key], str | None], key: Key) -> Any:
    """What the groups give, in the order of the rows.

    Raises:
        TargetError: for what has no part for each row, or is not the same for all where all share it.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return _joined_tensors(outputs, rows, module, side(key))
    if isinstance(first, dict):
        joined = {k: _joined([output[k] for output in outputs], rows, module, side, (*key, k)) for k in first}
        return joined if type(first) is dict else type(first)(**joined)
    if isinstance(first, tuple | list):
        columns = enumerate(zip(*outputs, strict=True))
        items = [_joined(list(column), rows, module, side, (*key, place)) for place, column in columns]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if all(output is first or (isinstance(first, int | float | str | bool) and output == first) for output in outputs):
        return first
    raise TargetError(
        f"{named(rows, module)} gives a {type(first).__name__}, which cannot be joined from groups of rows. Use these "
        "deltas one after the other: `adapted.using(name)`."
    )


def _joined_tensors(outputs: list[Tensor], rows: Rows, module: nn.Module, side: str | None) -> Tensor:
    if side == SHARED:
        if all(torch.equal(outputs[0], other) for other in outputs[1:]):
            return outputs[0]
        raise TargetError(
            f"{named(rows, module)} gives something of shape {tuple(outputs[0].shape)} for all rows, and it is not the "
            "same with these deltas. Use them one after the other: `adapted.using(name)`."
        )
    counts = [rows.ids.count(group) for group in range(len(rows.names))]
    most = max(counts)
    each = outputs[counts.index(most)].shape[0] // most if outputs[0].dim() else 0
    if not each or any(x.shape[:1] != (each * n,) for x, n in zip(outputs, counts, strict=True)):
        raise TargetError(
            f"{named(rows, module)} gives something of shape {tuple(outputs[0].shape)}, which has no part for each "
            "row. Use these deltas one after the other: `adapted.using(name)`."
        )
    if side is None and len(set(counts)) == 1:
        raise TargetError(
            f"{named(rows, module)} gives something of shape {tuple(outputs[0].shape)}, which may have a part for each "
            "row, or be the same for all: what was seen of this module does not tell. Use these deltas one after the "
            "other: `adapted.using(name)`."
        )
    shapes = {tuple(x.shape[1:]): name for x, name in zip(outputs, rows.names, strict=True)}
    if len(shapes) > 1:
        found = ", ".join(f"{shape} for {name!r}" for shape, name in shapes.items())
        raise TargetError(
            f"{named(rows, module)} gives rows of different shapes: {found}. Rows of one batch need heads of one "
            "size; use these deltas one after the other: `adapted.using(name)`."
        )
    divided = division(rows, each * len(rows.ids), outputs[0].device, module)
    return torch.cat(outputs).index_select(0, divided.inverse)


# --- on one product -----------------------------------------------------------------------------------------


def changed_rows(
    host: nn.Module,
    groups: Sequence[Acting],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    weight_and_bias: Callable[[], tuple[Tensor, Tensor | None]],
) -> Any:
    """What the deltas of each group make of its rows of the output.

    Args:
        host: called with ``args`` and ``kwargs``.
        groups: what acts.
        args: of the call.
        kwargs: of the call.
        output: of the base.
        weight_and_bias: the host's, for deltas that read them.

    Raises:
        TargetError: if what the host gets or gives has no part for each row.
    """
    if not any(group.activation for group in groups):
        return output
    pet: Any = host._modules[CHILD]
    _, rows = pet.rows()
    several = isinstance(output, tuple | list)
    tensor = output[0] if several else output
    value = args[0] if args else next(iter(kwargs.values()), None)
    own = cast(dict[str, Delta], pet._modules)
    deltas = [[own[key] for key in group.activation] for group in groups]
    slots = dict.fromkeys(delta.slot for group in deltas for delta in group if delta.slot is not None)
    taken = {slot: slot.take() for slot in slots}
    if tensor.shape[0] == 1 and is_shared(rows, host):
        tensor, value = _for_each(tensor, len(rows.ids)), _for_each(value, len(rows.ids))
    for x in (tensor, value, *taken.values()):
        if isinstance(x, Tensor):
            division(rows, x.shape[0] if x.dim() else 0, x.device, host)
    for form, column in _columns(deltas):
        read: list[Any] = [value if delta.slot is None else taken[delta.slot] for delta in column if delta is not None]
        alike = isinstance(read[0], Tensor) and all(x is read[0] for x in read)
        at_once = _at_once if form and alike and not rows.steady else None
        changed = at_once and at_once(form, column, rows, read[0], tensor, weight_and_bias)
        if changed is None:
            changed = _one_by_one(
                column, rows, host, dict(zip(_used(column), read, strict=True)), tensor, weight_and_bias
            )
        tensor = changed
    if not several:
        return tensor
    return (tensor, *output[1:]) if isinstance(output, tuple) else [tensor, *output[1:]]


Column = list[Delta | None]
"""A delta of every group of rows, or nothing."""


def _used(column: Column) -> list[int]:
    return [group for group, delta in enumerate(column) if delta is not None]


def _columns(deltas: Sequence[Sequence[Delta]]) -> list[tuple[Any, Column]]:
    """The deltas of all groups in columns of one form each: those of a group act in the order in which they are."""
    columns: list[tuple[Any, Column]] = []
    for number, group in enumerate(deltas):
        after = 0
        for delta in group:
            form = _form(delta)
            place = next((p for p in range(after, len(columns)) if columns[p][0] is form), len(columns))
            if place == len(columns):
                columns.append((form, [None] * len(deltas)))
            columns[place][1][number] = delta
            after = place + 1
    return columns


def _form(delta: Delta) -> Any:
    """What acts on rows of several deltas like this one at once; nothing if a call of it would do more than that."""
    hooked = delta._forward_pre_hooks or delta._forward_hooks  # a sharding engine gathers parameters there
    return None if hooked else _form_of(cast(Any, type(delta)))


@cache
def _form_of(kind: Any) -> Any:
    definers = [next((c for c in kind.__mro__ if name in vars(c)), object) for name in ("row_form", "forward")]
    known = issubclass(definers[0], definers[1])  # a subclass with another forward has another form, or none
    return getattr(kind, "row_form", None) if known else None


def _at_once(
    form: Any, column: Column, rows: Rows, x: Tensor, output: Tensor, host: Callable[[], tuple[Tensor, Tensor | None]]
) -> Tensor | None:
    """What the form makes of the output; of those rows alone that it acts on, if they are few."""
    used, batch = _used(column), len(rows.ids)
    changed: Tensor | None
    if 2 * sum(rows.ids.count(group) for group in used) >= batch:
        changed = form(column, row_ids(rows, output.device), x, output, host)
        return changed
    index, ids = _rows_of(rows, tuple(used), output.device)
    own, part = (t.reshape(batch, -1, *t.shape[1:]).index_select(0, index) for t in (x, output))
    changed = form([column[group] for group in used], ids, own.flatten(0, 1), part.flatten(0, 1), host)
    if changed is None:
        return None
    return output.reshape(batch, *part.shape[1:]).index_copy(0, index, changed.view_as(part)).view_as(output)


def _rows_of(rows: Rows, groups: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the rows of some groups are, and the number of each one's group among these."""
    if (groups, device) not in rows.known:
        index = [row for row, group in enumerate(rows.ids) if group in groups]
        ids = [groups.index(rows.ids[row]) for row in index]
        rows.known[groups, device] = (torch.tensor(index, device=device), torch.tensor(ids, device=device))
    found: tuple[Tensor, Tensor] = rows.known[groups, device]
    return found


def _one_by_one(
    column: Column,
    rows: Rows,
    host: nn.Module,
    read: Mapping[int, Any],
    output: Tensor,
    weight_and_bias: Callable[[], tuple[Tensor, Tensor | None]],
) -> Tensor:
    """What the delta of each group makes of its rows of the output."""
    divided, parts = division(rows, output.shape[0], output.device, host), []
    number = cast(Any, host._modules[CHILD]).rows()[0]
    for group, delta in enumerate(column):
        part = output if len(column) == 1 else output.index_select(0, divided.index[group])
        if delta is not None:
            x = read[group]
            if isinstance(x, Tensor) and len(column) > 1:
                x = x.index_select(0, division(rows, x.shape[0], x.device, host).index[group])
            with HERE.call.only(number, rows.parts[group]):  # whose rows these are: random numbers may be its own
                part = delta(x, part, *weight_and_bias()) if delta.reads_weight else delta(x, part)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, divided.inverse)


def generating(host: nn.Module, groups: Sequence[Acting], call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Generate with rows that use different deltas.

    Raises:
        TargetError: if deltas around ``generate`` cannot be told apart by rows.
    """
    if not any(group.generate for group in groups):
        return call(*args, **kwargs)
    form = around_form(host, [group._replace(around=group.generate) for group in groups])
    if form is None:
        raise TargetError(
            f"{type(host).__name__}: what deltas do around generate differs from row to row. Use these deltas one "
            "after the other: `adapted.using(name)`."
        )
    return form(call, args, kwargs)


def around_form(host: nn.Module, groups: Sequence[Acting]) -> Any:
    """What runs a call that deltas wrap for all groups at once, as ``form(call, args, kwargs)``, if there is such."""
    pet: Any = host._modules[CHILD]
    own = cast(dict[str, Delta], pet._modules)
    runs = []
    for form, column in _columns([[own[key] for key in group.around] for group in groups]):
        tensors = (p.device for delta in column if delta is not None for p in delta.parameters())
        ids = row_ids(pet.rows()[1], next(tensors, torch.device("cpu")))
        run = None if form is None or pet.rows()[1].steady else form(column, ids, pet)
        if run is None:
            return None
        runs.append(run)
    return partial(_run_around, runs)


def _run_around(runs: Sequence[Any], call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Each around those before it."""
    *inner, last = runs
    for run in inner:
        call = partial(_called, run, call)
    return last(call, args, kwargs)


def _called(run: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return run(call, args, kwargs)
