"""Which low-rank delta fits a place: on what its layer returns where that is the plain product, else on the weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.layers.delta import options_beside
from lightning_pet.layers.gating import GatedLowRank
from lightning_pet.layers.low_rank import LowRankLinear, LowRankParameter
from lightning_pet.layers.low_rank_base import Init, LowRank
from lightning_pet.layers.low_rank_hosts import ConvWeight, EmbeddingWeight, LowRankConv, LowRankEmbedding
from lightning_pet.model.layer_kinds import (
    acts_by_call,
    embed_scale,
    host_kind,
    matrix_of,
    reader_of,
    transposed,
    weight_of,
)
from lightning_pet.model.naming import module_at
from lightning_pet.model.quantised import shape_of
from lightning_pet.model.structure import Target
from lightning_pet.targets.patterns import value_at


@dataclass(frozen=True)
class Forms:
    """The classes of one low-rank method, by what they sit on; ``linear=None``: it acts on every weight itself."""

    linear: type[LowRankLinear] | None = LowRankLinear
    parameter: type[LowRankParameter] = LowRankParameter
    conv: type[LowRankConv] = LowRankConv
    conv_weight: type[ConvWeight] = ConvWeight
    embedding_weight: type[EmbeddingWeight] = EmbeddingWeight


@dataclass(frozen=True)
class Options:
    """What a method asks of a low-rank delta, whatever it sits on."""

    rank: int
    scale: float
    dropout: float = 0.0
    init: Init = "kaiming"
    use_dora: bool = False
    bias: bool = False


def is_called(root: nn.Module, target: Target) -> bool:
    """Whether a delta may add to what the host's call returns."""
    host = module_at(root, target.module)
    return target.reads is None and reader_of(root, target, None) is None and acts_by_call(host)


def fitted(root: nn.Module, target: Target, options: Options, forms: Forms | None = None) -> LowRank:
    """Build the low-rank delta for one place.

    Raises:
        TargetError: if the place has no room for one of the options.
    """
    forms = forms or Forms()
    host = module_at(root, target.module)
    weight = weight_of(host, target.parameter)
    assert weight is not None  # resolve_targets returned it
    kind = host_kind(host, target.parameter)
    called = forms.linear is not None and is_called(root, target)
    outputs, inputs = matrix_of(host, target.parameter)
    common: dict[str, Any] = {
        "scale": options.scale,
        "dropout": options.dropout,
        **options_beside(weight),
    }
    if options.init != "kaiming":
        common["init"] = options.init
    if options.use_dora:
        common["use_dora"] = True
    if options.bias and not (called and kind in ("linear", "conv1d_hf", "conv")):
        raise TargetError(
            f"{target.path}: a bias of B (lora_bias=True) needs the call of a linear layer or convolution, and this "
            "weight is read or looked up. Exclude it with exclude_modules, or set lora_bias=False."
        )
    if kind == "conv":
        return _convolution(cast(nn.Conv2d, host), target, options, forms, common, called)
    if kind == "embedding" and options.init == "orthogonal":
        raise TargetError(
            f"{target.path} is a table, which does not start with init='orthogonal'. Exclude it with exclude_modules, "
            "or choose another start."
        )
    if kind == "embedding":
        table = cast(nn.Embedding, host)
        common |= {"padding_idx": table.padding_idx, "embed_scale": embed_scale(host)}
        cls = LowRankEmbedding if called and not options.use_dora else forms.embedding_weight
        return cls(table.num_embeddings, table.embedding_dim, options.rank, **common)
    if called and forms.linear is not None:
        common |= {"bias": True} if options.bias else {}
        return forms.linear(inputs, outputs, options.rank, transposed=kind == "conv1d_hf", rows=target.rows, **common)
    turned = transposed(host, target.parameter)
    unasked = weight.is_meta and any(True for _ in host.buffers())  # what it computes with has no values yet
    if turned is None and (options.use_dora or unasked):
        raise TargetError(
            f"{target.path} is {'×'.join(map(str, weight.shape))} in a {type(host).__name__}, whose forward is no "
            "plain product: whether its rows or its columns are the outputs cannot be told, and "
            + ("DoRA rescales the outputs." if options.use_dora else "on the meta device there is nothing to ask.")
            + " Exclude it with exclude_modules, or "
            + ("set use_dora=False." if options.use_dora else "load the weights first.")
        )
    return forms.parameter(tuple(weight.shape), options.rank, transposed=bool(turned), rows=target.rows, **common)


def gated(root: nn.Module, target: Target, options: Options) -> GatedLowRank:
    """Build the gated low-rank delta for one place.

    Raises:
        TargetError: if it is not a linear layer that is called, as a gate reads what the call gets.
    """
    host = module_at(root, target.module)
    weight = weight_of(host, target.parameter)
    assert weight is not None  # resolve_targets returned it
    if host_kind(host, target.parameter) not in ("linear", "conv1d_hf") or not is_called(root, target):
        raise TargetError(
            f"{target.path} is in a {type(host).__name__} that is no called linear layer, and a gate (use_gating=True) "
            "reads what such a call gets. Exclude it with exclude_modules, or set use_gating=False."
        )
    outputs, inputs = matrix_of(host, target.parameter)
    common = {"scale": options.scale, "dropout": options.dropout, "init": options.init, **options_beside(weight)}
    return GatedLowRank(inputs, outputs, options.rank, rows=target.rows, **common)


def _convolution(
    conv: nn.Conv2d, target: Target, options: Options, forms: Forms, common: dict[str, Any], called: bool
) -> LowRank:
    if options.init not in ("kaiming", "gaussian"):
        raise TargetError(
            f"{target.path} is a convolution, which starts with init='kaiming' or 'gaussian', not {options.init!r}. "
            "Exclude it with exclude_modules, or choose one of the two."
        )
    common |= {"bias": True} if options.bias else {}
    return (forms.conv if called and not options.use_dora else forms.conv_weight)(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        options.rank,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        **common,
    )


def scale_of(config: Mapping[str, Any], target: Target, rank: int) -> float:
    """What a low-rank delta is multiplied by, as a file tells it.

    Args:
        config: options of the method.
        target: the place.
        rank: of the delta there.
    """
    alpha = value_at(config.get("alpha_pattern"), target, config.get("alpha", 16))
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def rank_at(
    root: nn.Module, target: Target, r: int, pattern: Mapping[str, int] | None = None, clamp: bool = False
) -> int:
    """The rank that a place gets.

    Args:
        root: of the model.
        target: the place.
        r: what is asked for.
        pattern: what is asked for at single places.
        clamp: a place that is too small gets the largest rank that it can have.

    Raises:
        TargetError: if the place is too small.
    """
    host = module_at(root, target.module)
    weight = weight_of(host, target.parameter)
    assert weight is not None  # resolve_targets returned it
    rank, limit = value_at(pattern, target, r), largest_rank(host, target.parameter)
    if rank > limit and not clamp:
        raise TargetError(
            f"{target.path} is {'×'.join(map(str, shape_of(weight)))}: the rank can be at most {limit}, "
            f"not {rank}. "
            "Lower r, set a lower rank_pattern for it, exclude it, or give it the rank that it can have by "
            "clamp_rank=True."
        )
    return min(rank, limit)


def largest_rank(host: nn.Module, parameter: str) -> int:
    """The largest rank that a change of this weight can have."""
    return min(matrix_of(host, parameter))
