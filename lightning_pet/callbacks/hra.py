"""HRA (Yuan et al. 2024): the input of a layer is reflected a few times."""

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.arguments import whole
from lightning_pet.callbacks.on_layers import OnLayersCallback
from lightning_pet.errors import TargetError
from lightning_pet.insertion.input_places import input_place, turns_inputs
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.rotation import ReflectedWeight, Reflections
from lightning_pet.model.structure import Target


class HRACallback(OnLayersCallback):
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
        **kwargs: arguments of :class:`~lightning_pet.callbacks.on_layers.OnLayersCallback`, which say in which
            layers, and of :class:`~lightning_pet.callbacks.base.PETCallback`.

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
    serves = staticmethod(turns_inputs)
    gives_meaning: ClassVar[frozenset[str]] = frozenset({"apply_GS"})

    def __init__(
        self,
        r: int = 8,
        apply_GS: bool = False,  # as users of PEFT know it
        target_modules: list[str] | str = ["attention.q", "attention.v"],  # noqa: B006  # never mutated; the CLI shows it
        **kwargs: Any,
    ) -> None:
        super().__init__(target_modules=target_modules, **kwargs)
        self.r = r
        self.apply_GS = apply_GS
        whole("r", r, wanted="the number of reflections must be a positive integer, e.g. r=8.")

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
