"""What deltas that train together share: whatever changes beside the plan belongs to each of them."""

from torch import nn

from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.naming import tensors_at
from lightning_pet.model.outside import changed_buffers


def shared(root: nn.Module, record: Adaptation) -> tuple[str, ...]:
    """What changes beside the plan of deltas that train together, and belongs to each of them."""
    others = record.held_by(name for name in record.names if name not in record.together)
    beside = [name for name in record.trained_names if name not in record.trained_in_place]
    return tuple(n for n in dict.fromkeys((*beside, *changed_buffers(root))) if n not in others)


def part(root: nn.Module, record: Adaptation, stays: str) -> None:
    """Deltas that have trained together are ordinary ones from now on, of which one acts."""
    names = shared(root, record)
    present = tensors_at(root, names)
    for name in record.together:
        record.claims[name] = record.claims.get(name, frozenset()) | frozenset(present)
        if name != stays:
            record.values[name] = {n: tensor.detach().clone() for n, tensor in present.items()}
    record.together = ()
    record.act((stays,))
