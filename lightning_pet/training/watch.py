"""What a run is watched for: nothing trains but the plan, everything planned does, and nothing is built anew."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_pet.errors import DeadSiteError, OptimizerMismatchError, PETError, UnsupportedStrategyError
from lightning_pet.insertion.commit import required_gradients
from lightning_pet.model.adaptation import Mark, adapted_root, compare, mark, record_of
from lightning_pet.model.naming import CHILD, canonical, delta_of, is_inside, join, named_tensors
from lightning_pet.model.outside import frozen_parameters
from lightning_pet.operations.adapted import Adapted
from lightning_pet.strategies import private
from lightning_pet.strategies.parameter_groups import shown, trainable_of
from lightning_pet.strategies.strategy import StrategyAdapter, reads_checkpoint
from lightning_pet.targets.heads import HEAD
from lightning_pet.training.tasks.tasks import Tasks


class Run(Protocol):
    """One Trainer with one LightningModule; the :class:`~lightning_pet.training.controller.Controller` is one."""

    trainer: pl.Trainer
    module: pl.LightningModule
    adapter: StrategyAdapter[Any]
    tasks: Tasks | None

    @property
    def adapted(self) -> Adapted:
        """Handle on the adapted root."""
        ...

    @property
    def root_path(self) -> str:
        """Path of the adapted root in the LightningModule."""
        ...


# --- nothing trains but the plan ------------------------------------------------------------------

# Frozen tensors of the base are compared with what they were before the first batch, at every save and at the end of
# every epoch. Their values are read once, at the speed of memory (version counters miss writes through ``.data``).


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


# --- everything planned trains: every delta gets a gradient, in the first step or over the first epoch ---


_REASONS = (
    "Their hosts did not run, or the graph is cut above them (torch.no_grad, or reentrant gradient checkpointing "
    "without an input that requires grad: use use_reentrant=False)"
)


class Firing:
    """Looks for deltas without a gradient during one fit.

    A part of the model may rest for a while (an expert, a tower, a layer that is dropped), so a silent delta is an
    error only if no other fires. Where all have fired, nothing is looked at any more.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.new_run()

    def new_run(self) -> None:
        """Forget the last fit."""
        self._seen: set[int] = set()
        self._idle: dict[str, nn.Parameter] = {}
        self._fired = False

    def look(self, optimizer: Any) -> None:
        """Before a step of an optimizer.

        Raises:
            DeadSiteError: if no delta has a gradient, and no optimizer that holds others has yet to make a step.
        """
        if id(optimizer) not in self._seen:
            self._first(optimizer)
        elif self._idle:
            silent = self._run.adapter.still_silent(self._idle)
            self._idle = {name: p for name, p in self._idle.items() if name in silent}

    def _first(self, optimizer: Any) -> None:
        self._seen.add(id(optimizer))
        adapter, wanted = self._run.adapter, self._deltas()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = {name: p for name, p in wanted.items() if id(p) in held} or (wanted if adapter.repacks else {})
        self._warn_unused_heads(optimizer)
        silent = set(adapter.without_gradient(own, optimizer)) if own else set()
        self._fired |= len(silent) < len(own)
        self._idle |= {name: own[name] for name in sorted(silent)}
        if not self._idle or self._others_wait(wanted):
            return
        if self._fired and not self._places():
            return
        if not self._fired:
            raise DeadSiteError(
                f"no delta received a gradient in the first step: {shown(self._places())}. {_REASONS}. Exclude these "
                "hosts with exclude_modules, or apply the delta where the model runs."
            )
        rank_zero_warn(
            f"{len(self._places())} deltas received no gradient in the first step: {shown(self._places())}. "
            f"{_REASONS}. A part that is used now and then trains when it is; the end of the epoch tells which never "
            "were. Under DDP such parts need strategy='ddp_find_unused_parameters_true'."
        )

    def _warn_unused_heads(self, optimizer: Any) -> None:
        """A head that was found by itself may be none of those that the loss is computed with."""
        root, adapter = self._run.adapted.root, self._run.adapter
        places = {
            target.module for a in self._run.adapted.record.applied for target in a.targets if target.role == HEAD
        }
        for path in sorted(join(self._run.root_path, place) for place in places):
            own = {name: p for name, p in trainable_of(self._run.module).items() if is_inside(name, path)}
            if own and len(adapter.without_gradient(own, optimizer)) == len(own):
                rank_zero_warn(
                    f"{path} of {type(root).__name__} was taken for a head, but the loss does not reach it. If the "
                    "model ends otherwise, leave it out with modules_to_save=[]."
                )

    def _deltas(self) -> dict[str, nn.Parameter]:
        # By name, not by requires_grad: toggle_optimizer takes that from what another optimizer holds.
        record, path = self._run.adapted.record, self._run.root_path
        required = required_gradients(self._run.adapted.root) & set(record.trainable_names)
        names = {join(path, name) for name in required}
        return {n: p for name, p in self._run.module.named_parameters() if (n := canonical(name)) in names}

    def _others_wait(self, wanted: dict[str, nn.Parameter]) -> bool:
        own = {id(p) for p in wanted.values()}
        for optimizer in self._run.adapter.optimizers():
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if id(optimizer) not in self._seen and held & own:
                return True
        return False

    def _places(self) -> list[str]:
        resting = (
            self._run.tasks.unseen if self._run.tasks is not None else ()
        )  # it is said of these that they had no rows
        idle = [name for name in self._idle if delta_of(name) not in resting]
        return list(dict.fromkeys(name.partition(f".{CHILD}.")[0] for name in idle))

    def report(self, when: str) -> None:
        """Say which never fired, and look no more.

        Args:
            when: e.g. ``"in epoch 0"``.
        """
        if not self._idle:
            return
        silent = self._run.adapter.everywhere(set(self._idle))
        self._idle = {name: p for name, p in self._idle.items() if name in silent}
        if self._places():
            rank_zero_warn(
                f"{len(self._places())} deltas never received a gradient {when}: {shown(self._places())}. They are as "
                f"they were at the start. {_REASONS}. If the model does not use these hosts, exclude_modules leaves "
                "them out."
            )
        self._idle = {}


