"""The difference that diff pruning learns for one weight: first gated, then a few values at fixed places."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_pet.layers.delta import (
    REMADE,
    Delta,
    Excerpt,
    Remaker,
    kind_of,
    unchanged_since,
    wrong_names,
)
from lightning_pet.layers.gated_weight import Form, Gates, expected_open, gated_weight
from lightning_pet.layers.hard_concrete import HardConcrete
from lightning_pet.layers.sharding import is_sharded
from lightning_pet.layers.side_loss import Penalty

Kind = Literal["both", "weight", "group"]

_GATES = ("alpha", "alpha_group")


def _with_values(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    flat, places = weight.reshape(-1), indices.long()
    moved = flat.index_select(0, places).to(values.dtype) + values
    return flat.index_copy(0, places, moved.to(weight.dtype)).view(weight.shape)


class SparseDifference(Delta):
    r"""A difference that is added to a weight of any shape, in one of two forms.

    * *Gated*: :math:`\theta + z_g\, z \odot w`, with a hard-concrete gate z for every weight and z_g for the
      weight as a whole. In training mode gates are drawn for every step, in evaluation mode each takes its
      typical value, :math:`\min(1, \max(0, \sigma(\alpha)(r - l) + l))`. w starts at zero, so the model
      starts as the base.
    * *Fixed* (after :meth:`fix`): values at fixed places. Only they are a parameter, so that nothing, no
      optimizer and no decay, can move any other entry. Where an engine holds the parameters, w stays, and is
      read at these places only; files are the same.

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
        self.kind = kind
        self.alpha_start = alpha
        self.gate_dtype = gate_dtype
        self.register_buffer("indices", None)
        self.register_parameter("values", None)
        count = partial(expected_open, law=law, per_weight=self.size if kind == "group" else 1, form=form)
        self.penalty = Penalty(count, weight=l0_weight)
        self.gates = Gates(law, self.penalty, form, seed)
        self._take_gated_form(torch.empty(0, device=device, dtype=dtype))
        self.reset_parameters()

    def _take_gated_form(self, like: Tensor) -> None:
        def made(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=like.device, dtype=dtype or like.dtype))

        self.values: Tensor | None = None
        self.indices: Tensor | None = None
        self.w: nn.Parameter | None = made(*self.shape)
        self.alpha = made(*self.shape, dtype=self.gate_dtype) if self.kind != "group" else None
        self.alpha_group = made(1) if self.kind != "weight" else None

    def reset_parameters(self) -> None:
        """No difference, gates open; a fixed difference becomes zero."""
        for parameter in (self.w, self.values):
            if parameter is not None:
                nn.init.zeros_(parameter)
        for parameter in self.gate_parameters:
            nn.init.constant_(parameter, self.alpha_start)

    @property
    def gate_parameters(self) -> list[nn.Parameter]:
        """α of the weights and of the group, as far as there are such gates; none once the places are decided."""
        return [p for p in (self.alpha, self.alpha_group) if p is not None and not self.is_fixed]

    @property
    def is_fixed(self) -> bool:
        """Whether the places are decided."""
        return self.indices is not None

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight; the weight itself where no place was kept."""
        if self.is_fixed:
            return self._moved(weight)
        if self.training:
            assert self.w is not None
            return gated_weight(weight, self.w, self.alpha, self.alpha_group, self.gates)
        return (self.difference() + weight).to(weight.dtype)

    def _moved(self, weight: Tensor) -> Tensor:
        assert self.indices is not None
        if not self.indices.numel():
            return weight
        return _with_values(weight, self.indices, self._values(self.values, self.w))

    @property
    def remakes(self) -> bool:  # type: ignore[override]
        """A weight that differs at a few places is copied soon; one with gates has to be drawn."""
        return self.indices is not None and self.size >= REMADE and bool(self.indices.numel())

    def remaker(self, weight: Tensor) -> Remaker | None:
        """See :meth:`Delta.remaker`; once the places are decided."""
        indices, values = self.indices, self.values
        if indices is None or values is None or not self.remakes:
            return None
        if (check := unchanged_since(weight, indices, values)) is None:
            return None

        @torch.no_grad()
        def remake() -> Tensor:
            check()
            return _with_values(weight, indices, values)

        return remake

    def _values(self, values: Tensor | None, w: Tensor | None) -> Tensor:
        if values is not None:
            return values
        assert self.indices is not None
        assert w is not None
        return w.reshape(-1).index_select(0, self.indices.long())

    def difference(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The difference as evaluation uses it, dense, in the weight's shape.

        Args:
            tensors: the own tensors by name, whole, where an engine holds parts of them.
        """
        own = self._own(tensors)
        if self.indices is not None:
            values = self._values(own.get("values"), own.get("w"))
            return values.new_zeros(self.size).index_copy(0, self.indices.long(), values).view(self.shape)
        difference = own["w"]
        if "alpha" in own:
            difference = self.law.typical(own["alpha"].to(difference.dtype)) * difference
        if "alpha_group" in own:
            difference = self.law.typical(own["alpha_group"]) * difference
        return difference

    def _own(self, tensors: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        if tensors is not None:
            return tensors
        return {name: t for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the difference added."""
        with torch.no_grad():
            if self.is_fixed:
                return self._moved(weight)
            return (self.difference() + weight).to(weight.dtype)

    @torch.no_grad()
    def reach(self, largest: float) -> float:
        """No gate is more than open; see :meth:`Delta.reach`."""
        values = self._values(self.values, self.w) if self.is_fixed else self.w
        return largest + (float(values.abs().max()) if values is not None and values.numel() else 0.0)

    def count_nonzero(self, tensors: Mapping[str, Tensor] | None = None) -> int:
        """Non-zero entries of the difference as evaluation uses it; see :meth:`difference`."""
        with torch.no_grad():
            own = self._own(tensors)
            values = self._values(own.get("values"), own.get("w")) if self.is_fixed else self.difference(own)
            return int(values.count_nonzero())

    def expected_nonzero(self, tensors: Mapping[str, Tensor] | None = None) -> float:
        """Expected number of non-zero entries: E‖z·z_g‖₀ while gated, those that were kept afterwards."""
        if self.indices is not None:
            return float(self.indices.numel())
        per_weight = self.size if self.alpha is None else 1
        gates = [gate.detach().float() for gate in self._gates_of(tensors)]
        return expected_open(*gates, law=self.law, per_weight=per_weight).item()

    def weighted_penalty(self, tensors: Mapping[str, Tensor] | None = None) -> float:
        """The penalty that goes with the loss; 0 once the places are decided."""
        return 0.0 if self.is_fixed else float(self.penalty(*self._gates_of(tensors)))

    def _gates_of(self, tensors: Mapping[str, Tensor] | None) -> list[Tensor]:
        own = self._own(tensors)
        return [own[name] for name in _GATES if name in own]

    # --- the two forms ------------------------------------------------------------------------------

    def fix(self, places: Tensor) -> list[tuple[nn.Parameter, nn.Parameter | None]]:
        """Keep the difference at these places only, and train it there from now on.

        It starts with the values that evaluation used. Without any place it is frozen, and costs nothing.

        Args:
            places: flat indices, rising.

        Returns:
            Every parameter until now, with the one that goes on in its place; none if it is fixed already.
        """
        if self.is_fixed:
            return []
        assert self.w is not None
        old, gates = self.w, self.gate_parameters
        self._take_fixed_form(places, self.difference().detach().reshape(-1)[places])
        new = self.values if isinstance(self.values, nn.Parameter) else None
        return [(old, new), *((gate, None) for gate in gates)]

    def _take_fixed_form(self, places: Tensor, values: Tensor) -> None:
        self.w = self.alpha = self.alpha_group = None
        self._take_places(places, values)
        del self.values
        if values.numel():
            self.values = nn.Parameter(values.clone())
        else:  # engines that shard cannot take a parameter without numbers
            self.register_buffer("values", values.clone())

    def _take_places(self, places: Tensor, like: Tensor) -> None:
        index = torch.int32 if self.size < 2**31 else torch.int64
        self.indices = places.to(device=like.device, dtype=index)

    def take_form(self, tensors: Mapping[str, Tensor], *, held: bool = False) -> bool:
        """Become fixed with as many entries as these tensors have, or gated if they are of a gated difference.

        With ``held`` a gated difference keeps its parameters when it becomes fixed, to become gated again; one
        that was fixed before the engine came stays as it is.
        """
        if not tensors or self.misfits(tensors):
            return False
        present = self.values if self.w is None else self.w
        assert present is not None
        if held and self.w is None:
            return False
        if held and "values" in tensors:
            self._take_places(tensors["indices"], present)
        elif "values" in tensors:
            self._take_fixed_form(*(tensors[name].to(present.device) for name in ("indices", "values")))
        elif self.w is None:
            self._take_gated_form(present)
        elif self.indices is not None:
            self.indices = None
        else:
            return False
        return True

    @property
    def excerpts(self) -> Mapping[str, Excerpt | None]:
        """Once the places are decided, of w the entries there, and of the gates nothing."""
        if self.w is None or self.indices is None:
            return {}
        return {"w": Excerpt("values", self.indices)} | {name: None for name in _GATES if name in self._own(None)}

    def spread(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Put the values of a fixed difference to their places, if this one has kept its w."""
        if not self.excerpts or "values" not in tensors:
            return tensors
        values, places = tensors["values"], tensors["indices"]
        w = values.new_zeros(self.size).index_copy(0, places.long(), values).view(self.shape)
        shapes = {"alpha": self.shape, "alpha_group": (1,)}
        gates = {name: values.new_full((), self.alpha_start).expand(shapes[name]) for name in _GATES}
        return {"indices": places, "w": w} | {name: gate for name, gate in gates.items() if name in self._own(None)}

    def packed(self) -> dict[str, Tensor]:
        """A fixed difference as its places and values, a gated one as it is."""
        if not self.excerpts:
            return super().packed()
        assert self.indices is not None
        return {"indices": self.indices, "values": self._values(None, self.w).detach()}

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Why these tensors do not fit: neither a gated difference of this weight nor a fixed one."""
        if tensors.keys() & {"indices", "values"}:
            expected: dict[str, tuple[int, ...]] = dict.fromkeys(("indices", "values"), ())
        else:
            expected = {"w": self.shape}
            expected |= {"alpha": self.shape} if self.kind != "group" else {}
            expected |= {"alpha_group": (1,)} if self.kind != "weight" else {}
        wrong = wrong_names(expected.keys(), tensors.keys())
        if "values" in expected:
            return wrong or self._wrong_places(tensors["indices"], tensors["values"])
        return wrong + [
            f"{name} ({kind_of(tensors[name])}) has shape {tuple(tensors[name].shape)}, expected fractions of {shape}"
            for name, shape in expected.items()
            if name in tensors and (tuple(tensors[name].shape) != shape or not tensors[name].is_floating_point())
        ]

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
        """Take over the tensors of a file, and their form."""
        self.take_form(tensors, held=self.w is not None and is_sharded(self.w))
        super().unpack(self.spread(tensors))
