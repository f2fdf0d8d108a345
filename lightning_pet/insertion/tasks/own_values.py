"""Heads, biases and whole weights of deltas that train together: a parameter for each delta and tensor.

Methods name tensors of the base that train as they are. Where several deltas train in one run, these become weight
deltas (:class:`~lightning_pet.layers.value.Value`) of a method of the machinery's own, one for each delta. Files do
not know of it: there the values have the names of the tensors in whose place they are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_pet.errors import TargetError
from lightning_pet.insertion.method import Insertion, delta_name, suffix_of
from lightning_pet.layers.delta import Tied
from lightning_pet.layers.sharding import is_sharded
from lightning_pet.layers.value import Value
from lightning_pet.model.adaptation import Adaptation, Applied
from lightning_pet.model.naming import VALUE, join, named_parameters
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.heads import HEAD
from lightning_pet.targets.targets import seen_reader


@dataclass(frozen=True)
class OwnValues:
    """The method; see :class:`~lightning_pet.insertion.method.Method`, of which it has what inserting asks for."""

    delta: str
    method: ClassVar[str] = VALUE
    name: ClassVar[str] = "default"

    def config_at(self, targets: Sequence[Target]) -> dict[str, Any]:
        """It has no options."""
        return {}


def wants_own_values(method: Any) -> bool:
    """Whether a method is one of several that train tensors of the base side by side."""
    return bool(getattr(method, "own_values", False))


@contextmanager
def started(method: Any, states: dict[str, Any]) -> Iterator[None]:
    """Within the block random numbers are those of a delta's own seed, if it has one: one sequence for its methods.

    Args:
        method: of the delta.
        states: where the sequence of each delta stands; kept from one method to the next.
    """
    stream: Any = getattr(method, "stream", None)
    if stream is not None:  # of a run that goes on drawing from it
        with stream.drawing([torch.device("cpu")]):
            yield
        return
    seed: int | None = getattr(method, "start_seed", None)
    if seed is None:
        yield
        return
    delta = delta_name(method)
    with torch.random.fork_rng():
        if delta in states:
            torch.set_rng_state(states[delta])
        else:
            torch.manual_seed(seed)
        yield
        states[delta] = torch.get_rng_state()


def insertions_for(
    root: nn.Module,
    names: Iterable[str],
    targets: Sequence[Target],
    structure: Structure | None,
    outputs: int | None = None,
) -> tuple[list[Insertion], list[str | None]]:
    """Values in the place of these tensors, with the modules that read them.

    Args:
        root: the adapted root.
        names: of tensors of the base.
        targets: places of the methods, heads among them.
        structure: what is known of the model.
        outputs: number of labels of this delta's head.

    Raises:
        TargetError: if the head with this number cannot be told, or an engine has split a tensor.
    """
    names = tuple(dict.fromkeys(names))
    every = named_parameters(root, every_name=True)
    parameters = dict(every)
    heads = tuple(target.module for target in targets if target.role == HEAD)
    sized = _output_of(names, parameters, heads) if outputs is not None else frozenset()
    found: list[Insertion] = []
    for name in names:
        parameter = parameters[name]
        if is_sharded(parameter):
            raise TargetError(
                f"{name}: each task has its own, and fully_shard has split it already. Build the model in __init__ and "
                "call fully_shard in configure_model, after the deltas are in; or leave it out (modules_to_save=[])."
            )
        same = [name, *(other for other, p in every if p is parameter and other != name)]
        own: Value | None = None
        for each in same:
            path, _, attribute = each.rpartition(".")
            place = Target(path, attribute, HEAD if any(_inside(path, head) for head in heads) else None)
            target = replace(place, reads=seen_reader(root, place, structure))
            delta = Value(parameter, outputs if name in sized else None) if own is None else Tied(own)
            found.append(Insertion(target, delta, suffix_of(target)))
            own = own or delta  # type: ignore[assignment]
    return found, [insertion.target.reads for insertion in found]


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _output_of(names: Sequence[str], parameters: Mapping[str, Tensor], heads: Sequence[str]) -> frozenset[str]:
    """The tensors that have as many rows as there are labels: the matrix that comes last, and its bias.

    Raises:
        TargetError: if there is none.
    """
    own = [n for n in names if not heads or any(_inside(n.rpartition(".")[0], head) for head in heads)]
    matrices = [name for name in own if parameters[name].dim() > 1]
    if not matrices:
        raise TargetError(
            "labels: no head trains in this run that is a task's own (what lies beside the base is shared by all). "
            "Name it in modules_to_save of the PET callback."
        )
    last = matrices[-1]
    path, rows = last.rpartition(".")[0], parameters[last].shape[0]
    return frozenset(name for name in own if name.rpartition(".")[0] == path and parameters[name].shape[:1] == (rows,))


# --- as files have it -----------------------------------------------------------------------------------


def is_own(applied: Applied) -> bool:
    """Whether this is no method of the user's, but holds values of tensors of the base."""
    return applied.method == VALUE


def as_own(tensors: Mapping[str, Tensor], record: Adaptation) -> dict[str, Tensor]:
    """What a file holds of one delta, with the names of the values that it has in place of tensors of the base."""
    places = [(target.path, join(path, VALUE)) for applied, target, path in record.places() if is_own(applied)]
    names = {base: name for base, name in places if name in set(record.delta_names)}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def own_places(record: Adaptation) -> set[str]:
    """Names of the tensors of the base in whose place deltas have values of their own."""
    return {target.path for applied in record.applied if is_own(applied) for target in applied.targets}
