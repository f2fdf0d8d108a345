"""Biases as deltas: where the base has none, and where only some rows of one train."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_pet.errors import NotMergeableError
from lightning_pet.layers import rows as ranges
from lightning_pet.layers.delta import Delta, Host, Path
from lightning_pet.layers.row_forms import beside, stacks_of


class _Bias(Delta):
    """A vector that starts at zero, for some of the output features of a host."""

    def __init__(
        self,
        shape: Sequence[int],
        rows: Sequence[Sequence[int]] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = shape[-1]
        self.rows = ranges.whole(rows, self.features)
        self.value = nn.Parameter(torch.empty(*shape[:-1], ranges.size(self.rows), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the vector to zero: the delta does nothing."""
        nn.init.zeros_(self.value)

    def wide(self) -> Tensor:
        """The vector for all features."""
        return ranges.spread(self.value, self.rows, self.features, 0.0)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"value={tuple(self.value.shape)}, features={self.features}"


def _added_by_rows(deltas: Sequence[_Bias | None], ids: Tensor, x: Tensor, output: Tensor, host: Host) -> Tensor:
    """Each row's own vector added; see :attr:`Delta.row_form`."""
    (values,) = stacks_of(deltas, output.dtype, lambda delta: (delta.wide(),))
    assert values is not None
    return output + beside(values, ids, output)


class AddedBias(_Bias):
    """``y = f(x) + b`` on a host without a bias.

    Args:
        shape: [features] of the host's output.
        rows: half-open ranges of output features that get one; ``None``: all.
        device: where the vector lives.
        dtype: its dtype.
    """

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the vector to ``output``, [..., features], in the dtype of ``output``."""
        return output + self.wide().to(output.dtype)

    row_form = staticmethod(_added_by_rows)

    def merged(self, weight: Tensor) -> Tensor:
        """Refuse: no weight can hold it.

        Raises:
            NotMergeableError: always.
        """
        raise NotMergeableError(
            "an added bias cannot be merged: its host has no bias, and merging keeps the names of the base's "
            "parameters. Keep the delta attached, or train only the biases that the model has (add_missing=False)."
        )


class BiasRows(_Bias):
    """Some rows of a bias that the host has: those of one role in a fused projection.

    Args:
        shape: shape of the host's bias, [features] or [experts, features].
        rows: half-open ranges of features that train.
        device: where the vector lives.
        dtype: its dtype.
    """

    path: ClassVar[Path] = "weight"

    def forward(self, bias: Tensor) -> Tensor:
        """The effective bias, in the shape and dtype of ``bias``."""
        return (bias + self.wide()).to(bias.dtype)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The effective bias as a new tensor."""
        return (weight + self.wide()).to(weight.dtype)


class BiasBeside(BiasRows):
    """The same change of a bias that the host has, added to its output: for layers that cast their own bias."""

    path: ClassVar[Path] = "activation"

    def forward(self, x: Tensor, output: Tensor) -> Tensor:  # type: ignore[override]
        """Add the vector to ``output``, [..., features], in the dtype of ``output``."""
        return output + self.wide().to(output.dtype)

    row_form = staticmethod(_added_by_rows)
