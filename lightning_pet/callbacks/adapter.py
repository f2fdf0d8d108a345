"""Bottleneck adapters (Houlsby et al. 2019 and others), also dropped in lower layers (AdapterDrop)."""

import math
from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
from torch import nn

from lightning_pet.arguments import one_of, positive, some, whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.layers.bottleneck import BehindNorm, Bottleneck, Init, ParallelBottleneck, activation
from lightning_pet.model.structure import Structure, Target
from lightning_pet.strategies.strategy import adapter_for
from lightning_pet.targets.parameters import norm_parameters
from lightning_pet.targets.patterns import listed_if_given, listed_layers
from lightning_pet.targets.placement import Placement, Sublayer, check_narrower, delta_options, resolve_sites
from lightning_pet.training.controller import Controller


class AdapterCallback(PETCallback):
    r"""Bottleneck adapters: :math:`h \leftarrow h + s\,W_{up}\,\sigma(W_{down} h + b_{down}) + b_{up}`.

    Two thin layers, k features wide in between, on the residual stream. Sources: Houlsby et al. 2019; Pfeiffer et al.
    2020; He et al. 2022 (parallel); Lin et al. 2020 (``inner_norm``); Rücklé et al. 2020 (AdapterDrop).

    Args:
        placement: ``"houlsby"``: on the output of every sub-layer, before its residual sum; ``"pfeiffer"``: behind
            the sum of the feed-forward and, in a post-norm model, its norm; ``"parallel"``: beside the feed-forward,
            with the same input (not normalised in a pre-norm model).
        bottleneck_size: features in between, k; takes the place of ``reduction_factor``.
        reduction_factor: width of the stream over k; the quotient is rounded down.
        non_linearity: between the layers: ``"gelu"``, ``"relu"``, ``"silu"`` (``"swish"``), ``"gelu_new"``,
            ``"linear"`` (none) … Default: gelu for ``"houlsby"``, relu for the others.
        scale: factor s; 4 in the scaled parallel adapter of He et al.
        sublayers: which sub-layers: ``"attention"``, ``"ffn"``, ``"mixer"`` (without softmax attention, as in Mamba).
            Default: all that exist for ``"houlsby"``, ``"ffn"`` for the others.
        cross_attention: cross-attention, too.
        bias: biases in both layers.
        inner_norm: a layer norm of its own at the entrance of each adapter.
        use_gating: multiply what each adapter adds by a trained gate, one number per example (UniPELT).
        init: ``"normal"``: nearly the identity (normal with standard deviation ``init_std``, cut at two of them);
            ``"lora"``: exactly the identity (the layer down as in LoRA, the layer up zero).
        init_std: see ``init``.
        layer_norms: train all norms of the base as well.
        drop_layers: no adapter in the first so many layers; encoder and decoder count each its own.
        robust_drop: drop a random number of first layers in every training batch, from none to all but one. One
            trained model then works with any number (:meth:`drop_first`). Not under ZeRO.
        seed: of that number, together with the step: a resumed run goes on with the same draws.
        exclude_modules: names of sub-layers to leave out, or of modules around them: suffixes, globs, or ``re:…``.
        layers_to_transform: only layers of these indices.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range, a name unknown, or two options exclude each other.

    Example:
        >>> from lightning_pet import AdapterCallback
        >>> AdapterCallback(bottleneck_size=0)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: bottleneck_size=0: must be a positive integer, e.g. 64.
    """

    method: ClassVar[str] = "adapter"
    shards = True
    width: ClassVar[str | None] = "bottleneck_size"
    gives_meaning: ClassVar[frozenset[str]] = frozenset({"scale", "non_linearity"})
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {"exclude_modules", "layers_to_transform"}

    def __init__(
        self,
        placement: Placement = "houlsby",
        bottleneck_size: int | None = None,
        reduction_factor: float = 16,
        non_linearity: str | None = None,
        scale: float = 1.0,
        sublayers: list[Sublayer] | None = None,
        cross_attention: bool = False,
        bias: bool = True,
        inner_norm: bool = False,
        use_gating: bool = False,
        init: Init = "normal",
        init_std: float = 1e-3,
        layer_norms: bool = False,
        drop_layers: int = 0,
        robust_drop: bool = False,
        seed: int = 0,
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.placement = placement
        self.bottleneck_size = bottleneck_size
        self.reduction_factor = reduction_factor
        self.non_linearity = non_linearity
        self.scale = scale
        self.sublayers = sublayers
        self.cross_attention = cross_attention
        self.bias = bias
        self.inner_norm = inner_norm
        self.use_gating = use_gating
        self.init = init
        self.init_std = init_std
        self.layer_norms = layer_norms
        self.drop_layers = drop_layers
        self.robust_drop = robust_drop
        self.seed = seed
        self.exclude_modules = listed_if_given(exclude_modules)
        self.layers_to_transform = listed_layers(layers_to_transform)
        self._validate()

    def _validate(self) -> None:
        one_of("placement", self.placement, Placement)
        one_of("init", self.init, Init)
        for name in self.sublayers or ():
            one_of("sublayers", name, Sublayer)
        some("sublayers", self.sublayers, "name at least one, e.g. ['ffn'], or leave it out.")
        if self.bottleneck_size is not None:
            whole("bottleneck_size", self.bottleneck_size, wanted="must be a positive integer, e.g. 64.")
        positive("reduction_factor", self.reduction_factor)
        positive("scale", self.scale)
        positive("init_std", self.init_std)
        whole("drop_layers", self.drop_layers, 0, "must be an integer of at least 0.")
        whole("seed", self.seed, 0, "must be an integer of at least 0.")
        if self.drop_layers and self.robust_drop:
            raise ArgumentError(
                "drop_layers and robust_drop exclude each other: the first fixes the layers without adapters, the "
                "second draws them anew in every batch. Set one."
            )
        activation(self._activation)

    @property
    def _activation(self) -> str:
        return self.non_linearity or ("gelu" if self.placement == "houlsby" else "relu")

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the residual sums; see :func:`~lightning_pet.targets.placement.resolve_sites`."""
        return resolve_sites(
            root,
            structure,
            self.placement,
            sublayers=self.sublayers,
            cross_attention=self.cross_attention,
            layers=self.layers_to_transform,
            drop_layers=self.drop_layers,
            exclude=self.exclude_modules or (),
        )

    def build(self, root: nn.Module, target: Target) -> Bottleneck:
        """Build the adapter for one place.

        Raises:
            TargetError: if the reduction factor leaves no feature.
        """
        width = target.sizes[0]
        size = self.bottleneck_size or int(width / self.reduction_factor)
        if size < 1:
            raise TargetError(
                f"{target.path} is {width} features wide, which reduction_factor={self.reduction_factor:g} reduces to "
                f"none. Use at most {width}, or set bottleneck_size."
            )
        behind_norm = (target.role or "").endswith(".norm")
        kind = ParallelBottleneck if self.placement == "parallel" else BehindNorm if behind_norm else Bottleneck
        adapter = kind(
            width,
            size,
            non_linearity=self._activation,
            scale=self.scale,
            bias=self.bias,
            inner_norm=self.inner_norm,
            gated=self.use_gating,
            init=self.init,
            init_std=self.init_std,
            **delta_options(root, target),
        )
        adapter.optional_gradient = self.robust_drop
        return adapter

    def numbers(self, root: nn.Module, targets: Sequence[Target]) -> int:
        """Numbers that the method would train at the present bottleneck.

        Raises:
            TargetError: if a place is narrower than it, so that no budget buys what is no bottleneck.
        """
        check_narrower(self.bottleneck_size, targets)
        return super().numbers(root, targets)

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of base parameters that train as they are: heads, and norms by option."""
        norms = norm_parameters(root, self.module) if self.layer_norms else ()
        return tuple(dict.fromkeys((*super().trained(root, targets), *norms)))

    # --- AdapterDrop ----------------------------------------------------------------------------

    def drop_first(self, root: nn.Module, layers: int) -> None:
        """Pass over the adapters of the first layers of every stack, and use all others again.

        Args:
            root: the adapted root (:attr:`Adapted.root <lightning_pet.Adapted.root>`).
            layers: how many; 0: use all. Adapters outside of numbered layers are always used.
        """
        for target, delta in self.deltas(root):
            cast(Bottleneck, delta).dropped = _depth(target) < layers

    def drawn(self, root: nn.Module, step: int, batch_idx: int) -> int:
        """How many layers are dropped in one batch: a function of the seed and these numbers alone."""
        deepest = max((target.sizes[1] for target, _ in self.deltas(root) if len(target.sizes) > 1), default=0)
        return Random(f"{self.seed}:{step}:{batch_idx}").randint(0, deepest)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare the engine for adapters that are dropped at random.

        Raises:
            UnsupportedStrategyError: if it cannot train without them.
        """
        if self.robust_drop and stage == "fit":
            adapter_for(trainer).expect_gaps(trainer, f"{type(self).__name__}(robust_drop=True)")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw how many layers this batch goes without adapters."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.robust_drop:
            root = Controller.get(trainer).adapted.root
            self.drop_first(root, self.drawn(root, trainer.global_step, batch_idx))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Use all adapters outside of training batches."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.robust_drop:
            self.drop_first(Controller.get(trainer).adapted.root, 0)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no adapter dropped."""
        controller = Controller.find(trainer)
        if self.robust_drop and controller is not None and controller.rules() is not None:  # else it began in setup
            self.drop_first(controller.adapted.root, 0)
        super().on_exception(trainer, pl_module, exception)


def _depth(target: Target) -> float:
    """Layers of the stack that run before this place; those outside of layers come last."""
    return target.sizes[1] if len(target.sizes) > 1 else math.inf
