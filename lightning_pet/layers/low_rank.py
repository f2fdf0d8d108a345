"""Low-rank deltas for linear layers and for bare parameters."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pet.errors import ArgumentError
from lightning_pet.layers.delta import Host, Path
from lightning_pet.layers.low_rank_base import Init, LowRank, OwnBias, Rows, check_rank
from lightning_pet.layers.low_rank_dora import Dora, dora_linear
from lightning_pet.layers.low_rank_product import (
    add_low_rank,
    compute_dtype,
    is_narrow,
    is_plain,
    is_simple,
    low_rank_directly,
    low_rank_linear,
    prefers_merged,
)
from lightning_pet.layers.row_forms import Parts, kept, low_rank_rows, own_tensors, stacks_of


class LowRankLinear(OwnBias):
    """LoRA or DoRA on a linear layer: ``y = x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ``.

    Args:
        in_features: input features of the host.
        out_features: output features of the host.
        r: rank, at least 1.
        scale: factor s of the delta, alpha / r or alpha / sqrt(r).
        dropout: probability of zeroing an input feature on the way to A; active in training only.
        init: ``"kaiming"`` (A uniform within ±1/√in, B zero), ``"gaussian"`` (A normal with standard
            deviation 1/r, B zero), ``"pissa"`` (r principal components of W) or ``"olora"`` (QR of W).
        use_dora: train a magnitude per output feature beside the direction. Needs the base weight in
            the forward, so the host must be a plain linear layer with no other delta.
        transposed: the host's weight is [in, out] (transformers' ``Conv1D``).
        rows: half-open ranges of output features of a fused projection. B has one row per output
            feature in them, and all others stay as they are.
        bias: also train a bias of B, added as ``s · bias``; it merges into the host's bias.
        device: where the parameters live.
        dtype: dtype of the parameters; products run in the input's (or autocast's).

    Raises:
        ArgumentError: if an argument is out of range, or ``use_dora`` meets ``bias``.
    """

    fuses_linear: ClassVar[bool] = True
    _bare = False
    _direct = False
    _adds = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        scale: float,
        dropout: float = 0.0,
        init: Init = "kaiming",
        use_dora: bool = False,
        transposed: bool = False,
        rows: Rows | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if use_dora and bias:
            raise ArgumentError("use_dora=True has no place for a bias of B. Set bias=False, or use_dora=False.")
        check_rank(r)
        self.transposed = transposed
        super().__init__(
            (r, in_features),
            (out_features, r),
            out_features=out_features,
            scale=scale,
            dropout=dropout,
            init=init,
            use_dora=use_dora,
            rows=rows,
            device=device,
            dtype=dtype,
            bias=bias,
        )
        # A and B as they are, and nothing else: decided once, because generation asks in every layer for every token.
        self._direct = self.rows is None and not bias
        self._adds = self._direct and not use_dora
        self._bare = self._adds and self.a0 is None and type(self)._flat_a is LowRank._flat_a

    def forward(
        self, x: Tensor, output: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Apply the delta.

        Args:
            x: input of the host, [..., in].
            output: output of the host, [..., out]; ``None`` to have it computed here.
            weight: the host's weight, if ``output`` is ``None``; for DoRA always, in floating point.
            bias: the host's bias, likewise.

        Returns:
            [..., out].

        Raises:
            ArgumentError: if neither output nor weight is given, or DoRA does not get the weight.
        """
        if self._direct and output is None and weight is not None:
            direct = self._directly(x, weight.t() if self.transposed else weight, bias)
            if direct is not None:
                return direct
        if weight is None and (output is None or self.use_dora):
            raise ArgumentError(
                "DoRA needs the weight of a plain linear layer and must be the only delta on it. "
                "Set use_dora=False, or take the other delta off."
                if self.use_dora
                else "LowRankLinear needs the host's output, or its weight to compute it."
            )
        dtype = compute_dtype(x)
        x = x.to(dtype)
        a, b = self._flat_a().to(dtype), self._spread(self.b).to(dtype)
        if weight is None:
            return self._add(output, x, a, b)  # type: ignore[arg-type]
        matrix = self._matrix(weight)
        if self.use_dora:
            return self._dora(x, output, matrix, bias, a, b)
        if not is_plain(weight):
            return self._add(F.linear(x, matrix, bias), x, a, b)
        drops = self._drops()
        constant = "a" in self._buffers and torch.is_grad_enabled()  # then x need not be kept, but for the merged form
        merged = not drops and not constant and prefers_merged(x, weight)
        if self.bias is not None:
            offset = self._own_bias(self.bias.dtype)
            bias = offset if bias is None else bias + offset
        matrix, bias = matrix.to(dtype), None if bias is None else bias.to(dtype)
        origin, dropout = self._origin(dtype), self.dropout if drops else 0.0
        return low_rank_linear(x, matrix, bias, a, b, self.scale, merged=merged, origin=origin, dropout=dropout)

    def _directly(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output in autograd's own nodes where these are cheaper than one of ours; ``None`` where they are not."""
        own, dropout = self._parameters, self.dropout if self.training else 0.0
        a, b = own.get("a", self._buffers.get("a")), own.get("b")
        if self._bare or not is_narrow(x, weight) or (dropout and not self.use_dora):
            if self._bare:
                return low_rank_directly(x, weight, bias, a, b, self.scale, dropout)
            if not self._adds or (self.a0 is not None and (dropout or self.a0.dtype != x.dtype)):
                return None
            return low_rank_directly(x, weight, bias, a, b, self.scale, dropout, self._flat_a, self._origin(x.dtype))
        if a is None or b is None or not is_simple(x, weight, bias, a, b):
            return None
        changed = self._changed_directly(weight, b)
        if changed is None:
            return None
        if not dropout:
            return F.linear(x, changed, bias)
        return F.linear(x, weight, bias) + F.linear(F.dropout(x, dropout), changed - weight)

    def _changed_directly(self, weight: Tensor, b: Tensor) -> Tensor | None:
        """The effective weight, exactly the base's at the start; ``None`` where something is of another dtype."""
        a0, b0, magnitude = self.a0, self.b0, self._parameters.get("magnitude")
        for tensor in (a0, b0, magnitude):
            if tensor is not None and tensor.dtype != b.dtype:
                return None
        a = self._flat_a()
        if a0 is None or b0 is None:
            changed = torch.addmm(weight, b, a, alpha=self.scale)
        else:
            changed = torch.add(weight, b @ a - b0 @ a0, alpha=self.scale)
        if magnitude is None:
            return changed
        norm: Tensor = torch.linalg.vector_norm(changed.detach(), dim=-1)
        return changed * (magnitude / norm).unsqueeze(-1)

    @staticmethod
    def row_form(
        deltas: Sequence["LowRankLinear | None"], ids: Tensor, x: Tensor, output: Tensor, host: Host
    ) -> Tensor | None:
        """All rows at once, if none drops inputs; see :attr:`Delta.row_form`."""
        own = [delta for delta in deltas if delta is not None]
        if any(delta._drops() for delta in own):
            return None
        weight, bias = host() if any(delta.use_dora for delta in own) else (None, None)
        tensors, parts = partial(LowRankLinear._made_of, weight=weight), LowRankLinear._row_parts
        stacks = stacks_of(deltas, compute_dtype(x), partial(parts, weight=weight, bias=bias), tensors)
        return low_rank_rows(x, output, ids, *stacks)

    def _made_of(self, weight: Tensor | None) -> list[Tensor]:
        return own_tensors(self) if weight is None or not self.use_dora else [*own_tensors(self), weight]

    def _row_parts(self, weight: Tensor | None, bias: Tensor | None) -> Parts:
        """A and s · B with the start of both behind them; what is added, and by how much more the rest is scaled."""
        a, b = self._flat_a(), self._spread(self.b)
        if self.a0 is not None and self.b0 is not None:
            a, b = torch.cat([a, self.a0]), torch.cat([b, -self._spread(self.b0)], -1)
        b = b if self.scale == 1.0 else b * self.scale
        if weight is None or not self.use_dora:
            return a, b, None if self.bias is None else self._own_bias(self.bias.dtype), None
        excess = kept(self, "excess", self._made_of(weight), lambda: self._excess(self._matrix(weight))[0])
        return a, b * (1 + excess).unsqueeze(-1), None if bias is None else -excess * bias, excess

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _origin(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.a0 is None or self.b0 is None:
            return None
        return self.a0.to(dtype), self._spread(self.b0).to(dtype)

    def _add(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        origin, drops = self._origin(x.dtype), self._drops()
        if origin is None and not drops:
            output = add_low_rank(output, x, a, b, self.scale)
        else:
            dropout = self.dropout if drops else 0.0
            output = low_rank_linear(
                x, None, None, a, b, self.scale, merged=False, origin=origin, product=output, dropout=dropout
            )
        return output if self.bias is None else output + self._own_bias(output.dtype)

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        """DoRA does, for its norms."""
        return self.use_dora

    def _dora(
        self, x: Tensor, output: Tensor | None, matrix: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        """Base output plus what rescaling and the low-rank term add: exactly the base output at the start."""
        excess, changed = self._excess(matrix)
        matrix, bias = matrix.to(x.dtype), None if bias is None else bias.to(x.dtype)
        layer = Dora(matrix, bias, a, b, excess, self.scale, self._origin(x.dtype), changed)
        return dora_linear(x, layer, product=output, dropout=self.dropout if self._drops() else 0.0)

    def _excess(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """By how much more than 1 DoRA scales every output feature, and the changed weight before that."""
        assert self.magnitude is not None
        with torch.autocast(matrix.device.type, enabled=False):
            with torch.no_grad():
                changed = self._changed(self._own(matrix))
                norm = torch.linalg.vector_norm(changed, dim=-1).to(self.magnitude.dtype)
                changed = self._among(matrix, changed)
            return self._spread((self.magnitude / norm - 1).unsqueeze(-1)).squeeze(-1), changed


class LowRankParameter(LowRank):
    """LoRA or DoRA on a parameter that is read without calling its module.

    Args:
        shape: shape of the parameter: [out, in], or [n, out, in] for n experts with their own A and B.
        r: rank, at least 1.
        scale: factor s of the delta.
        dropout: probability of dropping an input feature on the way to A, for all positions of a forward alike;
            active in training only.
        init: as in :class:`LowRankLinear`, for every matrix on its own.
        use_dora: train a magnitude per output feature.
        transposed: the last two dimensions are [in, out].
        rows: half-open ranges of output features, as in :class:`LowRankLinear`.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ArgumentError: if an argument is out of range, or the shape has neither 2 nor 3 dimensions.
    """

    path: ClassVar[Path] = "weight"

    def __init__(
        self,
        shape: Sequence[int],
        r: int,
        *,
        scale: float,
        dropout: float = 0.0,
        init: Init = "kaiming",
        use_dora: bool = False,
        transposed: bool = False,
        rows: Rows | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(shape) not in (2, 3):
            raise ArgumentError(
                f"A low-rank delta needs a parameter of 2 or 3 dimensions, not of shape {tuple(shape)}."
            )
        check_rank(r)
        self.transposed = transposed
        *experts, first, second = shape
        inputs, outputs = (first, second) if transposed else (second, first)
        super().__init__(
            (*experts, r, inputs),
            (*experts, outputs, r),
            out_features=outputs,
            scale=scale,
            dropout=dropout,
            init=init,
            use_dora=use_dora,
            rows=rows,
            device=device,
            dtype=dtype,
        )

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, in the shape and dtype of ``weight``; computed in at least float32."""
        return self._effective(weight, drop=True)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight
