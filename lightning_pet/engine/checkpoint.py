"""What a run's checkpoints hold, and the checks before one is used: the rules behind the strategy adapter."""

from collections.abc import Mapping
from typing import Any, Protocol

import lightning.pytorch as pl

from lightning_pet.core.adaptation import changed_buffers
from lightning_pet.core.adapted import Adapted
from lightning_pet.core.naming import canonical, join, named_tensors
from lightning_pet.engine import entry as entries
from lightning_pet.engine import optimizers as optim
from lightning_pet.engine.resume import ExactResume
from lightning_pet.store.fingerprint import Fingerprint


class Run(Protocol):
    """What the rules need to know of a run."""

    trainer: pl.Trainer
    module: pl.LightningModule
    resume: ExactResume

    @property
    def adapted(self) -> Adapted:
        """Handle on the adapted root."""
        ...

    @property
    def root_path(self) -> str:
        """Path of the adapted root in the LightningModule."""
        ...

    @property
    def base_check(self) -> str:
        """What to do about another base model: ``"error"``, ``"warn"`` or ``"off"``."""
        ...


class Checkpoints:
    """Delta-only checkpoints of one run; see :class:`~lightning_pet.engine.strategy.CheckpointRules`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._base: Fingerprint | None = None
        self._optimizer_names: Any = None

    # --- saving ---------------------------------------------------------------------------------

    def keep(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Only the delta, trained base parameters, and what training changed besides."""
        wanted = self._names()
        return {canonical(name): value for name, value in state.items() if canonical(name) in wanted}

    def _names(self) -> set[str]:
        run = self._run
        root, record, prefix = run.adapted.root, run.adapted.record, run.root_path
        inside = {*record.delta_names, *record.trained_names, *changed_buffers(root)}
        # Persistent buffers of metrics and losses beside the root are few and small.
        mine = {id(tensor) for _, tensor in named_tensors(root)}
        outside = {name for name, tensor in named_tensors(run.module) if id(tensor) not in mine}
        return {join(prefix, name) for name in inside} | outside

    def before_save(self, checkpoint: dict[str, Any]) -> None:
        """Filter once more (averaging callbacks put full states in), and add the entry. Runs on every rank."""
        run = self._run
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                checkpoint[key] = self.keep(checkpoint[key])
        record = run.adapted.record
        entry = entries.make_entry(record, run.root_path, self._fingerprint(), checkpoint["state_dict"])
        if "optimizer_states" in checkpoint:
            entry["optimizers"] = optim.parameter_names(run.trainer.optimizers, run.module)
        if "loops" in checkpoint and run.trainer.training:
            entry["resume"] = run.resume.state(run.trainer)
        checkpoint[entries.KEY] = entry

    def _fingerprint(self) -> Fingerprint:
        # The base is frozen, so once per run is enough.
        if self._base is None:
            adapted = self._run.adapted
            self._base = entries.base_fingerprint(adapted.root, adapted.record)
        return self._base

    # --- loading --------------------------------------------------------------------------------

    def after_load(self, checkpoint: dict[str, Any], path: object) -> None:
        """Refuse whatever does not fit this run, before anything of it is used."""
        run = self._run
        adapted = run.adapted
        entry = entries.read_entry(checkpoint, path)
        entries.check_methods(entry, adapted.record, path)
        entries.check_tensors(checkpoint, entry, path)
        entries.check_base(entries.saved_fingerprint(entry, path), adapted.root, adapted.record, path, run.base_check)
        if "resume" in entry and run.trainer.state.fn == "fit":
            run.resume.load_state(entry["resume"])
        self._optimizer_names = entry.get("optimizers")

    def load_model(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy the tensors in; the key set must fit exactly."""
        run = self._run
        prefix = f"{run.root_path}." if run.root_path else ""
        state = {canonical(name): value for name, value in checkpoint["state_dict"].items()}
        inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        outside = {n: t for n, t in state.items() if not n.startswith(prefix)}
        own = dict(named_tensors(run.module))
        run.adapted.load_state_dict(inside)
        for name, tensor in outside.items():
            own[name].detach().copy_(tensor)

    def before_optimizers(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """Saved optimizer states belong to names, not to positions."""
        if self._optimizer_names is None:
            return checkpoint
        run = self._run
        names = optim.parameter_names(run.trainer.optimizers, run.module)
        states = optim.reorder_state(checkpoint["optimizer_states"], self._optimizer_names, names)
        return {**checkpoint, "optimizer_states": states}
