"""What happens around a model during a Trainer's run, for all PET callbacks of that Trainer together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden


from lightning_pet.core.adaptation import freeze, record_of, refresh
from lightning_pet.core.adapted import Adapted
from lightning_pet.core.naming import canonical, join
from lightning_pet.core.method import Method
from lightning_pet.engine import optimizers as optim
from lightning_pet.engine.adapt import apply
from lightning_pet.engine.checkpoint import Checkpoints
from lightning_pet.engine.delta import start_from
from lightning_pet.engine.durable_io import install as install_durable_io
from lightning_pet.engine.precision import keep_delta_precision
from lightning_pet.engine.resume import ExactResume
from lightning_pet.engine.roots import batch_forward, default_root
from lightning_pet.engine.strategy import adapter_for
from lightning_pet.engine.table import show_plan
from lightning_pet.errors import DeadSiteError, PETError, TargetError, UnsupportedStrategyError

_ATTRIBUTE = "_pet_controller"
_MISSING = object()


class TrainerMethod(Method, Protocol):
    """What the controller asks of a callback, besides what every method answers."""

    start_from: str | None
    base_check: str
    verbose: bool

    def lr_ratios(self, delta_names: Sequence[str]) -> dict[str, float]:
        """Learning-rate factor of parameters that do not train at their group's rate."""
        ...


