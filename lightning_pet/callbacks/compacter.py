"""Compacter, Compacter++, PHM adapter and low-rank adapter (Karimi Mahabadi et al. 2021)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_pet.arguments import at_least, one_of, positive, whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.bottleneck import activation
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.phm import PHMBottleneck, PHMRule, check_divisible
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.parameters import norm_parameters
from lightning_pet.targets.patterns import listed_if_given, listed_layers
from lightning_pet.targets.placement import check_narrower, delta_options, resolve_sites

Placement = Literal["both", "ffn"]


class CompacterCallback(PETCallback):
    r"""Compacter: bottleneck adapters whose two layers are sums of Kronecker products, :math:`\sum_i A_i \otimes B_i`.

    After attention and feed-forward, :math:`h \leftarrow h + up(\sigma(down(h)))`, with a rule of n matrices
    A_i [n, n] that all adapters share and slices :math:`B_i = s_i t_i^\top` of their own. Sources: Karimi Mahabadi
    et al. 2021 (Compacter, Compacter++, PHM and low-rank adapters), Zhang et al. 2021 (PHM layers).

    Args:
        phm_dim: n, the number of Kronecker products; divides the width and the bottleneck. 1: low-rank adapter
            (without a rule).
        rank: rank of the slices.
        reduction_factor: width over bottleneck; the quotient is rounded down.
        bottleneck_size: features of the bottleneck; takes the place of ``reduction_factor``.
        shared_rule: one rule for all adapters, encoder and decoder, both layers; False: two in every adapter.
            Default: shared if ``factorized``, as in the paper.
        placement: ``"both"``: after attention and feed-forward (Compacter); ``"ffn"``: after the feed-forward
            only (Compacter++).
        factorized: slices of low rank; False: full slices (PHM adapter; with ``phm_dim=1``, a dense adapter).
        non_linearity: between the layers, e.g. ``"gelu_new"``, ``"gelu"``, ``"relu"``, ``"silu"``.
        rule_init: standard deviation of the rule at the start; default: 1e-4 if shared, else 0.01.
        cross_attention: also after cross-attention (``placement="both"``).
        layer_norms: also train the base's norms, as the paper does.
        drop_layers: none in the first so many layers of every stack (AdapterDrop).
        exclude_modules: patterns of sub-layers that stay as they are.
        layers_to_transform: only these layer indices.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range, or ``bottleneck_size`` is not divisible by ``phm_dim``.

    Example:
        >>> from lightning_pet import CompacterCallback
        >>> CompacterCallback(phm_dim=0)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: phm_dim=0: must be a positive integer.
    """

    method: ClassVar[str] = "compacter"
    shards = True
    width: ClassVar[str | None] = "bottleneck_size"
    gives_meaning: ClassVar[frozenset[str]] = frozenset({"non_linearity"})
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {"exclude_modules", "layers_to_transform"}

    def __init__(
        self,
        phm_dim: int = 4,
        rank: int = 1,
        reduction_factor: float = 32,
        bottleneck_size: int | None = None,
        shared_rule: bool | None = None,
        placement: Placement = "both",
        factorized: bool = True,
        non_linearity: str = "gelu_new",
        rule_init: float | None = None,
        cross_attention: bool = False,
        layer_norms: bool = False,
        drop_layers: int = 0,
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.phm_dim = phm_dim
        self.rank = rank
        self.reduction_factor = reduction_factor
        self.bottleneck_size = bottleneck_size
        self.shared_rule = shared_rule
        self.placement = placement
        self.factorized = factorized
        self.non_linearity = non_linearity
        self.rule_init = rule_init
        self.cross_attention = cross_attention
        self.layer_norms = layer_norms
        self.drop_layers = drop_layers
        self.exclude_modules = listed_if_given(exclude_modules)
        self.layers_to_transform = listed_layers(layers_to_transform)
        self._validate()

    def _validate(self) -> None:
        whole("phm_dim", self.phm_dim)
        whole("rank", self.rank)
        if self.bottleneck_size is not None:
            whole("bottleneck_size", self.bottleneck_size)
        positive("reduction_factor", self.reduction_factor, "must be positive; the paper's is 32.")
        one_of("placement", self.placement, Placement)
        if self.rule_init is not None:
            positive("rule_init", self.rule_init, "a standard deviation, e.g. 1e-4; 0 would never train.")
        if self.bottleneck_size is not None:
            check_divisible("bottleneck_size", self.bottleneck_size, self.phm_dim)
        at_least("drop_layers", self.drop_layers, 0, "a number of layers, 0 or more.")
        activation(self.non_linearity)

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the outputs of attention and feed-forward.

        Raises:
            TargetError: if there are none, or one cannot be adapted.
        """
        return resolve_sites(
            root,
            structure,
            sublayers=("ffn",) if self.placement == "ffn" else None,
            cross_attention=self.cross_attention,
            layers=self.layers_to_transform,
            drop_layers=self.drop_layers,
            exclude=self.exclude_modules or (),
        )

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build the shared rule, if there is one, and an adapter per place."""
        rule = None
        if self._shares():
            rule = PHMRule(self.phm_dim, std=self.rule_init or 1e-4, **delta_options(root, targets[0]))
        adapters = [Insertion(target, self._adapter(root, target, rule)) for target in targets]
        return adapters if rule is None else [Insertion(Target("", ""), rule, "rule"), *adapters]

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the adapter for one place, with a rule of its own."""
        return self._adapter(root, target, None)

    def _shares(self) -> bool:
        return self.phm_dim > 1 and (self.factorized if self.shared_rule is None else self.shared_rule)

    def _adapter(self, root: nn.Module, target: Target, rule: PHMRule | None) -> PHMBottleneck:
        width = target.sizes[0]
        size = self.bottleneck_size or int(width / self.reduction_factor)
        check_divisible("width", width, self.phm_dim, f"{target.path}: ", fixed=True)
        if self.bottleneck_size is None:
            where = f"{target.path}: reduction_factor={self.reduction_factor:g} makes of width {width} "
            check_divisible("bottleneck_size", size, self.phm_dim, where)
        return PHMBottleneck(
            width,
            size,
            self.phm_dim,
            rank=self.rank if self.factorized else None,
            non_linearity=self.non_linearity,
            rule=rule,
            rule_std=self.rule_init or 0.01,
            **delta_options(root, target),
        )

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of base parameters that train as they are: heads, and norms by option."""
        norms = norm_parameters(root, self.module) if self.layer_norms else ()
        return tuple(dict.fromkeys((*super().trained(root, targets), *norms)))

    def numbers(self, root: nn.Module, targets: Sequence[Target]) -> int:
        """Numbers that the method would train at the present bottleneck.

        Raises:
            TargetError: if a place is narrower than it, so that no budget buys what is no bottleneck.
        """
        check_narrower(self.bottleneck_size, targets)
        return super().numbers(root, targets)

    def set_width(self, width: int) -> None:
        """Size the bottleneck in units of ``phm_dim``, which must divide it."""
        self.bottleneck_size = width * self.phm_dim
