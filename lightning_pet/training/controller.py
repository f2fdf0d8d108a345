"""What happens around a model during a Trainer's run, for all PET callbacks of that Trainer together."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_pet.errors import DeadSiteError, PETError, TargetError, UnsupportedStrategyError
from lightning_pet.insertion.checks import resizable
from lightning_pet.insertion.commit import (
    freeze,
    leave_out,
    note_users_flags,
    outgrown,
    refresh,
    renew,
    required_gradients,
    show_users_flags,
    take_out,
    undo,
)
from lightning_pet.insertion.method import Method, delta_name, key_of
from lightning_pet.insertion.widening import narrow, widen
from lightning_pet.layers.sharding import holds_parts
from lightning_pet.model.adaptation import Adaptation, described, record_of
from lightning_pet.model.naming import by_delta, delta_prefix, join, modules_on_the_way, named_parameters
from lightning_pet.model.outside import mark_anew
from lightning_pet.model.structure import host_parameter
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.apply import insert_methods, is_applied, read_starts, start
from lightning_pet.operations.plan import Plan, show_plan
from lightning_pet.operations.roots import batch_forward, batches_of_run, default_root, root_of
from lightning_pet.strategies import optimizers as optim
from lightning_pet.strategies import private
from lightning_pet.strategies.agreement import same
from lightning_pet.strategies.parameter_groups import Exchange, exchange, names_of
from lightning_pet.strategies.plain import warn_left_out
from lightning_pet.strategies.strategy import StrategyAdapter, adapter_for
from lightning_pet.training.checkpoint import Checkpoints
from lightning_pet.training.durable_io import install as install_durable_io
from lightning_pet.training.durable_io import keep_last_linked, save_after_module
from lightning_pet.training.frozen import (
    left_out,
    let_rest,
    refuse_averaging_first,
    refuse_outdated_averages,
    share_frozen,
    train_beside,
    warn_left_out_deltas,
    warn_of_frozen_base,
)
from lightning_pet.training.resume import ExactResume
from lightning_pet.training.run_log import log_options
from lightning_pet.training.step import (
    convert,
    keep_precision,
    let_inputs_require_grad,
    measure_losses,
    outside_of_init,
    refuse_without_gradient,
    replaces_layers,
    warn_of_rounding,
)
from lightning_pet.training.tasks.steps import Steps
from lightning_pet.training.tasks.tasks import Tasks, tasks_of
from lightning_pet.training.watch import Firing, Trained, Watch, refuse_meddlers

_ATTRIBUTE = "_pet_controller"


class Controller:
    """One per Trainer and LightningModule. The first PET callback of the list drives it.

    It inserts the deltas as soon as the model is there, freezes the base (again after every piece of
    user code that could have thawed it), repairs the optimizers, checks that every delta gets a
    gradient, and makes every checkpoint a delta checkpoint.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, methods: Sequence[Method]) -> None:
        self.trainer = trainer
        self.module = module
        self.methods = list(methods)
        self.resume = ExactResume()
        self.adapter: StrategyAdapter[Any] = adapter_for(trainer)
        self.checkpoints = Checkpoints(self)
        self._found: tuple[str, torch.nn.Module] | None = None
        self._plan: Plan | None = None
        self._configure: Callable[[], Any] | None = None  # the user's own, while ours is in its place
        self._converts = False  # the precision plug-in replaces layers
        self._undo: list[Callable[[], None]] = []
        self._new: list[Method] = []  # inserted in this run
        self._trained = False  # an optimizer has stepped in this run
        self.watch = Watch(self)
        self.firing = Firing(self)
        self._given: tuple[str, ...] = ()  # names of what was applied before this run
        self.tasks: Tasks | None = None
        self._undo_steps: Callable[[], None] = lambda: None

    # --- finding the controller -----------------------------------------------------------------

    @classmethod
    def of(cls, trainer: pl.Trainer, module: pl.LightningModule, methods: Sequence[Method]) -> "Controller":
        """The controller of this Trainer and module, made if there is none."""
        found = cls.find(trainer)
        if found is None or found.module is not module:
            found = cls(trainer, module, methods)
            trainer.__dict__[_ATTRIBUTE] = found
        found.methods = list(methods)
        return found

    @classmethod
    def find(cls, trainer: pl.Trainer) -> "Controller | None":
        """The controller of this Trainer, if a PET callback was set up."""
        return cast("Controller | None", trainer.__dict__.get(_ATTRIBUTE))

    @classmethod
    def get(cls, trainer: pl.Trainer) -> "Controller":
        """The controller of this Trainer.

        Raises:
            PETError: if no PET callback was set up.
        """
        found = cls.find(trainer)
        if found is None:
            raise PETError(
                "the PET callback was never set up; pass it to Trainer(callbacks=[…]) and do not call its hooks."
            )
        return found

    def leads(self, method: object) -> bool:
        """Whether this callback is the one that drives (the first of the list)."""
        return self.methods[0] is method

    @property
    def adapted(self) -> Adapted:
        """Handle on the adapted root."""
        return Adapted(self._root()[1])

    @property
    def record(self) -> Adaptation:
        """What was applied, as far as it belongs to this run: not the deltas that only act beside it, or rest."""
        return self.adapted.record.of(*self._deltas())

    def _deltas(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(delta_name(method) for method in self.methods))

    @property
    def base_check(self) -> str:
        """The strictest choice among the callbacks."""
        return min((method.base_check for method in self.methods), key=["exact", "error", "warn", "off"].index)

    @property
    def root_path(self) -> str:
        """Path of the adapted root in the LightningModule."""
        return self._root()[0]

    def _root(self) -> tuple[str, torch.nn.Module]:
        """Path and module of the root. An adapted one that is still in its place need not be looked for."""
        if self._found is not None:
            path, root = self._found
            *_, there = modules_on_the_way(self.module, path)
            if there is root and record_of(root) is not None:
                return self._found
        self._found = root_of(self.module)
        return self._found

    # --- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Insert now if the model is complete, else right after the hook that completes it."""
        refuse_averaging_first(self.trainer.callbacks, self.methods[0])  # type: ignore[attr-defined]
        self.tasks = tasks_of(self.trainer)
        if stage == "fit":
            refuse_meddlers(self.trainer.callbacks)  # type: ignore[attr-defined]
        self.adapter = adapter_for(self.trainer)
        self.adapter.check(self.trainer)
        if self.adapter.shards:
            self._refuse_unsharded()
        self._warn_spawn()
        self._given = self._delta_names()
        self._new, self._trained = [], False
        self.watch.new_run()
        self.firing.new_run()
        self.checkpoints.new_run()
        builds_later = is_overridden("configure_model", self.module)
        if self.tasks is not None:
            self._undo_steps = Steps(self, self.tasks).install()
        self._converts = replaces_layers(self.trainer.precision_plugin)
        self._advance(last=False)
        self._after("setup", last=not builds_later)
        if builds_later:
            self._after("configure_model", last=True)
        if stage == "fit":
            warn_left_out(self.module, getattr(self.trainer, "datamodule", None))
            self._configure = self.module.configure_optimizers
            self._replace("configure_optimizers", self._configure_optimizers)
            self.resume.setup(self.trainer)
        keep_precision(self.trainer, self.adapter)
        names = self.tasks.names if self.tasks is not None else ()
        install_durable_io(self.trainer.strategy, any(method.delta_files for method in self.methods), names)
        keep_last_linked(self.trainer)
        trainer = self.trainer
        self.adapter.install(lambda: Controller.get(trainer).rules())

    def _refuse_unsharded(self) -> None:
        unfit = [type(method).__name__ for method in self.methods if not method.shards]
        if unfit:
            raise UnsupportedStrategyError(
                f"{', '.join(unfit)}: not tested with parameters that are sharded over processes, as "
                f"{type(self.trainer.strategy).__name__} shards them. Use strategy='ddp'."
            )

    def rules(self) -> Checkpoints | None:
        """The rules for checkpoints, while there is a delta."""
        return self.checkpoints if record_of(self._root()[1]) is not None else None

    def _replace(self, hook: str, method: Callable[..., Any]) -> None:
        self._undo.append(private.replace_method(self.module, hook, method))

    def _after(self, hook: str, *, last: bool) -> None:
        overridden, dtype = is_overridden(hook, self.module), torch.get_default_dtype()

        def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = self._trained_before() if overridden else None
            root = self._root()[1]
            record = record_of(root)
            if overridden and before is None:
                show_users_flags(root)  # it may freeze a part, or ask what is frozen
            with resizable(root, record is not None and len(self._new) == len(record.applied)):
                out = original(*args, **kwargs)
            with outside_of_init(dtype):
                if before is not None:
                    before.check(self.trainer, self.module)
                elif overridden:
                    self._look_again()
                self._advance(last=last)
            return out

        self._replace(hook, run)

    def _trained_before(self) -> Trained | None:
        """What an earlier run, a file or ``apply`` has left; ``None`` if all of the delta is new."""
        root = self._root()[1]
        record = record_of(root)
        return Trained.of(root) if record is not None and len(self._new) < len(record.applied) else None

    def _look_again(self) -> None:
        """User code ran since the insertion: it may have loaded other weights, or built more of the model."""
        root = self._root()[1]
        if record_of(root) is None:
            return
        refrozen = note_users_flags(root)
        if refrozen or outgrown(root) or root is not default_root(self.module)[1]:
            take_out(root)
            self._new = []
        else:
            refresh(root)

    def _advance(self, *, last: bool) -> None:
        if self._converts and not last:
            return
        inserted = self.adapter.agreed("inserting the deltas", lambda: self._insert_or_wait(last))
        if not (inserted and last):
            return
        root = self._root()[1]
        if self.adapter.several:
            same("the methods", described(root))
        if self._new:
            self._start()
        if any(method.start_from for method in self._new):
            self.adapter.after_insertion(root, complete=True)  # a file may have brought other shapes
        with self.adapter.planning(root):
            self._plan = self.adapted.plan()  # now: once an engine has the model, shapes are those of its parts

    def _insert_or_wait(self, last: bool) -> bool:
        """Insert, or let a later hook complete the model first."""
        if self._converts:
            convert(self.trainer, self.module)
        try:
            self._insert(last)
        except PETError:
            if last:
                raise
            return False
        root, fitting = self._root()[1], self.trainer.state.fn == TrainerFn.FITTING
        if self.tasks is not None:
            self.tasks.gather(root, train=fitting)
        elif fitting:
            train_beside(root, self._deltas())
        freeze(root)
        self.adapter.settle()
        if not self.adapter.widens:
            narrow(root)
        elif not holds_parts(root):  # else as the engine moves it: see keep_precision
            widen(root, model=self.module)
        if last and self.trainer.state.fn == TrainerFn.FITTING:
            refuse_without_gradient(root)
        self.adapter.after_insertion(root, complete=last)
        return True

    def _insert(self, last: bool) -> None:
        root = self._root()[1]
        if all(is_applied(root, method) for method in self.methods):
            return
        configure = self._configure or self.module.configure_optimizers
        data = batches_of_run(self.trainer, self.module, configure) if last else None
        with self.adapter.planning(root):
            try:
                self._new += insert_methods(self.module, self.methods, batches=data)
            except TargetError:
                if not any(True for _ in root.parameters()):
                    raise
                look = batch_forward(self.trainer, self.module, configure)
                self._new += insert_methods(self.module, self.methods, look, of_loss=True, batches=data)

    def _start(self) -> None:
        """Load the files that the new methods start from; one process may not find what the others read."""
        if not any(method.start_from for method in self._new):
            return
        self.adapter.check_start(self._root()[1])
        with self.adapter.undisturbed():
            files = self.adapter.agreed("reading start_from", partial(read_starts, self.module, self._new))
            start(self.module, self._new, files, self.adapter.whole, self.adapter.fill)

    def _warn_spawn(self) -> None:
        launcher = self.trainer.strategy.launcher
        if not private.starts_processes(launcher) or self.rules() is not None:
            return
        if private.has_fitted(launcher):
            rank_zero_warn(
                "this Trainer has trained in other processes, and the module in this process never got their delta: "
                "without ckpt_path, a new and untrained one is used. Pass ckpt_path, or load_delta(module, checkpoint)."
            )
        else:
            rank_zero_warn(
                "this strategy trains in new processes and hands only the weights back, so the delta will be missing "
                "in this process after fit. Call lightning_pet.apply(module, callbacks) before fit, use "
                "strategy='ddp', or load_delta(module, checkpoint) afterwards."
            )

    def _warn_changed_form(self) -> None:
        """Weights go back by name: a delta that has other tensors than when it was applied would stay as it was."""
        if private.starts_processes(self.trainer.strategy.launcher) and self._given not in ((), self._delta_names()):
            rank_zero_warn(
                "the delta has other tensors now than before fit, so the process that called fit does not get its "
                "values. There, call load_delta on a new module with a checkpoint of this run."
            )

    def _delta_names(self) -> tuple[str, ...]:
        record = record_of(self._root()[1])
        return record.delta_names if record is not None else ()

    # --- optimizers -----------------------------------------------------------------------------

    def _configure_optimizers(self, original: Callable[[], Any]) -> Any:
        record, prefix = self.adapted.record, self.root_path
        leave_out(self.adapted.root, ())
        freeze(self.adapted.root)
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            # A method may search instead of train. Optimizers refuse to hold nothing, so the user's are not built.
            return None
        parameters = dict(named_parameters(self.module, every_name=True))
        delta = {join(prefix, name): parameters[join(prefix, name)] for name in record.planned_names}
        places = {path: (applied, target) for applied, target, path in record.places()}
        hosts = {
            join(prefix, place, name): join(prefix, host_parameter(self.adapted.root, target))
            for place, names in by_delta(dict.fromkeys(record.delta_names)).items()
            for _, target in [places[place]]
            for name in names
        }
        ratios: dict[str, float] = {}
        options: dict[str, dict[str, float]] = {}
        for method in self.methods:
            own = [name for name in record.delta_names if places[delta_prefix(name)][0].key == key_of(method)]
            own += record.trained_by(delta_name(method)) if getattr(method, "in_place", False) else ()
            ratios |= {join(prefix, name): ratio for name, ratio in method.lr_ratios(own).items()}
            options |= {join(prefix, name): own_options for name, own_options in method.group_options(own).items()}
        of_runs = self.tasks.of_optimizer(record.delta_names) if self.tasks is not None else {}
        runs = {join(prefix, name): found for name, found in of_runs.items()}
        warn_of_frozen_base(self.adapted.root, prefix, self.methods)
        made = original()
        self._leave_out(optim.collect(made, "param_groups"))
        returned = optim.hold_delta(made, self.module, delta, hosts, ratios, options, runs)
        self.adapter.optimizers_made(optim.collect(returned, "param_groups"), self.module)
        return returned

    def _leave_out(self, optimizers: Sequence[Any]) -> None:
        root = self.adapted.root
        left = left_out(root, optimizers, self.methods)
        if not left:
            return
        leave_out(root, left)
        warn_left_out_deltas(root, left)
        if not self.adapter.shards:
            self._plan = self.adapted.plan()
            self.adapter.wrap_again()

    def exchange(self, exchanges: Sequence[Exchange]) -> None:
        """Deltas have exchanged parameters in the middle of a fit: tell the record, the optimizers and the strategy."""
        root = self.adapted.root
        renew(root)
        if not exchanges:
            return
        names = names_of(self.module)
        new_names = [names.get(id(change.new), "") for change in exchanges]
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        exchange(self.trainer.optimizers, schedulers, exchanges, new_names)
        optim.check(self.trainer.optimizers, self.module)
        self.adapter.wrap_again()

    def on_fit_start(self) -> None:
        """Optimizers exist and the checkpoint, if any, was read: check, and show the table."""
        self._undo_all()
        root = self.adapted.root
        freeze(root)
        mark_anew(root)
        if self.adapter.materialized_late:
            self._start()
        self.adapter.check_wrapped(self.module)
        if not self.adapter.keeps_masters:
            warn_of_rounding(self.module)
        refuse_outdated_averages(self.trainer.callbacks, self.module)  # type: ignore[attr-defined]
        share_frozen(self.trainer.callbacks, self.module)  # type: ignore[attr-defined]
        self._undo.append(let_inputs_require_grad(root))
        self._undo.append(measure_losses(self.module, root))
        if not self.module.automatic_optimization:
            self._undo.append(optim.pass_over_empty(self.module, self.adapter.optimizers))
        self._undo.append(self.watch.guard_optimizers())
        self._undo.append(save_after_module(self.trainer, self.module))
        if self._plan is not None:
            log_options(self.trainer, self.adapted, self._plan, self.methods)
            if any(method.verbose for method in self.methods):
                show_plan(self._plan)

    def before_batch(self) -> None:
        """The base is remembered before the first batch; deltas that do not train are as they are when evaluated."""
        self.watch.begin()
        let_rest(self.adapted.root)

    def before_step(self, optimizer: Any) -> None:
        """Before an optimizer steps: some delta has received a gradient, and the base is known.

        Raises:
            DeadSiteError: naming the deltas, if none has one.
        """
        self.firing.look(optimizer)
        self.watch.settle()
        self._trained = True

    def on_train_epoch_end(self) -> None:
        """The base is what it was; which deltas rested all the time?"""
        self.watch.check(f"at the end of epoch {self.trainer.current_epoch}")
        self.watch.begin()  # for optimizers that step by themselves
        self.firing.report(f"in epoch {self.trainer.current_epoch}")

    def refuse_dead(self) -> None:
        """Say what torch only says of tensors.

        Raises:
            DeadSiteError: naming deltas.
        """
        names = sorted(required_gradients(self.adapted.root))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise DeadSiteError(
            f"the loss depends on nothing that trains: no delta acted in this step ({shown}). Their hosts did not run, "
            "or the loss was computed under torch.no_grad or from detached outputs. Name targets that this step runs."
        )

    # --- the end ----------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Take every wrapper off the LightningModule; after an error before the first step, the delta too.

        What is on the strategy stays: ``save_checkpoint`` works after fit.
        """
        self._undo_all()
        self._undo_steps()
        self._undo_steps = lambda: None
        self.resume.teardown(self.trainer)
        self._warn_changed_form()
        root = self._root()[1]
        interrupted = self.trainer.state.status == TrainerStatus.INTERRUPTED and not self._trained
        if interrupted and self._new and not self.adapter.is_wrapped(root):
            undo(root, [key_of(method) for method in self._new])
            self._new = []

    def _undo_all(self) -> None:
        for undone in reversed(self._undo):
            undone()
        self._undo = []
        self._configure = None
