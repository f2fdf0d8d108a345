"""Whether a model takes rows with prompts of different lengths: hidden columns in front of the shorter ones.

It is tried out: the module that takes the ids is called with hidden columns and without, on what it gets in a forward
of a random batch. What stands behind them has to come out as before, whether the module is told positions or counts
them itself.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.insertion.prompt import PromptCall
from lightning_pet.insertion.prompt_columns import POSITIONS, RowColumns, cut, extended
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.call import HERE, Selection
from lightning_pet.model.naming import module_at
from lightning_pet.probe.row_leaves import Leaves, close, tensors_in
from lightning_pet.probe.trace import candidate_inputs, random_batch

_ROWS, _TOKENS, _HIDDEN = 3, 7, 2


def learn_padding(root: nn.Module, record: Adaptation, names: Any, told: dict[str, bool]) -> None:
    """Look at the modules that take ids, if the rows' prompts differ in length.

    Args:
        root: the adapted root.
        record: its own.
        names: of the rows' deltas.
        told: what is known; more is added.

    Raises:
        TargetError: naming a module that does not take hidden columns.
    """
    wanted = [name for name in dict.fromkeys(names) if name is not None]
    consumers: dict[str, dict[str, Any]] = {}
    for inserted in record.of(*wanted).deltas(root):
        if inserted.target.role == "prompt.call":
            consumers.setdefault(inserted.target.module, {})[inserted.method.delta] = inserted.delta
    for path, calls in consumers.items():
        lengths = {name: calls[name].length if name in calls else 0 for name in dict.fromkeys(names)}
        if len(set(lengths.values())) == 1 or path in told:
            continue
        found = _padded(root, record, path, next(iter(calls.values())))
        if found is None:
            shown = ", ".join(f"{name!r}: {length}" for name, length in lengths.items())
            raise TargetError(
                f"rows with prompts of different lengths ({shown}) need hidden columns in front of the shorter ones, "
                f"and {path!r} was not seen to compute the same with them (a model that looks at its first column, for "
                "one, does not). Use these deltas one after the other: `adapted.using(name)`."
            )
        told[path] = found


def _padded(root: nn.Module, record: Adaptation, path: str, call: PromptCall) -> bool | None:
    """Whether positions have to be told; ``None``: hidden columns change what comes out, or nobody knows."""
    consumer = module_at(root, path)
    with HERE.call.only(record.switch.number, Selection()), torch.no_grad():
        for arguments in candidate_inputs(root):
            with suppress(Exception):  # these are no inputs of this model
                given, expected = _call_of(root, consumer, call, random_batch(arguments, _ROWS, _TOKENS, 0))
                for telling in (True, False):
                    if telling and POSITIONS[0] not in call.names:
                        continue
                    with suppress(Exception):
                        if _agrees(consumer, call, given, expected, telling):
                            return telling
                return None
    return None


def _call_of(root: nn.Module, consumer: nn.Module, call: PromptCall, batch: dict[str, Any]) -> Any:
    """What a module gets in a forward of its root, by name, and the tensors that it gives."""
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = {**dict(zip(call.names, args, strict=False)), **kwargs}
        seen.append((given, tensors_in({"gives": output})))

    handle = consumer.register_forward_hook(note, with_kwargs=True)
    try:
        root(**batch)
    finally:
        handle.remove()
    return seen[0]


def _agrees(consumer: nn.Module, call: PromptCall, given: Any, expected: Leaves, telling: bool) -> bool:
    ids = given[call.ids_name]
    nothing = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
    columns = RowColumns(nothing, nothing, telling, call.filler)
    columns.length, columns.hides, columns.told = _HIDDEN, True, telling
    batch, size = ids.shape
    output = consumer(**extended(given, columns, call.ids_name, batch, size, None, None))
    found = tensors_in({"gives": cut(output, _HIDDEN, batch, size)})
    return found.keys() == expected.keys() and all(
        found[key].shape == x.shape and close(found[key], x) for key, x in expected.items()
    )
