"""A prefix in attention that is written out in torch's functions.

No tensor that the model sees changes its shape: where it forms softmax(scores) between two products, the prefix
joins the softmax, and its part of the result is added to the second product.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_pet.attention import einsum as attention_einsum
from lightning_pet.attention.interface import LivePrefix
from lightning_pet.attention.masks import causal, wider
from lightning_pet.errors import TargetError
from lightning_pet.layers.prefix import attend_with_prefix

PRODUCT, ADDED_PRODUCT, SUM, SOFTMAX, DROPOUT, SDPA, MULTI_HEAD = range(7)
FUNCTIONS: Final[dict[Any, int]] = {
    torch.matmul: PRODUCT,
    torch.bmm: PRODUCT,
    Tensor.matmul: PRODUCT,
    Tensor.bmm: PRODUCT,
    Tensor.__matmul__: PRODUCT,
    torch.baddbmm: ADDED_PRODUCT,
    Tensor.baddbmm: ADDED_PRODUCT,
    torch.einsum: SUM,
    F.softmax: SOFTMAX,
    torch.softmax: SOFTMAX,
    Tensor.softmax: SOFTMAX,
    F.dropout: DROPOUT,
    torch.dropout: DROPOUT,
    F.scaled_dot_product_attention: SDPA,
    F.multi_head_attention_forward: MULTI_HEAD,
}
"""What is looked at, and as what."""

_MULTI_HEAD: Final = inspect.signature(F.multi_head_attention_forward)


def _softmax_options(args: tuple[Any, ...], kwargs: Mapping[str, Any], scores: Tensor) -> dict[str, Any]:
    """``dtype`` of a softmax call; the softmax must be over the last dimension.

    Raises:
        TargetError: if it is not.
    """
    dim = kwargs.get("dim", args[0] if args else None)
    if dim not in (-1, scores.dim() - 1):
        raise TargetError(f"prefix tuning: a softmax over dimension {dim} of {tuple(scores.shape)} is not supported.")
    given = [x for x in (*args[1:], kwargs.get("dtype")) if isinstance(x, torch.dtype)]
    return {"dtype": given[0]} if given else {}


def operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Both operands of a product."""
    first, second = (*args, *kwargs.values())[:2]
    return first, second


