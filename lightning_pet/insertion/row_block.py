"""Deltas for single rows of a batch, for one thread: what acts on which, and the values that go with it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor, nn

from lightning_pet.errors import TargetError
from lightning_pet.insertion.choice import LOCK
from lightning_pet.insertion.host import expose, is_swapped_by_others
from lightning_pet.insertion.row_guard import Manners
from lightning_pet.insertion.stand_in import belong, close, leaving_for, placed_values, places_of, wanted_by
from lightning_pet.layers.sharding import holds_parts
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.call import Rows
from lightning_pet.model.naming import named_modules


@contextmanager
def using_rows(root: nn.Module, record: Adaptation, names: Sequence[str | None], manners: Manners) -> Iterator[None]:
    """Within the block every row of a batch uses its own delta in this thread; ``None``: none.

    Args:
        root: what is adapted.
        record: its own.
        names: one per row.
        manners: what is known of how modules treat rows.

    Raises:
        TargetError: if the values of what was trained in place cannot be read side by side here.
    """
    switch = record.switch
    belong(root, record)
    groups = tuple(dict.fromkeys(names))
    tuples = [() if name is None else (name,) for name in groups]
    with ExitStack() as exposed:
        with LOCK:
            wanted = _wanted_by_each(root, record, groups)
            differing = {name for values in wanted for name in values}
            everything = differing | set(record.held_by(record.names))
            modules = named_modules(root, of_base=True)
            places, _ = places_of(modules, everything, aside=False)
            if differing and (holds_parts(root) or any(is_swapped_by_others(module) for module, _ in places)):
                raise TargetError(
                    f"an engine holds parts of {', '.join(sorted(differing)[:4])}, and every delta has values of its "
                    "own there: rows of one batch cannot read different ones. Use one after the other: `using(name)`."
                )
            parts = [record.selection(deltas) for deltas in tuples]
            for part, values in zip(parts, wanted, strict=True):
                part.values.update(placed_values(root, values) if values else {})
            paths = {id(module): path for path, module in modules.items()}
            ids = tuple(groups.index(name) for name in names)
            rows = Rows(groups, ids, tuple(parts), frozenset(differing), paths, manners)
            union = record.selection(tuple(name for name in groups if name is not None))
            for module, attributes in places:
                expose(module, attributes, switch, by_rows=True)
            block = exposed.enter_context(switch.using(replace(union, rows=rows)))
        try:
            with exposed:
                yield
        finally:
            for module, attributes in places:
                close(module, attributes, switch, block.made_a_graph)


def _wanted_by_each(root: nn.Module, record: Adaptation, groups: Sequence[str | None]) -> list[dict[str, Tensor]]:
    """What each delta would have in place of what the model holds; a look at the model for all that do not act now."""
    leaving: set[str] | None = None
    found = []
    for name in groups:
        if name is None or name in record.active:
            found.append(wanted_by(root, record, () if name is None else (name,)))
            continue
        leaving = leaving_for(root, record, (name,)) if leaving is None else leaving
        found.append({n: record.originals[n] for n in leaving} | record.values.get(name, {}))
    return found
