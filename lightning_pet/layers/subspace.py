"""Training a model inside a random subspace of all its weights (intrinsic dimension)."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers.delta import REMADE, Delta, Remaker, unchanged_since
from lightning_pet.layers.fastfood import (
    define,
    fastfood,
    fastfood_transposed,
    hold,
    padded_length,
    projected_before_back,
    projected_values,
    transposed_values,
)
from lightning_pet.layers.transforms import is_ordinary, is_transformed


class Subspace(Delta):
    """The numbers that train: one vector for all tensors of the model and, if wanted, one factor for each.

    Args:
        size: length of the vector θ.
        tensors: number of factors λ; 0: none.
        device: where the parameters live.
        dtype: dtype of the parameters.
    """

    path = "shared"

    def __init__(
        self,
        size: int,
        tensors: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.factors = nn.Parameter(torch.empty(tensors, device=device, dtype=dtype)) if tensors else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """θ = 0 and λ = 1: nothing is changed yet."""
        nn.init.zeros_(self.vector)
        if self.factors is not None:
            nn.init.ones_(self.factors)


class Projected(Delta):
    """One tensor of the model, moved by its own projection of the common vector: ``W + λ P θ``.

    λ is applied before the projection, which is linear, so that autograd keeps d numbers and not a weight's.

    Args:
        subspace: holds θ and λ.
        index: this tensor's place in λ.
        numel: numbers in the tensor.
        seed: what P is a function of.
        authors_gradient: divide θ's gradient by the length of the transform, as the paper's code does.
    """

    path = "weight"

    def __init__(
        self, subspace: Subspace, index: int, numel: int, seed: int, *, authors_gradient: bool = False
    ) -> None:
        super().__init__()
        self.__dict__["subspace"] = subspace
        self.index = index
        self.numel = numel
        self.seed = seed
        self.authors_gradient = authors_gradient
        self.ran = False
        define()
        hold(self, seed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        define()
        hold(self, self.seed)

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    @property
    def divisor(self) -> int:
        """What θ's gradient is divided by."""
        if not self.authors_gradient:
            return 1
        return padded_length(len(self.__dict__["subspace"].vector), self.numel)

    @property
    def remakes(self) -> bool:  # type: ignore[override]
        """Projecting once more costs little where backward projects back with the same random numbers at once."""
        return self.numel >= REMADE

    def remaker(self, weight: Tensor) -> Remaker | None:
        """See :meth:`Delta.remaker`; for a weight that stays where it is, on the device of θ."""
        subspace = cast(Subspace, self.__dict__["subspace"])
        vector, factors = subspace.vector, subspace.factors
        check = unchanged_since(weight, vector, *([] if factors is None else [factors]))
        if check is None or not self.remakes or vector.device != weight.device:
            return None

        @torch.no_grad()
        def remake() -> Tensor:
            check()
            return _moved(weight, vector, factors, self, soon_back=True)

        return remake

    def forward(self, weight: Tensor) -> Tensor:
        """Effective weight, in the dtype of the base; the sum is made in at least float32.

        Args:
            weight: [...], ``numel`` numbers.
        """
        if not (self.ran or torch.compiler.is_compiling()):
            self.ran = True
        subspace = cast(Subspace, self.__dict__["subspace"])
        vector: Tensor = subspace.vector
        ordinary = not is_transformed() and is_ordinary(vector) and is_ordinary(weight)
        if ordinary and vector.device == weight.device:
            return _move(weight, vector, subspace.factors, self)
        if self.authors_gradient:
            constant = vector.detach()
            vector = constant + (vector - constant) / self.divisor
        if subspace.factors is not None:
            vector = vector * subspace.factors[self.index]
        change: Tensor = fastfood(vector.to(weight.device), self.numel, self.seed)
        return (weight + change.view(weight.shape)).to(weight.dtype)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The effective weight as a new tensor; see :meth:`Delta.merged`."""
        return cast(Tensor, self(weight))

    @torch.no_grad()
    def reach(self, largest: float) -> float:
        """See :meth:`Delta.reach`; rows of P have a known norm (Cauchy–Schwarz)."""
        subspace = cast(Subspace, self.__dict__["subspace"])
        factor = 1.0 if subspace.factors is None else abs(float(subspace.factors[self.index]))
        moved, length = factor * float(subspace.vector.abs().sum()), padded_length(len(subspace.vector), self.numel)
        if not 10 * length * moved < torch.finfo(subspace.vector.dtype).max:
            return super().reach(largest)  # sums on the way may be too large
        return largest + moved * math.sqrt(length / self.numel)

    def extra_repr(self) -> str:
        """What P is."""
        return f"numel={self.numel}, seed={self.seed}"


def _moved(weight: Tensor, vector: Tensor, factors: Tensor | None, delta: Projected, soon_back: bool = False) -> Tensor:
    scaled = vector if factors is None else vector * factors[delta.index]
    change = (projected_before_back if soon_back else projected_values)(scaled, delta.numel, delta.seed)
    return (weight + change.view(weight.shape)).to(weight.dtype)


class _Move(torch.autograd.Function):
    """``W + λ P θ`` in one node; it keeps θ and λ alone."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, vector: Tensor, factors: Tensor | None, delta: Projected) -> Tensor:
        ctx.index, ctx.seed, ctx.divisor = delta.index, delta.seed, delta.divisor
        ctx.save_for_backward(vector, factors)
        return _moved(weight, vector, factors, delta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        vector, factors = ctx.saved_tensors
        to_weight, to_vector, to_factors, _ = ctx.needs_input_grad
        own = gradient if to_weight else None
        if not (to_vector or to_factors):
            return own, None, None, None
        transposed = fastfood_transposed if torch.is_grad_enabled() else transposed_values
        back = transposed(gradient.to(vector.dtype).reshape(-1), vector.numel(), ctx.seed)
        of_factors = None
        if to_factors:
            of_factors = F.pad(torch.dot(back, vector).view(1), (ctx.index, factors.numel() - ctx.index - 1))
        if factors is not None:
            back = back * factors[ctx.index]
        return own, back / ctx.divisor if ctx.divisor > 1 else back, of_factors, None


# Past what ``Function.apply`` does for torch.func, which does not come here.
_move: Callable[..., Tensor] = super(torch.autograd.Function, _Move).apply
