"""AdaLoRA: low-rank deltas whose ranks are allocated while they train (Zhang et al. 2023)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lightning_pet.arguments import at_least, positive, share, whole
from lightning_pet.callbacks.base import Scalar
from lightning_pet.callbacks.on_layers import OnLayersCallback
from lightning_pet.errors import ArgumentError, PETError, TargetError
from lightning_pet.insertion.low_rank_places import Forms, Options, fitted
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.side_loss import TOGETHER
from lightning_pet.layers.svd_low_rank import (
    Importance,
    SvdConvWeight,
    SvdLowRank,
    SvdLowRankConv,
    SvdLowRankLinear,
    SvdLowRankParameter,
    allocate,
    rank_budget,
    triplet_scores,
    updated,
)
from lightning_pet.model.adaptation import record_of
from lightning_pet.model.layer_kinds import host_kind, matrix_of
from lightning_pet.model.naming import module_at
from lightning_pet.model.structure import Target
from lightning_pet.strategies.strategy import StrategyAdapter
from lightning_pet.training.controller import Controller

_HOSTS = ("linear", "conv1d_hf", "conv", "weight")
_FORMS = Forms(SvdLowRankLinear, SvdLowRankParameter, SvdLowRankConv, SvdConvWeight)


class AdaLoRACallback(OnLayersCallback):
    r"""AdaLoRA: :math:`y = W x + s\,B\,\mathrm{diag}(e) A x` with :math:`s = \alpha / r_{init}`.

    Every matrix starts with ``init_r`` triplets (a column of B, a number of e, a row of A). While training,
    the triplets of all matrices are compared by importance (sensitivity times uncertainty of their gradients),
    and the number of those that stay falls from ``init_r`` to ``target_r`` per matrix on average: matrices that
    matter keep more. A penalty keeps A and B orthonormal. e starts at zero, so the model starts as the base, bit for
    bit. The file holds the triplets that are left. Source: Zhang et al. 2023, *Adaptive Budget Allocation for
    Parameter-Efficient Fine-Tuning*.

    Ranks are allocated after the optimizer's step, from the gradients that it used: ``on_train_batch_end``.

    Args:
        target_r: average rank at the end.
        init_r: rank of every matrix at the start; at most min(in, out) of every target.
        alpha: numerator of the scale.
        tinit: steps before the first triplet goes. ``None``: a tenth of the run.
        tfinal: steps after the last one has gone. ``None``: three tenths of the run.
        delta_t: steps from one allocation to the next.
        beta1: share of the past in the running sensitivity.
        beta2: share of the past in the running uncertainty.
        orth_reg_weight: factor of the penalty, the mean of ‖A Aᵀ − 1‖ and ‖Bᵀ B − 1‖ over all matrices.
        total_step: optimizer steps of the run. ``None``: what the Trainer's limits and data give.
        dropout: probability of dropping an input of the low-rank branch.
        target_modules: roles, suffixes, globs, or ``"re:…"``; see :class:`LoRACallback`.
        exclude_modules: patterns of the same kinds, taken out again.
        layers_to_transform: only these layer indices. Every pattern must have a target in one of them.
        layers_pattern: name of the list of layers whose indices are meant (``"blocks"``), where the first number in
            the names of modules is that of something else, such as a stage.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range.

    Example:
        >>> from lightning_pet import AdaLoRACallback
        >>> AdaLoRACallback(target_r=8, init_r=4)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: target_r=8 is more than init_r=4: ranks only fall; start with init_r=12.
    """

    method: ClassVar[str] = "adalora"
    mirrors = False
    width: ClassVar[str | None] = "init_r"
    shards = True
    figures = ("norm", "rank")
    gives_meaning: ClassVar[frozenset[str]] = frozenset({"alpha"})
    may_change: ClassVar[frozenset[str]] = OnLayersCallback.may_change | {
        "dropout",
        "orth_reg_weight",
        "total_step",
    }

    def __init__(
        self,
        target_r: int = 8,
        init_r: int = 12,
        alpha: float = 16,
        tinit: int | None = None,
        tfinal: int | None = None,
        delta_t: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
        total_step: int | None = None,
        dropout: float = 0.0,
        target_modules: list[str] | str = ["attention", "ffn"],  # noqa: B006  # never mutated; the CLI shows it
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            **kwargs,
        )
        self.target_r = target_r
        self.init_r = init_r
        self.alpha = alpha
        self.tinit = tinit
        self.tfinal = tfinal
        self.delta_t = delta_t
        self.beta1 = beta1
        self.beta2 = beta2
        self.orth_reg_weight = orth_reg_weight
        self.total_step = total_step
        self.dropout = dropout
        self._validate()
        self._importance: dict[str, Importance] = {}
        self._seen = 0  # optimizer steps that were looked at
        self._first = self._last = 0  # steps between which triplets go
        self._found: tuple[nn.Module, tuple[str, ...], dict[str, SvdLowRank]] | None = None  # in this run

    def _validate(self) -> None:
        for label, number, least in (
            ("target_r", self.target_r, 1),
            ("init_r", self.init_r, 1),
            ("delta_t", self.delta_t, 1),
            ("tinit", self.tinit, 0),
            ("tfinal", self.tfinal, 0),
            ("total_step", self.total_step, 1),
        ):
            if number is not None or label not in ("tinit", "tfinal", "total_step"):
                whole(label, number, least, f"must be an integer of at least {least}.")
        if self.target_r > self.init_r:
            raise ArgumentError(
                f"target_r={self.target_r} is more than init_r={self.init_r}: ranks only fall; start with "
                f"init_r={math.ceil(1.5 * self.target_r)}."
            )
        positive("alpha", self.alpha, "must be a positive number; 2·r is a usual choice.")
        share("beta1", self.beta1, "a share of the past in (0, 1), e.g. 0.85.", ends="()")
        share("beta2", self.beta2, "a share of the past in (0, 1), e.g. 0.85.", ends="()")
        at_least("orth_reg_weight", self.orth_reg_weight, 0, "must be at least 0; 0 is no penalty.")
        share("dropout", self.dropout, "a probability in [0, 1), e.g. 0.05.", ends="[)")

    # --- places and deltas ----------------------------------------------------------------------

    @staticmethod
    def serves(module: nn.Module, parameter: str) -> bool:
        """Whether a delta can sit on this parameter of a module."""
        return host_kind(module, parameter) in _HOSTS

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build one delta of triplets per target.

        Raises:
            TargetError: if ``init_r`` is larger than a target allows.
        """
        found = super().insertions(root, targets)
        deltas = [cast(SvdLowRank, insertion.delta) for insertion in found]
        matrices = sum(2 * delta.e[..., 0].numel() for delta in deltas)
        for delta in deltas:
            delta.penalty.weight = self.orth_reg_weight / matrices
        return found

    def build(self, root: nn.Module, target: Target) -> SvdLowRank:
        """Build the delta that fits the host's class."""
        host = module_at(root, target.module)
        outputs, inputs = matrix_of(host, target.parameter)
        if self.init_r > min(inputs, outputs):
            raise TargetError(
                f"{target.path} is {outputs}×{inputs}: its rank can be at most {min(inputs, outputs)}, not "
                f"{self.init_r}. Lower init_r, or exclude it."
            )
        options = Options(self.init_r, self.alpha / self.init_r, self.dropout)
        return cast(SvdLowRank, fitted(root, target, options, _FORMS))

    def set_width(self, width: int) -> None:
        """Start with this rank; the rank at the end is no larger."""
        super().set_width(width)
        self.target_r = min(self.target_r, width)

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take over both ranks that an equal budget has led to before."""
        super().adopt(config)
        if self.budget is not None and self.budget == config.get("budget"):
            self.target_r = config["target_r"]

    # --- the schedule ---------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the schedule to the length of the run.

        Raises:
            ArgumentError: if the run has no end, or leaves no step to reduce ranks in.
        """
        super().on_train_start(trainer, pl_module)
        self._begin_steps(trainer)
        total = self.total_step or self._steps.total(trainer)
        if not math.isfinite(total) or total < 1:
            raise ArgumentError(
                "the run has no last step, and ranks are reduced over the length of the run. Give the Trainer "
                "max_epochs or max_steps, or AdaLoRACallback(total_step=…)."
            )
        total = int(total)
        self._first = total // 10 if self.tinit is None else self.tinit
        self._last = total - (3 * total // 10 if self.tfinal is None else self.tfinal)
        if self._first >= self._last:
            raise ArgumentError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of a run of {total} to reduce ranks in. "
                "Lower them, or train longer."
            )
        self._seen = self._steps.made(trainer)
        Controller.get(trainer).adapter.watch_gradients(_named(self._triplets(trainer)))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step: note the importance of every number, and keep the triplets that the budget pays for."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = self._steps.made(trainer)
        if step == self._seen:
            return  # gradients are still being accumulated
        self._seen = step
        deltas, adapter = self._triplets(trainer), Controller.get(trainer).adapter
        if step < self._last or (step == self._last and not self._importance):
            self._look(deltas, adapter)
        self._keep(self._allocation(step, deltas), deltas, adapter)
        if step >= self._last:
            self._importance.clear()

    def figure(self, name: Scalar, trainer: pl.Trainer) -> float:
        """The average rank as it is now, or what every method has."""
        if name != "rank":
            return super().figure(name, trainer)
        ranks = [delta.rank for delta in self._triplets(trainer).values()]
        return sum(ranks) / len(ranks)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how the ranks were allocated."""
        super().on_train_end(trainer, pl_module)
        ranks = [delta.rank for delta in self._triplets(trainer).values()]
        mean = sum(ranks) / len(ranks)
        if (step := self._steps.made(trainer)) < self._last:
            rank_zero_warn(
                f"the run ended after step {step}, before the ranks were to reach target_r="
                f"{self.target_r} in step {self._last}: they are {mean:.1f} on average. Set total_step to the length "
                "of the run."
            )
        rank_zero_info(f"AdaLoRA: ranks {min(ranks)} to {max(ranks)}, {mean:.1f} on average.")
        self._found = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the deltas of the last run."""
        return super().__getstate__() | {"_found": None}

    def _triplets(self, trainer: pl.Trainer) -> dict[str, SvdLowRank]:
        """The deltas that train; they are looked for again where others do."""
        root = Controller.get(trainer).adapted.root
        record = record_of(root)
        trains = record.trainable_names if record else ()
        if self._found is None or self._found[0] is not root or self._found[1] is not trains:
            places = self.training_deltas(root)
            deltas = {f"{target.path}:{target.role}": cast(SvdLowRank, delta) for target, delta in places}
            self._found = root, trains, deltas
        return self._found[2]

    @torch.no_grad()
    def _look(self, deltas: dict[str, SvdLowRank], adapter: StrategyAdapter[Any]) -> None:
        """Every process sees whole values and gradients, so that all allocate the same."""
        gradients = dict(adapter.gradients(_named(deltas)))
        lost = [name for name, gradient in gradients.items() if gradient is None]
        if lost:
            raise PETError(
                f"AdaLoRA reads the gradients after every step, and {lost[0]} has none: they were reset right after "
                "the step. Under manual optimization, call zero_grad before backward."
            )
        known = cast(dict[str, Tensor], gradients)
        if not get_total_norm(list(known.values()), math.inf).isfinite():
            return  # the gradient scaler has skipped this step
        for named in _portions(adapter.whole(_named(deltas))):
            before = [self._importance.get(name) or Importance(*map(torch.zeros_like, (v, v))) for name, v in named]
            before = [
                importance
                if importance.sensitivity.device == value.device
                else Importance(*(tensor.to(value.device) for tensor in importance))
                for importance, (_, value) in zip(before, named, strict=True)
            ]
            values = [value for _, value in named]
            after = updated(before, values, [known.pop(name) for name, _ in named], self.beta1, self.beta2)
            self._importance.update(zip((name for name, _ in named), after, strict=True))

    @torch.no_grad()
    def _keep(self, kept: list[Tensor], deltas: dict[str, SvdLowRank], adapter: StrategyAdapter[Any]) -> None:
        """Switch all other triplets off."""
        torch._foreach_copy_([delta.kept for delta in deltas.values()], kept)
        reduced = ~torch.stack([one.all() for one in kept]) if len(kept) else torch.zeros(0)
        left = dict(compress(zip(deltas, kept, strict=True), reduced.tolist()))
        numbers = [(path, deltas[path].e) for path in left]
        adapter.fill(numbers, {path: e * left[path] for path, e in adapter.whole(numbers)})

    def _allocation(self, step: int, deltas: dict[str, SvdLowRank]) -> list[Tensor]:
        """Which triplets stay after a step."""
        due = self._first < step < self._last and step % self.delta_t == 0
        if not self._importance or not (due or step == self._last):
            # Between allocations any triplet may come back; after the last one momentum must bring back none.
            return [delta.kept if step > self._last else torch.ones_like(delta.kept) for delta in deltas.values()]
        initial = sum(delta.kept.numel() for delta in deltas.values())  # of a parameter only a part may be here
        final = self.target_r * (initial // self.init_r)
        scores = [
            triplet_scores(*(self._importance[f"{path}.{name}"].score() for name in ("a", "b", "e"))) for path in deltas
        ]
        return allocate(scores, rank_budget(step, self._first, self._last, initial, final))

    # --- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The running importance, so that a resumed run allocates as the uninterrupted one would have."""
        return {**self._steps.state(), "importance": {name: list(pair) for name, pair in self._importance.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self._steps.load(state_dict)
        self._importance = {name: Importance(*pair) for name, pair in state_dict["importance"].items()}


def _portions(named: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Several at a time, and no more than the work on them is worth in memory."""
    found, size = [], 0
    for name, tensor in named:
        found.append((name, tensor))
        size += tensor.numel()
        if size > TOGETHER:
            yield found
            found, size = [], 0
    if found:
        yield found


def _named(deltas: Mapping[str, SvdLowRank]) -> list[tuple[str, Tensor]]:
    return [(f"{path}.{name}", getattr(delta, name)) for path, delta in deltas.items() for name in ("a", "b", "e")]
