"""What all low-rank deltas (LoRA, DoRA, PiSSA, OLoRA) share.

The effective weight is ``W + s · B A`` with A [r, in] and B [out, r]. With ``init="pissa"`` or
``"olora"`` it is ``W + s · (B A - B0 A0)`` instead, where (A0, B0) is the value at the start: the
same function and the same training as moving B0 A0 out of the base weight, but the base stays
untouched, so the delta can be taken off exactly.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.layers import rows as ranges
from lightning_pet.layers.combining import Factors, factored
from lightning_pet.layers.delta import Delta, check_scale
from lightning_pet.layers.low_rank_product import add_product_, is_plain, sum_is_finite
from lightning_pet.layers.sharding import whole

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]
Rows = Sequence[Sequence[int]]


class LowRank(Delta):
    """What all low-rank deltas share: parameters, initialisation and the effective weight.

    A subclass says how its host's weight reads as a matrix [..., out, in] (:meth:`_matrix`).

    Attributes:
        a: [..., r, in], trained.
        b: [..., out, r], trained; ``out`` counts only the output features in ``rows``.
        magnitude: [..., out], trained; only with ``use_dora``.
        a0: start value of ``a``, a buffer; only with ``init="pissa"`` or ``"olora"``.
        b0: start value of ``b``, likewise.
        r: rank.
        scale: factor s (alpha / r, or alpha / sqrt(r) for rsLoRA).
    """

    a: nn.Parameter
    b: nn.Parameter
    a0: Tensor | None
    b0: Tensor | None
    magnitude: nn.Parameter | None

    def __init__(
        self,
        a_shape: tuple[int, ...],
        b_shape: tuple[int, ...],
        *,
        out_features: int,
        scale: float,
        dropout: float = 0.0,
        init: Init = "kaiming",
        use_dora: bool = False,
        rows: Rows | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(scale, dropout, init)
        self.out_features = out_features
        self.scale = float(scale)
        self.dropout = float(dropout)
        self.init: Init = init
        self.use_dora = use_dora
        self.rows = _checked_rows(rows, out_features)
        if self.rows is not None:
            b_shape = (*b_shape[:-2], ranges.size(self.rows), b_shape[-1])
        self._make(a_shape, b_shape, device=device, dtype=dtype)
        shifts = init in ("pissa", "olora")
        self.register_buffer("a0", torch.empty_like(self.a) if shifts else None)
        self.register_buffer("b0", torch.empty_like(self.b) if shifts else None)
        # B's shape without the rank: [..., out] for a matrix, [out] for a convolution's [out, r, 1, 1].
        if init == "orthogonal" and self.r % 2:
            raise ArgumentError(f"init='orthogonal' halves the rank, which must be even, not r={self.r}.")
        magnitude = torch.empty(self._flat_b().shape[:-1], device=device, dtype=dtype)
        self.magnitude = nn.Parameter(magnitude) if use_dora else None
        self.reset_parameters()

    def _make(self, a_shape: tuple[int, ...], b_shape: tuple[int, ...], **options: Any) -> None:
        """Create what trains: A and B. What makes them of something else overrides this, and has them as properties."""
        self.a = nn.Parameter(torch.empty(a_shape, **options))
        self.b = nn.Parameter(torch.empty(b_shape, **options))

    @property
    def r(self) -> int:
        """Rank."""
        return self._flat_b().shape[-1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A, set B to zero: the delta does nothing, whatever ``init`` is.

        With ``"orthogonal"`` both are drawn, and it does nothing up to rounding. PiSSA, OLoRA and DoRA depend on the
        base weight: call :meth:`initialize_from` afterwards.
        """
        if self.init == "orthogonal":
            self._draw_orthogonal()
            return
        if self.init == "gaussian":
            nn.init.normal_(self.a, std=1 / self.r)
        else:
            bound = 1 / math.sqrt(self._flat_a().shape[-1])
            nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)
        self._remember_origin()
        if self.magnitude is not None:
            nn.init.ones_(self.magnitude)

    def _draw_orthogonal(self) -> None:
        """Rows of A and columns of B in two subspaces of the rank that are orthogonal to each other: B A = 0."""
        a, b = self._flat_a(), self._flat_b()
        half, *stack = self.r // 2, *a.shape[:-2]
        draw = partial(torch.randn, device=a.device, dtype=a.dtype)
        q = torch.linalg.qr(draw(*stack, self.r, self.r)).Q
        self.a.copy_((q[..., ::2, :].mT @ draw(*stack, half, a.shape[-1]) / 10).view_as(self.a))
        self.b.copy_((draw(*stack, b.shape[-2], half) @ q[..., 1::2, :] / 10).view_as(self.b))
        if self.magnitude is not None:
            nn.init.ones_(self.magnitude)

    def freeze_a(self) -> None:
        """Let A be a constant, a buffer of the same name: only B trains (LoRA-FA)."""
        if "a" in self._parameters:
            a = self.a.detach()
            del self.a
            self.register_buffer("a", a)

    @property
    def starts_from_weight(self) -> bool:  # type: ignore[override]
        """PiSSA, OLoRA and DoRA do."""
        return self.magnitude is not None or self.init in ("pissa", "olora")

    @torch.no_grad()
    def initialize_from(self, weight: Tensor) -> None:
        """Set what depends on the base weight: A and B of PiSSA and OLoRA, the magnitude of DoRA.

        Args:
            weight: the host's parameter.

        Raises:
            ArgumentError: if the weight is not that of the host for which the delta was built, or
                has a rank below ``r``.
        """
        if not self.starts_from_weight:
            return
        weight = whole(weight)
        matrix = self._matrix(weight).to(_precise(weight))
        wanted = (*self._flat_b().shape[:-2], self.out_features, self._flat_a().shape[-1])
        if matrix.shape != wanted:
            raise ArgumentError(
                f"This delta was built for a weight that reads as {wanted} [..., out, in], and got one of "
                f"shape {tuple(weight.shape)}. Pass the parameter of its own host."
            )
        matrix = self._own(matrix)
        if self.init in ("pissa", "olora"):
            a, b = _principal(matrix, self.r, self.scale) if self.init == "pissa" else _orthonormal(matrix, self.r)
            self.a.copy_(a.reshape(self.a.shape))
            self.b.copy_(b.reshape(self.b.shape))
            self._remember_origin()
        if self.magnitude is not None:
            self.magnitude.copy_(self._norm(matrix))

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The effective weight as a new tensor; see :meth:`Delta.merged`."""
        if not self._adds_in_place(weight):
            return self._effective(weight)
        result = weight.clone()
        self.merge_(result)
        return result

    @torch.no_grad()
    def merge_(self, weight: Tensor) -> None:
        """Add the product into a weight, in place; see :meth:`Delta.merge_`."""
        if not self._adds_in_place(weight):
            weight.copy_(self._effective(weight))
            return
        for matrix, b, a, options in self._sums(weight):
            add_product_(matrix, b, a, self.scale, **options)

    @torch.no_grad()
    def merges_finite(self, weight: Tensor) -> bool:
        """See :meth:`Delta.merges_finite`."""
        if not self._adds_in_place(weight):
            return False
        return all(sum_is_finite(matrix, b, a, self.scale, **options) for matrix, b, a, options in self._sums(weight))

    def _sums(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
        """What each part of a weight changes by, as arguments of :func:`add_product_`."""
        dtype, matrix = _precise(weight), self._matrix(weight)
        a, b = self._flat_a().to(dtype), self._flat_b().to(dtype)
        a0, b0 = (None, None) if self.a0 is None or self.b0 is None else (self.a0.view_as(a), self.b0.view_as(b))
        used = 0
        for start, stop in self.rows or ((0, self.out_features),):
            own = slice(used, used + stop - start)
            options = {
                "origin": None if a0 is None or b0 is None else (a0.to(dtype), b0[..., own, :].to(dtype)),
                "magnitude": None if self.magnitude is None else self.magnitude[..., own],
                "rounds_twice": self.path == "weight",  # as the effective weight is: to the bit
            }
            yield matrix[..., start:stop, :], b[..., own, :], a, options
            used = own.stop

    @torch.no_grad()
    def low_rank_factors(self) -> Factors | None:
        """A and s · B, with the start of both behind them; see :meth:`Delta.low_rank_factors`."""
        if self.magnitude is not None or self.changes_bias:
            return None
        a, b = self._flat_a(), self._flat_b() * self.scale
        if self.a0 is not None and self.b0 is not None:
            a, b = torch.cat([a, self.a0.view_as(a)], -2), torch.cat([b, self.b0.view_as(b) * -self.scale], -1)
        return self._shaped(a, b)

    def _shaped(self, a: Tensor, b: Tensor) -> Factors:
        """Matrices A and B of any rank in the shapes of the parameters."""
        return a, b

    @torch.no_grad()
    def approximation(self, change: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The best A and B for a change of the host's weight, with a scale of one; nothing of its own is changed.

        Args:
            change: in the shape of the weight.

        Returns:
            A and B by name, and ‖change − B A‖² (Frobenius).
        """
        matrix = self._matrix(change)
        (a, b), lost = factored(matrix, self.r)
        found = {"a": a.reshape(self.a.shape), "b": b.reshape(self.b.shape)}
        return {name: tensor.to(self.a.dtype) for name, tensor in found.items()}, lost

    def _adds_in_place(self, weight: Tensor) -> bool:
        """Whether the product can be added into this memory: the matrix is a view of it."""
        return is_plain(weight) and self._matrix(weight).data_ptr() == weight.data_ptr()

    @torch.no_grad()
    def reach(self, largest: float) -> float:
        """Each number of A and B as large as the largest of its row or column; see :meth:`Delta.reach`."""
        if self.magnitude is not None:
            return super().reach(largest)  # a norm of zero would leave no number
        pairs = [(self._flat_a(), self._flat_b())]
        if self.a0 is not None and self.b0 is not None:
            pairs.append((self.a0.view_as(pairs[0][0]), self.b0.view_as(pairs[0][1])))
        sizes = [(_largest(a, -1) * _largest(b, -2)).sum(-1).max() for a, b in pairs]
        return largest + abs(self.scale) * float(sum(sizes))

    def _matrix(self, weight: Tensor) -> Tensor:
        """A view of the host's weight as [..., out, in]; its own inverse up to the shape."""
        return weight

    def _flat_a(self) -> Tensor:
        return self.a

    def _flat_b(self) -> Tensor:
        return self.b

    def _remember_origin(self) -> None:
        if self.a0 is not None and self.b0 is not None:
            self.a0.copy_(self.a)
            self.b0.copy_(self.b)

    def _change(self, dtype: torch.dtype, *, drop: bool = False) -> Tensor:
        """``s (B A - B0 A0)``, [..., out, in]."""
        a, b = self._flat_a().to(dtype), self._flat_b().to(dtype)
        if drop:  # an input feature is dropped with its column of A, for all positions alike
            a = a * F.dropout(torch.ones_like(a[..., :1, :]), self.dropout)
        change = b @ a
        if self.a0 is not None and self.b0 is not None:
            change = change - self.b0.view_as(b).to(dtype) @ self.a0.view_as(a).to(dtype)
        return change * self.scale

    def _changed(self, matrix: Tensor) -> Tensor:
        """These rows with the low-rank change added, in at least float32; a constant to autograd."""
        with torch.no_grad():
            matrix = matrix.to(_precise(matrix))
            return self._moved(matrix, self._change(matrix.dtype))

    def _moved(self, matrix: Tensor, change: Tensor) -> Tensor:
        """What a change of this size makes of the rows that it belongs to."""
        return matrix + change

    def _norm(self, matrix: Tensor) -> Tensor:
        """Norm of each output feature's effective weight, before DoRA rescales it; a constant to autograd."""
        norm: Tensor = torch.linalg.vector_norm(self._changed(matrix), dim=-1)
        return norm

    def _effective(self, weight: Tensor, *, drop: bool = False) -> Tensor:
        """The weight as the host reads it; ``drop``: where it is training, with dropout."""
        drop = drop and self.training and self.dropout > 0
        dtype = _precise(weight)
        # Autocast would round the change before it is added.
        with torch.autocast(weight.device.type, enabled=False):
            matrix = self._matrix(weight).to(dtype)
            own = self._own(matrix)
            changed = self._moved(own, self._change(dtype, drop=drop))
            if self.magnitude is not None:
                # In the magnitude's dtype, so that the factor is exactly 1 at the start.
                factor = self.magnitude / self._norm(own).to(self.magnitude.dtype)
                changed = changed * factor.to(dtype).unsqueeze(-1)
            return self._matrix(self._among(matrix, changed)).to(weight.dtype).reshape(weight.shape)

    def _own(self, matrix: Tensor) -> Tensor:
        """The rows of [..., out, in] that this delta changes."""
        return matrix if self.rows is None else ranges.take(matrix, self.rows, -2)

    def _among(self, matrix: Tensor, own: Tensor) -> Tensor:
        """``matrix`` with these rows replaced."""
        return own if self.rows is None else ranges.put(matrix, own, self.rows, -2)

    def _spread(self, own: Tensor) -> Tensor:
        """[..., rows, n] to [..., out, n], zero elsewhere."""
        return own if self.rows is None else ranges.spread(own, self.rows, self.out_features, dim=-2)

    def extra_repr(self) -> str:
        """Options that differ from the default."""
        parts = [f"a={tuple(self.a.shape)}", f"b={tuple(self.b.shape)}", f"scale={self.scale:g}"]
        parts += [f"dropout={self.dropout:g}"] * bool(self.dropout) + [f"init={self.init!r}"] * (self.init != "kaiming")
        parts += ["use_dora=True"] * self.use_dora + [f"rows={self.rows}"] * (self.rows is not None)
        return ", ".join(parts)


