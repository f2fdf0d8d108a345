"""What deltas share that add a change made of small factors to a weight, where no plain B A expresses it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_pet.errors import ArgumentError
from lightning_pet.layers import rows as ranges
from lightning_pet.layers.combining import Factors
from lightning_pet.layers.delta import REMADE, Delta, Path, Remaker, check_scale, unchanged_since

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Form:
    """How a weight reads as matrices.

    Attributes:
        outputs: output features.
        inputs: input features; of a convolution, those of one group.
        kernel: of a convolution, else empty.
        experts: how many matrices there are, if more than one lie in the weight.
        transposed: the last two dimensions are [in, out].
        rows: half-open ranges of the output features that change; ``None``: all.
    """

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    transposed: bool = False
    rows: Rows | None = None

    @property
    def own(self) -> int:
        """Output features that change."""
        return self.outputs if self.rows is None else ranges.size(self.rows)

    @property
    def columns(self) -> int:
        """Columns of the matrix: inputs, at every place of a kernel."""
        return self.inputs * prod(self.kernel)

    @property
    def is_spatial(self) -> bool:
        """A kernel that looks at more than one place."""
        return any(size != 1 for size in self.kernel)

    def matrix(self, weight: Tensor) -> Tensor:
        """A view of a weight as [..., out, columns]; its own inverse up to the shape."""
        if self.kernel:
            return weight.flatten(1)
        return weight.mT if self.transposed else weight


@dataclass(frozen=True)
class Drops:
    """What is left out of the change while it trains.

    Attributes:
        features: probability of leaving out an output feature, for all positions of a forward alike.
        whole: probability of leaving out all of it.
        rescales: what is left of the features is divided by 1 - ``features``.
    """

    features: float = 0.0
    whole: float = 0.0
    rescales: bool = False


class WeightChange(Delta):
    """A delta whose effective weight is ``W + s · change``; a subclass makes the change of its factors.

    Attributes:
        form: how the host's weight reads as matrices.
        scale: factor s.
        drops: what is left out while it trains.
    """

    def __init__(self, form: Form, scale: float, drops: Drops | None) -> None:
        super().__init__()
        check_scale(scale, "the scale (alpha / r)")
        drops = drops or Drops()
        for name, value in (("rank_dropout", drops.features), ("module_dropout", drops.whole)):
            if not 0 <= value < 1:
                raise ArgumentError(f"{name} is a probability and must be in [0, 1), not {value!r}.")
        self.form = form
        self.scale = float(scale)
        self.drops = drops

    def change(self, dtype: torch.dtype) -> Tensor:
        """``s · change``, [..., own outputs, columns]."""
        raise NotImplementedError

    def matrices(self) -> Factors | None:
        """A [..., R, columns] and B [..., own outputs, R] with ``s · change = B A``; ``None`` if not known."""
        raise NotImplementedError

    @torch.no_grad()
    def low_rank_factors(self) -> Factors | None:
        """See :meth:`Delta.low_rank_factors`; none where their rank would be that of any matrix of this size."""
        found = self.matrices()
        if found is None or found[0].shape[-2] >= min(self.form.own, self.form.columns):
            return None
        (a, b), kernel = found, self.form.kernel
        if kernel:
            a, b = a.reshape(-1, self.form.inputs, *kernel), b.reshape(*b.shape, *(1 for _ in kernel))
        return a, b

    def largest(self) -> float:
        """A number that no value of ``s · change`` exceeds in size."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The effective weight as a new tensor; see :meth:`Delta.merged`."""
        return self.effective(weight)

    @torch.no_grad()
    def reach(self, largest: float) -> float:
        """See :meth:`Delta.reach`."""
        return largest + self.largest()

    def effective(self, weight: Tensor) -> Tensor:
        """The weight as the host reads it, computed in at least float32; while training, without what is dropped."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):  # it would round the change before it is added
            matrix, rows = self.form.matrix(weight).to(dtype), self.form.rows
            change = self.change(dtype)
            if (kept := self.kept(change)) is not None:
                change = change * kept.unsqueeze(-1)
            changed = (matrix if rows is None else ranges.take(matrix, rows, -2)) + change
            changed = changed if rows is None else ranges.put(matrix, changed, rows, -2)
            return self.form.matrix(changed).to(weight.dtype).reshape(weight.shape)

    def added(self, output: Tensor, change: Tensor) -> Tensor:
        """A host's output with what the change makes of its input, [..., own outputs]."""
        if (kept := self.kept(change)) is not None:
            change = change * kept
        if self.form.rows is not None:
            change = ranges.spread(change, self.form.rows, self.form.outputs)
        return output + change.to(output.dtype)

    def kept(self, like: Tensor) -> Tensor | None:
        """A factor for every own output feature; ``None`` where nothing is dropped."""
        drops = self.drops
        if not self.training or not (drops.features or drops.whole):
            return None
        kept = torch.empty(self.form.own, dtype=like.dtype, device=like.device).bernoulli_(1 - drops.features)
        if drops.rescales:
            kept = kept / (1 - drops.features)
        if drops.whole:
            kept = kept * torch.empty((), dtype=like.dtype, device=like.device).bernoulli_(1 - drops.whole)
        return kept

    def extra_repr(self) -> str:
        """Shapes of the factors and the scale."""
        shapes = [f"{name}={tuple(p.shape)}" for name, p in self._parameters.items() if p is not None]
        return ", ".join([*shapes, f"scale={self.scale:g}"])


class OnLinear(WeightChange):
    """Mixed in where the change acts on a linear layer that is called."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        scale: float,
        transposed: bool = False,
        rows: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        own = None if rows is None else tuple((int(start), int(stop)) for start, stop in rows)
        form = Form(out_features, in_features, transposed=transposed, rows=own)
        # Of the method's class, which takes a rank.
        super().__init__(form, r, scale=scale, **options)  # type: ignore[misc]


class OnWeight(WeightChange):
    """Mixed in where the change acts on the weight itself, which is read without a call or by one of another kind."""

    path: ClassVar[Path] = "weight"

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, in the shape and dtype of ``weight``."""
        return self.effective(weight)

    @property
    def remakes(self) -> bool:  # type: ignore[override]
        """A large one, where nothing was drawn for it."""
        return self.form.outputs * self.form.columns >= REMADE and not (self.drops.features or self.drops.whole)

    def remaker(self, weight: Tensor) -> Remaker | None:
        """See :meth:`Delta.remaker`."""
        if not self.remakes or (check := unchanged_since(weight, *self.parameters())) is None:
            return None

        @torch.no_grad()
        def remake() -> Tensor:
            check()
            return self.effective(weight)

        return remake


def draw_(tensor: Tensor, fan_in: int) -> None:
    """Fill a tensor as ``nn.Linear`` starts: uniform within ±1/√fan_in."""
    bound = fan_in**-0.5
    tensor.uniform_(-bound, bound)
