"""AdapterBias (Fu et al. 2022)."""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.arguments import one_of
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.adapter_bias import TokenScore, TokenShift
from lightning_pet.layers.delta import Delta
from lightning_pet.model.layer_kinds import host_kind
from lightning_pet.model.named_roles import features, is_norm, named_places
from lightning_pet.model.naming import module_at
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.heads import HEAD, parameters_below
from lightning_pet.targets.patterns import listed_if_given, listed_layers
from lightning_pet.targets.placement import Sublayer, delta_options, resolve_sites
from lightning_pet.targets.targets import resolve_targets

Form = Literal["authors", "survey"]
_CALLED = ("linear", "conv1d_hf")
_log = logging.getLogger(__name__)


class AdapterBiasCallback(PETCallback):
    r"""AdapterBias: one shift per layer, :math:`y = f(x) + \alpha(h)\, v`, whose size depends on the token.

    v [width] starts at zero, so the model starts as the base, bit for bit. Source: Fu et al. 2022.

    Args:
        form: what alpha reads. ``"authors"``: the feed-forward's intermediate activation (with a bias), as in
            the paper and its code; in layers without one that can be read (experts, no feed-forward at all) as
            ``"survey"``, which is said. ``"survey"``: the input x of the feed-forward sub-layer (without a bias), as in
            the overview of Ding et al. 2022.
        share_alpha: one alpha for all layers; v stays per layer.
        layer_norms: also train the norm of every adapted feed-forward and that of the embedding, as the
            paper does.
        exclude_modules: patterns of feed-forwards that stay as they are.
        layers_to_transform: only these layer indices.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if an option is not one of its values.

    Example:
        >>> from lightning_pet import AdapterBiasCallback
        >>> AdapterBiasCallback(form="paper")
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: form='paper': use one of 'authors', 'survey'.
    """

    method: ClassVar[str] = "adapter_bias"
    shards = True
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {"exclude_modules", "layers_to_transform"}

    def __init__(
        self,
        form: Form = "authors",
        share_alpha: bool = False,
        layer_norms: bool = False,
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        one_of("form", form, Form)
        self.form = form
        self.share_alpha = share_alpha
        self.layer_norms = layer_norms
        self.exclude_modules = listed_if_given(exclude_modules)
        self.layers_to_transform = listed_layers(layers_to_transform)

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the feed-forwards.

        Where none has an activation that can be read, alpha reads the input of the sub-layer instead, which is said.

        Raises:
            TargetError: if there is no place for it.
        """
        options: dict[str, Any] = {"exclude": self.exclude_modules or (), "layers": self.layers_to_transform}
        if self.form == "survey":
            return resolve_sites(root, structure, "parallel", **options)
        found: tuple[Target, ...] = ()
        why: TargetError | None = None
        try:
            found = resolve_targets(root, "ffn.down", structure, **options)
        except TargetError as error:
            why = error
        own = tuple(target for target in found if _is_read(root, structure, target))
        hidden = [target for target in found if target not in own]
        if found and not hidden:
            return own
        return (*own, *self._inputs(root, structure, own, hidden, why))

    def _inputs(
        self,
        root: nn.Module,
        structure: Structure,
        own: tuple[Target, ...],
        hidden: Sequence[Target],
        why: TargetError | None,
    ) -> tuple[Target, ...]:
        """Places for the layers whose activations are not seen; what did not run at all is left out."""
        ran = [target for target in hidden if _ran(structure, target)]
        kinds = {site.kind for site in structure.sites}
        kind = next((kind for kind in get_args(Sublayer) if kind in kinds), None) if "ffn" not in kinds else None
        try:
            places = resolve_sites(
                root,
                structure,
                "parallel",
                sublayers=None if kind is None else [kind],
                exclude=self.exclude_modules or (),
                layers=self.layers_to_transform,
                covered=own,
            )
        except TargetError as error:
            if own and not ran:
                places = ()
            elif why is not None:
                raise TargetError(f"{why} The input of a sub-layer is no place either: {error}") from error
            elif not ran:
                raise
            else:
                raise TargetError(
                    f"{ran[0].path} is read without being called as a layer (experts, for example), so the activation "
                    f"in front of it is not seen, and its sub-layer's input is no place either: {error}"
                ) from error
        if places:
            rank_zero_warn(
                f"AdapterBias: in {len(places)} layers alpha reads the input of the sub-layer, as form='survey' does, "
                f"because there is no feed-forward activation that can be read ({places[0].module!r} …)."
            )
        if lost := [target.path for target in hidden if target not in ran]:
            _log.warning("AdapterBias: %s and others did not run in the probing forward: no shift there.", lost[0])
        return places

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build one shift per layer, after the alpha that they share, if they do.

        Raises:
            ArgumentError: if alpha is shared by layers of several sizes.
        """
        alpha = None
        if self.share_alpha:
            read = sorted({self._sizes(root, target)[0] for target in targets})
            if len(read) > 1:
                raise ArgumentError(
                    f"share_alpha=True needs layers of one size, but alpha would read {read} features. "
                    "Set share_alpha=False, or exclude some of them."
                )
            alpha = TokenScore(read[0], bias=self.form == "authors", **delta_options(root, targets[0]))
        shifts = [Insertion(target, self._shift(root, target, alpha)) for target in targets]
        return shifts if alpha is None else [Insertion(Target("", ""), alpha, "alpha"), *shifts]

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the shift for one place, with an alpha of its own."""
        return self._shift(root, target, None)

    def _sizes(self, root: nn.Module, target: Target) -> tuple[int, int]:
        if target.parameter:
            return features(module_at(root, target.module))
        return target.sizes[0], target.sizes[0]

    def _shift(self, root: nn.Module, target: Target, alpha: TokenScore | None) -> TokenShift:
        options = {"bias": bool(target.parameter), "alpha": alpha, **delta_options(root, target)}
        return TokenShift(*self._sizes(root, target), **options)

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of base parameters that train as they are: heads, and norms by option."""
        heads = super().trained(root, targets)
        places = [target for target in targets if target.role != HEAD]
        norms = _norms(root, places) if self.layer_norms else ()
        return tuple(dict.fromkeys((*heads, *parameters_below(root, norms, "layer_norms"))))


def _is_read(root: nn.Module, structure: Structure, target: Target) -> bool:
    """Whether the projection is called as a layer, so that its input, the activation, is seen."""
    called = structure.called is None or target.module in structure.called
    return called and host_kind(module_at(root, target.module), target.parameter) in _CALLED


def _ran(structure: Structure, target: Target) -> bool:
    around = (target.module, target.module.rpartition(".")[0])
    return structure.called is None or bool(structure.called.intersection(around))


def _norms(root: nn.Module, targets: Sequence[Target]) -> list[str]:
    """The norm of every adapted feed-forward, and that of the embedding.

    A feed-forward's norm is the last one in the innermost module around it that has any: in a post-norm block it
    reads the sum, in a pre-norm block it stands in front of the feed-forward.
    """
    children: dict[str, list[str]] = {}
    modules = named_places(root)
    for path, module in modules.items():
        if is_norm(module):
            children.setdefault(path.rpartition(".")[0], []).append(path)
    found: list[str] = []
    for target in targets:
        around = target.module
        while around and around not in children:
            around = around.rpartition(".")[0]
        if around not in children:
            raise TargetError(f"layer_norms=True: there is no norm around {target.path}. Set layer_norms=False.")
        found.append(children[around][-1])
    for parent, norms in children.items():
        beside = any(isinstance(module, nn.Embedding) for module in modules[parent].children())
        apart = not any(f"{target.module}.".startswith(f"{parent}." if parent else "") for target in targets)
        found += [norm for norm in norms if (beside and apart) or "embed" in norm.rpartition(".")[2]]
    return found
