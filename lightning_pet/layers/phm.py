r"""Parametrised hypercomplex multiplication (PHM), and the bottleneck adapters made of it.

A PHM layer multiplies by a sum of Kronecker products, :math:`y = x \sum_i A_i \otimes B_i`, with a *rule* of n
small matrices A_i [n, n] and n *slices* B_i [in/n, out/n]. A *factored* layer has B_i = L_i R_i of a rank r.
The sum of a small layer is formed: one product with it takes less time than calling several. Beyond that x is read
as n blocks, and a Kronecker product is a product of every block with B_i followed by one across the blocks with A_i, in
either order.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.layers.bottleneck import activation
from lightning_pet.layers.delta import Delta, Host, Part, Path
from lightning_pet.layers.low_rank_product import compute_dtype
from lightning_pet.layers.row_forms import Parts, bottleneck_rows, kept, own_tensors, stacks_of

_GAIN = math.sqrt(2)
_FORMED = 1 << 9  # numbers of a matrix that is formed: beyond it products with it take longer than calls
_LARGEST_ADVISED = 1_000_000  # sizes beyond it are not searched for divisors


def phm_product(x: Tensor, rule: Tensor, weight: Tensor) -> Tensor:
    """``x @ sum(kron(rule[i], weight[i]))`` with full slices.

    Args:
        x: [..., in].
        rule: [n, n, n]: matrix, row, column.
        weight: [n, in/n, out/n].

    Returns:
        [..., out].
    """
    n, rows, columns = weight.shape
    if rows >= columns:  # the smaller side is mixed
        blocks = x.reshape(-1, rows) @ weight.permute(1, 0, 2).reshape(rows, n * columns)
        mixed = rule.permute(2, 1, 0).reshape(n, n * n) @ blocks.view(-1, n * n, columns)
    else:
        mixed = rule.permute(2, 0, 1).reshape(n * n, n) @ x.reshape(-1, n, rows)
        mixed = mixed.reshape(-1, n * rows) @ weight.reshape(n * rows, columns)
    return mixed.reshape(*x.shape[:-1], n * columns)


def factored_phm_product(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``x @ sum(kron(rule[i], left[i] @ right[i]))``, in two products.

    The rule is multiplied into the smaller of the two factors, which then stands for all blocks at once.

    Args:
        x: [..., in].
        rule: [n, n, n]: matrix, row, column.
        left: [n, in/n, r].
        right: [n, r, out/n].

    Returns:
        [..., out].
    """
    n, rows, r = left.shape
    columns = right.shape[-1]
    if rows >= columns:
        inner = x.reshape(-1, rows) @ left.permute(1, 0, 2).reshape(rows, n * r)
        wide = rule.permute(1, 0, 2)[:, :, None, :, None] * right[None, :, :, None, :]
        y = inner.view(-1, n * n * r) @ wide.reshape(n * n * r, n * columns)
    else:
        wide = rule.permute(1, 2, 0)[:, None, :, :, None] * left.permute(1, 0, 2)[None, :, None, :, :]
        inner = x.reshape(-1, n * rows) @ wide.reshape(n * rows, n * n * r)
        y = inner.view(-1, n * r) @ right.reshape(n * r, columns)
    return y.reshape(*x.shape[:-1], n * columns)


def phm_matrix(rule: Tensor, *factors: Tensor) -> Tensor:
    """``sum(kron(rule[i], weight[i]))``, [in, out].

    Args:
        rule: [n, n, n]: matrix, row, column.
        *factors: the slices [n, in/n, out/n], or left [n, in/n, r] and right [n, r, out/n] factors of them.
    """
    weight = factors[0] if len(factors) == 1 else torch.bmm(*factors)
    n, rows, columns = weight.shape
    blocks = rule.reshape(n, n * n).t() @ weight.reshape(n, rows * columns)
    return blocks.view(n, n, rows, columns).transpose(1, 2).reshape(n * rows, n * columns)