# --- user code that runs before every verb, and gives new values to what was trained --------------


@dataclass(frozen=True)
class Trained:
    """What a delta was before ``setup`` or ``configure_model`` ran again."""

    root: nn.Module
    marks: dict[str, Mark | None]
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]

    @classmethod
    def of(cls, root: nn.Module) -> "Trained":
        """Remember the delta of a root, and what trains with it."""
        record = record_of(root)
        own = {*record.delta_names, *record.trained_names} if record is not None else set()
        tensors = {name: tensor for name, tensor in named_tensors(root) if name in own}
        values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return cls(root, {name: mark(tensor) for name, tensor in tensors.items()}, tensors, values)

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare, after the hook, and put back what was only loaded over.

        Raises:
            PETError: if modules of the delta are gone; if others took their places, and this run neither trains nor
                reads a checkpoint.
        """
        found = adapted_root(module)
        whole = found is None or found[1] is not self.root
        own = dict(named_tensors(self.root))
        gone = [name for name in self.marks if name not in own]
        if gone and not whole:
            raise PETError(
                f"{type(module).__name__} replaced modules that carry a trained delta: {shown(gone)} are gone. setup "
                "and configure_model run once per fit, validate, test and predict; let them build the model only if it "
                "is not there yet."
            )
        if reads_checkpoint(trainer):
            return  # all of it comes from the file
        lost = list(self.marks) if whole else self._put_back(own, type(module).__name__)
        if not lost:
            return
        text = (
            f"{type(module).__name__} built anew what was trained: {shown(lost)}. setup and "
            "configure_model run once per fit, validate, test and predict; let them build the model only if "
            "it is not there yet, or pass ckpt_path."
        )
        if trainer.state.fn != TrainerFn.FITTING:
            raise PETError(text)
        rank_zero_warn(f"{text} This fit starts from what is new.")

    def _put_back(self, own: dict[str, Tensor], kind: str) -> list[str]:
        """Give tensors their trained values again that were loaded over; return names of replaced ones."""
        changed = self._changed(own)
        there = [name for name in changed if own[name] is self.tensors[name]]
        with torch.no_grad():
            for name in there:
                own[name].copy_(self.values[name])
        lost = self._changed(own)
        if there and not lost:
            rank_zero_info(
                f"{kind} loaded other values over what was trained ({shown(there)}), as it does for the base; "
                "the trained ones are put back."
            )
        return lost

    def _changed(self, own: dict[str, Tensor]) -> list[str]:
        names = [name for name, before in self.marks.items() if before is not None]
        answers = compare((own[name], self.marks[name]) for name in names)
        return [name for name, changed in zip(names, answers, strict=True) if changed is not False]
