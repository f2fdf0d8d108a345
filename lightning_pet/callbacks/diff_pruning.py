"""Diff pruning (Guo, Rush and Kim 2021)."""

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import zip_longest
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pet.callbacks.base import PETCallback
from lightning_pet.core.adaptation import renew
from lightning_pet.core.heads import find_heads
from lightning_pet.core.insertion import base_class
from lightning_pet.core.method import Insertion
from lightning_pet.core.naming import join, named_modules
from lightning_pet.core.structure import Structure, Target
from lightning_pet.core.targets import suggest
from lightning_pet.engine.controller import Controller
from lightning_pet.engine.exchanges import clip_norm, refuse_exchanges
from lightning_pet.engine.figures import Curve, save_figure
from lightning_pet.engine.parameter_groups import Exchange
from lightning_pet.errors import ArgumentError, PETError, TargetError
from lightning_pet.layers.delta import Delta, Tied
from lightning_pet.layers.gated_weight import Form
from lightning_pet.layers.hard_concrete import HardConcrete, mixed
from lightning_pet.layers.magnitude import largest
from lightning_pet.layers.sparse_difference import Kind, SparseDifference

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
        l0_weight: factor of the expected number of open gates beside the loss. The smaller the model, the
            larger it may be.
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
        embeddings: include embedding tables, and what is tied to one.
        norms: include the weights and biases of normalisations.
        exclude_modules: modules or parameters to leave out: ends of names, or globs. Every one must hit.
        seed: of the random gates.
        plot: draw density and expected density over the steps into the log folder, if matplotlib is installed.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`. Task heads train as they
            are; ``modules_to_save=[]`` gives them differences as well.

    Raises:
        ArgumentError: if a number is out of range.

    Example:
        >>> from lightning_pet import DiffPruningCallback
        >>> DiffPruningCallback(density=0)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: density=0: a share in (0, 1], e.g. 0.005 for half a percent.
    """

    method: ClassVar[str] = "diff_pruning"
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "exclude_modules",
        "embeddings",
        "norms",
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
        exclude_modules: list[str] | None = None,
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
        self.exclude_modules = exclude_modules
        self.seed = seed
        self.plot = plot
        self._validate()
        self._history: list[list[float]] = []  # step, density, expected density
        self._cut_at = self._end_at = 0

    def _validate(self) -> None:
        if not 0 < self.density <= 1:
            raise ArgumentError(f"density={self.density}: a share in (0, 1], e.g. 0.005 for half a percent.")
        if len(self.stages) != 2 or not self.stages[0] > 0 <= self.stages[1] or sum(self.stages) > 1 + 1e-9:
            raise ArgumentError(
                f"stages={tuple(self.stages)}: two shares of the run, the first positive, that add up to at most 1, "
                "e.g. (0.6, 0.4)."
            )
        for label, value in (("alpha_lr", self.alpha_lr), ("alpha_clip", self.alpha_clip)):
            if not math.isfinite(value) or value <= 0:
                raise ArgumentError(f"{label}={value}: must be a positive number, e.g. {label}=0.1.")
        if not math.isfinite(self.l0_weight) or self.l0_weight < 0:
            raise ArgumentError(f"l0_weight={self.l0_weight}: must not be negative; the paper uses 1.25e-7.")
        if not math.isfinite(self.alpha_init):
            raise ArgumentError(f"alpha_init={self.alpha_init}: must be a number, e.g. 5.0.")
        allowed = {"penalty": get_args(Form), "gates": get_args(GatesOf), "state": get_args(StateType)}
        for label, words in allowed.items():
            if getattr(self, label) not in words:
                raise ArgumentError(f"{label}={getattr(self, label)!r}: use {' or '.join(map(repr, words))}.")
        if len(self.stretch) != 2:
            raise ArgumentError(f"stretch={tuple(self.stretch)}: two numbers, e.g. (-1.5, 1.5).")
        self._law()

    def _law(self) -> HardConcrete:
        return HardConcrete(self.stretch[0], self.stretch[1], self.temperature)

    # --- places and deltas ------------------------------------------------------------------------

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Every parameter but those of heads and of what the options leave out.

        Raises:
            TargetError: if an exclusion hits nothing, a parameter cannot be moved, or none is left.
        """
        places = [
            (path, name, parameter, module)
            for path, module in named_modules(root).items()
            if "pet" not in path.split(".")
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        heads = find_heads(root, ()) if self.modules_to_save is None else self.modules_to_save
        self._check_exclusions([join(path, name) for path, name, *_ in places])
        # By identity: what is tied to something left out is left out with it.
        left_out = {id(p) for path, name, p, m in places if self._is_left_out(path, name, m, heads)}
        kept = [(path, name, p) for path, name, p, _ in places if id(p) not in left_out]
        for path, name, parameter in kept:
            if not parameter.is_floating_point():
                raise TargetError(
                    f"{join(path, name)} is stored as {parameter.dtype}: no difference can be added to it. Exclude it "
                    "with exclude_modules, or load the base in floating point."
                )
        if not kept:
            raise TargetError("no parameter is left for diff pruning; exclude less.")
        return tuple(Target(path, name) for path, name, _ in kept)

    def _is_left_out(self, path: str, name: str, module: nn.Module, heads: Sequence[str]) -> bool:
        if any(f".{head}." in f".{path}." for head in heads):
            return True
        if not self.embeddings and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return True
        if not self.norms and "norm" in base_class(module).__name__.lower():
            return True
        return any(_hits(pattern, join(path, name)) for pattern in self.exclude_modules or ())

    def _check_exclusions(self, names: list[str]) -> None:
        for pattern in self.exclude_modules or ():
            if not any(_hits(pattern, name) for name in names):
                raise TargetError(f"exclude_modules: {pattern!r} hits no parameter.{suggest(pattern, names)}")

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """One difference per weight; modules that share a weight share its difference.

        Raises:
            TargetError: if the density leaves no weight at all.
        """
        modules = named_modules(root)
        first: dict[int, Delta] = {}
        found = []
        for target in targets:
            parameter = modules[target.module]._parameters[target.parameter]
            suffix = "" if target.parameter == "weight" else target.parameter
            if id(parameter) in first:
                found.append(Insertion(target, Tied(first[id(parameter)]), suffix))
                continue
            assert parameter is not None  # resolve found it
            first[id(parameter)] = self._difference(parameter, len(first))
            found.append(Insertion(target, first[id(parameter)], suffix))
        size = sum(delta.size for delta in first.values() if isinstance(delta, SparseDifference))
        if self._budget(size) < 1:
            raise TargetError(
                f"density={self.density} leaves none of {size} weights; the smallest that leaves one is {1 / size:.2g}."
            )
        return found

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the difference of one weight."""
        return self.insertions(root, [target])[0].delta

    def _difference(self, parameter: nn.Parameter, index: int) -> SparseDifference:
        kinds: dict[tuple[str, bool], Kind] = {("weight", True): "both", ("weight", False): "weight"}
        return SparseDifference(
            tuple(parameter.shape),
            self._law(),
            kind=kinds.get((self.gates, self.structured), "group"),
            form=self.penalty,
            l0_weight=self.l0_weight,
            alpha=self.alpha_init,
            seed=mixed(self.seed, index),
            device=parameter.device,
            dtype=torch.float64 if parameter.dtype == torch.float64 else torch.float32,
            gate_dtype=torch.bfloat16 if self.state == "bf16" else None,
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
        return {name: {**plain, "lr": self.alpha_lr} if _is_gate(name) else plain for name in delta_names}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip the gradients of the gates; once, name the weights that no gradient reaches."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        differences = self.differences(Controller.get(trainer).adapted.root)
        clip_norm(trainer, optimizer, [p for _, delta in differences for p in delta.gate_parameters], self.alpha_clip)
        if not self._looked:
            self._looked = True
            self._report_unreached(differences)

    def _report_unreached(self, differences: Sequence[tuple[Target, SparseDifference]]) -> None:
        unreached = [target.path for target, delta in differences if delta.w is not None and delta.w.grad is None]
        if len(unreached) == len(differences) and not any(delta.is_fixed for _, delta in differences):
            raise PETError("no weight received a gradient: the graph is cut above all of them (torch.no_grad?).")
        if unreached:
            more = f" and {len(unreached) - 4} more" if len(unreached) > 4 else ""
            rank_zero_warn(
                f"no gradient reaches {', '.join(unreached[:4])}{more}: the model does not use them, or not through "
                "the module that owns them, so their difference stays zero. exclude_modules leaves them out."
            )

    # --- the stages -------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse runs in which parameters cannot be exchanged."""
        if stage == "fit":
            refuse_exchanges(trainer, "diff pruning")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide at which steps the stages end.

        Raises:
            ArgumentError: if the length of the run is not known, or a stage has no step.
        """
        differences = self.differences(Controller.get(trainer).adapted.root)
        self._looked = False
        for _, delta in differences:
            delta.train()  # a model may be trained in evaluation mode; its gates are random all the same
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ArgumentError(
                "the length of this run is not known, so neither are its stages: set max_steps or max_epochs of the "
                "Trainer, and limit_train_batches if the data has no length."
            )
        if all(delta.is_fixed for _, delta in differences):
            self._cut_at, self._end_at = 0, int(steps)
            return
        shares = [Fraction(str(share)) for share in self.stages]
        self._cut_at, self._end_at = round(shares[0] * int(steps)), round(sum(shares) * int(steps))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._cut_at = self._end_at = max(self._cut_at, 1)
        elif self._cut_at < 1 or (shares[1] and self._end_at <= self._cut_at):
            raise ArgumentError(
                f"stages={tuple(self.stages)} of a run of {int(steps)} optimizer steps: a stage has none. Train longer, "
                "or change the shares."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw this step's gates: they depend on seed and step alone, on every rank and after a resume."""
        self._cut_if_due(trainer)
        for _, delta in self.differences(Controller.get(trainer).adapted.root):
            delta.gates.begin(trainer.global_step, batch_idx)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if any(id(parameter) in self._gate_ids for parameter in group["params"]):
                    group["lr"] = self.alpha_lr

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Cut after the last step of the first stage; stop after that of the second."""
        self._cut_if_due(trainer)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._note(trainer, pl_module)
        if trainer.global_step >= self._end_at:
            trainer.should_stop = True
