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
    return _gradient(a), _gradient(b.mT).mT


def _orthogonality_gradients(pairs: Sequence[Sequence[Tensor]], factor: Tensor | float) -> list[Sequence[Tensor]]:
    """The same of several pairs (A, B), times a factor: one product for all matrices of one shape."""
    rows = [matrix for a, b in pairs for matrix in (a, b.mT)]
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, matrix in enumerate(rows):
        alike[matrix.shape, matrix.dtype].append(index)
    for indices in alike.values():
        found = _gradient(torch.stack([rows[index] for index in indices])).mul_(factor)
        for index, gradient in zip(indices, found.unbind(), strict=True):
            rows[index] = gradient
    return [(a, b.mT) for a, b in zip(rows[::2], rows[1::2], strict=True)]


def _distance(rows: Tensor) -> tuple[Tensor, Tensor]:
    difference = rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return difference, torch.linalg.matrix_norm(difference)


def _gradient(rows: Tensor) -> Tensor:
    difference, norm = _distance(rows)
    scale = torch.where(norm > 0, 2 / norm, torch.zeros_like(norm))
    return scale[..., None, None] * (difference @ rows)
