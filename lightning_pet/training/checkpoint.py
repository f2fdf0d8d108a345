"""What a run's checkpoints hold, and the checks before one is used: the rules behind the strategy adapter."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_pet.errors import DeltaFileError, OptimizerMismatchError, PETError
from lightning_pet.insertion.commit import take_forms
from lightning_pet.layers.delta import Excerpt
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.naming import canonical, join, named_tensors, split_below
from lightning_pet.model.outside import note_changed, outside_parameters
from lightning_pet.operations.saved import base_fingerprint, changed_besides, check_base, check_fit, check_methods
from lightning_pet.store.entry import KEY, MARK, check_tensors, make_entry, read_entry, saved_fingerprint
from lightning_pet.store.manifest import Fingerprint
from lightning_pet.strategies import optimizers as optim
from lightning_pet.strategies.plain import make_plain, seal
from lightning_pet.strategies.strategy import Named
from lightning_pet.training.resume import ExactResume
from lightning_pet.training.state_excerpts import (
    as_held,
    as_stored,
    excerpts_of,
    held_schedule,
    held_states,
    stored_names,
    stored_schedule,
    stored_states,
)
from lightning_pet.training.watch import Run, Watch

_STATES = ("state_dict", "current_model_state")  # the second is of averaging callbacks


class SavedRun(Run, Protocol):
    """A run that checkpoints are written of."""

    resume: ExactResume
    watch: Watch

    @property
    def record(self) -> Adaptation:
        """What was applied, as far as it belongs to this run."""
        ...

    @property
    def base_check(self) -> str:
        """What to do about another base model: ``"error"``, ``"warn"`` or ``"off"``."""
        ...


class Checkpoints:
    """Delta-only checkpoints of one run; see :class:`~lightning_pet.strategies.strategy.CheckpointRules`."""

    def __init__(self, run: SavedRun) -> None:
        self._run = run
        self._base: tuple[frozenset[str], Fingerprint] | None = None
        self._optimizer_names: Any = None
        self._optimizer_classes: Any = None
        self._from_file: Iterable[str] = ()  # of the adapted root, before the state dict was completed

    # --- saving ---------------------------------------------------------------------------------

    def parts(self) -> dict[str, Tensor]:
        """The module's own tensors of which a checkpoint holds something: the delta, what trains, what has changed."""
        wanted = self._wanted()
        return {name: tensor for name, tensor in named_tensors(self._run.module) if name in wanted}

    def stored(self, named: Named) -> Named:
        """What a checkpoint holds of these tensors, which are whole."""
        return as_stored(named, self._excerpts())

    def _excerpts(self) -> dict[str, Excerpt | None]:
        return excerpts_of(self._run.adapted.root, self._run.root_path)

    def keep(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Only the delta, trained base parameters, and what training changed besides.

        Raises:
            PETError: if a part of the delta is not in ``state``.
        """
        excerpts = self._excerpts()
        required, wanted = (self._stored_names(names, excerpts) for names in (self._required(), self._wanted()))
        kept = {name: value for key, value in state.items() if (name := canonical(key)) in wanted}
        if absent := sorted(required - kept.keys()):
            raise PETError(
                f"{len(absent)} tensors of the delta are not in the state of {type(self._run.module).__name__} that is "
                f"to be saved: {', '.join(absent[:4])}. Its state_dict, or a hook on it, leaves them out."
            )
        return kept

    def _full(self, names: Iterable[str]) -> list[str]:
        """Names from the root as names from the module."""
        path = self._run.root_path
        return [join(path, name) for name in names]

    def _required(self) -> set[str]:
        record = self._run.record
        return set(self._full((*record.delta_names, *record.trained_names)))

    def _stored_names(self, names: set[str], excerpts: Mapping[str, Excerpt | None]) -> set[str]:
        return (names - excerpts.keys()) | {e.name for n, e in excerpts.items() if e is not None and n in names}

    def _wanted(self) -> set[str]:
        return {*self._required(), *self._full(self._changed()), *self._beside_root()}

    def _changed(self) -> set[str]:
        """What has changed besides the delta and is saved: buffers, and parameters beside the base."""
        return self._run.adapter.anywhere(set(self._changed_here()))

    def _changed_here(self) -> dict[str, Tensor]:
        adapted = self._run.adapted
        found = (changed_besides(adapted.root, adapted.record, delta) for delta in self._run.record.names)
        return {name: tensor for own in found for name, tensor in own.items()}

    def _beside_root(self) -> set[str]:
        # Buffers of metrics and losses beside the root are few and small.
        mine = {id(tensor) for _, tensor in named_tensors(self._run.adapted.root)}
        return {name for name, tensor in named_tensors(self._run.module) if id(tensor) not in mine}

    def before_save(self, checkpoint: dict[str, Any]) -> None:
        """Filter once more (averaging callbacks put full states in), and add the entry. Runs on every rank."""
        run = self._run
        run.watch.check(f"before a save at step {run.trainer.global_step}")
        for key in _STATES:
            if key in checkpoint:
                checkpoint[key] = self.keep(checkpoint[key])
        left_out = make_plain(checkpoint)
        seal(checkpoint)
        record = run.record
        written = checkpoint["state_dict"] if run.trainer.is_global_zero else {}
        entry = make_entry(record, run.root_path, self._fingerprint(frozenset(self._changed())), written)
        if "optimizer_states" in checkpoint:
            entry["optimizers"] = self._store_optimizers(checkpoint)
            entry["optimizer_classes"] = run.adapter.class_names()
        if "loops" in checkpoint and run.trainer.state.fn == TrainerFn.FITTING:
            entry["resume"] = run.resume.state(run.trainer)
        if left_out:
            entry["left_out"] = left_out
        checkpoint[KEY] = entry
        if record.delta_names or record.flags.keys() - set(record.trained_names):
            checkpoint["state_dict"] = {MARK: torch.empty(0), **checkpoint["state_dict"]}

    def _store_optimizers(self, checkpoint: dict[str, Any]) -> list[list[list[str]]]:
        """Let the states be those of the tensors that the checkpoint holds; return their names."""
        names, excerpts = self._run.adapter.parameter_names(self._run.module), self._excerpts()
        if not excerpts:
            return names
        checkpoint["optimizer_states"] = stored_states(checkpoint["optimizer_states"], names, excerpts, self._shapes())
        checkpoint["lr_schedulers"] = [
            stored_schedule(state, names[index], excerpts)
            for state, (index, _) in zip(checkpoint["lr_schedulers"], self._schedulers(), strict=True)
        ]
        return stored_names(names, excerpts)

    def _schedulers(self) -> list[tuple[int, Any]]:
        """Schedulers, each with the position of its optimizer."""
        optimizers = [id(optimizer) for optimizer in self._run.adapter.optimizers()]
        schedulers = [config.scheduler for config in self._run.trainer.lr_scheduler_configs]
        places = {number: position for position, number in enumerate(optimizers)}  # an engine has one of its own
        return [(places.get(id(scheduler.optimizer), 0), scheduler) for scheduler in schedulers]

    def _shapes(self) -> dict[str, Tensor]:
        return self._run.adapter.shaped(named_tensors(self._run.module))

    def _fingerprint(self, saved: frozenset[str]) -> Fingerprint:
        # The base is frozen, so once is enough, until more beside it has changed and is saved.
        if self._base is None or self._base[0] != saved:
            adapted, whole = self._run.adapted, self._run.adapter.whole
            exact = self._run.base_check == "exact"
            self._base = saved, base_fingerprint(adapted.root, self._run.record, saved, exact, whole)
        return self._base[1]

    def new_run(self) -> None:
        """Forget what was true of the last run only."""
        self._base = self._optimizer_names = None

    # --- loading --------------------------------------------------------------------------------

    def after_load(self, checkpoint: dict[str, Any], path: object) -> None:
        """Refuse whatever does not fit this run, before anything of it is used."""
        run = self._run
        adapted = run.adapted
        entry = read_entry(checkpoint, path)
        check_methods(entry, run.record, path)
        check_tensors(checkpoint, entry, path)
        saved, whole = saved_fingerprint(entry, path), run.adapter.whole
        held = run.adapter.is_wrapped(adapted.root)
        undo = take_forms(adapted.root, self._split(checkpoint["state_dict"])[0], held=held)
        try:
            for key in _STATES:
                if key in checkpoint:
                    self._check_fit(checkpoint[key], path)
            stored = [*run.record.trained_names, *self._split(checkpoint["state_dict"])[0]]
            check_base(saved, adapted.root, adapted.record, path, run.base_check, stored, whole)
        except BaseException:
            undo()
            raise
        if "resume" in entry and run.trainer.state.fn == TrainerFn.FITTING:
            run.resume.load_state(entry["resume"])
        self._from_file = self._split(checkpoint["state_dict"])[0].keys()
        self._optimizer_names, self._optimizer_classes = entry.get("optimizers"), entry.get("optimizer_classes")
        for key in _STATES:
            if key in checkpoint and not run.adapter.shards:
                checkpoint[key] = self._completed(checkpoint[key])

    def _split(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The part of the adapted root under its own names, and the rest."""
        return split_below({canonical(name): value for name, value in state.items()}, self._run.root_path)

    def _check_fit(self, state: Mapping[str, Any], path: object) -> None:
        inside, outside = self._split(state)
        own = self._shapes()
        allowed = self._beside_root()
        for name, value in outside.items():
            if name not in allowed or own[name].shape != value.shape:
                raise DeltaFileError(
                    f"{path}: {name} of shape {tuple(value.shape)} is no tensor that {type(self._run.module).__name__} "
                    "has beside its delta. Resume with the module that wrote it.",
                    "mismatch",
                )
        try:
            self._check_inside(as_held(self._run.adapted.root, inside), own)
        except DeltaFileError as error:
            raise DeltaFileError(f"{path}: {error}", error.code) from None

    def _check_inside(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        adapted = self._run.adapted
        check_fit(adapted.root, adapted.record, self._run.record.names, tensors, self._split(own)[0])

    def _completed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict of the whole module: hooks and averaging callbacks load it strictly.

        The base is in it by reference.
        """
        run = self._run
        saved = {canonical(name): value for name, value in state.items()}
        own = dict(named_tensors(run.module))
        # By identity: a tied tensor is saved under one of its names.
        by_identity = {id(own[name]): value for name, value in saved.items()}
        full = run.module.state_dict()
        return {
            name: by_identity.get(id(own[canonical(name)]), value) if canonical(name) in own else value
            for name, value in full.items()
        }

    def load_model(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy the tensors of a checked checkpoint in; buffers that are not in it are those of the base."""
        run = self._run
        inside, state = self._split(checkpoint["state_dict"])
        held = as_held(run.adapted.root, inside)
        state |= zip(self._full(held), held.values(), strict=True)
        own = list(named_tensors(run.module))
        besides = outside_parameters(run.adapted.root, run.adapted.record)
        wanted = {*self._required(), *self._beside_root(), *self._full(besides)}
        wanted |= {name for name, tensor in own if not isinstance(tensor, nn.Parameter)}
        found = {name: value for name, value in state.items() if name in wanted}
        self._check_inside(
            self._split(found)[0], run.adapter.shaped(own)
        )  # once more: on_load_checkpoint of the user came between
        originals = run.adapted.record.originals
        changed = [name for name in self._changed_here() if name in originals]
        run.adapter.fill(own, dict(zip(self._full(changed), [originals[name] for name in changed], strict=True)))
        note_changed(run.adapted.root, self._from_file)
        run.adapter.fill(own, found)  # in a second turn: a completed state refers to the very buffers

    def before_optimizers(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """Saved optimizer states belong to names, not to positions."""
        if self._optimizer_names is None:
            return checkpoint
        run = self._run
        names, classes = run.adapter.parameter_names(run.module), run.adapter.class_names()
        if len(classes) == len(self._optimizer_names) and classes != self._optimizer_classes:
            raise OptimizerMismatchError(
                f"The checkpoint was written with {self._optimizer_classes}, this run has {classes}: the state of one "
                "is none of the other. Resume with the optimizer of the checkpoint, or start a new run with start_from."
            )
        excerpts = self._excerpts()
        stored = stored_names(names, excerpts) if excerpts else names
        states = optim.reorder_state(checkpoint["optimizer_states"], self._optimizer_names, stored)
        if not excerpts:
            return {**checkpoint, "optimizer_states": states}
        schedules = [
            held_schedule(state, scheduler.state_dict(), names[index], excerpts)
            for state, (index, scheduler) in zip(checkpoint["lr_schedulers"], self._schedulers(), strict=True)
        ]
        states = held_states(states, names, excerpts, self._shapes())
        return {**checkpoint, "optimizer_states": states, "lr_schedulers": schedules}
