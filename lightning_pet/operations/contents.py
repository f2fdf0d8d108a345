"""What belongs to one delta of a model: its tensors as the model holds them, and as files do."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.insertion.choice import tensors_at
from lightning_pet.insertion.commit import changed_buffers
from lightning_pet.insertion.tasks.own_values import as_base_names
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.delta_names import check_known, delta_of, in_file
from lightning_pet.model.naming import join, named_tensors
from lightning_pet.model.outside import changed_outside, outside_parameters


def meant(record: Adaptation, name: str | None = None) -> str:
    """The delta that is meant: that of this name; without one, the only one there is, or that trains.

    Raises:
        ArgumentError: if there is none of this name, or several may be meant.
    """
    if name is not None:
        check_known((name,), record.names)
        return name
    for names in (record.names, [name for name in record.names if name not in record.waiting]):
        if len(names) == 1:
            return names[0]
    raise ArgumentError(
        f"this model has the deltas {', '.join(map(repr, record.names))}; say which one is meant: adapted[name], or "
        "name=…."
    )


def tensors_of(root: nn.Module, record: Adaptation, delta: str) -> dict[str, Tensor]:
    """The tensors of a delta, what it has of its own in place of the base's, and what has changed besides.

    Returns:
        References (not copies) by canonical name relative to the root.
    """
    own = [name for name in record.delta_names if delta_of(name) == delta]
    if delta in record.values:
        found = {name: tensor.detach() for name, tensor in tensors_at(root, own).items()}
        return found | record.values[delta]
    base = [name for name in record.of(delta).trained_names if name not in record.claims.get(delta, ())]
    tensors = dict(named_tensors(root))
    found = {name: tensors[name].detach() for name in (*own, *base)}
    return found | {name: tensor.detach() for name, tensor in changed_besides(root, record, delta).items()}


def changed_besides(root: nn.Module, record: Adaptation, delta: str) -> dict[str, Tensor]:
    """Buffers, and parameters beside the base, that have changed under an active delta, or that it has brought."""
    changed: dict[str, Tensor] = {**changed_buffers(root), **changed_outside(root)}
    mine = record.claims.get(delta, frozenset())
    others = record.held_by(name for name in record.names if name not in (delta, *record.together))
    keeps = delta == record.keeper or delta in record.together
    found = {name: t for name, t in changed.items() if name in mine or (keeps and name not in others)}
    return found | tensors_at(root, mine - found.keys())


def packed(root: nn.Module, record: Adaptation, delta: str) -> dict[str, Tensor]:
    """A delta as files hold it: each part in its own form and under its own name, and what trains of the base."""
    tensors = {name: t for name, t in tensors_of(root, record, delta).items() if delta_of(name) is None}
    for inserted in record.of(delta).deltas(root):
        tensors |= {join(inserted.path, name): tensor for name, tensor in inserted.delta.packed().items()}
    return in_file(as_base_names(tensors))


def check_fit(
    root: nn.Module,
    record: Adaptation,
    deltas: Iterable[str],
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None = None,
) -> None:
    """The key set and every shape must be those of some deltas.

    Args:
        root: the adapted root.
        record: of it.
        deltas: their names.
        tensors: all of them, whole, by name from the root.
        own: the root's tensors by name, in full shape, where an engine changed the shapes of its own.

    Raises:
        DeltaFileError: (``mismatch``) naming missing, extra and misshapen tensors.
    """
    own = dict(named_tensors(root)) if own is None else own
    view = record.of(*deltas)
    required = {*view.delta_names, *view.trained_names}
    optional = {n for n, t in named_tensors(root) if not isinstance(t, nn.Parameter)} - {*record.delta_names}
    optional |= outside_parameters(root, record).keys()
    problems = [f"missing {name}" for name in sorted(required - set(tensors))]
    problems += [f"unexpected {name}" for name in sorted(set(tensors) - required - optional)]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise DeltaFileError(
            f"the delta does not fit the model: {shown}. Apply the same methods with the same "
            "arguments that the delta was trained with, to the same kind of model.",
            "mismatch",
        )
