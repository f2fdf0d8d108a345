"""The handle on one of the deltas of a model."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import PETError
from lightning_pet.insertion.checks import check_intact, check_restorable
from lightning_pet.insertion.choice import place, record_at, refuse_in_use, remove, remove_all, tensors_at
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.delta_names import check_known
from lightning_pet.operations.contents import tensors_of
from lightning_pet.operations.merging import Merge, signals_wait
from lightning_pet.operations.plan import Plan, plan_of
from lightning_pet.operations.saving import save
from lightning_pet.store.reader import PathLike


class OneDelta:
    """One delta of an adapted model: all that one file holds, under the name that it has in the model.

    Attributes:
        root: the adapted root.
        name: what it is called there.
    """

    def __init__(self, root: nn.Module, name: str) -> None:
        self.root, self.name = root, name

    def __repr__(self) -> str:
        if self.name not in record_at(self.root).names:
            return f"OneDelta({self.name!r}: removed)"
        methods = ", ".join(applied.label for applied in self.record.applied)
        return f"OneDelta({self.name!r}: {methods}, {'acts' if self.acts else 'does not act'})"

    @property
    def record(self) -> Adaptation:
        """What was applied, as far as it belongs to this delta."""
        record = record_at(self.root)
        check_known((self.name,), record.names)
        return record.of(self.name)

    @property
    def acts(self) -> bool:
        """Whether it acts in the calling thread."""
        record = record_at(self.root)
        chosen = record.switch.chosen()
        return self.name in (record.names if chosen is None else chosen.deltas)

    @property
    def beside(self) -> tuple[str, ...]:
        """The deltas that acted beside it when it was trained, as they were called there."""
        return tuple(record_at(self.root).beside.get(self.name, ()))

    def plan(self) -> Plan:
        """Its places and sizes; ``str(plan)`` is a table."""
        return plan_of(self.root, self.record)

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by canonical name relative to the root; see :meth:`Adapted.state_dict`."""
        check_known((self.name,), record_at(self.root).names)
        return tensors_of(self.root, record_at(self.root), self.name)

    def save(self, path: PathLike, **options: Any) -> int:
        """Write it into a file, as :func:`lightning_pet.save_delta` does; returns the bytes written."""
        return save(self.root, "", self.root, path, name=self.name, **options)

    def remove(self) -> None:
        """Take it out; what other deltas compute stays, bit for bit.

        Raises:
            PETError: if a block of some thread uses it.
        """
        record = record_at(self.root)
        check_known((self.name,), record.names)
        refuse_in_use(record, self.name, "removed")
        refuse_lost(self.record, "removed")
        if len(record.names) == 1:
            check_restorable(self.root, record)
            remove_all(self.root)
        else:
            remove(self.root, self.name)

    def merge_(self, *, dequantize: bool = False) -> None:
        """Add it into the base weights and take it out; see :meth:`Adapted.merge_`.

        Other deltas stay. They were trained on the base without this one, which is said once.
        """
        record = record_at(self.root)
        check_known((self.name,), record.names)
        refuse_in_use(record, self.name, "merged")
        check_intact(self.root, record)
        merge(self.root, (self.name,), dequantize)


def refuse_lost(record: Adaptation, verb: str) -> None:
    """Refuse what needs the original values of tensors that never had any in memory.

    Raises:
        PETError: naming one.
    """
    lost = [name for name in record.trained_names if record.originals[name].is_meta]
    if lost:
        raise PETError(
            f"the delta cannot be {verb}: the original values of {lost[0]} were never in memory, because the "
            "model was on the meta device when the delta was inserted. Load the base model again."
        )


def merge(root: nn.Module, deltas: tuple[str, ...], dequantize: bool = False) -> None:
    """Add deltas into the base weights and take them out; what they have trained in place becomes the base's."""
    record = record_at(root)
    before, staying = record.active, [name for name in record.names if name not in deltas]
    place(root, deltas)  # what others have in place of the base's values is no part of the sum
    done = False
    try:
        checked = Merge(root, dequantize, deltas if staying else None)
        with signals_wait():
            checked.write()
            if staying:
                _become_base(root, record, tuple(name for name in before if name not in deltas))
            done = True
    except BaseException:
        if not done:
            place(root, before)
        raise
    if staying:
        rank_zero_warn(
            f"{', '.join(map(repr, deltas))} is a part of the base now. {', '.join(map(repr, staying))} stayed in the "
            "model: trained on the base without it, and, when saved from now on, saved as deltas of this one."
        )


def _become_base(root: nn.Module, record: Adaptation, active: tuple[str, ...]) -> None:
    """Let those that stay be deltas of the base as it is after a merge."""
    now = tensors_at(root, record.originals)
    record.originals.update({name: tensor.detach().to("cpu", copy=True) for name, tensor in now.items()})
    place(root, active)
