"""Changes of a weight by a Kronecker product (LoKr): ``W + s · (W1 ⊗ W2)``.

The outputs are taken apart as p × k and the inputs as m × n. W1 [p, m] and W2 [k, n] are whole, or products of rank r
where that has fewer numbers: the sizes decide. On linear layers the product is never formed: the input reads as
[m, n], and goes through W2 along n and through W1 along m.
"""

from dataclasses import dataclass
from math import isqrt, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.layers.combining import Factors
from lightning_pet.layers.low_rank_base import check_rank
from lightning_pet.layers.low_rank_product import compute_dtype
from lightning_pet.layers.weight_change import Drops, Form, OnLinear, OnWeight, WeightChange, draw_

Init = Literal["default", "lycoris"]


@dataclass(frozen=True)
class Split:
    """How a matrix is taken apart.

    Attributes:
        factor: first size of outputs and of inputs, as far as it divides them; -1: near their roots.
        both: W1 may be a product of rank r, too.
        core: of a kernel that looks at several places, W2 is a product of three factors.
        init: which factor starts at zero: the first one, or as LyCORIS has it the second.
    """

    factor: int = -1
    both: bool = False
    core: bool = False
    init: Init = "default"


def divided(size: int, factor: int = -1) -> tuple[int, int]:
    """A size as a product of two: the first is ``factor`` where that divides it, else the next divisor below.

    >>> divided(128), divided(128, 4), divided(120, 7), divided(127)
    ((8, 16), (4, 32), (6, 20), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = isqrt(size) if factor == -1 else min(isqrt(size), factor)
    first = next(number for number in range(limit, 0, -1) if size % number == 0)
    return first, size // first


def kron(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product of [..., p, m] and [..., k, n]: [..., p k, m n], of each pair of matrices."""
    product = first.unsqueeze(-1).unsqueeze(-3) * second.unsqueeze(-2).unsqueeze(-4)
    return product.flatten(-2).flatten(-3, -2)


