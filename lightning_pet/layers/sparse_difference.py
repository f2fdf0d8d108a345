"""The difference that diff pruning learns for one weight: first gated, then a few values at fixed places."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_pet.layers.delta import Delta
from lightning_pet.layers.gated_weight import Form, Gates, expected_open, gated_weight
from lightning_pet.layers.hard_concrete import HardConcrete
from lightning_pet.layers.side_loss import Penalty

Kind = Literal["both", "weight", "group"]


class SparseDifference(Delta):
    r"""A difference that is added to a weight of any shape, in one of two forms.

    * *Gated*: :math:`\theta + z_g\, z \odot w`, with a hard-concrete gate z for every weight and z_g for the
      weight as a whole. In training mode gates are drawn for every step, in evaluation mode each takes its
      typical value, :math:`\min(1, \max(0, \sigma(\alpha)(r - l) + l))`. w starts at zero, so the model
      starts as the base.
    * *Fixed* (after :meth:`fix`): values at fixed places. Only they are a parameter, so that nothing, no
      optimizer and no decay, can move any other entry.

    The sum is computed in the dtype of w and rounded once to that of the weight, attached and merged alike.

    Args:
        shape: of the weight.
        law: distribution of the gates.
        kind: gates of every ``"weight"``, of the ``"group"`` (all of this weight), or ``"both"``.
        form: how the penalty counts open gates; see :func:`~lightning_pet.layers.gated_weight.expected_open`.
        l0_weight: factor of the penalty.
        alpha: start of every α.
        seed: tells its gates apart from those of other weights.
        device: where the parameters live.
        dtype: dtype of w, float32 or float64.
        gate_dtype: dtype of α (``None``: that of w).
    """

    path = "weight"
    optional_gradient = True  # "every weight" includes those that a batch does not reach

    def __init__(
        self,
        shape: tuple[int, ...],
        law: HardConcrete,
        *,
        kind: Kind = "both",
        form: Form = "product",
        l0_weight: float = 0.0,
        alpha: float = 5.0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        gate_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.size = torch.Size(shape).numel()
        self.law = law
        self.alpha_start = alpha
        self.w: nn.Parameter | None = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        gate_dtype = gate_dtype or self.w.dtype
        each = torch.empty(shape if kind != "group" else (), device=device, dtype=gate_dtype)
        whole = torch.empty(1, device=device, dtype=self.w.dtype)
        self.alpha = nn.Parameter(each) if kind != "group" else None
        self.alpha_group = nn.Parameter(whole) if kind != "weight" else None
        self.register_parameter("values", None)
        self.register_buffer("indices", None)
        count = partial(expected_open, law=law, per_weight=self.size if kind == "group" else 1, form=form)
        self.penalty = Penalty(count, weight=l0_weight)
        self.gates = Gates(law, self.penalty, form, seed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No difference, gates open; a fixed difference becomes zero."""
        for parameter in (self.w, self.values):
            if parameter is not None:
                nn.init.zeros_(parameter)
        for parameter in self.gate_parameters:
            nn.init.constant_(parameter, self.alpha_start)

    @property
    def gate_parameters(self) -> list[nn.Parameter]:
        """α of the weights and of the group, as far as there are such gates."""
        return [parameter for parameter in (self.alpha, self.alpha_group) if parameter is not None]

    @property
    def is_fixed(self) -> bool:
        """Whether the places are decided."""
        return self.w is None

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight; the weight itself where no place was kept."""
        if self.w is None:
            return self._moved(weight, self.values) if self.indices.numel() else weight
        if self.training:
            return gated_weight(weight, self.w, self.alpha, self.alpha_group, self.gates)
        return (self.difference() + weight).to(weight.dtype)

    def _moved(self, weight: Tensor, values: Tensor) -> Tensor:
        flat, places = weight.reshape(-1), self.indices.long()
        moved = flat.index_select(0, places).to(values.dtype) + values
        return flat.index_copy(0, places, moved.to(weight.dtype)).view(weight.shape)

    def difference(self) -> Tensor:
        """The difference as evaluation uses it, dense, in the weight's shape."""
        if self.w is None:
            values: Tensor = self.values
            return values.new_zeros(self.size).index_copy(0, self.indices.long(), values).view(self.shape)
        difference: Tensor = self.w
        if self.alpha is not None:
            difference = self.law.typical(self.alpha.to(self.w.dtype)) * difference
        if self.alpha_group is not None:
            difference = self.law.typical(self.alpha_group) * difference
        return difference

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the difference added."""
        with torch.no_grad():
            if self.w is None:
                return self._moved(weight, self.values)
            return (self.difference() + weight).to(weight.dtype)

    def expected_nonzero(self) -> float:
        """Expected number of non-zero entries: E‖z·z_g‖₀ while gated, those that were kept afterwards."""
        if self.w is None:
            return float(self.indices.numel())
        per_weight = self.size if self.alpha is None else 1
        parameters = [parameter.detach().float() for parameter in self.gate_parameters]
        return expected_open(*parameters, law=self.law, per_weight=per_weight).item()

    # --- the two forms ------------------------------------------------------------------------------

    def fix(self, places: Tensor) -> nn.Parameter | None:
        """Keep the difference at these places only, and train it there from now on.

        Args:
            places: flat indices, rising.

        Returns:
            The new parameter, which starts with the difference that evaluation used; it is frozen if it
            has no entries.
        """
        values = self.difference().detach().reshape(-1)[places]
        self._take_fixed_form(places, values)
        return self.values

    def _take_fixed_form(self, places: Tensor, values: Tensor) -> None:
        self.w = self.alpha = self.alpha_group = None
        index = torch.int32 if self.size < 2**31 else torch.int64
        self.indices = places.to(device=values.device, dtype=index)
        self.values = nn.Parameter(values.clone(), requires_grad=values.numel() > 0)

    def take_form(self, tensors: Mapping[str, Tensor]) -> bool:
        """Become fixed, with as many entries, if these tensors are of a fixed difference."""
        places, values = tensors.get("indices"), tensors.get("values")
        if places is None or values is None or self.misfits(tensors):
            return False
        device = (self.values if self.w is None else self.w).device
        self._take_fixed_form(places.to(device), values.to(device))
        return True

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Why these tensors do not fit: neither a gated difference of this weight nor a fixed one."""
        if not tensors.keys() & {"indices", "values"}:
            if self.w is None:
                return ["values and indices are missing: the difference was fixed, the file's is not"]
            return super().misfits(tensors)
        wrong = [f"{name} is missing" for name in sorted({"indices", "values"} - tensors.keys())]
        wrong += [f"{name} is unexpected" for name in sorted(tensors.keys() - {"indices", "values"})]
        return wrong or self._wrong_places(tensors["indices"], tensors["values"])

    def _wrong_places(self, places: Tensor, values: Tensor) -> list[str]:
        if places.ndim != 1 or places.shape != values.shape or places.dtype not in (torch.int32, torch.int64):
            kind = str(places.dtype).removeprefix("torch.")
            return [f"indices ({kind}) have shape {tuple(places.shape)}, values {tuple(values.shape)}"]
        if not values.is_floating_point():
            return [f"values have dtype {values.dtype}"]
        if places.is_meta or not places.numel():
            return []
        if places[0] < 0 or places[-1] >= self.size or not (places[1:] > places[:-1]).all():
            return [f"indices are not rising numbers below {self.size}"]
        return []

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a file, and its form."""
        if not self.take_form(tensors):
            super().unpack(tensors)
