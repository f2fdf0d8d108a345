"""Rotations of what a layer reads, the mathematics of OFT and HRA: the lengths and angles of its inputs stay.

A row of numbers x becomes x M with an M that is orthogonal, or nearly; merged, the host's weight W becomes W Mᵀ. M is
never formed for all features: it is a stack of small blocks, or a few reflections.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers.combining import Factors
from lightning_pet.layers.delta import Delta, Path


class _Rotation(Delta):
    """What all rotations share.

    Args:
        features: input features of the host; of a convolution, those of one place of its kernel window, flattened.
        stack: of a weight that holds several matrices (experts), how many: each has a rotation of its own.
        transposed: the host's weight is [..., in, out].
        kernel: the host is a convolution: its weight is [out, in, *kernel].
    """

    path: ClassVar[Path] = "around"

    def __init__(
        self, features: int, *, stack: Sequence[int] = (), transposed: bool = False, kernel: bool = False
    ) -> None:
        super().__init__()
        self.features = features
        self.stack = tuple(stack)
        self.transposed = transposed
        self.kernel = kernel

    @property
    def _own(self) -> Tensor:
        """What trains."""
        raise NotImplementedError

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        """``x M`` or ``x Mᵀ``, [*stack, ..., features], in the dtype of x, which is the wider one of all."""
        raise NotImplementedError

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the host on ``x M``; the dtype of x, [..., features], stays."""
        return call(self._rotated(x, back=False), *args, **kwargs)

    def _rotated(self, x: Tensor, back: bool) -> Tensor:
        wide = _precise(x.dtype, self._own.dtype)
        with torch.autocast(x.device.type, enabled=False):  # it would round away what a rotation keeps
            return self._turn(x.to(wide), back).to(x.dtype)

    def _effective(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1) if self.kernel else weight.mT if self.transposed else weight
        turned = self._rotated(matrix, back=True)
        return turned.mT.contiguous() if self.transposed else turned.reshape(weight.shape)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """``W Mᵀ``, as a new tensor."""
        return self._effective(weight)


