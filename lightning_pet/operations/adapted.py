"""The handle on an adapted model: which deltas act, switch off, merge, take out, read, write."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, PETError
from lightning_pet.exchange.source import read_source
from lightning_pet.insertion.checks import check_acting, check_intact, check_restorable, refuse_lost
from lightning_pet.insertion.choice import (
    activate,
    let_train,
    place,
    refuse_in_use,
    remove,
    remove_all,
    using,
    using_rows,
)
from lightning_pet.insertion.commit import check_sum, copy_in
from lightning_pet.insertion.prepare import is_shared
from lightning_pet.insertion.row_guard import check_rows, guarded
from lightning_pet.model.adaptation import Adaptation, adapted_roots, record_at, record_of
from lightning_pet.model.naming import check_known, tensors_at
from lightning_pet.model.outside import note_changed
from lightning_pet.operations.combining.in_model import combine
from lightning_pet.operations.combining.rules import Combination, How
from lightning_pet.operations.loading import load, replace_values
from lightning_pet.operations.merging import Merge, signals_wait
from lightning_pet.operations.plan import Plan, plan_of
from lightning_pet.operations.roots import base_of
from lightning_pet.operations.saved import changed_besides, check_fit, meant, save, tensors_of
from lightning_pet.store.reader import PathLike

# --- on one of the deltas -------------------------------------------------------------------------


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


def merge(root: nn.Module, deltas: tuple[str, ...], dequantize: bool = False) -> None:
    """Add deltas into the base weights and take them out; what they have trained in place becomes the base's."""
    record = record_at(root)
    before = record.active if not record.together else ()  # of those that train together none acts by itself
    staying = [name for name in record.names if name not in deltas]
    awake = [name for name in record.names if name not in record.waiting]
    place(root, deltas)  # what others have in place of the base's values is no part of the sum
    done = False
    try:
        checked = Merge(root, dequantize, deltas if staying else None)
        with signals_wait():
            checked.write()
            if staying:
                _become_base(root, record, tuple(name for name in before if name not in deltas))
                let_train(root, [name for name in awake if name in staying])
            done = True
    except BaseException:
        if not done:
            place(root, before)
            let_train(root, awake)
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


# --- on all of them -------------------------------------------------------------------------------


