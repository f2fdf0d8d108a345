"""MiSS (Kang et al. 2024): one small matrix shared by all blocks of a weight."""

from typing import Any, ClassVar

from torch import nn

from lightning_pet.arguments import share, whole
from lightning_pet.callbacks.on_layers import OnLayersCallback
from lightning_pet.errors import TargetError
from lightning_pet.insertion.low_rank_places import is_called
from lightning_pet.layers.delta import Delta, options_beside
from lightning_pet.layers.shard_sharing import ShardSharing, ShardSharingWeight
from lightning_pet.model.layer_kinds import host_kind, matrix_of, transposed, weight_of
from lightning_pet.model.naming import module_at
from lightning_pet.model.structure import Target

_HOSTS = ("linear", "conv1d_hf", "weight")


class MiSSCallback(OnLayersCallback):
    r"""Matrix shard sharing: :math:`\Delta W_{:,c} = D_{c \bmod r,:}`, that is :math:`y = W x + D^T \sum_b x_b`.

    The input is cut into blocks of r, and the sum of the blocks goes through one matrix D (r × out), which starts at
    zero, so the model starts as the base, bit for bit. It is a LoRA of rank r whose A is fixed: half of the numbers,
    and no activation is kept for the backward pass but the sum. Source: Kang et al. 2024, *MiSS: Revisiting the
    Trade-off in LoRA with an Efficient Shard-Sharing Structure* (earlier called Bone).

    Args:
        r: size of a block, at most the inputs of every target. Default of HF PEFT.
        dropout: probability of dropping an input of the branch (not of the base).
        target_modules: roles, suffixes, globs, or ``"re:…"``; see :class:`~lightning_pet.LoRACallback`.
        mini_r: outputs share columns of D, too, of which there are so many; it must divide the outputs of every
            target. ``None``: every output has its own.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.on_layers.OnLayersCallback`, which say in which
            layers, and of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_pet import MiSSCallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> apply(net, [MiSSCallback(r=2, target_modules=["0"])]).plan().trainable
        6
    """

    method: ClassVar[str] = "miss"
    shards = True
    width: ClassVar[str | None] = "r"
    may_change: ClassVar[frozenset[str]] = OnLayersCallback.may_change | {"dropout"}

    def __init__(
        self,
        r: int = 64,
        dropout: float = 0.0,
        target_modules: list[str] | str = ["all-linear"],  # noqa: B006  # never mutated; the CLI shows it
        mini_r: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(target_modules=target_modules, **kwargs)
        self.r = r
        self.dropout = dropout
        self.mini_r = mini_r
        whole("r", r, wanted="the size of a block must be a positive integer, e.g. r=64.")
        if mini_r is not None:
            whole("mini_r", mini_r, wanted="must be a positive integer that divides the outputs, or None.")
        share("dropout", dropout, "a probability in [0, 1), e.g. 0.05.", ends="[)")

    @staticmethod
    def serves(module: nn.Module, parameter: str) -> bool:
        """Whether a delta can sit on this parameter of a module."""
        return host_kind(module, parameter) in _HOSTS

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the delta that fits the host's class.

        Raises:
            TargetError: if a target is smaller than a block, or ``mini_r`` does not divide its outputs.
        """
        host = module_at(root, target.module)
        weight = weight_of(host, target.parameter)
        assert weight is not None  # resolve_targets returned it
        outputs, inputs = matrix_of(host, target.parameter)
        if self.r > inputs:
            raise TargetError(
                f"{target.path} has {inputs} inputs: r can be at most that, not {self.r}. Lower r, or exclude it "
                "(exclude_modules)."
            )
        own = outputs if target.rows is None else sum(stop - start for start, stop in target.rows)
        if self.mini_r is not None and own % self.mini_r:
            raise TargetError(
                f"{target.path} has {own} outputs, which mini_r={self.mini_r} does not divide. Choose a divisor, or "
                "exclude it (exclude_modules)."
            )
        options: dict[str, Any] = {"mini_r": self.mini_r, "rows": target.rows, **options_beside(weight)}
        if is_called(root, target):
            turned = host_kind(host, target.parameter) == "conv1d_hf"
            return ShardSharing(inputs, outputs, self.r, dropout=self.dropout, transposed=turned, **options)
        lies = transposed(host, target.parameter)
        if lies is None:
            raise TargetError(
                f"{target.path} is {'×'.join(map(str, weight.shape))} in a {type(host).__name__}, whose forward is no "
                "plain product: which of its sides are the inputs cannot be told. Exclude it with exclude_modules."
            )
        if self.dropout:
            raise TargetError(
                f"{target.path} is read without a call of its layer, so that no input can be dropped. Set dropout=0, "
                "or exclude it with exclude_modules."
            )
        return ShardSharingWeight(inputs, outputs, self.r, stack=tuple(weight.shape[:-2]), transposed=lies, **options)
