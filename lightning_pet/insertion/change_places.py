"""Methods whose change is made of small factors (LoKr, LoHa): their places, ranks by pattern, and what fits where."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from lightning_pet.arguments import positive, share, some, whole
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.low_rank_places import is_called
from lightning_pet.insertion.method import Insertion, suffix_of
from lightning_pet.layers.delta import Delta, options_beside
from lightning_pet.layers.weight_change import Drops, Form
from lightning_pet.model.layer_kinds import host_kind, matrix_of, transposed, weight_of
from lightning_pet.model.naming import module_at
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.patterns import check_patterns, settled, value_at
from lightning_pet.targets.targets import resolve_targets, with_readers

_HOSTS = ("linear", "conv1d_hf", "conv", "weight")


def form_at(root: nn.Module, target: Target) -> tuple[Form, bool]:
    """How the weight of a place reads as matrices, and whether its layer is a linear one that is called.

    Raises:
        TargetError: if which way the weight lies cannot be told.
    """
    host = module_at(root, target.module)
    weight = weight_of(host, target.parameter)
    assert weight is not None  # resolve_targets returned it
    kind = host_kind(host, target.parameter)
    outputs, inputs = matrix_of(host, target.parameter)
    if kind == "conv":
        conv = cast(nn.Conv2d, host)
        return Form(outputs, conv.in_channels // conv.groups, tuple(conv.kernel_size)), False
    if is_called(root, target) and kind in ("linear", "conv1d_hf"):
        return Form(outputs, inputs, transposed=kind == "conv1d_hf", rows=target.rows), True
    turned = transposed(host, target.parameter)
    if turned is None and weight.is_meta and any(True for _ in host.buffers()):
        raise TargetError(
            f"{target.path} is {'×'.join(map(str, weight.shape))} in a {type(host).__name__}, whose forward is no "
            "plain product: whether its rows or its columns are the outputs cannot be told on the meta device. Exclude "
            "it with exclude_modules, or load the weights first."
        )
    experts = tuple(weight.shape[:-2])
    return Form(outputs, inputs, experts=experts, transposed=bool(turned), rows=target.rows), False


def beside(root: nn.Module, target: Target) -> dict[str, Any]:
    """Device and dtype of a delta's parameters at a place."""
    weight = weight_of(module_at(root, target.module), target.parameter)
    assert weight is not None
    return options_beside(weight)


class Factored:
    """What such methods have in common; mixed in before :class:`PETCallback`.

    A class has the attributes ``r``, ``alpha``, ``rank_pattern``, ``alpha_pattern``, ``target_modules``,
    ``exclude_modules``, ``layers_to_transform``, ``layers_pattern``, ``rank_dropout`` and ``module_dropout``.
    """

    def checked_options(self) -> None:
        """Raise ArgumentError unless these attributes are in their ranges."""
        own = cast(Any, self)
        for label, patterns in (("rank_pattern", own.rank_pattern), ("alpha_pattern", own.alpha_pattern)):
            if patterns is not None and not (
                isinstance(patterns, Mapping) and all(isinstance(key, str) for key in patterns)
            ):
                raise ArgumentError(
                    f"{label}={patterns!r}: a number for each pattern is wanted, e.g. {{'attention.q': 4}}."
                )
            setattr(self, label, None if patterns is None else dict(patterns))  # files hold no other mapping
        ranks = {"r": own.r} | {f"rank_pattern[{key!r}]": value for key, value in (own.rank_pattern or {}).items()}
        alphas = {f"alpha_pattern[{key!r}]": value for key, value in (own.alpha_pattern or {}).items()}
        for label, rank in ranks.items():
            whole(label, rank, wanted="the rank must be a positive integer, e.g. r=8.")
        for label, alpha in ({"alpha": own.alpha} | alphas).items():
            positive(label, alpha, "must be a positive number; r is a usual choice.", kind=int | float)
        for label in ("rank_dropout", "module_dropout"):
            share(label, getattr(own, label), "a probability in [0, 1), e.g. 0.05.", ends="[)")
        some("target_modules", own.target_modules, "name at least one role, suffix or pattern, e.g. 'attention.q'.")

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the target layers; see :func:`~lightning_pet.targets.targets.resolve_targets`."""
        own = cast(Any, self)
        found = resolve_targets(
            root,
            own.target_modules,
            structure,
            exclude=own.exclude_modules or (),
            layers=own.layers_to_transform,
            layers_pattern=own.layers_pattern,
            hosts=lambda module, parameter: host_kind(module, parameter) in _HOSTS,
        )
        return with_readers(root, found, structure)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build one delta per target.

        Raises:
            ArgumentError: if a pattern of ranks or alphas decides for no target.
        """
        own = cast(Any, self)
        check_patterns("rank_pattern", own.rank_pattern, targets)
        check_patterns("alpha_pattern", own.alpha_pattern, targets)
        return [Insertion(target, self.build(root, target), suffix_of(target)) for target in targets]

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the delta of one place."""
        raise NotImplementedError

    def config_at(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Ranks and alphas by place, where their patterns depend on order or are regular expressions."""
        own = cast(Any, self)
        places = [target for target in targets if target.parameter]
        by_pattern = {"rank_pattern": own.rank_pattern, "alpha_pattern": own.alpha_pattern}
        config: dict[str, Any] = own.config()
        return config | {option: settled(patterns, places) for option, patterns in by_pattern.items()}

    def rank_and_scale(self, target: Target) -> tuple[int, float]:
        """The rank of a place, and alpha / r."""
        own = cast(Any, self)
        rank = value_at(own.rank_pattern, target, own.r)
        return rank, value_at(own.alpha_pattern, target, own.alpha) / rank

    def drops(self, rescales: bool) -> Drops:
        """What is left out while it trains."""
        own = cast(Any, self)
        return Drops(own.rank_dropout, own.module_dropout, rescales)