class Adapted(Mapping[str, OneDelta]):
    """A model with its deltas: a mapping from their names to each of them.

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
    >>> list(adapted), adapted.active
    (['default'], ('default',))
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

    # --- a mapping from names to deltas -----------------------------------------------------------

    def __getitem__(self, name: str) -> OneDelta:
        check_known((name,), self._names())
        return OneDelta(self.root, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __bool__(self) -> bool:
        return record_of(self.root) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapted) and other.root is self.root

    def __hash__(self) -> int:
        return hash((Adapted, id(self.root)))

    def _names(self) -> tuple[str, ...]:
        record = record_of(self.root)
        return () if record is None else record.names

    @property
    def active(self) -> tuple[str, ...]:
        """The deltas that act in the calling thread, in the order in which they do."""
        chosen = self.record.switch.chosen()
        return self.record.names if chosen is None else chosen.deltas

    def activate(self, *names: str) -> None:
        """Let these deltas act in this order (their sum), and no others; without names: the base. For all threads.

        Those that act are those that train, where somebody trains them. What they have trained in place (heads,
        biases, whole weights) is exchanged with them, bit for bit. Threads inside of a block of :meth:`using` or
        :meth:`disabled` go on with what they have chosen.

        Raises:
            ArgumentError: if there is no such delta, or two of them have each its own values for one tensor.
            TargetError: if two of them cannot act on one layer. In all cases nothing is changed.
        """
        try:
            activate(self.root, names)
        except KeyError:  # a host is gone; to look for that each time would cost more than switching
            check_intact(self.root, self.record)
            raise

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """Within the block these deltas act in this order, and no others, for the calling thread or task only.

        Other threads do not notice, and may use others at the same time; trained heads and biases are read with their
        delta, too. Enter and leave the block in one thread, and do not ``await`` in between.

        Raises:
            ArgumentError: as :meth:`activate`.
            TargetError: as :meth:`activate`.
        """
        record = self.record
        check_known(names, record.names)
        check_sum(record, names)
        if len(names) > 1:
            check_acting(self.root, names)
        if set(record.active) - set(names):
            refuse_lost(record, "switched off")
        check_intact(self.root, record)
        with using(self.root, record, names):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes what the base computed, bit for bit; for the calling thread only.

        Other threads go on with the deltas and with trained heads and biases. The values of the parameters stay: this
        thread reads the original ones. What forwards inside of the block do to buffers is forgotten at its end, where
        the deltas had changed them. Enter and leave the block in one thread, and do not ``await`` in between.
        """
        with self.using():
            yield

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block each row of a batch uses its own delta, for the calling thread only; ``None``: the base.

        One name per row of what the model is called with. What it makes of the batch inside (beams, windows, flattened
        tokens) follows by the batch-major rule: the first dimension of what a layer gets is a multiple k of the number
        of names, and each k consecutive entries belong to one row. Whether a model keeps to it, and which arguments
        all rows share, is looked at when rows are first asked for. Gradients reach each delta from its own rows.

        Raises:
            ArgumentError: if there is no such delta, or the names are no list.
            TargetError: for what cannot be told apart by rows, naming it; also from forwards inside of the block.

        >>> import torch
        >>> from lightning_pet import LoRACallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> adapted = apply(net, [LoRACallback(r=2, target_modules=["0"])])
        >>> with adapted.rows(["default", None, "default"]):
        ...     net(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        """
        with self._rows(names):
            yield

    @contextmanager
    def _rows(self, names: Sequence[str | None], every: Sequence[str] | None = None) -> Iterator[None]:
        """The same; ``every``: deltas that are called in this order in any case, also where they have no rows."""
        record = self.record
        check_rows(names, record)
        if set(record.active) - set(names):
            refuse_lost(record, "switched off")
        check_intact(self.root, record)
        with guarded(self.root, record, names) as manners, using_rows(self.root, record, names, manners, every):
            yield

    def load(
        self,
        name: str,
        source: PathLike,
        *,
        heads: bool = True,
        rename: Mapping[str, str] | None = None,
        base_check: str = "error",
        revision: str | None = None,
    ) -> OneDelta:
        """Load one more delta, beside those that are there; see :func:`lightning_pet.load_delta`."""
        load(self.root, source, base_check, name=name, heads=heads, rename=rename, revision=revision)
        return self[name]

    def replace(self, name: str, source: PathLike, *, base_check: str = "error") -> None:
        """Exchange the values of a delta in place for those of a file of the same methods, places and shapes.

        Nothing is compiled anew. A forward of another thread sees the values before it or those after it, whole: one
        that runs is waited for, and one that begins meanwhile waits. (Calls of a compiled model are not told apart:
        replace between them.)

        Raises:
            DeltaFileError: if the file has another form. The model is as it was then.
            BaseMismatchError: if it was trained on another base.
        """
        check_intact(self.root, self.record)
        replace_values(self.root, name, read_source(source, base_of(self.root), base_check, delta=name), base_check)

    def combine(
        self,
        name: str,
        weights: Mapping[str, float] | Sequence[str],
        method: How = "linear",
        *,
        rank: int | None = None,
        density: float | None = None,
        seed: int = 0,
    ) -> Combination:
        """Make one more delta of several: of the changes that they make to the base, not of their parameters.

        What can be had from the parameters alone is (LoRA of different ranks, (IA)³, averages of adapters, prefixes one
        behind the other), all else that merges through the change of each weight: DoRA, diff pruning, deltas of
        different methods, and TIES and DARE on heads and biases. Where no rank is asked for, the result of that is the
        change itself, dense or sparse. The result waits, as one more delta that is loaded does.

        Args:
            name: of the result.
            weights: a number for each delta, ``{"tone": 0.7, "topic": 0.3}``, negative to unlearn; or their names
                alone, for equal weights that sum to one.
            method: what to do; see :func:`lightning_pet.combine_deltas`.
            rank: of the result, where it is approximated (``"svd"``, ``"ties"``, …).
            density: share of entries that is kept; default: 0.2 for TIES, else 0.5.
            seed: of DARE.

        Returns:
            The error of the approximation, and the ranks.

        Raises:
            ArgumentError: if there is no such delta, there is one of this name, or what is asked for means nothing.
            DeltaFileError: if they cannot be combined.
            PETError: if an engine holds parts of the parameters. In all cases the model is as it was.
        """
        return combine(self.root, name, weights, method, rank, density, seed)

    # --- what is there ----------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Every delta with its place and size; ``str(plan)`` is a table."""
        check_intact(self.root, self.record)
        return plan_of(self.root, self.record)

    def save(self, path: PathLike, *, name: str | None = None, **options: Any) -> int:
        """Write a delta into a file; see :func:`lightning_pet.save_delta`."""
        return save(self.root, "", self.root, path, name=name, **options)

    def state_dict(self) -> dict[str, Tensor]:
        """The delta: its tensors, the trained base tensors (heads, biases), and what has changed besides.

        Besides: buffers, and parameters beside the base into which the user's code writes (an average of weights).

        Returns:
            References (not copies) by canonical name relative to the root.

        Raises:
            ArgumentError: if there are several, and not one of them alone trains: ``adapted[name].state_dict()``.
        """
        check_intact(self.root, self.record)
        return tensors_of(self.root, self.record, meant(self.record))

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a delta in. The key set and every shape must fit exactly; otherwise nothing is changed.

        Buffers that are not among ``tensors`` are those of the base.

        Raises:
            ArgumentError: if there are several deltas, and not one of them alone trains, or that one does not act.
            DeltaFileError: (``mismatch``) naming missing, extra and misshapen tensors.
        """
        record, delta = self.record, meant(self.record)
        if delta not in record.active:
            raise ArgumentError(f"the delta {delta!r} does not act: call activate({delta!r}) first.")
        self.check_fit(tensors)
        record.claims.pop(delta, None)
        changed = changed_besides(self.root, record, delta).keys() & record.originals.keys()
        copy_in(self.root, {name: record.originals[name] for name in changed})
        copy_in(self.root, tensors)
        note_changed(self.root, tensors)

    def check_fit(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> None:
        """Raise what :meth:`load_state_dict` would raise.

        Args:
            tensors: the delta, whole.
            own: the root's tensors by name, in full shape, where an engine changed the shapes of its own.
        """
        check_fit(self.root, self.record, (meant(self.record),), tensors, own)

    # --- out of the model -------------------------------------------------------------------------

    def remove(self) -> None:
        """Take everything out: the model is bit for bit what it was, with its own parameter names."""
        record = self.record
        refuse_lost(record, "removed")
        for name in record.names:
            refuse_in_use(record, name, "removed")
        check_restorable(self.root, record)
        remove_all(self.root)

    def merge_(self, *, dequantize: bool = False) -> None:
        """Add the delta into its base weights and take it out; trained heads keep their trained values.

        Of several, ``adapted[name].merge_()`` merges one.

        Weights are changed in place, one after the other, after all of them were checked: no second copy is made.
        An interruption (Ctrl-C) waits until the last one is done.

        Args:
            dequantize: a layer whose weight is quantised becomes an ordinary linear layer with the dequantised
                weight plus its delta. Without this such a merge is refused: a quantised format cannot hold the sum.

        Raises:
            ArgumentError: if there are several deltas.
            NotMergeableError: if any delta cannot be merged exactly; nothing is changed then.
        """
        record = self.record
        check_intact(self.root, record)
        if len(record.names) > 1:
            meant(Adaptation(applied=record.applied, waiting=dict.fromkeys(record.names, ())))
        refuse_in_use(record, record.names[0], "merged")
        merge(self.root, record.names, dequantize)
