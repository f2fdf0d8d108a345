"""Low-rank deltas for embeddings and convolutions; the mathematics is in :mod:`lightning_pet.layers.low_rank_base`.

Where the host's call is its plain look-up or product, a delta adds to what it returns. Where it is not, or nobody
calls the host, and for DoRA, which rescales the whole effective weight, it acts on the weight
(:class:`EmbeddingWeight`, :class:`ConvWeight`).
"""

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.layers.combining import Factors
from lightning_pet.layers.delta import Path
from lightning_pet.layers.low_rank_base import Init, LowRank, OwnBias, check_rank

_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LowRankEmbedding(LowRank):
    """LoRA on an embedding: ``y = E[ids] + s · embed_scale · (Aᵀ[ids]) Bᵀ``.

    A [r, num_embeddings] starts at zero, and B [embedding_dim, r] is drawn.

    Args:
        num_embeddings: rows of the host's weight.
        embedding_dim: columns of the host's weight.
        r: rank, at least 1.
        scale: factor s of the delta.
        padding_idx: the host's; its column of A gets no gradient.
        embed_scale: factor by which the host itself multiplies the rows it looks up (Gemma,
            M2M100: the value of their ``embed_scale``); without it attached and merged would differ.
        dropout: probability of dropping an input on the way to A, which is one id; active in training only.
        init: ``"kaiming"`` (B normal with standard deviation 1), ``"gaussian"`` (B normal with standard deviation
            1/r), ``"pissa"`` or ``"olora"``, as in :class:`~lightning_pet.layers.low_rank.LowRankLinear`.
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
        dropout: float = 0.0,
        init: Init = "kaiming",
        use_dora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(r)
        _check_dora(self, use_dora)
        self.padding_idx = padding_idx
        self.embed_scale = float(embed_scale)
        super().__init__(
            (r, num_embeddings),
            (embedding_dim, r),
            out_features=embedding_dim,
            scale=scale,
            dropout=dropout,
            init=init,
            use_dora=use_dora,
            device=device,
            dtype=dtype,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A to zero and draw B; see :meth:`LowRank.reset_parameters`."""
        nn.init.zeros_(self.a)
        nn.init.normal_(self.b, std=1 / self.r if self.init == "gaussian" else 1.0)
        self._remember_origin()
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
        if self.training and self.dropout > 0:
            inner = inner * F.dropout(torch.ones_like(inner[..., :1]), self.dropout)
        # A lookup is not autocast, so what is added to it is not either.
        with torch.autocast(output.device.type, enabled=False):
            change = F.linear(inner, self.b)
            if self.a0 is not None and self.b0 is not None:
                change = change - F.linear(F.embedding(ids, self.a0.t()), self.b0)
            change = change * (self.scale * self.embed_scale)
        return output + change.to(output.dtype)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.t()


class EmbeddingWeight(LowRankEmbedding):
    """LoRA or DoRA on the table of an embedding: arguments as in :class:`LowRankEmbedding`.

    ``use_dora`` trains a magnitude per embedding dimension. The host applies its own scale to what it reads, so
    ``embed_scale`` has no effect.
    """

    path: ClassVar[Path] = "weight"

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """The effective weight, [num_embeddings, embedding_dim]."""
        return self._effective(weight, drop=True)


class LowRankConv(OwnBias):
    """LoRA on a convolution of one to three dimensions: a convolution to r channels, then one of size 1.

    A is [r, in / groups, *kernel] and B [out, r, 1, ...]. With ``groups > 1`` every group of inputs
    goes through the same A and to its own outputs in B, so that the change of the weight is B A as
    for any other layer.

    Args:
        in_channels: of the host.
        out_channels: of the host.
        kernel_size: of the host, one number per dimension; its length decides how many there are.
        r: rank, at least 1.
        scale: factor s of the delta.
        stride: of the host.
        padding: of the host: numbers per dimension, ``"same"`` or ``"valid"``.
        dilation: of the host.
        groups: of the host.
        padding_mode: of the host.
        dropout: probability of zeroing an input element on the way to A; active in training only.
        init: ``"kaiming"`` or ``"gaussian"``, as in :class:`~lightning_pet.layers.low_rank.LowRankLinear`.
        bias: also train a bias of B, added as ``s · bias``; it merges into the host's bias.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    flat: ClassVar[bool] = False
    """A and B are held as matrices."""

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
        use_dora: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(r)
        _check_dora(self, use_dora)
        kernel = tuple(kernel_size)
        if len(kernel) not in _CONVOLUTIONS:
            raise ArgumentError(f"Convolutions of 1 to 3 dimensions take a low-rank delta, not kernel_size={kernel}.")
        if init not in ("kaiming", "gaussian"):
            raise ArgumentError(f"A convolution takes init='kaiming' or 'gaussian', not {init!r}.")
        if bias and self.path == "weight":
            raise ArgumentError("A delta on the weight of a convolution has no place for a bias of B. Set bias=False.")
        ones = (1,) * len(kernel)
        self.stride = tuple(stride or ones)
        self.padding = padding if isinstance(padding, str) else tuple(padding or (0,) * len(kernel))
        self.dilation = tuple(dilation or ones)
        self.groups = groups
        self.padding_mode = padding_mode
        self.kernel = (in_channels // groups, *kernel)
        super().__init__(
            (r, prod(self.kernel)) if self.flat else (r, *self.kernel),
            (out_channels, r) if self.flat else (out_channels, r, *ones),
            out_features=out_channels,
            scale=scale,
            dropout=dropout,
            init=init,
            use_dora=use_dora,
            device=device,
            dtype=dtype,
            bias=bias,
        )

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Apply the delta.

        Args:
            x: input of the host, [batch, in, *size] or [in, *size].
            output: output of the host, [batch, out, *size] or [out, *size].

        Returns:
            A tensor like ``output``.
        """
        conv, ones = _CONVOLUTIONS[len(self.dilation)], (1,) * len(self.dilation)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        padding: tuple[int, ...] | str = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pads(), mode=self.padding_mode), (0,) * len(self.dilation)
        a = self._flat_a().to(x.dtype).reshape(-1, *self.kernel).repeat(self.groups, *(1,) * len(self.kernel))
        b = self._flat_b().to(x.dtype).reshape(self.out_features, -1, *ones)
        inner = conv(x, a, None, self.stride, padding, self.dilation, self.groups)
        output = torch.add(output, conv(inner, b, groups=self.groups).to(output.dtype), alpha=self.scale)
        return output if self.bias is None else output + self._own_bias(output.dtype).view(-1, *ones)

    def _pads(self) -> list[int]:
        """Elements to add before and after each dimension, last dimension first, as F.pad wants them."""
        kernel = self.kernel[1:]
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

    def _shaped(self, a: Tensor, b: Tensor) -> Factors:
        return a.reshape(-1, *self.kernel), b.reshape(*b.shape, *(1,) * (len(self.kernel) - 1))


class ConvWeight(LowRankConv):
    """LoRA or DoRA on the weight of a convolution: arguments as in :class:`LowRankConv`, but no ``bias``.

    ``use_dora`` trains a magnitude per output channel. Dropout drops elements of the kernel's window, for all
    positions of a forward alike.
    """

    path: ClassVar[Path] = "weight"

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """The effective weight, [out, in / groups, *kernel]."""
        return self._effective(weight, drop=True)


def _check_dora(delta: LowRank, use_dora: bool) -> None:
    if use_dora and delta.path != "weight":
        raise ArgumentError(f"{type(delta).__name__} adds to an output; DoRA on such a host acts on its weight.")