def added_operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Both operands of a ``baddbmm``, and the factor of their product."""
    left = args[1] if len(args) > 1 else kwargs["batch1"]
    right = args[2] if len(args) > 2 else kwargs["batch2"]
    return left, right, float(kwargs.get("alpha", 1.0))


def same_scores(product: Tensor, scores: Tensor) -> bool:
    """Whether a product may be these scores, up to how leading dimensions are laid out."""
    return product.shape[-2:] == scores.shape[-2:] and product.numel() == scores.numel()


@dataclass(eq=False)
class _Product:
    query: Tensor
    result: Tensor


class FunctionalRoute(TorchFunctionMode):
    """Gives one host its prefix while it runs.

    Args:
        live: the prefix.
        scale: what the scores were multiplied by when the structure was probed; ``None`` if no softmax was seen.
        axis: dimension of the heads in scores that have one of windows, too.
    """

    def __init__(self, live: LivePrefix, scale: float | None, axis: int = 1) -> None:
        super().__init__()
        self.live = live
        self.scale = scale
        self.axis = axis
        self.products: list[_Product] = []
        self.shares: Tensor | None = None  # the prefix's part of a softmax that waits for its values
        self.shape: torch.Size | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        kind = FUNCTIONS.get(func)
        if kind is None:
            return func(*args, **kwargs)
        if kind == PRODUCT:
            return self._product(func, args, kwargs)
        if kind == ADDED_PRODUCT:
            return self._added_product(func, args, kwargs)
        if kind == SUM:
            return self._sum(func, args, kwargs)
        if kind == SOFTMAX:
            return self._softmax(func, args, kwargs)
        if kind == DROPOUT:
            return self._dropout(func, args, kwargs)
        return self._sdpa(args, kwargs) if kind == SDPA else _multi_head(self.live, args, kwargs)

    def finish(self) -> None:
        """The host, or one attention in it, has run: nothing may be left over."""
        if self.shares is not None:
            raise TargetError(
                "prefix tuning: an attention's shares were not multiplied with values in a way that is known. "
                "Exclude this site."
            )

    # --- softmax between two products ------------------------------------------------------------

    def _product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result: Tensor = func(*args, **kwargs)
        left, _ = operands(args, kwargs)
        if self.shares is not None and self.shape is not None and same_shape(left, self.shape):
            return self._with_values(result)
        self.products.append(_Product(left, result))
        return result

    def _added_product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result: Tensor = func(*args, **kwargs)
        self.products.append(_Product(added_operands(args, kwargs)[0], result))
        return result

    def _sum(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result: Tensor = func(*args, **kwargs)
        shares = None if self.shares is None else sum_operand_like(args, self.shape)
        if shares is not None:
            found = attention_einsum.values(args, shares)
            return result if found is None else self._with_values(result, found.order)
        if (score := attention_einsum.scores(args)) is not None:
            self.products.append(_Product(score.left, result))
        return result

    def _softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores: Tensor = args[0] if args else kwargs["input"]
        found = next((product for product in self.products if same_scores(product.result, scores)), None)
        if found is None:
            return func(*args, **kwargs)
        self.finish()
        self.products.remove(found)
        options = _softmax_options(args[1:], kwargs, scores)
        theirs, self.shares = attend_with_prefix(scores, self._scores(found.query, scores), **options)
        self.shape = theirs.shape
        return theirs

    def _scores(self, query: Tensor, scores: Tensor) -> Tensor:
        if self.scale is None:
            raise TargetError(
                "prefix tuning: this attention runs in another way than when its structure was probed, and the scale "
                "of its scores is not known. Load the model with the attn_implementation that the prefix was made with."
            )
        key = self.live.key
        if query.shape[-1] != key.shape[-1]:
            raise TargetError(
                f"prefix tuning: queries of {query.shape[-1]} features, but a prefix of {key.shape[-1]}. "
                "Exclude this site."
            )
        query = _by_head(query, key.shape[0], self.axis)
        product = torch.matmul(query, _like(key, query, self.axis).mT) * self.scale
        return product.reshape(*scores.shape[:-1], key.shape[-2]).to(scores.dtype)

    def _dropout(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dropped: Tensor = args[0] if args else kwargs["input"]
        if self.shares is not None and dropped.shape == self.shape:
            self.shares = F.dropout(self.shares, *_dropout_options(args[1:], kwargs))
        return func(*args, **kwargs)

    def _with_values(self, result: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
        shares, value = self.shares, self.live.value
        assert shares is not None
        self.shares, self.live.used = None, True
        shares = _by_head(shares, value.shape[0], self.axis)
        extra = torch.matmul(shares, _like(value, shares, self.axis))
        extra = extra.reshape(result.shape) if order is None else extra.permute(order)
        return result + extra.to(result.dtype)

    # --- the fused function ----------------------------------------------------------------------

    def _sdpa(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = given.pop("query"), given.pop("key"), given.pop("value")
        flat = key.dim() == 3
        if flat:
            heads = self.live.key.shape[0]
            query, key, value = (_by_head(x, heads) for x in (query, key, value))
        mask, length = given.pop("attn_mask", None), self.live.length
        if given.pop("is_causal", False):
            mask = causal(length, query, key)
        elif mask is not None:
            mask = wider(_by_head(mask, query.shape[-3]) if flat and mask.dim() == 3 else mask, length, query, key)
        key, value = self.live.before(key, value)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **given)
        return out.flatten(0, 1) if flat else out


def sum_operand_like(args: tuple[Any, ...], shape: torch.Size | None) -> int | None:
    """Which operand of an Einstein sum may be the shares of this shape."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    return next((i for i, x in enumerate(operands) if shape is not None and same_shape(x, shape)), None)


def same_shape(tensor: Any, shape: torch.Size) -> bool:
    """Whether a tensor may be the shares of this shape, up to how leading dimensions are laid out."""
    return isinstance(tensor, Tensor) and tensor.shape[-2:] == shape[-2:] and tensor.numel() == shape.numel()