class Controller:
    """One per Trainer and LightningModule. The first PET callback of the list drives it.

    It inserts the deltas as soon as the model is there, freezes the base (again after every piece of
    user code that could have thawed it), repairs the optimizers, checks that every delta gets a
    gradient, and makes every checkpoint a delta checkpoint.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, methods: Sequence[TrainerMethod]) -> None:
        self.trainer = trainer
        self.module = module
        self.methods = list(methods)
        self.resume = ExactResume()
        self.checkpoints = Checkpoints(self)
        self._replaced: list[tuple[Any, str, Any]] = []
        self._inserted_now = False
        self._checked: set[int] = set()

    # --- finding the controller -----------------------------------------------------------------

    @classmethod
    def of(cls, trainer: pl.Trainer, module: pl.LightningModule, methods: Sequence[TrainerMethod]) -> "Controller":
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
            raise PETError("the PET callback was never set up; pass it to Trainer(callbacks=[…]) and do not call its hooks.")
        return found

    def leads(self, method: object) -> bool:
        """Whether this callback is the one that drives (the first of the list)."""
        return self.methods[0] is method

    @property
    def adapted(self) -> Adapted:
        """Handle on the adapted root."""
        return Adapted(default_root(self.module)[1])

    @property
    def base_check(self) -> str:
        """The strictest choice among the callbacks."""
        return min((method.base_check for method in self.methods), key=["error", "warn", "off"].index)

    @property
    def root_path(self) -> str:
        """Path of the adapted root in the LightningModule."""
        return default_root(self.module)[0]

    # --- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Insert now if the model is complete, else right after the hook that completes it."""
        _refuse_averaging_first(self.trainer.callbacks, self.methods[0])  # type: ignore[attr-defined]
        adapter = adapter_for(self.trainer)
        self._warn_spawn()
        self._inserted_now = False
        self._checked.clear()
        builds_later = is_overridden("configure_model", self.module)
        self._advance(last=False)
        self._after("setup", last=not builds_later)
        if builds_later:
            self._after("configure_model", last=True)
        if stage == "fit":
            self._wrap_configure_optimizers()
            self.resume.setup(self.trainer)
        keep_delta_precision(self.trainer)
        install_durable_io(self.trainer.strategy)
        trainer = self.trainer
        adapter.install(lambda: Controller.get(trainer).checkpoints)

    def _after(self, hook: str, *, last: bool) -> None:
        original = getattr(self.module, hook)
        may_change = is_overridden(hook, self.module)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._restore(self.module, hook)
            out = original(*args, **kwargs)
            if may_change and self._inserted_now:
                refresh(default_root(self.module)[1])
            self._advance(last=last)
            return out

        self._replace(self.module, hook, wrapper)

    def _advance(self, *, last: bool) -> None:
        root = default_root(self.module)[1]
        if record_of(root) is None or last:
            try:
                self._insert()
            except TargetError:
                if last:
                    raise
                return
        freeze(root)
        if last:
            self._start_from()

    def _insert(self) -> None:
        root = default_root(self.module)[1]
        had = record_of(root) is not None
        try:
            apply(self.module, self.methods)
        except TargetError:
            forward = batch_forward(self.trainer, self.module)
            if forward is None or not any(True for _ in root.parameters()):
                raise
            apply(self.module, self.methods, forward=forward)
        self._inserted_now = self._inserted_now or not had

    def _start_from(self) -> None:
        if self._inserted_now:
            for method in self.methods:
                if method.start_from is not None:
                    start_from(self.adapted, method, method.start_from, method.base_check)

    def _warn_spawn(self) -> None:
        launcher = self.trainer.strategy.launcher
        in_new_process = launcher is not None and type(launcher).__name__ == "_MultiProcessingLauncher"
        if in_new_process and record_of(default_root(self.module)[1]) is None:
            rank_zero_warn(
                "this strategy trains in new processes and hands only the weights back, so the delta will be missing in "
                "this process after fit. Call lightning_pet.apply(module, callbacks) before fit, or use strategy='ddp'."
            )

    # --- optimizers -----------------------------------------------------------------------------

    def _wrap_configure_optimizers(self) -> None:
        original = self.module.configure_optimizers

        def configure_optimizers() -> Any:
            self._restore(self.module, "configure_optimizers")
            record = self.adapted.record
            parameters = {canonical(n): p for n, p in self.module.named_parameters(remove_duplicate=False)}
            prefix = self.root_path
            trained = [join(prefix, name) for name in record.trainable_names]
            hosts = {
                join(prefix, name): join(prefix, target.path)
                for _, target, path, key in record.hosts()
                for name in record.delta_names
                if name.startswith(join(path, "pet", key) + ".")
            }
            ratios = {
                join(prefix, name): ratio
                for method in self.methods
                for name, ratio in method.lr_ratios(record.delta_names).items()
            }
            delta = {name: parameters[name] for name in trained}
            return optim.hold_delta(original(), self.module, delta, hosts, ratios)

        self._replace(self.module, "configure_optimizers", configure_optimizers)

    def on_fit_start(self) -> None:
        """Optimizers exist and the checkpoint, if any, was read: check, and show the table."""
        freeze(self.adapted.root)
        optim.check(self.trainer.optimizers, self.module)
        if any(method.verbose for method in self.methods):
            show_plan(self.adapted.plan())

    def check_gradients(self, optimizer: Any) -> None:
        """Once per optimizer, before its first step: every parameter that it holds has a gradient.

        Raises:
            DeadSiteError: naming the deltas that have none.
        """
        if id(optimizer) in self._checked:
            return
        self._checked.add(id(optimizer))
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        delta = {join(self.root_path, name) for name in self.adapted.record.delta_names}
        dead = [
            canonical(name)
            for name, parameter in self.module.named_parameters()
            if id(parameter) in held and parameter.grad is None and canonical(name) in delta
        ]
        if dead:
            shown = ", ".join(dead[:4]) + (f" and {len(dead) - 4} more" if len(dead) > 4 else "")
            raise DeadSiteError(
                f"{len(dead)} delta parameters received no gradient in the first step: {shown}. Their hosts did not run, or "
                "the graph is cut above them (torch.no_grad, or reentrant gradient checkpointing without an input that "
                "requires grad). Exclude these hosts with exclude_modules, or use use_reentrant=False."
            )

    # --- replacing methods on instances, and putting them back ----------------------------------

    def _replace(self, owner: Any, name: str, value: Callable[..., Any]) -> None:
        self._replaced.append((owner, name, owner.__dict__.get(name, _MISSING)))
        owner.__dict__[name] = value

    def _restore(self, owner: Any, name: str) -> None:
        for item in [item for item in self._replaced if item[0] is owner and item[1] == name]:
            self._replaced.remove(item)
            if item[2] is _MISSING:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = item[2]

    def teardown(self) -> None:
        """Take every wrapper off the LightningModule. Those on the strategy stay: ``save_checkpoint`` works after fit."""
        for owner, name, _ in list(self._replaced):
            self._restore(owner, name)
        self.resume.teardown(self.trainer)


def _refuse_averaging_first(callbacks: Sequence[pl.Callback], first: object) -> None:
    for callback in callbacks:
        if callback is first:
            return
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UnsupportedStrategyError(
                f"{type(callback).__name__} is listed before {type(first).__name__}: it would copy the model before the "
                "delta is in it. List the PET callbacks first."
            )
