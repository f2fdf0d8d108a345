"""Nothing trains but the plan: what a checkpoint does not hold must not change during a fit.

Frozen tensors of the base are compared with what they were before the first batch, at every save and at the end of
every epoch. Their values are read once, at the speed of memory (version counters miss writes through ``.data``).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_pet.errors import OptimizerMismatchError, PETError, UnsupportedStrategyError
from lightning_pet.model.marks import Mark, compare, mark
from lightning_pet.model.naming import join
from lightning_pet.model.outside import frozen_parameters
from lightning_pet.strategies import private
from lightning_pet.strategies.parameter_groups import shown
from lightning_pet.training.run import Run

_HOOKS: Final = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_end",
)


def refuse_meddlers(callbacks: Sequence[pl.Callback]) -> None:
    """Callbacks whose purpose is to train or to cut the base.

    Raises:
        UnsupportedStrategyError: naming the callback and what does the same with a delta.
    """
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, BaseFinetuning):
            raise UnsupportedStrategyError(
                f"{name} lets the base train in the middle of the fit, which the checkpoints of a delta would not "
                "hold. Leave it out; LayerFreezingCallback(unfreeze_every=…) unfreezes layer by layer and saves them, "
                "and modules_to_save trains modules from the start."
            )
        if isinstance(callback, ModelPruning):
            raise UnsupportedStrategyError(
                f"{name} cuts and renames weights of the base, which the checkpoints of a delta would not hold. Leave "
                "it out; DiffPruningCallback trains a sparse difference, and after adapted.merge_() the model can be "
                "pruned."
            )


class Watch:
    """Compares the frozen base during one fit."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._marks: dict[str, Mark | None] | None = None
        self._settled = False
        self._thawed = False

    def new_run(self) -> None:
        """Forget the last fit."""
        self._marks, self._settled, self._thawed = None, False, False

    # --- marking ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first batch: remember the base. Whatever loads weights has done so by now."""
        if self._marks is None:
            self._marks = {name: mark(parameter) for name, parameter in self._frozen().items()}

    def settle(self) -> None:
        """Before the first step: engines that arrange their parts in the first forward have done so by now."""
        self.begin()
        if self._settled or self._marks is None:
            return
        self._settled = True
        frozen = self._frozen()
        pairs = [(name, frozen[name]) for name in self._marks if name in frozen]
        answers = compare((parameter, self._marks[name]) for name, parameter in pairs)
        for (name, parameter), changed in zip(pairs, answers, strict=True):
            if changed is None:
                self._marks[name] = mark(parameter)

    def _frozen(self) -> dict[str, nn.Parameter]:
        adapted = self._run.adapted
        return frozen_parameters(adapted.root, adapted.record)

    # --- comparing ----------------------------------------------------------------------------------

    def check(self, when: str) -> None:
        """Compare, in every process.

        Args:
            when: names the moment, e.g. ``"at the end of epoch 0"``.

        Raises:
            OptimizerMismatchError: if an optimizer holds frozen tensors of the base.
            PETError: if frozen tensors of the base have changed.
        """
        if self._marks is None:
            return
        self._run.adapter.settle()
        self._run.adapter.agreed("comparing the base", partial(self._check, when))

    def _check(self, when: str) -> None:
        frozen, marks = self._frozen(), self._marks or {}
        self._check_optimizers(frozen, when)
        self._warn_thawed(frozen, when)
        gone = [name for name in marks if name not in frozen]
        names = [name for name in marks if name in frozen]
        answers = compare([(frozen[name], marks[name]) for name in names])
        found = [*gone, *(name for name, changed in zip(names, answers, strict=True) if changed)]
        if found:
            full = [join(self._run.root_path, name) for name in found]
            verb = "is there no more" if found == gone and len(gone) == 1 else "have changed or are gone"
            raise PETError(
                f"{when}: frozen tensors of the base {verb}: {shown(full)}. A checkpoint holds the delta and what "
                "trains by the plan, so this would be lost, and the delta would fit no base. "
                f"{self._suspects()}Leave the base alone there; or let it train by the plan (modules_to_save, "
                "LayerFreezingCallback, FullFineTuningCallback); or, if it is a copy that the module keeps itself, "
                "name the base with module='…', so that the copy lies beside it and is saved."
            )

    def _warn_thawed(self, frozen: dict[str, nn.Parameter], when: str) -> None:
        """Somebody unfreezes the base, and would wait in vain for it to train."""
        thawed = [name for name, parameter in frozen.items() if parameter.requires_grad]
        if thawed and not self._thawed:
            self._thawed = True
            full = [join(self._run.root_path, name) for name in thawed]
            rank_zero_warn(
                f"{when}: {len(full)} tensors of the base were set to require a gradient: {shown(full)}. No optimizer "
                "holds them, so they do not train. Let them train by the plan: modules_to_save, LayerFreezingCallback "
                "(unfreeze_every unfreezes layer by layer), or FullFineTuningCallback."
            )

    def _check_optimizers(self, frozen: dict[str, nn.Parameter], when: str) -> None:
        names = {id(parameter): name for name, parameter in frozen.items()}
        for index, optimizer in enumerate(self._run.adapter.optimizers()):
            for number, group in enumerate(optimizer.param_groups):
                held = [names[id(p)] for p in group["params"] if id(p) in names]
                if held:
                    self._refuse(
                        held, f"{when}: optimizer {index} ({type(optimizer).__name__}) holds in group {number}"
                    )

    def _refuse(self, names: Sequence[str], what: str) -> None:
        full = [join(self._run.root_path, name) for name in names]
        raise OptimizerMismatchError(
            f"{what} tensors of the base that the plan keeps frozen: {shown(full)}. Checkpoints would not hold what "
            "they become. Let them train by the plan: modules_to_save, LayerFreezingCallback (unfreeze_every unfreezes "
            "layer by layer), or FullFineTuningCallback."
        )

    def _suspects(self) -> str:
        found = list(_writers(self._run.module, self._run.trainer.callbacks))  # type: ignore[attr-defined]
        return f"Code that runs between the steps: {', '.join(found)}. " if found else ""

    # --- optimizers ---------------------------------------------------------------------------------

    def guard_optimizers(self) -> Callable[[], None]:
        """Refuse groups with tensors of the base at once, by the name of who adds them; returns what undoes it."""
        optimizers = [
            optimizer for optimizer in self._run.adapter.optimizers() if hasattr(optimizer, "add_param_group")
        ]
        undo = [private.replace_method(optimizer, "add_param_group", self._guarded) for optimizer in optimizers]

        def back() -> None:
            for undone in undo:
                undone()

        return back

    def _guarded(self, original: Callable[[Any], None], param_group: dict[str, Any]) -> None:
        given = param_group["params"]
        parameters = [given] if isinstance(given, nn.Parameter) else list(given)
        names = {id(parameter): name for name, parameter in self._frozen().items()}
        held = [names[id(p)] for p in parameters if id(p) in names]
        if held:
            self._refuse(held, f"{_caller()} adds to an optimizer")
        original({**param_group, "params": parameters})


def _caller() -> str:
    """The innermost method of a callback or LightningModule that is being called."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, pl.Callback | pl.LightningModule):
            return f"{type(owner).__name__}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "somebody"


def _writers(module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> Iterator[str]:
    """Hooks of the user's code that run between the steps."""
    yield from (f"{type(module).__name__}.{hook}" for hook in _HOOKS if is_overridden(hook, module))
    for callback in callbacks:
        kind = type(callback)
        if kind.__module__.partition(".")[0] not in ("lightning", "lightning_pet"):
            theirs = [hook for hook in _HOOKS if getattr(kind, hook, None) is not getattr(pl.Callback, hook, None)]
            yield from (f"{kind.__name__}.{hook}" for hook in theirs)