def _by_head(tensor: Tensor, heads: int, axis: int = 1) -> Tensor:
    """The tensor as batch × heads × rows × features; windows may be before or after the heads."""
    if tensor.dim() == 3 and tensor.shape[0] % heads == 0:
        return tensor.reshape(-1, heads, *tensor.shape[-2:])
    if tensor.dim() == 4 and heads in (1, tensor.shape[1]):
        return tensor
    if tensor.dim() == 5 and heads in (1, tensor.shape[axis]):
        return tensor
    raise TargetError(
        f"prefix tuning: an attention with tensors of shape {tuple(tensor.shape)}, not laid out as (batch, {heads} "
        "heads, rows, features). Exclude this site."
    )


def _like(prefix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """Keys or values of the prefix, so that they multiply with a tensor by head."""
    windows = (1,) * (tensor.dim() - 3 - axis)
    return prefix.to(tensor.dtype).view(prefix.shape[0], *windows, *prefix.shape[1:])


def _dropout_options(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, bool]:
    p = kwargs.get("p", args[0] if args else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[1] if len(args) > 1 else True))
    return p, training


# --- torch.nn.MultiheadAttention -----------------------------------------------------------------


def _multi_head(live: LivePrefix, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What :func:`torch.nn.functional.multi_head_attention_forward` returns, with the prefix in front."""
    o = bind_multi_head(args, kwargs)
    if not is_plain_multi_head(o):
        raise TargetError("prefix tuning: multi-head attention with bias_kv, zero_attn or static keys. Exclude it.")
    flat = o["query"].dim() == 2
    query, key, value = project(o)
    mask = _combined_mask(o, query, key)
    length = live.length
    if mask is not None:
        mask = wider(mask, length, query, key)
    key, value = live.before(key, value)
    dropout = o["dropout_p"] if o["training"] else 0.0
    weights = None
    if o["need_weights"]:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        out = F.dropout(weights, dropout) @ value
        weights = weights[..., length:]
        weights = weights.mean(1) if o["average_attn_weights"] else weights
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(-2), o["out_proj_weight"], o["out_proj_bias"])
    if flat:
        return out.squeeze(1), None if weights is None else weights.squeeze(0)
    return out, weights


def bind_multi_head(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of :func:`torch.nn.functional.multi_head_attention_forward` by name."""
    bound = _MULTI_HEAD.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def is_plain_multi_head(o: Mapping[str, Any]) -> bool:
    """Keys and values are projections of the input, and nothing else."""
    return not o["add_zero_attn"] and all(o[name] is None for name in ("bias_k", "bias_v", "static_k", "static_v"))


def project(o: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as batch × heads × positions × features."""
    biases = (None,) * 3 if o["in_proj_bias"] is None else o["in_proj_bias"].chunk(3)
    if o["use_separate_proj_weight"]:
        weights = tuple(o[f"{role}_proj_weight"] for role in "qkv")
    else:
        weights = o["in_proj_weight"].chunk(3)
    heads = o["num_heads"]
    projected = []
    for x, weight, bias in zip((o["query"], o["key"], o["value"]), weights, biases, strict=True):
        x = x.unsqueeze(1) if x.dim() == 2 else x
        projected.append(_split_heads(F.linear(x, weight, bias), heads))
    return projected[0], projected[1], projected[2]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).permute(1, 2, 0, 3)


def _combined_mask(o: Mapping[str, Any], query: Tensor, key: Tensor) -> Tensor | None:
    """``attn_mask`` and ``key_padding_mask`` as one additive mask that broadcasts to the scores."""
    parts = []
    if (mask := o["attn_mask"]) is not None:
        parts.append(mask.view(-1, query.shape[1], *mask.shape[1:]) if mask.dim() == 3 else mask)
    if (mask := o["key_padding_mask"]) is not None:
        parts.append(mask.reshape(-1, 1, 1, key.shape[-2]))
    additive = [
        torch.zeros(part.shape, dtype=query.dtype, device=query.device).masked_fill(part, -torch.inf)
        if part.dtype == torch.bool
        else part.to(query.dtype)
        for part in parts
    ]
    return None if not additive else additive[0] if len(additive) == 1 else additive[0] + additive[1]
