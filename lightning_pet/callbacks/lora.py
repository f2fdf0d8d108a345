"""LoRA and its variants (Hu et al. 2021)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.arguments import one_of, positive, share, some, whole
from lightning_pet.callbacks.base import PETCallback, Scalar
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.low_rank_places import Options, fitted, largest_rank, rank_at
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.delta import Delta
from lightning_pet.model.layer_kinds import host_kind, weight_of
from lightning_pet.model.naming import module_at, named_modules, named_parameters
from lightning_pet.model.quantised import initialize
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.patterns import check_patterns, listed, listed_if_given, listed_layers, settled, value_at
from lightning_pet.targets.targets import resolve_targets, with_readers

Init = Literal["kaiming", "gaussian", "pissa", "olora"]
Bias = Literal["none", "lora_only", "all"]


class LoRACallback(PETCallback):
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
        init: how A and B start. ``"pissa"`` (principal singular vectors) and ``"olora"`` (QR) subtract
            the start values in the delta, so the base weight still stays as it is.
        rank_pattern: rank for some targets, by role, suffix, glob or ``"re:…"``, e.g. ``{"attention.q": 16}``. The
            first pattern that hits counts, and every one must count somewhere.
        alpha_pattern: alpha for some targets, likewise.
        clamp_rank: a target that is too small for its rank gets the largest that it can have, which is said,
            instead of an error.
        lora_plus_ratio: learning rate of B over that of A.
        bias: biases that train as well: ``"none"``, those of the targets, or all.
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
    gives_meaning: ClassVar[frozenset[str]] = frozenset({"alpha", "use_rslora"})
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "dropout",
        "lora_plus_ratio",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
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
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        clamp_rank: bool = False,
        lora_plus_ratio: float = 1.0,
        bias: Bias = "none",
        lora_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = listed(target_modules)
        self.exclude_modules = listed_if_given(exclude_modules)
        self.layers_to_transform = listed_layers(layers_to_transform)
        self.layers_pattern = listed_if_given(layers_pattern)
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        self.init = init
        self.rank_pattern = rank_pattern
        self.alpha_pattern = alpha_pattern
        self.clamp_rank = clamp_rank
        self.lora_plus_ratio = lora_plus_ratio
        self.bias = bias
        self.lora_bias = lora_bias
        self._validate()

    @property
    def shares_tasks(self) -> bool:
        """Whether several of it train on engines that share parameters; DoRA was not tested there."""
        return not self.use_dora

    def _validate(self) -> None:
        for label, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if patterns is not None and not (
                isinstance(patterns, Mapping) and all(isinstance(k, str) for k in patterns)
            ):
                raise ArgumentError(
                    f"{label}={patterns!r}: a number for each pattern is wanted, e.g. {{'attention.q': 4}}."
                )
            setattr(self, label, None if patterns is None else dict(patterns))  # files hold no other mapping
        for label, rank in [
            ("r", self.r),
            *((f"rank_pattern[{k!r}]", v) for k, v in (self.rank_pattern or {}).items()),
        ]:
            whole(label, rank, wanted="the rank must be a positive integer, e.g. r=8.")
        alphas = [("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in (self.alpha_pattern or {}).items())]
        for label, alpha in alphas:
            positive(label, alpha, "must be a positive number; 2·r is a usual choice.", kind=int | float)
        share("dropout", self.dropout, "a probability in [0, 1), e.g. 0.05.", ends="[)")
        some("target_modules", self.target_modules, "name at least one role, suffix or pattern, e.g. 'attention.q'.")
        positive("lora_plus_ratio", self.lora_plus_ratio, "must be positive; the paper suggests 16.")
        one_of("init", self.init, Init)
        one_of("bias", self.bias, Bias)
        if self.use_dora and self.init in ("pissa", "olora"):
            raise ArgumentError(f"use_dora with init={self.init!r}: both replace the start of the weight; choose one.")
        if self.use_dora and self.lora_bias:
            raise ArgumentError("lora_bias with use_dora: DoRA has no place for a bias of B; choose one.")

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the target projections; see :func:`~lightning_pet.targets.targets.resolve_targets`."""
        found = resolve_targets(
            root,
            self.target_modules,
            structure,
            exclude=self.exclude_modules or (),
            layers=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            hosts=lambda module, parameter: host_kind(module, parameter) is not None,
        )
        return with_readers(root, found, structure)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build one low-rank delta per target.

        Raises:
            ArgumentError: if a pattern of ranks or alphas decides for no target.
            TargetError: if the rank is larger than a target allows.
        """
        check_patterns("rank_pattern", self.rank_pattern, targets)
        check_patterns("alpha_pattern", self.alpha_pattern, targets)
        return super().insertions(root, targets)

    def config_at(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Ranks and alphas by place, where their patterns depend on order or are regular expressions."""
        places = [target for target in targets if target.parameter]
        by_pattern = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        return self.config() | {option: settled(patterns, places) for option, patterns in by_pattern.items()}

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the delta that fits the host's class."""
        host = module_at(root, target.module)
        weight = weight_of(host, target.parameter)
        assert weight is not None  # resolve_targets returned it
        rank = rank_at(root, target, self.r, self.rank_pattern, self.clamp_rank)
        alpha = value_at(self.alpha_pattern, target, self.alpha)
        scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        delta = fitted(root, target, Options(rank, scale, self.dropout, self.init, self.use_dora, self.lora_bias))
        if not weight.is_meta:
            initialize(delta, host, target.parameter)
        elif self.init in ("pissa", "olora") or self.use_dora:
            raise ArgumentError(
                f"{target.path} is on the meta device, but init={self.init!r} and use_dora={self.use_dora} "
                "need its values. Load the weights first, or use init='kaiming' without DoRA."
            )
        return delta

    def spend_budget(self, root: nn.Module, targets: Sequence[Target]) -> None:
        """Pick a rank, if there is a budget, and say which targets have a lower one than was asked for."""
        super().spend_budget(root, targets)
        low = [
            f"{target.path} ({limit} instead of {rank})"
            for target, limit in self._limits(root, targets)
            if (rank := value_at(self.rank_pattern, target, self.r)) > limit
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
        ranks = [value_at(self.rank_pattern, target, self.r) for target, _ in self.deltas(self.adapted.root)]
        return sum(ranks) / len(ranks)

    def lr_ratios(self, delta_names: Sequence[str]) -> dict[str, float]:
        """LoRA+: B learns ``lora_plus_ratio`` times as fast as A."""
        if self.lora_plus_ratio == 1:
            return {}
        return {name: self.lora_plus_ratio for name in delta_names if name.endswith(".b")}
