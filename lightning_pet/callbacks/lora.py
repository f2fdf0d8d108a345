"""LoRA and its variants (Hu et al. 2021)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_pet.arguments import at_least, one_of, positive, share, whole
from lightning_pet.callbacks.base import PETCallback, Scalar
from lightning_pet.callbacks.on_layers import OnLayersCallback, by_name
from lightning_pet.errors import ArgumentError, PETError, TargetError, UnsupportedStrategyError
from lightning_pet.exchange.source import read_source
from lightning_pet.insertion.low_rank_places import Options, fitted, gated, is_called, largest_rank, rank_at
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.low_rank_base import Init as LayerInit
from lightning_pet.layers.low_rank_base import LowRank
from lightning_pet.layers.low_rank_hosts import LowRankEmbedding
from lightning_pet.layers.sharding import is_partition, is_sharded
from lightning_pet.model.layer_kinds import host_kind, weight_of
from lightning_pet.model.naming import DEFAULT, module_at, named_modules, named_parameters
from lightning_pet.model.quantised import initialize
from lightning_pet.model.structure import Structure, Target
from lightning_pet.operations.roots import base_of
from lightning_pet.probe.host_inputs import Batches, Place, Study
from lightning_pet.strategies.strategy import accompany_runs
from lightning_pet.targets.patterns import (
    exactly,
    settled,
    value_at,
)

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva"]
Bias = Literal["none", "lora_only", "all"]


class LoRACallback(OnLayersCallback):
    r"""Low-rank adaptation: :math:`y = W x + s\,B A x`, with :math:`s = \alpha / r`.

    The base weight W stays as it is; A (r × in) and B (out × r) train. B starts at zero, so the model
    starts as the base, bit for bit. Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA),
    Liu et al. 2024 (DoRA), Meng et al. 2024 (PiSSA), Büyükakyüz 2024 (OLoRA), Hayou et al. 2024 (LoRA+).

    Args:
        r: rank; at most min(in, out) of every target (see ``clamp_rank``).
        alpha: numerator of the scale.
        dropout: probability of dropping an input of the low-rank branch (not of the base).
        target_modules: roles (``"attention.q"``, ``"ffn.up"``, ``"all-linear"``), suffixes
            (``"q_proj"``), globs (``"encoder.layer.*.output.dense"``), or ``"re:…"``. Every one must hit.
            A fused projection is split: ``"attention.v"`` adapts only v on GPT-2.
        exclude_modules: patterns of the same kinds, taken out again.
        layers_to_transform: only these layer indices. Every pattern must have a target in one of them.
        layers_pattern: name of the list of layers whose indices are meant (``"blocks"``), where the first number in
            the names of modules is that of something else, such as a stage.
        use_rslora: scale by alpha/√r instead of alpha/r.
        use_dora: also train the magnitude of every output feature.
        init: how A and B start. ``"kaiming"`` and ``"gaussian"``: A drawn, B zero. ``"orthogonal"``: both drawn, with
            B A = 0 up to rounding (even ranks). ``"pissa"`` (principal singular vectors) and ``"olora"`` (QR) subtract
            the start values in the delta, so the base weight still stays as it is. ``"eva"``: A from the directions in
            which the inputs of each target vary most, B zero; batches of the training data are read for it before
            the first step, and ranks are shared out by variance.
        eva_rho: with ``init="eva"``: a target gets at most so many times its rank, and possibly none, while the sum of
            all ranks stays; 1: every target its own.
        eva_tau: cosine between a direction before and after a batch from which it counts as settled.
        eva_batches: read at most so many batches.
        eva_whiten: divide directions by the roots of their singular values, as the paper does for images.
        rank_pattern: rank for some targets, by role, suffix, glob or ``"re:…"``, e.g. ``{"attention.q": 16}``. The
            first pattern that hits counts, and every one must count somewhere.
        alpha_pattern: alpha for some targets, likewise.
        clamp_rank: a target that is too small for its rank gets the largest that it can have, which is said,
            instead of an error.
        train_a: train A, too; ``False``: it stays as it was drawn (LoRA-FA, Zhang et al. 2023). Not on tables.
        lora_plus_ratio: learning rate of B over that of A.
        bias: biases that train as well: ``"none"``, those of the targets, or all.
        use_gating: multiply what is added by a trained gate, one number per example (UniPELT); on linear layers that
            are called, without DoRA, ``lora_bias`` or a start from weights. Such a delta never merges.
        lora_bias: B has a bias of its own, which trains; linear layers and convolutions only, and not with DoRA.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range, or two options exclude each other.

    Example:
        >>> from lightning_pet import LoRACallback
        >>> LoRACallback(r=0)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: r=0: the rank must be a positive integer, e.g. r=8.
    """

    method: ClassVar[str] = "lora"
    shards = True
    width: ClassVar[str | None] = "r"
    figures = ("norm", "rank")
    gives_meaning: ClassVar[frozenset[str]] = frozenset({"alpha", "alpha_pattern", "use_rslora"})
    by_pattern: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    may_change: ClassVar[frozenset[str]] = OnLayersCallback.may_change | {
        "dropout",
        "lora_plus_ratio",
        "eva_rho",
        "eva_tau",
        "eva_batches",
        "eva_whiten",
    }

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        target_modules: list[str] | str = ["attention.q", "attention.v"],  # noqa: B006  # never mutated; the CLI shows it
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: Init = "kaiming",
        eva_rho: float = 2.0,
        eva_tau: float = 0.99,
        eva_batches: int = 100,
        eva_whiten: bool = False,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        clamp_rank: bool = False,
        lora_plus_ratio: float = 1.0,
        bias: Bias = "none",
        lora_bias: bool = False,
        use_gating: bool = False,
        train_a: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            **kwargs,
        )
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora, self.use_dora = use_rslora, use_dora
        self.init, self.eva_rho, self.eva_tau = init, eva_rho, eva_tau
        self.eva_batches, self.eva_whiten = eva_batches, eva_whiten
        self.rank_pattern = by_name("rank_pattern", rank_pattern)
        self.alpha_pattern = by_name("alpha_pattern", alpha_pattern)
        self.clamp_rank = clamp_rank
        self.lora_plus_ratio = lora_plus_ratio
        self.bias = bias
        self.lora_bias, self.use_gating, self.train_a = lora_bias, use_gating, train_a
        self._learned: dict[str, Any] | None = None  # ranks and alphas by place that data, or a file, have decided
        self._directions: dict[str, Tensor] = {}  # A of each place, until it is built
        self._validate()
        if init == "eva":
            accompany_runs()  # which know from the start what they go on from

    @property
    def not_for_tasks(self) -> str | None:
        """What one run learns of its data is that of all its tasks."""
        return None if self.init != "eva" else "init='eva' looks at the data of one task. Choose another init."

    @property
    def shares_tasks(self) -> bool:
        """Whether several of it train on engines that share parameters; DoRA was not tested there."""
        return not self.use_dora

    def _validate(self) -> None:
        for label, rank in [
            ("r", self.r),
            *((f"rank_pattern[{k!r}]", v) for k, v in (self.rank_pattern or {}).items()),
        ]:
            whole(label, rank, wanted="the rank must be a positive integer, e.g. r=8.")
        alphas = [("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in (self.alpha_pattern or {}).items())]
        for label, alpha in alphas:
            positive(label, alpha, "must be a positive number; 2·r is a usual choice.", kind=int | float)
        share("dropout", self.dropout, "a probability in [0, 1), e.g. 0.05.", ends="[)")
        positive("lora_plus_ratio", self.lora_plus_ratio, "must be positive; the paper suggests 16.")
        one_of("init", self.init, Init)
        one_of("bias", self.bias, Bias)
        at_least("eva_rho", self.eva_rho, 1, "must be at least 1, which shares nothing out; the paper has 2.")
        share("eva_tau", self.eva_tau, "a cosine in (0, 1], e.g. 0.99.", ends="(]", kind=int | float)
        whole("eva_batches", self.eva_batches)
        if self.use_dora and self.init in ("pissa", "olora"):
            raise ArgumentError(f"use_dora with init={self.init!r}: both replace the start of the weight; choose one.")
        if self.init == "orthogonal":
            ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in (self.rank_pattern or {}).items()}}
            if odd := next((label for label, rank in ranks.items() if rank % 2), None):
                raise ArgumentError(f"{odd}={ranks[odd]}: init='orthogonal' halves the rank, which must be even.")
        if not self.train_a and (self.use_gating or self.lora_plus_ratio != 1):
            other = "use_gating" if self.use_gating else f"lora_plus_ratio={self.lora_plus_ratio:g}"
            raise ArgumentError(f"train_a=False with {other}: that is for an A that trains; choose one.")
        if self.use_gating and (self.use_dora or self.lora_bias or self.init not in ("kaiming", "gaussian", "eva")):
            other = "use_dora" if self.use_dora else "lora_bias" if self.lora_bias else f"init={self.init!r}"
            raise ArgumentError(f"use_gating with {other}: behind a gate there is only the plain B A; choose one.")
        if self.use_dora and self.lora_bias:
            raise ArgumentError("lora_bias with use_dora: DoRA has no place for a bias of B; choose one.")

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the target projections; see :func:`~lightning_pet.targets.targets.resolve_targets`."""
        self._learned, self._directions = None, {}
        return super().resolve(root, structure)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build one low-rank delta per target.

        Raises:
            ArgumentError: if a pattern of ranks or alphas decides for no target.
            TargetError: if the rank is larger than a target allows.
        """
        if self._learned is not None:  # what the patterns decided was replaced
            return PETCallback.insertions(self, root, targets)
        return super().insertions(root, targets)

    def config_at(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Ranks and alphas by place, where their patterns depend on order or are regular expressions."""
        places = [target for target in targets if target.parameter]
        by_pattern = {"rank_pattern": self._ranks, "alpha_pattern": self._alphas}
        return self.config() | {option: settled(patterns, places) for option, patterns in by_pattern.items()}

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the delta that fits the host's class."""
        host = module_at(root, target.module)
        weight = weight_of(host, target.parameter)
        assert weight is not None  # resolve_targets returned it
        rank = rank_at(root, target, self.r, self._ranks, self.clamp_rank)
        alpha = value_at(self._alphas, target, self.alpha)
        scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        init: LayerInit = "kaiming" if self.init == "eva" else self.init
        options = Options(rank, scale, self.dropout, init, self.use_dora, self.lora_bias)
        delta = gated(root, target, options) if self.use_gating else fitted(root, target, options)
        if not self.train_a:
            _freeze_a(delta, target)
        if (directions := self._directions.get(exactly(target))) is not None:
            with torch.no_grad():
                cast(Tensor, delta.a).copy_(directions)
        if not weight.is_meta:
            initialize(delta, host, target.parameter)
        elif self.init in ("pissa", "olora") or self.use_dora:
            raise ArgumentError(
                f"{target.path} is on the meta device, but init={self.init!r} and use_dora={self.use_dora} "
                "need its values. Load the weights first, or use init='kaiming' without DoRA."
            )
        return delta

    @property
    def _ranks(self) -> dict[str, int] | None:
        return self.rank_pattern if self._learned is None else self._learned["rank_pattern"]

    @property
    def _alphas(self) -> dict[str, float] | None:
        return self.alpha_pattern if self._learned is None else self._learned["alpha_pattern"]

    # --- a start from data ----------------------------------------------------------------------

    def look_at_data(self, root: nn.Module, targets: Sequence[Target], batches: Batches | None) -> Sequence[Target]:
        """With ``init="eva"``: find the directions of the targets' inputs, and how many each target gets.

        Raises:
            PETError: if there are no data.
            TargetError: if a target is not a linear layer that is called, or has no values yet.
            UnsupportedStrategyError: if an engine holds the values in parts already.
        """
        if self.init != "eva":
            return targets
        resumed = self.start_from or (batches.resumed if batches is not None else None)
        if resumed is not None:
            return self._as_in(resumed, root, targets)
        if batches is None:
            raise PETError(
                "init='eva' starts from training data, which a Trainer's run has and apply() has not. Pass the "
                "callback to Trainer(callbacks=[…]), or start_from= a file."
            )
        places = {exactly(target): self._place(root, target) for target in targets}
        study = Study(root, places, self.eva_rho, self.eva_tau, self.eva_batches)
        self._directions = study.run(batches, whiten=self.eva_whiten)
        found = {name: len(rows) for name, rows in self._directions.items()}
        alphas = {
            exactly(t): value_at(self.alpha_pattern, t, self.alpha) * found[exactly(t)] / places[exactly(t)].rank
            for t in targets
        }
        self._learn(found, {name: alpha for name, alpha in alphas.items() if found[name]})
        kept = [target for target in targets if found[exactly(target)]]
        rank_zero_info(
            f"init='eva' has read {study.read} batches{'' if study.settled else ' (not all directions are settled)'}: "
            f"{len(kept)} of {len(targets)} targets get ranks of {min(found[exactly(t)] for t in kept)} to "
            f"{max(found.values())}."
        )
        return kept

    def _place(self, root: nn.Module, target: Target) -> Place:
        host = module_at(root, target.module)
        weight = weight_of(host, target.parameter)
        assert weight is not None
        if host_kind(host, target.parameter) not in ("linear", "conv1d_hf") or not is_called(root, target):
            raise TargetError(
                f"{target.path} is in a {type(host).__name__} that is no called linear layer, and init='eva' looks at "
                "the inputs of such. Exclude it with exclude_modules, or choose another init."
            )
        if is_partition(weight) or is_sharded(weight):
            raise UnsupportedStrategyError(
                f"{target.path} is in parts before the run begins, and init='eva' runs the model then. Build the model "
                "whole in __init__ and let the engine share it out (DDP, FSDPStrategy, ZeRO), or choose another init."
            )
        if weight.is_meta:
            raise TargetError(
                f"{target.path} has no values yet (meta device), and init='eva' runs the model. Load the weights first."
            )
        limit = largest_rank(host, target.parameter)
        rank = rank_at(root, target, self.r, self._ranks, self.clamp_rank)
        return Place(host, target.path, rank, limit)

    def _learn(self, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> None:
        self._learned = {
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank and rank != self.r} or None,
            "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != self.alpha} or None,
        }

    def _as_in(self, path: str, root: nn.Module, targets: Sequence[Target]) -> Sequence[Target]:
        """Places and ranks of a checkpoint or file, whose values come later: its data were looked at then."""
        stored = read_source(path, base_of(root), "off", delta=None if self.delta == DEFAULT else self.delta)
        mine = [m for m in stored.methods if (m.method, m.name) == (self.method, self.name)]
        if not mine:
            return targets  # whoever reads the values says so
        self._learned = {option: mine[0].config.get(option) for option in ("rank_pattern", "alpha_pattern")}
        there = {exactly(target) for target in mine[0].targets}
        return [target for target in targets if exactly(target) in there]

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take over what data, or a budget, have decided for a model that is adapted already."""
        super().adopt(config)
        if self.init == "eva" and config.get("init") == "eva":
            self._learned = {option: config.get(option) for option in ("rank_pattern", "alpha_pattern")}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What was learned of data is in the deltas now."""
        self._directions = {}
        super().on_fit_start(trainer, pl_module)

    def __getstate__(self) -> dict[str, Any]:
        """Copies learn from data of their own."""
        return super().__getstate__() | {"_directions": {}}

    def spend_budget(self, root: nn.Module, targets: Sequence[Target]) -> None:
        """Pick a rank, if there is a budget, and say which targets have a lower one than was asked for."""
        super().spend_budget(root, targets)
        low = [
            f"{target.path} ({limit} instead of {rank})"
            for target, limit in self._limits(root, targets)
            if (rank := value_at(self._ranks, target, self.r)) > limit
        ]
        if self.clamp_rank and low:
            rank_zero_warn(
                f"clamp_rank: {len(low)} of {len(targets)} targets are too small for their rank and have a lower one: "
                f"{', '.join(low[:4])}{' …' if len(low) > 4 else ''}."
            )

    def numbers(self, root: nn.Module, targets: Sequence[Target]) -> int:
        """Numbers that the method would train at the present rank.

        Raises:
            TargetError: if the rank is larger than any target allows, so that no budget searches beyond.
        """
        limits = [limit for _, limit in self._limits(root, targets)]
        if limits and self.r > max(limits):
            raise TargetError(f"r={self.r}: no target allows more than {max(limits)}.")
        return super().numbers(root, targets)

    def _limits(self, root: nn.Module, targets: Sequence[Target]) -> list[tuple[Target, int]]:
        modules = named_modules(root)
        return [(target, largest_rank(modules[target.module], target.parameter)) for target in targets]

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of base parameters that train as they are: heads, and biases by option."""
        heads = super().trained(root, targets)
        return tuple(dict.fromkeys((*heads, *self._biases(root, targets))))

    def _biases(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        hosts = {target.module for target in targets}
        names = [name for name, _ in named_parameters(root) if ".pet." not in f".{name}"]
        biases = [name for name in names if "bias" in name.rpartition(".")[2]]
        if self.bias == "none":
            return ()
        chosen = biases if self.bias == "all" else [name for name in biases if name.rpartition(".")[0] in hosts]
        if not chosen:
            raise TargetError(
                f"bias={self.bias!r}: there is no bias in {'the model' if self.bias == 'all' else 'the targets'}; "
                "use bias='none'."
            )
        return tuple(chosen)

    def figure(self, name: Scalar, trainer: pl.Trainer) -> float:
        """The average rank over all targets, or what every method has."""
        if name != "rank":
            return super().figure(name, trainer)
        ranks = [value_at(self._ranks, target, self.r) for target, _ in self.deltas(self.adapted.root)]
        return sum(ranks) / len(ranks)

    def lr_ratios(self, delta_names: Sequence[str]) -> dict[str, float]:
        """LoRA+: B learns ``lora_plus_ratio`` times as fast as A."""
        if self.lora_plus_ratio == 1:
            return {}
        return {name: self.lora_plus_ratio for name in delta_names if name.endswith(".b")}


def _freeze_a(delta: Delta, target: Target) -> None:
    if not isinstance(delta, LowRank) or isinstance(delta, LowRankEmbedding):
        raise TargetError(
            f"{target.path} is a table, whose A starts at zero: with train_a=False nothing would ever change. Exclude "
            "it with exclude_modules, or train A."
        )
    delta.freeze_a()
