"""HiRA (Huang et al. 2025): low-rank changes that multiply the weight."""

from typing import Any, ClassVar, Literal

from torch import nn

from lightning_pet.arguments import one_of, share, whole
from lightning_pet.callbacks.on_layers import OnLayersCallback, by_name
from lightning_pet.insertion.low_rank_places import Forms, Options, fitted, rank_at
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.hadamard_low_rank import HadamardConv, HadamardEmbedding, HadamardParameter
from lightning_pet.model.structure import Target

_FORMS = Forms(linear=None, parameter=HadamardParameter, conv_weight=HadamardConv, embedding_weight=HadamardEmbedding)


class HiRACallback(OnLayersCallback):
    r"""Hadamard high-rank adaptation: :math:`W \odot (1 + B A)`.

    A (r × in) and B (out × r) train; their product says of every entry of W by which share it changes. B starts at
    zero, so the model starts as the base, bit for bit. The change has a rank as high as that of W, for the numbers of
    a LoRA of rank r. Source: Huang et al. 2025, *HiRA: Parameter-Efficient Hadamard High-Rank Adaptation*.

    Args:
        r: rank of B A, at most min(in, out) of every target (see ``clamp_rank``); default of HF PEFT.
        dropout: probability of dropping an input of the change, for all positions of a forward alike.
        target_modules: roles, suffixes, globs, or ``"re:…"``; see :class:`~lightning_pet.LoRACallback`.
        init: how A starts: ``"kaiming"`` (uniform within ±1/√in) or ``"gaussian"`` (standard deviation 1/r). Of an
            embedding B is drawn, and A is zero.
        rank_pattern: rank for some targets, by role, suffix, glob or ``"re:…"``; the first that hits counts.
        clamp_rank: a target that is too small for its rank gets the largest that it can have, instead of an error.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.on_layers.OnLayersCallback`, which say in which
            layers, and of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_pet import HiRACallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> apply(net, [HiRACallback(r=2, target_modules=["0"])]).plan().trainable
        14
    """

    method: ClassVar[str] = "hira"
    shards = True
    width: ClassVar[str | None] = "r"
    by_pattern: ClassVar[tuple[str, ...]] = ("rank_pattern",)
    may_change: ClassVar[frozenset[str]] = OnLayersCallback.may_change | {"dropout"}

    def __init__(
        self,
        r: int = 32,
        dropout: float = 0.0,
        target_modules: list[str] | str = ["attention.q", "attention.v"],  # noqa: B006  # never mutated; the CLI shows it
        init: Literal["kaiming", "gaussian"] = "kaiming",
        rank_pattern: dict[str, int] | None = None,
        clamp_rank: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(target_modules=target_modules, **kwargs)
        self.r = r
        self.dropout = dropout
        self.init = init
        self.rank_pattern = by_name("rank_pattern", rank_pattern)
        self.clamp_rank = clamp_rank
        whole("r", r, wanted="the rank must be a positive integer, e.g. r=32.")
        for key, rank in (self.rank_pattern or {}).items():
            whole(f"rank_pattern[{key!r}]", rank, wanted="the rank must be a positive integer, e.g. 32.")
        share("dropout", dropout, "a probability in [0, 1), e.g. 0.05.", ends="[)")
        one_of("init", init, Literal["kaiming", "gaussian"])

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the delta that fits the host's class."""
        rank = rank_at(root, target, self.r, self.rank_pattern, self.clamp_rank)
        return fitted(root, target, Options(rank, 1.0, self.dropout, self.init), _FORMS)
