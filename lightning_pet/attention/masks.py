"""Masks of every kind, made wider by the positions of a prefix that every query may see."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pet.errors import TargetError

_WIDER = "_pet_wider"


def wider(mask: Any, length: int, query: Tensor, key: Tensor) -> Any:
    """A mask for ``length`` more positions in front of ``key``.

    Args:
        mask: boolean (true: visible), additive, or integer (2-D, 1: a real token), with the positions in
            its last dimension; or a block mask of flex attention; or ``None``.
        length: positions of the prefix.
        query: … × queries × features.
        key: … × positions × features, without the prefix.

    Returns:
        A new mask of the same kind.

    Raises:
        TargetError: if the mask is of no known kind.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return _wider_block_mask(mask, length, query, key)
    positions = key.shape[-2]
    if mask.shape[-1] > positions:  # made for a static cache
        mask = mask[..., :positions]
    elif mask.shape[-1] == 1 != positions:
        mask = mask.expand(*mask.shape[:-1], positions)
    elif mask.shape[-1] < positions:
        raise TargetError(
            f"prefix tuning: an attention mask of shape {tuple(mask.shape)} does not cover {positions} keys."
        )
    return F.pad(mask, (length, 0), value=0.0 if mask.is_floating_point() else 1)


def causal(length: int, query: Tensor, key: Tensor) -> Tensor:
    """What ``is_causal`` means (query i sees keys 0 to i), with the prefix visible to all, as a boolean mask."""
    queries, positions = query.shape[-2], key.shape[-2]
    rows = torch.arange(queries, device=query.device)[:, None]
    columns = torch.arange(-length, positions, device=query.device)
    visible: Tensor = columns <= rows
    return visible


def each_for(rows: Tensor, tensor: Tensor) -> Tensor:
    """One entry per row of a batch for a tensor with k consecutive entries per row.

    Raises:
        TargetError: if it has not.
    """
    if tensor.shape[0] % rows.shape[0]:
        raise TargetError(
            f"prefix tuning: an attention was called with {tensor.shape[0]} rows, but rows were chosen for a batch of "
            f"{rows.shape[0]}. Give one name per row of the batch."
        )
    each = tensor.shape[0] // rows.shape[0]
    return rows if each == 1 else rows.repeat_interleave(each, 0)


def seen_by_rows(mask: Any, visible: Tensor, query: Tensor, key: Tensor, kind: str) -> Any:
    """A mask that also hides the positions of a prefix that single rows do not have.

    Args:
        mask: wide enough for the prefix, or ``None``.
        visible: rows × positions of the prefix.
        query: rows · k × heads × queries × features.
        key: rows · k × heads × positions × features, without the prefix.
        kind: of the attention.

    Returns:
        A new mask.

    Raises:
        TargetError: if the mask is of another kind than those that can say it.
    """
    if (
        "flash" in kind
        or "flex" in kind
        or not isinstance(mask, Tensor | None)
        or (mask is not None and mask.dim() < 4)
    ):
        raise TargetError(
            f"prefix tuning: prefixes of different lengths, or rows without any, in one batch need a mask that {kind} "
            "does not take. Load the model with attn_implementation='sdpa'."
        )
    seen = F.pad(each_for(visible, query), (0, key.shape[-2]), value=True)[:, None, None]
    if mask is None and kind != "eager":
        return seen
    if mask is None:
        mask = query.new_zeros(())
    return mask & seen if mask.dtype is torch.bool else torch.where(seen, mask, float("-inf"))


def _wider_block_mask(mask: Any, length: int, query: Tensor, key: Tensor) -> Any:
    if type(mask).__name__ != "BlockMask":
        raise TargetError(f"prefix tuning: attention masks of type {type(mask).__name__} are not known.")
    known: dict[int, Any] = mask.__dict__.setdefault(_WIDER, {})  # every layer is given the same object
    if length not in known:
        from torch.nn.attention.flex_attention import create_block_mask

        visible = mask.mask_mod

        def with_prefix(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            seen: Tensor = (column < length) | visible(batch, head, row, (column - length).clamp(min=0))
            return seen

        sizes = (mask.kv_num_blocks.shape[0], mask.kv_num_blocks.shape[1])
        known[length] = create_block_mask(
            with_prefix, *sizes, query.shape[-2], key.shape[-2] + length, device=query.device
        )
    return known[length]
