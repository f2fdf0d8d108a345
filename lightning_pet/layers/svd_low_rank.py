"""Low-rank deltas in the form of a singular value decomposition (AdaLoRA): ``W + s · B diag(e) A``.

Every triplet (column of B, number of e, row of A) can be switched off by its number alone, so that the
rank of each matrix can change while it trains. A penalty keeps the rows of A and the columns of B orthonormal.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_pet.layers.delta import kind_of
from lightning_pet.layers.low_rank import LowRankLinear, LowRankParameter
from lightning_pet.layers.low_rank_base import LowRank
from lightning_pet.layers.low_rank_hosts import ConvWeight, LowRankConv
from lightning_pet.layers.side_loss import Penalty, with_penalty
from lightning_pet.layers.transforms import apply_node

# --- which triplets of which matrix are worth their place ------------------------------------------


class Importance(NamedTuple):
    """Smoothed importance of every number of one tensor.

    Attributes:
        sensitivity: running mean of ``|w · dL/dw|``.
        uncertainty: running mean of how far that moves from its mean.
    """

    sensitivity: Tensor
    uncertainty: Tensor

    def updated(self, value: Tensor, gradient: Tensor, beta1: float, beta2: float) -> "Importance":
        """After one more step.

        Args:
            value: the tensor.
            gradient: its gradient in this step.
            beta1: share of the past in the sensitivity.
            beta2: share of the past in the uncertainty.
        """
        return updated([self], [value], [gradient], beta1, beta2)[0]

    def score(self) -> Tensor:
        """Their product."""
        return self.sensitivity * self.uncertainty


def updated(
    before: Sequence[Importance], values: Sequence[Tensor], gradients: Sequence[Tensor], beta1: float, beta2: float
) -> list[Importance]:
    """:meth:`Importance.updated` of many tensors, which need not have one shape; nothing is changed in place."""
    now = torch._foreach_mul(list(values), list(gradients))
    torch._foreach_abs_(now)
    sensitivity = torch._foreach_mul([importance.sensitivity for importance in before], beta1)
    torch._foreach_add_(sensitivity, now, alpha=1 - beta1)
    torch._foreach_sub_(now, sensitivity)
    torch._foreach_abs_(now)
    uncertainty = torch._foreach_mul([importance.uncertainty for importance in before], beta2)
    torch._foreach_add_(uncertainty, now, alpha=1 - beta2)
    return [Importance(*pair) for pair in zip(sensitivity, uncertainty, strict=True)]


def triplet_scores(a: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """Importance of triplets from that of their numbers.

    Args:
        a: scores of A, [..., r, in].
        b: scores of B, [..., out, r].
        e: scores of e, [..., r].

    Returns:
        [..., r]: that of the number, and the means of both vectors.
    """
    return e + a.mean(-1) + b.mean(-2)


def rank_budget(step: int, first: int, last: int, initial: int, final: int) -> int:
    """Triplets that may stay after a step: ``initial`` until ``first``, ``final`` from ``last``, a cubic between.

    >>> [rank_budget(step, 2, 6, 100, 20) for step in range(8)]
    [100, 100, 100, 53, 30, 21, 20, 20]
    """
    if step <= first:
        return initial
    if step >= last:
        return final
    return int((initial - final) * (1 - (step - first) / (last - first)) ** 3 + final)


def allocate(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Keep the ``budget`` best triplets of all matrices together; of equal ones the first.

    Args:
        scores: [..., r] of each matrix.
        budget: how many.

    Returns:
        Which ones, in the shapes of ``scores``.
    """
    flat = torch.cat([score.flatten() for score in scores])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[:budget]] = True
    pieces = torch.split(kept, [score.numel() for score in scores])
    return [piece.view(score.shape) for piece, score in zip(pieces, scores, strict=True)]


# --- deltas ---------------------------------------------------------------------------------------


_STD = 0.02
_LEAST = 1e-30  # what no norm but zero is below


