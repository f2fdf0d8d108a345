"""Diff pruning (Guo, Rush and Kim 2021)."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal, cast, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_pet.arguments import at_least, finite, one_of, positive, share
from lightning_pet.callbacks.base import PETCallback, Scalar
from lightning_pet.callbacks.diff_pruning.cut import compare_anew, fix, largest_entries
from lightning_pet.callbacks.diff_pruning.density import DensityCurve, counted
from lightning_pet.errors import ArgumentError, DeadSiteError, PETError, TargetError, UnsupportedStrategyError
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.delta import Tied, options_beside
from lightning_pet.layers.gated_weight import Form
from lightning_pet.layers.hard_concrete import HardConcrete, mixed
from lightning_pet.layers.sparse_difference import Kind, SparseDifference
from lightning_pet.model.naming import named_modules, named_parameters
from lightning_pet.model.structure import Structure, Target
from lightning_pet.strategies.parameter_groups import Exchange, set_option
from lightning_pet.strategies.strategy import StrategyAdapter, adapter_for
from lightning_pet.targets.parameters import chosen_parameters, suffix_of, tied
from lightning_pet.targets.patterns import listed_if_given
from lightning_pet.training.controller import Controller
from lightning_pet.training.frozen import refuse_averages

GatesOf = Literal["weight", "group"]
StateType = Literal["fp32", "bf16"]


class DiffPruningCallback(PETCallback):
    r"""Diff pruning: :math:`\theta + z \odot w` over every weight, with few non-zero entries in the end.

    A run has two stages. First w and the gates z train, under a penalty on the expected number of open
    gates. Then the entries of largest magnitude are kept, exactly ⌊density · N⌋ of the N weights, and their
    values train on at fixed places. Every weight tensor is a group, whose gate multiplies those of its
    weights. Evaluation uses gates without noise. Source: Guo, Rush and Kim 2021.

    Args:
        density: share of the weights whose difference may stay non-zero, in (0, 1].
        structured: give every weight tensor a gate as well, so that whole tensors can go.
        l0_weight: factor of the expected number of open gates beside the loss. It decides whether loss or penalty
            has the say over a gate; how fast gates close, ``alpha_lr`` does. With a larger one, set
            ``structured=False``: a tensor's gate takes all its entries with it.
        stages: shares of the run's optimizer steps: training with gates, then with fixed places. The fit
            ends when both are over. From a file (``start_from``) the run has the second stage only.
        penalty: ``"product"`` counts weights whose gates are both open, ``"sum"`` (the authors' code) open
            gates of either kind.
        alpha_lr: learning rate of the gates, the same in every step whatever the schedule is.
        alpha_clip: largest norm of the gradient of all gates together.
        alpha_init: start of every α; 5 opens 99 % of the gates.
        stretch: l and r of the hard-concrete distribution.
        temperature: its β.
        gates: ``"weight"``: every weight has a gate; ``"group"``: only every tensor, which saves memory.
        state: ``"bf16"`` keeps α, its gradient and its optimizer state in bfloat16, which saves memory.
        embeddings: include lookup tables, and what is tied to one.
        norms: include normalisation layers.
        heads: give fresh task heads a sparse difference, too; default: they train as they are.
        exclude_modules: modules (with all below them), parameters or roles to leave as they are.
        seed: of the random gates.
        plot: draw density and expected density over the steps into the log folder, if matplotlib is installed.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`. Task heads train as they
            are, beside the density.

    Raises:
        ArgumentError: if a number is out of range.

    Example:
        >>> from lightning_pet import DiffPruningCallback
        >>> DiffPruningCallback(density=0)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: density=0: a share in (0, 1], e.g. 0.005 for half a percent.
    """

    method: ClassVar[str] = "diff_pruning"
    mirrors = False
    shards = True
    figures = ("norm", "density")
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "exclude_modules",
        "embeddings",
        "norms",
        "heads",
        "alpha_clip",
        "plot",
    }

    def __init__(
        self,
        density: float = 0.005,
        structured: bool = True,
        l0_weight: float = 1.25e-7,
        stages: tuple[float, float] = (0.6, 0.4),
        penalty: Form = "product",
        alpha_lr: float = 0.1,
        alpha_clip: float = 1.0,
        alpha_init: float = 5.0,
        stretch: tuple[float, float] = (-1.5, 1.5),
        temperature: float = 1.0,
        gates: GatesOf = "weight",
        state: StateType = "fp32",
        embeddings: bool = True,
        norms: bool = True,
        heads: bool = False,
        exclude_modules: list[str] | str | None = None,
        seed: int = 0,
        plot: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.density = density
        self.structured = structured
        self.l0_weight = l0_weight
        self.stages = list(stages)  # lists, as files give them back
        self.penalty = penalty
        self.alpha_lr = alpha_lr
        self.alpha_clip = alpha_clip
        self.alpha_init = alpha_init
        self.stretch = list(stretch)
        self.temperature = temperature
        self.gates = gates
        self.state = state
        self.embeddings = embeddings
        self.norms = norms
        self.heads = heads
        self.exclude_modules = listed_if_given(exclude_modules)
        self.seed = seed
        self.plot = plot
        self._validate()
        self._law()
        self._curve = DensityCurve()
        self._live: list[tuple[Target, SparseDifference]] = []  # during a fit
        self._gate_groups: list[dict[str, Any]] = []
        self._looked = False
        self._cut_at = self._end_at = 0

    def _validate(self) -> None:
        share("density", self.density, "a share in (0, 1], e.g. 0.005 for half a percent.")
        if len(self.stages) != 2 or not self.stages[0] > 0 <= self.stages[1] or sum(self.stages) > 1 + 1e-9:
            raise ArgumentError(
                f"stages={tuple(self.stages)}: two shares of the run, the first positive, that add up to at most 1, "
                "e.g. (0.6, 0.4)."
            )
        positive("alpha_lr", self.alpha_lr, "must be a positive number, e.g. alpha_lr=0.1.")
        positive("alpha_clip", self.alpha_clip, "must be a positive number, e.g. alpha_clip=0.1.")
        at_least("l0_weight", self.l0_weight, 0, "must not be negative; the paper uses 1.25e-7.")
        finite("alpha_init", self.alpha_init, "must be a number, e.g. 5.0.")
        for label, choices in (("penalty", Form), ("gates", GatesOf), ("state", StateType)):
            one_of(label, getattr(self, label), choices, f"use {' or '.join(map(repr, get_args(choices)))}.")
        if len(self.stretch) != 2:
            raise ArgumentError(f"stretch={tuple(self.stretch)}: two numbers, e.g. (-1.5, 1.5).")

    def _law(self) -> HardConcrete:
        return HardConcrete(self.stretch[0], self.stretch[1], self.temperature)

    # --- places and deltas ------------------------------------------------------------------------

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find every parameter; see :func:`~lightning_pet.targets.parameters.every_parameter`."""
        return chosen_parameters(root, structure, self)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build one difference per tensor; modules that share a tensor share its difference.

        Raises:
            TargetError: if the density leaves no entry at all, or a tensor is tied to one that does not move.
        """
        modules = named_modules(root)
        found, size = [], 0
        for first, *others in tied(root, targets):
            parameter = cast(nn.Parameter, modules[first.module]._parameters[first.parameter])
            delta = self._difference(parameter, first.path)
            found.append(Insertion(first, delta, suffix_of(first)))
            found += [Insertion(other, Tied(delta), suffix_of(other)) for other in others]
            size += delta.size
        if self._budget(size) < 1:
            raise TargetError(
                f"density={self.density} keeps none of {size:,} entries; the smallest that keeps one is {1 / size:.2g}."
            )
        return found

    def _difference(self, parameter: nn.Parameter, path: str) -> SparseDifference:
        kinds: dict[tuple[str, bool], Kind] = {("weight", True): "both", ("weight", False): "weight"}
        return SparseDifference(
            tuple(parameter.shape),
            self._law(),
            kind=kinds.get((self.gates, self.structured), "group"),
            form=self.penalty,
            l0_weight=self.l0_weight,
            alpha=self.alpha_init,
            seed=mixed(self.seed, path),
            gate_dtype=torch.bfloat16 if self.state == "bf16" else None,
            **options_beside(parameter),
        )

    def differences(self, root: nn.Module) -> list[tuple[Target, SparseDifference]]:
        """The differences in an adapted root, each once, with the place of the first module that has it."""
        return [(target, delta) for target, delta in self.deltas(root) if isinstance(delta, SparseDifference)]

    def _budget(self, size: int) -> int:
        return int(Fraction(str(self.density)) * size)  # exact: 0.29 of 100 are 29

    # --- the optimizer ----------------------------------------------------------------------------

    def group_options(self, delta_names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Nothing decays; gates have a learning rate of their own."""
        plain = {"weight_decay": 0.0}
        gates = ("alpha", "alpha_group")
        return {n: {**plain, "lr": self.alpha_lr} if n.rpartition(".")[2] in gates else plain for n in delta_names}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip the gradients of the gates; once, name the weights that no gradient reaches."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        adapter = Controller.get(trainer).adapter
        gates = [p for _, delta in self._live for p in delta.gate_parameters]
        if gates:
            adapter.clip(trainer, optimizer, gates, self.alpha_clip)
        if gates and not self._looked:
            self._looked = True
            # Also of those that toggle_optimizer lets rest at the moment.
            names = {id(parameter): name for name, parameter in named_parameters(pl_module)}
            places = {names[id(delta.w)]: (target.path, delta.w) for target, delta in self._live if delta.w is not None}
            silent = adapter.without_gradient({name: w for name, (_, w) in places.items()}, optimizer)
            self._report_unreached([places[name][0] for name in silent])

    def _report_unreached(self, unreached: Sequence[str]) -> None:
        if len(unreached) == len(self._live):
            raise DeadSiteError("no weight received a gradient: is the graph cut above all of them by torch.no_grad?")
        if unreached:
            more = f" and {len(unreached) - 4} more" if len(unreached) > 4 else ""
            rank_zero_warn(
                f"no gradient reaches {', '.join(unreached[:4])}{more}: the model does not use them, or not through "
                "the module that owns them, so their difference stays zero. exclude_modules leaves them out."
            )

    # --- the stages -------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse runs in which parameters cannot be exchanged, or cannot have their precision."""
        if self.state == "bf16" and adapter_for(trainer).shards:
            raise UnsupportedStrategyError(
                f"{type(self).__name__}(state='bf16'): {type(trainer.strategy).__name__} keeps the parameters of a "
                "module in one tensor of one precision. Use state='fp32', or strategy='ddp'."
            )
        if stage == "fit":
            refuse_averages(trainer.callbacks, type(self).__name__)  # type: ignore[attr-defined]
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide at which steps the stages end.

        Raises:
            ArgumentError: if the length of the run is not known, or a stage has no step.
        """
        controller = Controller.get(trainer)
        controller.adapter.settle()
        self._live, self._looked = self.differences(controller.adapted.root), False
        for _, delta in self._live:
            delta.train()  # a model may be trained in evaluation mode; its gates are random all the same
        gates = [p for _, delta in self._live for p in delta.gate_parameters]
        self._gate_groups = controller.adapter.groups_of(gates, pl_module)
        if trainer.global_step == 0:
            self._curve = DensityCurve()
        self._plan(trainer)

    def _plan(self, trainer: pl.Trainer) -> None:
        self._begin_steps(trainer)
        if math.isinf(self._steps.total(trainer)):
            raise ArgumentError(
                "the length of this run is not known, so neither are its stages: set max_steps, or max_epochs and, if "
                "the data has no length, limit_train_batches of the Trainer."
            )
        steps = int(self._steps.total(trainer))
        first, second = (Fraction(str(share)) for share in self.stages)
        self._cut_at, self._end_at = round(first * steps), round((first + second) * steps)
        if self._is_cut:  # a delta from a file, or a second fit
            self._cut_at, self._end_at = 0, steps
        elif trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._cut_at = self._end_at = max(self._cut_at, 1)
        elif self._cut_at < 1 or (second and self._end_at <= self._cut_at):
            raise ArgumentError(
                f"stages={tuple(self.stages)} of a run of {steps} optimizer steps: one of them has no step. Train "
                "longer, or change the shares."
            )

    @property
    def _is_cut(self) -> bool:
        return all(delta.is_fixed for _, delta in self._live)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw this step's gates: they depend on seed and step alone, on every rank and after a resume."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._cut_if_due(trainer)
        for _, delta in self._live:
            delta.gates.begin(trainer.global_step, batch_idx)
        for group in self._gate_groups:
            set_option(group, "lr", self.alpha_lr)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Cut after the last step of the first stage; end the fit after that of the second."""
        self._cut_if_due(trainer)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._note(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._end_at <= self._steps.made(trainer) < self._steps.total(trainer):
            trainer.should_stop = True

    def figure(self, name: Scalar, trainer: pl.Trainer) -> float:
        """The density now, or what every method has."""
        if name != "density":
            return super().figure(name, trainer)
        parts, _ = counted(self._live, Controller.get(trainer).adapter)
        return sum(part.nonzero for _, part in parts) / sum(part.size for _, part in parts)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut now if the run was stopped in its first stage; draw the curves."""
        super().on_train_end(trainer, pl_module)
        if not self._is_cut:
            rank_zero_warn(
                f"the fit ended after {self._steps.made(trainer)} of {self._cut_at} steps of the first stage: its "
                f"difference is cut to density {self.density} as it is, without fine-tuning."
            )
            self._cut_if_due(trainer, due=True)
        if self.plot:
            parts, _ = counted(self._live, Controller.get(trainer).adapter)  # in every process
            if trainer.is_global_zero:
                self._curve.draw(trainer, f"{self.method}_{self.name}", parts)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the gates change by themselves again."""
        self._release()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let the gates change by themselves again."""
        self._release()
        super().on_exception(trainer, pl_module, exception)

    def _release(self) -> None:
        for _, delta in self._live:
            delta.gates.count()
        self._live, self._gate_groups = [], []

    def _cut_if_due(self, trainer: pl.Trainer, due: bool = False) -> None:
        if not self._is_cut and (due or self._steps.made(trainer) >= self._cut_at):
            controller = Controller.get(trainer)
            controller.exchange(self.cut(controller.adapted.root, controller.adapter))
            self._gate_groups = []
            compare_anew(trainer.callbacks, "the difference is sparse")  # type: ignore[attr-defined]

    def cut(self, root: nn.Module, adapter: StrategyAdapter[Any] | None = None) -> list[Exchange]:
        """Keep the entries of largest magnitude, at fixed places, and forget the gates.

        A Trainer does it between the stages. In a loop of your own, build the optimizer anew afterwards.

        Args:
            root: the adapted root (``adapted.root``).
            adapter: of the Trainer's strategy, in a run.

        Returns:
            Which parameters took the place of which; none where an engine holds them, and they stay.

        Raises:
            PETError: if a difference is not finite, or all are zero.
        """
        deltas = [delta for _, delta in self.differences(root)]
        size = sum(delta.size for delta in deltas)
        wanted = self._budget(size)
        places = largest_entries(deltas, wanted, adapter)
        kept = sum(len(place) for place in places)
        if not kept:
            raise PETError("every difference is zero: nothing was learnt, or l0_weight closed all gates; lower it.")
        if kept < wanted:
            rank_zero_warn(f"only {kept} of {wanted} entries are not zero; a lower l0_weight keeps more gates open.")
        rank_zero_info(f"diff pruning: kept {kept:,} of {size:,} entries ({kept / size:.3%}).")
        return fix(root, deltas, places, adapter)

    # --- what is reported -------------------------------------------------------------------------

    def _note(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parts, penalty = counted(self._live, Controller.get(trainer).adapter)
        values = self._curve.note(trainer.global_step, parts)
        if not self._is_cut:
            values["penalty"] = penalty
        for label, value in values.items():
            pl_module.log(f"pet/{self.method}_{self.name}/{label}", value, on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return self._steps.state() | {"history": self._curve.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of the interrupted run."""
        self._steps.load(state_dict)
        self._curve.history = [list(row) for row in state_dict.get("history", [])]