class BlockRotation(_Rotation):
    r"""``y = W (x R)``, R a diagonal of small orthogonal blocks: OFT.

    Each block is made of a skew-symmetric Q, whose upper triangle trains, row by row: exactly by Cayley's
    :math:`R = (I - Q)(I + Q)^{-1}`, or by the first terms of the series of its inverse,
    :math:`R = I + 2Q + 2Q^2 + \dots + 2Q^{t-2} + Q^{t-1}`, which is a rotation as long as Q is small. All start at
    zero, and a product with ones and zeros is exact: the first output is the base's bit for bit.

    Args:
        features: input features of the host.
        block_size: rows of a block, b; it divides the features.
        block_share: one block for all.
        terms: of the series, t; three are what four are. ``None``: exactly.
        limit: largest Frobenius norm of all Q together, by which constrained OFT keeps each Q within
            ``limit / √blocks``; ``None``: any.
        device: where Q lives.
        dtype: dtype of Q; products run in the wider one of it, the input's and float32.
        **place: what all rotations take.

    Attributes:
        skew: the upper triangles of Q, [*stack, blocks, b (b - 1) / 2].
    """

    def __init__(
        self,
        features: int,
        block_size: int,
        *,
        block_share: bool = False,
        terms: int | None = 5,
        limit: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **place: Any,
    ) -> None:
        super().__init__(features, **place)
        self.block_size = block_size
        self.terms = terms
        self.limit = limit
        count = 1 if block_share else features // block_size
        numbers = block_size * (block_size - 1) // 2
        self.skew = nn.Parameter(torch.empty(*self.stack, count, numbers, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all Q to zero: the delta does nothing."""
        nn.init.zeros_(self.skew)

    @property
    def _own(self) -> Tensor:
        return self.skew

    def blocks(self, dtype: torch.dtype) -> Tensor:
        """R, [*stack, blocks or 1, b, b]."""
        size = self.block_size
        q = _skew(self._within(self.skew.to(dtype)), size)
        one = torch.eye(size, device=q.device, dtype=dtype)
        if self.terms is None:
            exact: Tensor = torch.linalg.solve(one + q, one - q, left=False)
            return exact
        if self.terms == 2:
            return one + 2 * q
        total = 2 * one + q  # by Horner's rule, from the last term on
        for _ in range(max(self.terms, 4) - 3):
            total = 2 * one + q @ total
        return one + q @ total

    def _within(self, skew: Tensor) -> Tensor:
        """The same numbers, or as many of their length as each Q may have."""
        if self.limit is None:
            return skew
        most = self.limit / math.sqrt(self.skew.shape[-2])
        norm = torch.linalg.vector_norm(skew, dim=-1, keepdim=True) * math.sqrt(2)  # Q has each of them twice
        kept: Tensor = skew * (most / norm.clamp(min=most))
        return kept

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        r = self.blocks(x.dtype)
        rows = x.shape[:-1] if self.stack else (x.shape[:-1].numel(),)
        parts = x.reshape(*rows, -1, self.block_size).transpose(-2, -3)
        return (parts @ (r.mT if back else r)).transpose(-2, -3).reshape(x.shape)

    @torch.no_grad()
    def reach(self, largest: float) -> float:
        """The largest number times the largest sum that a block takes of its kind; see :meth:`Delta.reach`."""
        return largest * float(self.blocks(_precise(self.skew.dtype)).abs().sum(-1).max())

    def extra_repr(self) -> str:
        """Shape of Q and how a block is made of it."""
        how = "exact" if self.terms is None else f"terms={self.terms}"
        return f"skew={tuple(self.skew.shape)}, block_size={self.block_size}, {how}" + (
            "" if self.limit is None else f", limit={self.limit:g}"
        )


class Reflections(_Rotation):
    r"""``y = W H₁ H₂ … H_r x`` with :math:`H_k = I - 2 u_k u_k^T`, u of unit length: HRA.

    The product is formed as :math:`I - U T U^T`, where T⁻¹ is upper triangular: halves on its diagonal, above it the
    products of the columns. Columns start in equal pairs, whose reflections undo each other: the first output is the
    base's to rounding, if their number is even. A column shorter than 1e-12 turns less, and one of zeros nothing.

    Args:
        features: input features of the host.
        rank: number of reflections, r.
        orthogonal: the columns are made orthogonal to each other first (Gram and Schmidt), so that
            :math:`I - 2 U U^T` results. That is never the identity; columns then start apart.
        device: where U lives.
        dtype: dtype of U; products run in the wider one of it, the input's and float32.
        **place: what all rotations take.

    Attributes:
        u: the columns, of any length, [*stack, features, r].
    """

    def __init__(
        self,
        features: int,
        rank: int,
        *,
        orthogonal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **place: Any,
    ) -> None:
        super().__init__(features, **place)
        self.orthogonal = orthogonal
        self.u = nn.Parameter(torch.empty(*self.stack, features, rank, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the columns: in equal pairs, if their number is even and they may be equal."""
        rank = self.u.shape[-1]
        with torch.no_grad():
            self.u.uniform_(-1, 1).mul_(1 / math.sqrt(rank))
            if rank % 2 == 0 and not self.orthogonal:
                self.u[..., 1::2] = self.u[..., ::2]

    @property
    def _own(self) -> Tensor:
        return self.u

    def low_rank_factors_on(self, weight: Callable[[], Tensor]) -> Factors | None:
        """``Uᵀ`` and ``-W U T``, whose product is the whole change of W."""
        if self.stack:
            return None
        with torch.no_grad():
            values = weight()
            matrix = values.flatten(1) if self.kernel else values.mT if self.transposed else values
            wide = _precise(values.dtype, self.u.dtype)
            u, t = self.factors(wide)
            a, b = u.mT, -(matrix.to(wide) @ u) @ t
        if self.kernel:
            a, b = a.reshape(-1, *values.shape[1:]), b.reshape(*b.shape, *(1,) * (values.dim() - 2))
        return a, b

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U and T."""
        rank = self.u.shape[-1]
        one = torch.eye(rank, device=self.u.device, dtype=dtype)
        u = F.normalize(self.u.to(dtype), dim=-2)
        if self.orthogonal:
            return torch.linalg.qr(u).Q, 2 * one
        inverse = (u.mT @ u).triu(1) + one / 2
        return u, torch.linalg.solve_triangular(inverse, one.expand_as(inverse), upper=True)

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        u, t = self.factors(x.dtype)
        return x - (x @ u) @ ((t if back else t.mT) @ u.mT)

    @torch.no_grad()
    def reach(self, largest: float) -> float:
        """No row of the weight becomes longer, so no number exceeds its length; see :meth:`Delta.reach`."""
        return largest * math.sqrt(self.features) * (1 + 1e-3)

    def extra_repr(self) -> str:
        """Shape of U."""
        return f"u={tuple(self.u.shape)}" + ", orthogonal=True" * self.orthogonal


class _OfWeight(_Rotation):
    """The same on the weight itself, for hosts whose weight is read without a call, and for convolutions."""

    path: ClassVar[Path] = "weight"

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """The effective weight, in the shape and dtype of ``weight``."""
        return self._effective(weight)


class BlockRotatedWeight(_OfWeight, BlockRotation):
    """``W Rᵀ``; see :class:`BlockRotation`."""


class ReflectedWeight(_OfWeight, Reflections):
    """``W H₁ … H_r``; see :class:`Reflections`."""


def _skew(upper: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices of their upper triangles, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    flat = upper.new_zeros(*upper.shape[:-1], size * size).index_copy(-1, rows * size + columns, upper)
    half = flat.view(*upper.shape[:-1], size, size)
    return half - half.mT


def _precise(*dtypes: torch.dtype) -> torch.dtype:
    """The widest of these, at least float32."""
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide
