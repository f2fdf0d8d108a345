"""HRA (Yuan et al. 2024): the input of a layer is reflected a few times."""

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.arguments import some, whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import TargetError
from lightning_pet.insertion.input_places import input_place, turns_inputs
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.rotation import ReflectedWeight, Reflections
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.patterns import listed, listed_if_given, listed_layers
from lightning_pet.targets.targets import resolve_targets, with_readers


class HRACallback(PETCallback):
    r"""Householder reflection adaptation: :math:`y = W H_1 H_2 \dots H_r x + b`, :math:`H_k = I - 2 u_k u_k^T`.

    The product is orthogonal, and differs from the identity by a matrix of rank r, so it costs what LoRA costs and
    keeps lengths and angles as OFT does. The columns u start in equal pairs, whose reflections undo each other: with an
    even r the model starts as the base, to rounding (6e-7 of the input in float32). They merge exactly. Only the layer
    itself reads W, so bases of any format will do. Source: Yuan et al. 2024. Defaults as in HF PEFT.

    Args:
        r: number of reflections; even, or the model does not start as the base. At most the inputs of every target.
        apply_GS: make the columns orthogonal to each other first (Gram and Schmidt), as the paper's strictest form has
            it. That product is never the identity: the model starts elsewhere, and the columns start apart.
        target_modules: layers whose input is reflected: roles, suffixes, globs or ``"re:…"``; see
            :class:`~lightning_pet.LoRACallback`. A fused projection has one input: name it as a whole.
        exclude_modules: patterns of the same kinds, taken out again.
        layers_to_transform: only these layer indices. Every pattern must have a target in one of them.
        layers_pattern: name of the list of layers whose indices are meant (``"blocks"``), where the first number in
            the names of modules is that of something else, such as a stage.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if ``r`` is no positive integer, or there is no pattern.

    Example:
        >>> import torch
        >>> from lightning_pet import HRACallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> apply(net, [HRACallback(r=2, target_modules=["0"])]).plan().trainable
        16
    """

    method: ClassVar[str] = "hra"
    shards = True
    width: ClassVar[str | None] = "r"
    gives_meaning: ClassVar[frozenset[str]] = frozenset({"apply_GS"})
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __init__(
        self,
        r: int = 8,
        apply_GS: bool = False,  # as users of PEFT know it
        target_modules: list[str] | str = ["attention.q", "attention.v"],  # noqa: B006  # never mutated; the CLI shows it
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.r = r
        self.apply_GS = apply_GS
        self.target_modules = listed(target_modules)
        self.exclude_modules = listed_if_given(exclude_modules)
        self.layers_to_transform = listed_layers(layers_to_transform)
        self.layers_pattern = listed_if_given(layers_pattern)
        whole("r", r, wanted="the number of reflections must be a positive integer, e.g. r=8.")
        some("target_modules", self.target_modules, "name at least one role, suffix or pattern, e.g. 'attention.q'.")

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the layers; see :func:`~lightning_pet.targets.targets.resolve_targets`."""
        found = resolve_targets(
            root,
            self.target_modules,
            structure,
            exclude=self.exclude_modules or (),
            layers=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            hosts=turns_inputs,
        )
        return with_readers(root, found, structure)

    def set_width(self, width: int) -> None:
        """So many pairs of reflections: a budget picks an even number of them."""
        self.r = 2 * width

    def spend_budget(self, root: nn.Module, targets: Sequence[Target]) -> None:
        """Pick the number of reflections, if there is a budget, and say if the model does not start as the base."""
        super().spend_budget(root, targets)
        if self.r % 2 and not self.apply_GS:
            rank_zero_warn(
                f"HRACallback(r={self.r}): an odd number of reflections is never the identity, so the model starts "
                "elsewhere than the base. Use an even r."
            )

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the reflections that fit the host."""
        place = input_place(root, target)
        if self.r > place.features:
            raise TargetError(
                f"{target.path} has {place.features} inputs: r can be at most that, not {self.r}. Lower r, or exclude "
                "it with exclude_modules."
            )
        cls = Reflections if place.called else ReflectedWeight
        return cls(place.features, self.r, orthogonal=self.apply_GS, **place.options)