class PHMRule(Delta):
    """One rule for all layers of a method.

    Args:
        n: number and size of its matrices.
        std: standard deviation at the start.
        device: where it lives.
        dtype: its dtype.
    """

    path: ClassVar[Path] = "shared"

    def __init__(
        self, n: int, *, std: float = 1e-4, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.std = std
        self.matrices = nn.Parameter(torch.empty(n, n, n, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices from a normal distribution."""
        nn.init.normal_(self.matrices, std=self.std)

    def forward(self) -> Tensor:
        """The rule, [n, n, n]."""
        return self.matrices


class PHMLinear(Part):
    r"""A linear layer whose weight is a sum of Kronecker products: :math:`x \sum_i A_i \otimes B_i + b`.

    With ``n=1`` there is no rule (A = 1): the layer is dense, or of rank r if it is factored.

    Args:
        in_features: a multiple of ``n``.
        out_features: a multiple of ``n``.
        n: number of Kronecker products.
        rank: rank of the slices B_i; ``None`` for full ones.
        rule: a rule that other layers use as well; ``None`` for one of its own.
        rule_std: standard deviation of an own rule at the start.
        device: where the parameters live.
        dtype: their dtype; products run in the input's (or autocast's).

    Raises:
        ArgumentError: if a size is not divisible by ``n``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        *,
        rank: int | None = 1,
        rule: PHMRule | None = None,
        rule_std: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for label, size in (("in_features", in_features), ("out_features", out_features)):
            check_divisible(label, size, n)
        self.n, self.rule_std = n, rule_std
        rows, columns = in_features // n, out_features // n

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = empty(n, rows, columns) if rank is None else None
        self.left = None if rank is None else empty(n, rows, rank)
        self.right = None if rank is None else empty(n, rank, columns)
        self.rule = empty(n, n, n) if rule is None and n > 1 else None
        self.bias = empty(out_features)
        self.__dict__["shared"] = rule  # not a child: it has its own place, and is counted once
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Slices uniform after Glorot with gain √2, an own rule normal, the bias zero."""
        for factor in self._factors():
            for piece in () if factor.is_meta else factor:
                nn.init.xavier_uniform_(piece, gain=_GAIN)
        if self.rule is not None:
            nn.init.normal_(self.rule, std=self.rule_std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., in]; returns [..., out] in the dtype in which the product ran."""
        dtype = compute_dtype(x)
        factors = [factor.to(dtype) for factor in self._factors()]
        bias, flat = self.bias.to(dtype), x.to(dtype).reshape(-1, x.shape[-1])
        if self.n == 1:
            *first, last = (factor[0] for factor in factors)
            for factor in first:
                flat = flat @ factor
            y = torch.addmm(bias, flat, last)
        elif flat.shape[1] * len(bias) <= _FORMED:
            y = torch.addmm(bias, flat, phm_matrix(self._rule().to(dtype), *factors))
        else:
            product = phm_product if len(factors) == 1 else factored_phm_product
            y = product(flat, self._rule().to(dtype), *factors) + bias
        return y.view(*x.shape[:-1], len(bias))

    def matrix(self) -> Tensor:
        """The weight, [out, in]."""
        factors = self._factors()
        if self.n > 1:
            return phm_matrix(self._rule(), *factors).t()
        return (factors[0][0] if len(factors) == 1 else factors[0][0] @ factors[1][0]).t()

    def made_of(self) -> list[Tensor]:
        """All tensors of the layer, and the rule that it shares."""
        shared = self.__dict__["shared"]
        return own_tensors(self) + ([] if shared is None else own_tensors(shared))

    def _factors(self) -> list[nn.Parameter]:
        return [factor for factor in (self.weight, self.left, self.right) if factor is not None]

    def _rule(self) -> Tensor:
        if self.rule is not None:
            return self.rule
        matrices: Tensor = self.__dict__["shared"]()
        return matrices

    def extra_repr(self) -> str:
        """Sizes."""
        shapes = ", ".join(str(tuple(factor.shape)) for factor in self._factors())
        return f"n={self.n}, slices={shapes}, shared_rule={self.__dict__['shared'] is not None}"


def check_divisible(label: str, size: int, n: int, where: str = "", *, fixed: bool = False) -> None:
    """Raise unless ``n`` divides the size.

    Args:
        label: name of the size.
        size: its value.
        n: number of Kronecker products.
        where: what the message begins with.
        fixed: the size cannot be chosen, so that only another ``n`` helps.

    Raises:
        ArgumentError: naming the size, the nearest sizes that n divides, and the nearest n that divide the size.
    """
    if size % n == 0 and size > 0:
        return
    near = [str(multiple) for multiple in (size // n * n, (size // n + 1) * n) if multiple > 0]
    candidates = range(1, size + 1 if size <= _LARGEST_ADVISED else 1)
    divisors = sorted(sorted((m for m in candidates if size % m == 0), key=lambda m: abs(m - n))[:2])
    advice = [] if fixed else [f"{label}={' or '.join(near)}"]
    advice += [f"phm_dim={' or '.join(map(str, divisors))}"] if divisors else []
    raise ArgumentError(f"{where}{label}={size} is not divisible by phm_dim={n}. Use {', or '.join(advice)}.")


class PHMBottleneck(Delta):
    """An adapter of two PHM layers, ``h + up(act(down(h)))``, on what its host returns.

    Source: Karimi Mahabadi et al. 2021.

    Args:
        width: features of h.
        bottleneck: features in between.
        n: number of Kronecker products; 1 for a low-rank (or dense) adapter.
        rank: rank of the slices; ``None`` for full ones.
        non_linearity: a name in :data:`~lightning_pet.layers.bottleneck.ACTIVATIONS`.
        rule: a rule that all adapters share; ``None``: two of its own.
        rule_std: standard deviation of own rules at the start.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ArgumentError: if a size is not divisible by ``n``.
    """

    scale = 1.0

    def __init__(
        self,
        width: int,
        bottleneck: int,
        n: int,
        *,
        rank: int | None = 1,
        non_linearity: str = "gelu_new",
        rule: PHMRule | None = None,
        rule_std: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_divisible("width", width, n, fixed=True)
        check_divisible("bottleneck_size", bottleneck, n)
        self.non_linearity = non_linearity

        def layer(inputs: int, outputs: int) -> PHMLinear:
            return PHMLinear(inputs, outputs, n, rank=rank, rule=rule, rule_std=rule_std, device=device, dtype=dtype)

        self.down = layer(width, bottleneck)
        self.up = layer(bottleneck, width)

    def reset_parameters(self) -> None:
        """Initialise both layers; a shared rule initialises itself."""
        self.down.reset_parameters()
        self.up.reset_parameters()

    def update(self, h: Tensor) -> Tensor:
        """What the adapter adds to h: [..., width] in the dtype in which the products ran."""
        added: Tensor = self.up(activation(self.non_linearity)(self.down(h)))
        return added

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """``output + update(output)``; the host's input is not used."""
        return output + self.update(output).to(output.dtype)

    @staticmethod
    def row_form(
        deltas: Sequence["PHMBottleneck | None"], ids: Tensor, x: Tensor, output: Tensor, host: Host
    ) -> Tensor | None:
        """All rows at once, with matrices that are made of the slices; see :attr:`Delta.row_form`."""
        own = [delta for delta in deltas if delta is not None]
        if len({delta.non_linearity for delta in own}) > 1:
            return None
        stacks = stacks_of(deltas, compute_dtype(output), PHMBottleneck._row_parts, PHMBottleneck._made_of)
        return bottleneck_rows(output, output, ids, activation(own[0].non_linearity), stacks)

    def _made_of(self) -> list[Tensor]:
        return [*self.down.made_of(), *self.up.made_of()]

    def _row_parts(self) -> Parts:
        down, up = kept(self, "matrices", self._made_of(), lambda: (self.down.matrix(), self.up.matrix()))
        return None, None, down, self.down.bias, up, self.up.bias
