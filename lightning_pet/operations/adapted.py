"""The handle on an adapted model: switch off, merge, take out, read, write."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_pet.errors import DeltaFileError, PETError
from lightning_pet.insertion.commit import changed_buffers, commit, copy_in, undo
from lightning_pet.insertion.intact import check_intact, check_restorable
from lightning_pet.insertion.method import Method
from lightning_pet.insertion.prepare import is_shared, prepare
from lightning_pet.insertion.stand_in import switched_off
from lightning_pet.model.adaptation import Adaptation, adapted_roots, record_of
from lightning_pet.model.naming import named_tensors
from lightning_pet.model.outside import changed_outside, note_changed, outside_parameters
from lightning_pet.model.structure import Structure
from lightning_pet.operations.merging import merge_deltas
from lightning_pet.operations.plan import Plan, plan_of


class Adapted:
    """A model with its deltas.

    Args:
        model: what was adapted, or anything that contains it, such as the LightningModule after ``fit``.

    Attributes:
        root: the adapted root; the same object as before, with deltas as children of its layers.

    Raises:
        PETError: if nothing was applied, or to several models inside of this one.

    >>> import torch
    >>> from lightning_pet import LoRACallback, apply
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> adapted = apply(net, [LoRACallback(r=2, target_modules=["0"])])
    >>> sorted(adapted.state_dict())
    ['0.pet.lora_default.a', '0.pet.lora_default.b']
    >>> adapted
    Adapted(Sequential: lora on 1 place, trains 16 of 30 numbers)
    >>> with adapted.disabled():
    ...     _ = net(torch.ones(1, 4))  # the base model's output
    >>> adapted.remove()
    >>> sorted(net.state_dict())
    ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    def __init__(self, model: nn.Module) -> None:
        found = {"": model} if record_of(model) is not None else adapted_roots(model)
        if not found:
            raise PETError(
                f"nothing was applied to this {type(model).__name__}, nor to anything inside of it. Call "
                "lightning_pet.apply or load_delta, or fit it with a PET callback; if one of these was done, pass the "
                "module that it was done to, or one that contains it."
            )
        if len(found) > 1:
            raise PETError(
                f"{len(found)} models inside of this {type(model).__name__} were adapted, each on its own: "
                f"{', '.join(found)}. Pass the one that is meant."
            )
        (self.root,) = found.values()

    def __repr__(self) -> str:
        record, kind = record_of(self.root), type(self.root).__name__
        if record is None:
            return f"Adapted({kind}: merged or removed)"
        places = [(a, sum(not is_shared(target) for target in a.targets)) for a in record.applied]
        methods = ", ".join(f"{a.label} on {n} place{'s' * (n != 1)}" for a, n in places)
        plan, off = self.plan(), ", switched off now" if record.switch.is_off() else ""
        return f"Adapted({kind}: {methods}, trains {plan.trainable:,} of {plan.base:,} numbers{off})"

    @property
    def record(self) -> Adaptation:
        """What was applied, and under which names."""
        record = record_of(self.root)
        if record is None:
            raise PETError("the deltas of this model were merged or removed; apply or load them again.")
        return record

    def plan(self) -> Plan:
        """Every delta with its place and size; ``str(plan)`` is a table."""
        check_intact(self.root, self.record)
        return plan_of(self.root, self.record)

    def state_dict(self) -> dict[str, Tensor]:
        """The delta: its tensors, the trained base tensors (heads, biases), and what has changed besides.

        Besides: buffers, and parameters beside the base into which the user's code writes (an average of weights).

        Returns:
            References (not copies) by canonical name relative to the root.
        """
        check_intact(self.root, self.record)
        tensors = dict(named_tensors(self.root))
        names = (*self.record.delta_names, *self.record.trained_names)
        return {name: tensors[name].detach() for name in names} | {
            name: tensor.detach() for name, tensor in (changed_buffers(self.root) | changed_outside(self.root)).items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a delta in. The key set and every shape must fit exactly; otherwise nothing is changed.

        Buffers that are not among ``tensors`` are those of the base.

        Raises:
            DeltaFileError: (``mismatch``) naming missing, extra and misshapen tensors.
        """
        self.check_fit(tensors)
        copy_in(self.root, {name: self.record.originals[name] for name in changed_buffers(self.root)})
        copy_in(self.root, tensors)
        note_changed(self.root, tensors)

    def check_fit(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> None:
        """Raise what :meth:`load_state_dict` would raise.

        Args:
            tensors: the delta, whole.
            own: the root's tensors by name, in full shape, where an engine changed the shapes of its own.
        """
        own = dict(named_tensors(self.root)) if own is None else own
        required = {*self.record.delta_names, *self.record.trained_names}
        optional = {n for n, t in named_tensors(self.root) if not isinstance(t, nn.Parameter)} - required
        optional |= outside_parameters(self.root, self.record).keys()
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

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes what the base computed, bit for bit; for the calling thread only.

        Other threads go on with the deltas and with trained heads and biases. The values of the parameters stay: this
        thread reads the original ones. What forwards inside of the block do to buffers is forgotten at its end, where
        the deltas had changed them. Enter and leave the block in one thread, and do not ``await`` in between.
        """
        self._refuse_lost_originals("switched off")
        check_intact(self.root, self.record)
        with switched_off(self.root, self.record):
            yield

    def remove(self) -> None:
        """Take everything out: the model is bit for bit what it was, with its own parameter names."""
        self._refuse_lost_originals("removed")
        check_restorable(self.root, self.record)
        undo(self.root)

    def merge_(self, *, dequantize: bool = False) -> None:
        """Add every delta into its base weight and take it out; trained heads keep their trained values.

        Weights are changed in place, one after the other, after all of them were checked: no second copy is made.
        An interruption (Ctrl-C) waits until the last one is done.

        Args:
            dequantize: a layer whose weight is quantised becomes an ordinary linear layer with the dequantised
                weight plus its delta. Without this such a merge is refused: a quantised format cannot hold the sum.

        Raises:
            NotMergeableError: if any delta cannot be merged exactly; nothing is changed then.
        """
        check_intact(self.root, self.record)
        merge_deltas(self.root, dequantize)

    def _refuse_lost_originals(self, verb: str) -> None:
        lost = [n for n in self.record.trained_names if self.record.originals[n].is_meta]
        if lost:
            raise PETError(
                f"the delta cannot be {verb}: the original values of {lost[0]} were never in memory, because the "
                "model was on the meta device when the delta was inserted. Load the base model again."
            )


def adapt(root: nn.Module, methods: Sequence[Method], structure: Structure | None = None) -> Adapted:
    """Apply methods to a root whose structure is known. Plan, build, then mutate."""
    commit(root, prepare(root, methods, structure))
    return Adapted(root)
