"""Base of the methods that change single layers: which ones, by role, name or pattern."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from lightning_pet.arguments import positive, share, some, whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError
from lightning_pet.insertion.change_places import FACTORED_HOSTS
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.weight_change import Drops
from lightning_pet.model.layer_kinds import host_kind
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.patterns import check_patterns, listed, listed_if_given, listed_layers, settled, value_at
from lightning_pet.targets.targets import resolve_targets, with_readers


class OnLayersCallback(PETCallback):
    """A method with one delta for each layer that it changes.

    A method of this kind says in :meth:`serves` on which weights it can sit, and in :meth:`build` what it puts there.

    Args:
        target_modules: roles, suffixes, globs, or ``"re:…"``; see :class:`~lightning_pet.LoRACallback`.
        exclude_modules: patterns of the same kinds, taken out again.
        layers_to_transform: only these layer indices. Every pattern must have a target in one of them.
        layers_pattern: name of the list of layers whose indices are meant (``"blocks"``), where the first number in
            the names of modules is that of something else, such as a stage.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if there is no pattern.
    """

    by_pattern: ClassVar[tuple[str, ...]] = ()
    """Options that hold values by pattern, such as ``rank_pattern``."""
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __init__(
        self,
        *,
        target_modules: list[str] | str = ["attention.q", "attention.v"],  # noqa: B006  # never mutated; the CLI shows it
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.target_modules = listed(target_modules)
        self.exclude_modules = listed_if_given(exclude_modules)
        self.layers_to_transform = listed_layers(layers_to_transform)
        self.layers_pattern = listed_if_given(layers_pattern)
        some("target_modules", self.target_modules, "name at least one role, suffix or pattern, e.g. 'attention.q'.")

    @staticmethod
    def serves(module: nn.Module, parameter: str) -> bool:
        """Whether a delta can sit on this parameter of a module: on any that reads as a matrix, unless told."""
        return host_kind(module, parameter) is not None

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the target weights; see :func:`~lightning_pet.targets.targets.resolve_targets`."""
        found = resolve_targets(
            root,
            self.target_modules,
            structure,
            exclude=self.exclude_modules or (),
            layers=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            hosts=self.serves,
        )
        return with_readers(root, found, structure)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build one delta per target.

        Raises:
            ArgumentError: if a pattern of values decides for no target.
            TargetError: if no delta of these options fits a target.
        """
        for option in self.by_pattern:
            check_patterns(option, getattr(self, option), targets)
        return super().insertions(root, targets)

    def config_at(self, targets: Sequence[Target]) -> dict[str, Any]:
        """The configuration with values by place, where their patterns depend on order or are regular expressions."""
        places = [target for target in targets if target.parameter]
        return self.config() | {option: settled(getattr(self, option), places) for option in self.by_pattern}


class FactoredCallback(OnLayersCallback):
    """A method whose change of a weight is a product of small factors, of rank r and scale alpha / r (LoHa, LoKr).

    Args:
        r: rank.
        alpha: numerator of the scale.
        rank_dropout: probability of leaving out an output feature of the change; active in training only.
        module_dropout: probability of leaving out the whole change of a layer; active in training only.
        rank_pattern: rank for some targets, by role, suffix, glob or ``"re:…"``; the first pattern that hits counts.
        alpha_pattern: alpha for some targets, likewise.
        **kwargs: arguments of :class:`OnLayersCallback`.

    Raises:
        ArgumentError: if a number is out of range.
    """

    by_pattern: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    may_change: ClassVar[frozenset[str]] = OnLayersCallback.may_change | {"rank_dropout", "module_dropout"}

    def __init__(
        self,
        *,
        r: int,
        alpha: float,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.r, self.alpha = r, alpha
        self.rank_dropout, self.module_dropout = rank_dropout, module_dropout
        self.rank_pattern = by_name("rank_pattern", rank_pattern)
        self.alpha_pattern = by_name("alpha_pattern", alpha_pattern)
        ranks = {f"rank_pattern[{key!r}]": value for key, value in (self.rank_pattern or {}).items()}
        alphas = {f"alpha_pattern[{key!r}]": value for key, value in (self.alpha_pattern or {}).items()}
        for label, rank in ({"r": r} | ranks).items():
            whole(label, rank, wanted="the rank must be a positive integer, e.g. r=8.")
        for label, number in ({"alpha": alpha} | alphas).items():
            positive(label, number, "must be a positive number; r is a usual choice.", kind=int | float)
        for label in ("rank_dropout", "module_dropout"):
            share(label, getattr(self, label), "a probability in [0, 1), e.g. 0.05.", ends="[)")

    @staticmethod
    def serves(module: nn.Module, parameter: str) -> bool:
        """Whether a delta can sit on this parameter of a module."""
        return host_kind(module, parameter) in FACTORED_HOSTS

    def rank_and_scale(self, target: Target) -> tuple[int, float]:
        """The rank of a place, and alpha / r."""
        rank = value_at(self.rank_pattern, target, self.r)
        return rank, value_at(self.alpha_pattern, target, self.alpha) / rank

    def drops(self, rescales: bool) -> Drops:
        """What is left out while it trains."""
        return Drops(self.rank_dropout, self.module_dropout, rescales)


def by_name(option: str, values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A copy of the values by pattern of an option, in the one type that files hold.

    Raises:
        ArgumentError: if it is no mapping from texts.
    """
    if values is not None and not (isinstance(values, Mapping) and all(isinstance(key, str) for key in values)):
        raise ArgumentError(f"{option}={values!r}: a number for each pattern is wanted, e.g. {{'attention.q': 4}}.")
    return None if values is None else dict(values)