class Kronecker(WeightChange):
    """What LoKr is on every kind of layer.

    Attributes:
        w1: [..., p, m]; ``None`` where ``w1_a`` [..., p, r] and ``w1_b`` [..., r, m] stand for it.
        w2: [..., k, n, *kernel]; ``None`` where ``w2_a`` [..., k, r] and ``w2_b`` [..., r, n · kernel] stand for it,
            or with ``t2`` [r, r, *kernel] ``w2_a`` [r, k] and ``w2_b`` [r, n].
        r: rank.
    """

    w1: nn.Parameter | None
    w1_a: nn.Parameter | None
    w1_b: nn.Parameter | None
    w2: nn.Parameter | None
    w2_a: nn.Parameter | None
    w2_b: nn.Parameter | None
    t2: nn.Parameter | None

    def __init__(
        self,
        form: Form,
        r: int,
        *,
        scale: float,
        split: Split | None = None,
        drops: Drops | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(r)
        super().__init__(form, scale, drops)
        self.split = split = split or Split()
        if split.factor != -1 and split.factor < 1:
            raise ArgumentError(f"decompose_factor must be a positive integer, or -1, not {split.factor!r}.")
        self.r = r
        (p, k), (m, n) = divided(form.own, split.factor), divided(form.inputs, split.factor)
        self.sizes = (p, k, m, n)
        places, e = prod(form.kernel), form.experts
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"):
            self.register_parameter(name, None)

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if split.both and r < max(p, m) / 2:
            self.w1_a, self.w1_b = made(*e, p, r), made(*e, r, m)
        else:
            self.w1 = made(*e, p, m)
        if r >= max(k, n) / 2:
            self.w2 = made(*e, k, n, *form.kernel)
        elif split.core and form.is_spatial:
            self.t2, self.w2_a, self.w2_b = made(r, r, *form.kernel), made(r, k), made(r, n)
        else:
            self.w2_a, self.w2_b = made(*e, k, r), made(*e, r, n * places)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all factors but one, which is zero: the delta does nothing."""
        behind = len(self.form.experts)
        for parameter in self.parameters():
            draw_(parameter, prod(parameter.shape[behind + 1 :]))
        first, second = (self.w1_a if self.w1 is None else self.w1), (self.w2_b if self.w2 is None else self.w2)
        zero = second if self.split.init == "lycoris" else first
        assert zero is not None
        nn.init.zeros_(zero)

    def first(self, dtype: torch.dtype) -> Tensor:
        """W1, [..., p, m]."""
        if self.w1 is not None:
            return self.w1.to(dtype)
        assert self.w1_a is not None
        assert self.w1_b is not None
        return self.w1_a.to(dtype) @ self.w1_b.to(dtype)

    def second(self, dtype: torch.dtype) -> Factors | Tensor:
        """W2 as (right [..., r, n · kernel], left [..., k, r]), or whole [..., k, n · kernel]."""
        if self.w2 is not None:
            return self.w2.to(dtype).flatten(-1 - len(self.form.kernel)) if self.form.kernel else self.w2.to(dtype)
        assert self.w2_a is not None
        assert self.w2_b is not None
        left, right = self.w2_a.to(dtype), self.w2_b.to(dtype)
        if self.t2 is None:
            return right, left
        core = self.t2.to(dtype).flatten(2)  # [r, r, kernel]
        return torch.einsum("ijk,jn->ink", core, right).flatten(1), left.t()

    @property
    def turned(self) -> bool:
        """The product is ``W2 ⊗ W1``: of a convolution of one dimension whose W2 is whole, as HF PEFT has it."""
        return len(self.form.kernel) == 1 and self.w2 is not None

    def change(self, dtype: torch.dtype) -> Tensor:
        """``s · (W1 ⊗ W2)``, [..., own outputs, columns]."""
        first, second = self.first(dtype), self.second(dtype)
        if not isinstance(second, Tensor):
            second = second[1] @ second[0]
        return self._product(first * self.scale, second)

    def _product(self, first: Tensor, second: Tensor) -> Tensor:
        if not self.turned:
            return kron(first, second)
        k, n, places = second.shape[0], self.sizes[3], prod(self.form.kernel)
        product = torch.einsum("ace,bd->abcde", second.view(k, n, places), first)
        return product.reshape(k * first.shape[0], -1)

    def matrices(self) -> Factors | None:
        """See :meth:`WeightChange.matrices`: of the rank of W1 times that of W2."""
        if self.turned:
            return None
        dtype = next(self.parameters()).dtype
        second = self.second(dtype)
        right1, left1 = _thin(self.first(dtype)) if self.w1_a is None or self.w1_b is None else (self.w1_b, self.w1_a)
        right2, left2 = _thin(second) if isinstance(second, Tensor) else second
        return kron(right1, right2), kron(left1, left2) * self.scale

    @torch.no_grad()
    def largest(self) -> float:
        """The largest value of W1 times that of W2, as far as factors tell."""
        dtype = next(self.parameters()).dtype
        second = self.second(dtype)
        if not isinstance(second, Tensor):
            right, left = second
            size = (right.abs().amax(-1) * left.abs().amax(-2)).sum(-1).max()
        else:
            size = second.abs().max()
        return abs(self.scale) * float(self.first(dtype).abs().max() * size)


class KroneckerLinear(OnLinear, Kronecker):
    """LoKr on a linear layer.

    Args:
        in_features: input features of the host.
        out_features: output features of the host.
        r: rank of a factor that is taken apart; also what ``alpha`` is divided by.
        scale: factor s, alpha / r.
        transposed: the host's weight is [in, out] (transformers' ``Conv1D``).
        rows: half-open ranges of output features of a fused projection.
        **options: ``split``, ``drops``, ``device`` and ``dtype`` of :class:`Kronecker`.

    Raises:
        ArgumentError: if an argument is out of range.
    """

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """``output + s · x (W1 ⊗ W2)ᵀ``.

        Args:
            x: input of the host, [..., in].
            output: output of the host, [..., out].

        Returns:
            [..., out].
        """
        dtype = compute_dtype(x)
        p, k, m, n = self.sizes
        x = x.to(dtype).reshape(*x.shape[:-1], m, n)
        first, second = self.first(dtype) * self.scale, self.second(dtype)
        if not isinstance(second, Tensor):
            change = F.linear(first @ F.linear(x, second[0]), second[1])
        elif m * k * (n + p) <= p * n * (m + k):
            change = first @ F.linear(x, second)
        else:
            change = F.linear(first @ x, second)
        return self.added(output, change.flatten(-2))


class KroneckerWeight(OnWeight, Kronecker):
    """LoKr on a weight: of a convolution, of several matrices in one (experts), or one that is read without a call."""


def _thin(matrix: Tensor) -> Factors:
    """A matrix as (right, left) of as small a rank as its shape allows."""
    rows, columns = matrix.shape[-2:]
    one = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    one = one.expand(*matrix.shape[:-2], *one.shape)
    return (matrix, one) if rows <= columns else (one, matrix)