class SvdLowRank(LowRank):
    """What makes a low-rank delta one of triplets; mixed in before its class.

    Attributes:
        e: [..., r], trained; starts at zero, so that the delta does nothing.
        kept: [..., r] of 0 and 1, a buffer: the triplets that the last allocation of ranks has left.
        penalty: its weight is that of this delta's distance from orthonormality.
    """

    e: nn.Parameter
    kept: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.e = nn.Parameter(torch.empty(self.a.shape[:-1], device=self.a.device, dtype=self.a.dtype))
        self.register_buffer("kept", torch.empty(self.e.shape, device=self.a.device, dtype=torch.int32))
        self.penalty = Penalty(orthogonality, orthogonality_gradient, 0.0, _orthogonality_gradients)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A and B, set e to zero, keep every triplet."""
        if "e" not in self._parameters:
            return  # called by the constructor of the base, before there is one
        nn.init.normal_(self.a, std=_STD)
        nn.init.normal_(self.b, std=_STD)
        nn.init.zeros_(self.e)
        self.kept.fill_(1)

    def _flat_a(self) -> Tensor:
        if "e" not in self._parameters:
            return self.a
        e: Tensor = self.e
        if self.penalty.weight:
            e = with_penalty(e, [self.a, self.b], self.penalty, self.training)
        return e.unsqueeze(-1) * self.a

    @property
    def rank(self) -> int:
        """Triplets that are left."""
        return int(self.kept.sum())

    @property
    def note(self) -> str:
        """For the plan."""
        return "" if self.kept.is_meta or bool(self.kept.all()) else f"rank {self.rank} of {self.kept.numel()}"

    # --- files hold the triplets that are left ------------------------------------------------------

    def packed(self) -> dict[str, Tensor]:
        """What a delta file holds: the triplets that are left, and which ones they are."""
        kept = self.kept.bool()
        if bool(kept.all()):
            return super().packed()
        return {name: rows.detach()[kept] for name, rows in self._rows().items()} | {"kept": self.kept}

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Why these tensors do not fit: those of a delta file, or of a checkpoint, which holds all triplets."""
        full = self.state_dict()
        if tensors.keys() != full.keys() or tensors["kept"].shape != self.kept.shape:
            return super().misfits(tensors)
        if tensors["a"].shape == self.a.shape:
            return super().misfits(tensors)
        if odd := [name for name, own in full.items() if kind_of(own) != kind_of(tensors[name])]:
            return [f"{odd[0]} holds {kind_of(tensors[odd[0]])}, expected {kind_of(full[odd[0]])}"]
        rank = int(tensors["kept"].bool().sum())
        expected = {name: (rank, *rows.shape[self.e.ndim :]) for name, rows in self._rows().items()}
        return [
            f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
            for name, shape in expected.items()
            if tuple(tensors[name].shape) != shape
        ]

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the triplets of a file over; those that it does not hold are zero from then on."""
        if self.kept.is_meta:
            return
        if tensors["a"].shape == self.a.shape and tensors["b"].shape == self.b.shape:
            super().unpack(tensors)
            return
        kept = tensors["kept"].bool()
        full: dict[str, Tensor] = {}
        for name, rows in self._rows().items():
            full[name] = tensors[name].new_zeros(rows.shape)
            full[name][kept] = tensors[name]
        super().unpack({**full, "b": full["b"].mT, "kept": tensors["kept"]})

    def _rows(self) -> dict[str, Tensor]:
        """The parameters with triplets first: [..., r, in], [..., r, out] and [..., r]."""
        return {"a": self.a, "b": self.b.mT, "e": self.e}


class SvdLowRankLinear(SvdLowRank, LowRankLinear):
    """AdaLoRA on a linear layer; arguments of :class:`~lightning_pet.layers.low_rank.LowRankLinear`."""

    def _changed_directly(self, weight: Tensor, b: Tensor) -> Tensor | None:
        a, e, penalty = self._parameters.get("a"), self._parameters.get("e"), self.penalty
        if a is None or e is None or e.dtype != b.dtype:
            return None
        if penalty.weight:
            with_gradients = torch.is_grad_enabled()
            penalty.arm(with_gradients)
            if with_gradients:
                penalty.hold((a, b))
                changed: Tensor = apply_node(_Changed, weight, b, e, a, self.scale, penalty)
                return changed
        return torch.addmm(weight, b * e, a, alpha=self.scale)


class _Changed(torch.autograd.Function):
    """``W + s · B diag(e) A`` for a small W, whose backward adds the penalty of A and B."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, b: Tensor, e: Tensor, a: Tensor, scale: float, penalty: Penalty) -> Tensor:
        ctx.scale, ctx.penalty = scale, penalty
        ctx.save_for_backward(b, e, a)
        return torch.addmm(weight, b * e, a, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        b, e, a = ctx.saved_tensors  # may run the forward again
        need_weight, _, need_e, _, *_ = ctx.needs_input_grad
        scaled, inner = e * ctx.scale, grad @ a.t()
        rows = (b * scaled).t()
        if (added := ctx.penalty.within(grad, (a, b))) is not None:
            of_a, of_b = torch.addmm(added[0], rows, grad), torch.addcmul(added[1], inner, scaled)
        else:
            of_a, of_b = rows @ grad, inner * scaled
        of_e = (inner * b).sum(0) * ctx.scale if need_e else None
        return grad if need_weight else None, of_b, of_e, of_a, None, None


class SvdLowRankParameter(SvdLowRank, LowRankParameter):
    """AdaLoRA on a bare parameter; arguments of :class:`~lightning_pet.layers.low_rank.LowRankParameter`."""


class SvdLowRankConv(SvdLowRank, LowRankConv):
    """AdaLoRA on a convolution; arguments of :class:`~lightning_pet.layers.low_rank_hosts.LowRankConv`."""

    flat = True


class SvdConvWeight(SvdLowRank, ConvWeight):
    """AdaLoRA on the weight of a convolution; arguments of :class:`~lightning_pet.layers.low_rank_hosts.ConvWeight`."""

    flat = True


def orthogonality(a: Tensor, b: Tensor) -> Tensor:
    """``‖A Aᵀ − 1‖ + ‖Bᵀ B − 1‖`` (Frobenius), summed over leading dimensions."""
    return _distance(a)[1].sum() + _distance(b.mT)[1].sum()


def orthogonality_gradient(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`orthogonality`; zero where the rows are orthonormal already."""
    return _scaled(a, 1.0) @ a, b @ _scaled(b.mT, 1.0)


def _orthogonality_gradients(pairs: Sequence[Sequence[Tensor]], factor: Tensor | float) -> list[Sequence[Tensor]]:
    """The same of several pairs (A, B), times a factor: one product for all matrices of one shape."""
    of_a, of_b = zip(*pairs, strict=True)
    return list(zip(_gradients(of_a, False, factor), _gradients(of_b, True, factor), strict=True))


def _gradients(matrices: Sequence[Tensor], columns: bool, factor: Tensor | float) -> list[Tensor]:
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[matrix.shape, matrix.dtype].append(index)
    found = list(matrices)
    for indices in alike.values():
        several = torch.stack([matrices[index] for index in indices])
        gradients = several @ _scaled(several.mT, factor) if columns else _scaled(several, factor) @ several
        for index, gradient in zip(indices, gradients.unbind(), strict=True):
            found[index] = gradient
    return found


def _distance(rows: Tensor) -> tuple[Tensor, Tensor]:
    difference = rows @ rows.mT
    difference.diagonal(dim1=-2, dim2=-1).sub_(1)
    return difference, torch.linalg.vector_norm(difference, dim=(-2, -1), keepdim=True)


def _scaled(rows: Tensor, factor: Tensor | float) -> Tensor:
    """The gradient of the distance, times a factor, with respect to the rows: this symmetric matrix times the rows."""
    difference, norm = _distance(rows)
    return difference.mul_(2 * factor / norm.clamp_(min=_LEAST))  # where the norm is zero, so is the difference
