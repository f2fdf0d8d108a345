"""Low-rank deltas for embeddings and convolutions; the mathematics is in :mod:`lightning_pet.layers.low_rank_base`.

DoRA rescales the whole effective weight, so on these hosts it works on the weight
(:class:`DoraEmbedding`, :class:`DoraConv`) instead of the activations.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.layers.delta import Path
from lightning_pet.layers.low_rank_base import Init, LowRank, check_rank


class LowRankEmbedding(LowRank):
    """LoRA on an embedding: ``y = E[ids] + s · embed_scale · (Aᵀ[ids]) Bᵀ``.

    A [r, num_embeddings] starts at zero, B [embedding_dim, r] normal with standard deviation 1.

    Args:
        num_embeddings: rows of the host's weight.
        embedding_dim: columns of the host's weight.
        r: rank, at least 1.
        scale: factor s of the delta.
        padding_idx: the host's; its column of A gets no gradient.
        embed_scale: factor by which the host itself multiplies the rows it looks up (Gemma,
            M2M100: the value of their ``embed_scale``); without it attached and merged would differ.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int,
        *,
        scale: float,
        padding_idx: int | None = None,
        embed_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(r)
        self.padding_idx = padding_idx
        self.embed_scale = float(embed_scale)
        super().__init__(
            (r, num_embeddings),
            (embedding_dim, r),
            out_features=embedding_dim,
            scale=scale,
            use_dora=self.path == "weight",
            device=device,
            dtype=dtype,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A to zero and draw B; see :meth:`LowRank.reset_parameters`."""
        nn.init.zeros_(self.a)
        nn.init.normal_(self.b)
        if self.magnitude is not None:
            nn.init.ones_(self.magnitude)

    def forward(self, ids: Tensor, output: Tensor) -> Tensor:
        """Apply the delta.

        Args:
            ids: integer ids, [...].
            output: output of the host, [..., embedding_dim].

        Returns:
            [..., embedding_dim] in the dtype of ``output``.
        """
        inner = F.embedding(ids, self.a.t(), self.padding_idx)
        # A lookup is not autocast, so what is added to it is not either.
        with torch.autocast(output.device.type, enabled=False):
            change = F.linear(inner, self.b) * (self.scale * self.embed_scale)
        return output + change.to(output.dtype)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.t()


class DoraEmbedding(LowRankEmbedding):
    """DoRA on an embedding: arguments as in :class:`LowRankEmbedding`, and a magnitude per embedding dimension."""

    path: ClassVar[Path] = "weight"

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """The effective weight, [num_embeddings, embedding_dim]."""
        return self._effective(weight)


class LowRankConv(LowRank):
    """LoRA on a 1-d or 2-d convolution: a convolution to r channels, then a 1x1 convolution.

    A is [r, in / groups, *kernel] and B [out, r, 1, ...]. With ``groups > 1`` every group of inputs
    goes through the same A and to its own outputs in B, so that the change of the weight is B A as
    for any other layer.

    Args:
        in_channels: of the host.
        out_channels: of the host.
        kernel_size: of the host, one number per dimension; its length decides 1-d or 2-d.
        r: rank, at least 1.
        scale: factor s of the delta.
        stride: of the host.
        padding: of the host: numbers per dimension, ``"same"`` or ``"valid"``.
        dilation: of the host.
        groups: of the host.
        padding_mode: of the host.
        dropout: probability of zeroing an input element on the way to A; active in training only.
        init: ``"kaiming"`` or ``"gaussian"``, as in :class:`~lightning_pet.layers.low_rank.LowRankLinear`.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        r: int,
        *,
        scale: float,
        stride: Sequence[int] | None = None,
        padding: Sequence[int] | str | None = None,
        dilation: Sequence[int] | None = None,
        groups: int = 1,
        padding_mode: str = "zeros",
        dropout: float = 0.0,
        init: Init = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(r)
        kernel = tuple(kernel_size)
        if len(kernel) not in (1, 2):
            raise ArgumentError(f"Only 1-d and 2-d convolutions take a low-rank delta, not kernel_size={kernel}.")
        if init not in ("kaiming", "gaussian"):
            raise ArgumentError(f"A convolution takes init='kaiming' or 'gaussian', not {init!r}.")
        if self.path == "weight" and dropout:
            raise ArgumentError("DoRA on a convolution works on its weight and has no input to drop. Set dropout=0.")
        ones = (1,) * len(kernel)
        self.stride = tuple(stride or ones)
        self.padding = padding if isinstance(padding, str) else tuple(padding or (0,) * len(kernel))
        self.dilation = tuple(dilation or ones)
        self.groups = groups
        self.padding_mode = padding_mode
        super().__init__(
            (r, in_channels // groups, *kernel),
            (out_channels, r, *ones),
            out_features=out_channels,
            scale=scale,
            dropout=dropout,
            init=init,
            use_dora=self.path == "weight",
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Apply the delta.

        Args:
            x: input of the host, [batch, in, *size] or [in, *size].
            output: output of the host, [batch, out, *size] or [out, *size].

        Returns:
            A tensor like ``output``.
        """
        conv = F.conv1d if len(self.dilation) == 1 else F.conv2d
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        padding: tuple[int, ...] | str = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pads(), mode=self.padding_mode), (0,) * len(self.dilation)
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        a = a.repeat(self.groups, *(1,) * (a.dim() - 1))
        inner = conv(x, a, None, self.stride, padding, self.dilation, self.groups)
        return torch.add(output, conv(inner, b, groups=self.groups).to(output.dtype), alpha=self.scale)

    def _pads(self) -> list[int]:
        """Elements to add before and after each dimension, last dimension first, as F.pad wants them."""
        kernel = self.a.shape[2:]
        if isinstance(self.padding, str):
            total = [d * (k - 1) if self.padding == "same" else 0 for d, k in zip(self.dilation, kernel, strict=True)]
        else:
            total = [2 * p for p in self.padding]
        return [side for t in reversed(total) for side in (t // 2, t - t // 2)]

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _flat_a(self) -> Tensor:
        return self.a.flatten(1)

    def _flat_b(self) -> Tensor:
        return self.b.flatten(1)


class DoraConv(LowRankConv):
    """DoRA on a convolution: arguments as in :class:`LowRankConv`, no dropout; a magnitude per output channel."""

    path: ClassVar[Path] = "weight"

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """The effective weight, [out, in / groups, *kernel]."""
        return self._effective(weight)