class OwnBias(LowRank):
    """A low-rank delta whose B may have a bias of its own, which merges into the host's.

    Attributes:
        bias: one number per row of B, trained; ``None`` without.
    """

    bias: nn.Parameter | None

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = nn.Parameter(self.b.new_zeros(self.b.shape[0])) if bias else None

    def reset_parameters(self) -> None:
        """Draw A, set B (and the bias) to zero; see :meth:`LowRank.reset_parameters`."""
        super().reset_parameters()
        bias = getattr(self, "bias", None)  # the first call comes from the constructor, before there is one
        if bias is not None:
            nn.init.zeros_(bias)

    @property
    def changes_bias(self) -> bool:  # type: ignore[override]
        """With a bias of its own."""
        return self.bias is not None

    @property
    def needs_bias(self) -> bool:  # type: ignore[override]
        """With a bias of its own."""
        return self.bias is not None

    @torch.no_grad()
    def merged_bias(self, bias: Tensor) -> Tensor:
        """``bias + s · own``."""
        return (bias.to(_precise(bias)) + self._own_bias(_precise(bias))).to(bias.dtype)

    def _own_bias(self, dtype: torch.dtype) -> Tensor:
        """``s · own`` for all output features."""
        assert self.bias is not None
        return self._spread(self.bias.to(dtype).unsqueeze(-1)).squeeze(-1) * self.scale


