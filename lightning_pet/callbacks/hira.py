"""HiRA (Huang et al. 2025): low-rank changes that multiply the weight."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_pet.arguments import one_of, share, some, whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.insertion.low_rank_places import Forms, Options, fitted, rank_at
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.hadamard_low_rank import HadamardConv, HadamardEmbedding, HadamardParameter
from lightning_pet.model.layer_kinds import host_kind
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.patterns import check_patterns, listed, listed_if_given, listed_layers, settled
from lightning_pet.targets.targets import resolve_targets, with_readers

_FORMS = Forms(linear=None, parameter=HadamardParameter, conv_weight=HadamardConv, embedding_weight=HadamardEmbedding)


class HiRACallback(PETCallback):
    r"""Hadamard high-rank adaptation: :math:`W \odot (1 + B A)`.

    A (r × in) and B (out × r) train; their product says of every entry of W by which share it changes. B starts at
    zero, so the model starts as the base, bit for bit. The change has a rank as high as that of W, for the numbers of
    a LoRA of rank r. Source: Huang et al. 2025, *HiRA: Parameter-Efficient Hadamard High-Rank Adaptation*.

    Args:
        r: rank of B A, at most min(in, out) of every target (see ``clamp_rank``); default of HF PEFT.
        dropout: probability of dropping an input of the change, for all positions of a forward alike.
        target_modules: roles, suffixes, globs, or ``"re:…"``; see :class:`~lightning_pet.LoRACallback`.
        exclude_modules: patterns of the same kinds, taken out again.
        layers_to_transform: only these layer indices. Every pattern must have a target in one of them.
        layers_pattern: name of the list of layers whose indices are meant (``"blocks"``), where the first number in
            the names of modules is that of something else, such as a stage.
        init: how A starts: ``"kaiming"`` (uniform within ±1/√in) or ``"gaussian"`` (standard deviation 1/r). Of an
            embedding B is drawn, and A is zero.
        rank_pattern: rank for some targets, by role, suffix, glob or ``"re:…"``; the first that hits counts.
        clamp_rank: a target that is too small for its rank gets the largest that it can have, instead of an error.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

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
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __init__(
        self,
        r: int = 32,
        dropout: float = 0.0,
        target_modules: list[str] | str = ["attention.q", "attention.v"],  # noqa: B006  # never mutated; the CLI shows it
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        init: Literal["kaiming", "gaussian"] = "kaiming",
        rank_pattern: dict[str, int] | None = None,
        clamp_rank: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.r = r
        self.dropout = dropout
        self.target_modules = listed(target_modules)
        self.exclude_modules = listed_if_given(exclude_modules)
        self.layers_to_transform = listed_layers(layers_to_transform)
        self.layers_pattern = listed_if_given(layers_pattern)
        self.init = init
        self.rank_pattern = None if rank_pattern is None else dict(rank_pattern)  # files hold no other mapping
        self.clamp_rank = clamp_rank
        whole("r", r, wanted="the rank must be a positive integer, e.g. r=32.")
        for key, rank in (self.rank_pattern or {}).items():
            whole(f"rank_pattern[{key!r}]", rank, wanted="the rank must be a positive integer, e.g. 32.")
        share("dropout", dropout, "a probability in [0, 1), e.g. 0.05.", ends="[)")
        some("target_modules", self.target_modules, "name at least one role, suffix or pattern, e.g. 'attention.q'.")
        one_of("init", init, Literal["kaiming", "gaussian"])

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the target weights; see :func:`~lightning_pet.targets.targets.resolve_targets`."""
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
        """Build one delta per target.

        Raises:
            ArgumentError: if a pattern of ranks decides for no target.
            TargetError: if the rank is larger than a target allows.
        """
        check_patterns("rank_pattern", self.rank_pattern, targets)
        return super().insertions(root, targets)

    def config_at(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Ranks by place, where their patterns depend on order or are regular expressions."""
        places = [target for target in targets if target.parameter]
        return self.config() | {"rank_pattern": settled(self.rank_pattern, places)}

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the delta that fits the host's class."""
        rank = rank_at(root, target, self.r, self.rank_pattern, self.clamp_rank)
        return fitted(root, target, Options(rank, 1.0, self.dropout, self.init), _FORMS)
