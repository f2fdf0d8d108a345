"""Deltas that train fewer numbers than their parameters have, and files that hold these numbers only.

An engine that shards keeps every parameter it was given until the run ends. A delta that needs fewer entries from
some step on says which (:attr:`~lightning_pet.layers.delta.Delta.excerpts`), and files hold what they would hold
if the parameters had been exchanged.
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from lightning_pet.layers.delta import Delta, Excerpt
from lightning_pet.model.adaptation import record_of
from lightning_pet.model.naming import by_delta, join


def excerpts_of(root: nn.Module, prefix: str = "") -> dict[str, Excerpt | None]:
    """The parameters of which files hold an excerpt, or nothing, by name.

    Args:
        root: the adapted root.
        prefix: put before every name.
    """
    return {
        join(prefix, path, name): excerpt and excerpt._replace(name=join(prefix, path, excerpt.name))
        for path, own in [(path, delta.excerpts) for path, delta in _deltas(root)]
        for name, excerpt in own.items()
    }


def as_stored(
    named: Iterable[tuple[str, Tensor]], excerpts: Mapping[str, Excerpt | None]
) -> Iterator[tuple[str, Tensor]]:
    """Take the excerpts of whole tensors, under the names that they have in files."""
    for name, tensor in named:
        excerpt = excerpts.get(name)
        if excerpt is not None:
            yield excerpt.name, tensor.detach().reshape(-1)[excerpt.places.to(tensor.device).long()]
        elif name not in excerpts:
            yield name, tensor


def as_held(root: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite: what the parameters are when a file holds these tensors, by name from the root."""
    groups = by_delta(tensors)
    for path, delta in _deltas(root):
        if delta.excerpts:
            groups[path] = dict(delta.spread(groups.get(path, {})))
    return {join(path, name): tensor for path, own in groups.items() for name, tensor in own.items()}


def _deltas(root: nn.Module) -> list[tuple[str, Delta]]:
    record = record_of(root)
    return [(found.path, found.delta) for found in record.deltas(root, pass_over_gone=True)] if record else []