def check_rank(r: int) -> None:
    """Raise ArgumentError unless the rank is a positive integer."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ArgumentError(f"r is the rank of the delta and must be an integer of at least 1, not {r!r}.")


def _check(scale: float, dropout: float, init: str) -> None:
    check_scale(scale, "the scale (alpha / r, or alpha / sqrt(r) for rsLoRA)")
    if not 0 <= dropout < 1:
        raise ArgumentError(f"dropout is a probability and must be in [0, 1), not {dropout!r}.")
    if init not in get_args(Init):
        raise ArgumentError(f"init must be one of {', '.join(map(repr, get_args(Init)))}, not {init!r}.")


def _checked_rows(rows: Rows | None, out_features: int) -> tuple[tuple[int, int], ...] | None:
    if rows is None:
        return None
    ranges = tuple((int(start), int(stop)) for start, stop in rows)
    edges = [0, *(edge for pair in ranges for edge in pair), out_features]
    if not ranges or edges != sorted(edges) or any(start == stop for start, stop in ranges):
        raise ArgumentError(
            f"rows must be non-empty, ascending, disjoint ranges within the {out_features} output features "
            f"of the host, such as [[0, {out_features}]], not {rows!r}."
        )
    return ranges


def _largest(factor: Tensor, dim: int) -> Tensor:
    """Size of the largest number along a dimension."""
    return factor.abs().amax(dim).to(_precise(factor))


def _precise(weight: Tensor) -> torch.dtype:
    """The dtype in which an effective weight is computed: that of the weight, at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def _principal(matrix: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A, B of the r largest singular components, such that s B A is their sum."""
    _check_full(matrix, r, "pissa")
    if scale <= 0:
        raise ArgumentError(f"init='pissa' divides by the scale, which must be positive, not {scale}.")
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[..., :r] / scale).sqrt()
    return root.unsqueeze(-1) * vh[..., :r, :], u[..., :r] * root.unsqueeze(-2)


def _orthonormal(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A, B of the first r columns of Q and rows of R."""
    _check_full(matrix, r, "olora")
    q, upper = torch.linalg.qr(matrix)
    return upper[..., :r, :], q[..., :r]


def _check_full(matrix: Tensor, r: int, init: str) -> None:
    if r > min(matrix.shape[-2:]):
        raise ArgumentError(
            f"init={init!r} needs r of at most {min(matrix.shape[-2:])} for a weight that reads as "
            f"{tuple(matrix.shape)} [..., out, in], not {r}. Lower r, or use init='kaiming'."
        )
