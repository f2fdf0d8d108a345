"""A prefix as a delta around the module that computes softmax attention.

Two routes lead into an attention, and the probe of the model's structure has seen which one a module takes:
*interface* (:mod:`lightning_pet.attention.interface`), transformers' table of attention functions, and
*functional* (:mod:`lightning_pet.attention.functions`), torch's own functions, intercepted while the host runs.
What must be known of a place to build its delta is in the place's ``sizes``, so that a file needs no probe.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pet.attention.functions import FunctionalRoute
from lightning_pet.attention.interface import LivePrefix, RowPrefixes, install
from lightning_pet.errors import DeadSiteError
from lightning_pet.layers.delta import wrong_kinds, wrong_names, wrong_shapes
from lightning_pet.layers.gating import new_gate, opened, reset_gate
from lightning_pet.layers.prefix import Prefix
from lightning_pet.model.call import HERE
from lightning_pet.model.structure import AttentionCore, Route, Target

_ROUTES: tuple[Route, ...] = ("interface", "functional")


@dataclass(frozen=True)
class PrefixSite:
    """What a prefix must know of its attention.

    Attributes:
        heads: key/value heads.
        key_dim: features of one key head.
        value_dim: features of one value head.
        width: features of the model around it, the input width of a re-parametrisation.
        route: how the prefix gets there.
        scale: factor of the scores on the functional route; ``None`` where none was seen.
        axis: dimension of the heads in scores that have one of windows, too.
    """

    heads: int
    key_dim: int
    value_dim: int
    width: int
    route: Route
    scale: float | None = None
    axis: int = 1

    @classmethod
    def of(cls, core: AttentionCore, width: int) -> Self:
        """The site of a probed attention."""
        return cls(core.kv_heads, core.key_dim, core.value_dim, width, core.route, core.scale, core.axis)

    @classmethod
    def read(cls, sizes: Sequence[int]) -> Self:
        """The inverse of :meth:`sizes`.

        Raises:
            DeadSiteError: if these are not the sizes of a prefix.
        """
        if len(sizes) != 8 or min(sizes) < 0 or not all((*sizes[:4], *sizes[6:])) or sizes[4] >= len(_ROUTES):
            raise DeadSiteError(f"sizes {tuple(sizes)} do not describe an attention. Apply the method anew.")
        heads, key_dim, value_dim, width, route, numerator, denominator, axis = sizes
        scale = numerator / denominator if numerator else None
        return cls(heads, key_dim, value_dim, width, _ROUTES[route], scale, axis)

    def sizes(self) -> tuple[int, ...]:
        """All of it in integers: the scale as an exact fraction, 0/1 for ``None``."""
        fraction = (0, 1) if self.scale is None else self.scale.as_integer_ratio()
        return (self.heads, self.key_dim, self.value_dim, self.width, _ROUTES.index(self.route), *fraction, self.axis)


def site_target(core: AttentionCore, width: int) -> Target:
    """The place of a prefix."""
    sizes = PrefixSite.of(core, width).sizes()
    return Target(core.owner, "", role="attention.core", cross=core.cross, sizes=sizes)


class AttentionPrefix(Prefix):
    """A :class:`~lightning_pet.layers.prefix.Prefix` that its host's attention sees.

    Args:
        site: the attention.
        length: positions.
        **kwargs: further arguments of the prefix.
    """

    def __init__(self, site: PrefixSite, length: int, **kwargs: Any) -> None:
        super().__init__(length, site.heads, site.key_dim, site.value_dim, **kwargs)
        self.site = site
        self._install()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A new process that unpickles a model must wrap the table, too."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._install()

    def _install(self) -> None:
        if self.site.route == "interface":
            install()

    @property
    def live(self) -> LivePrefix | None:
        """Keys and values for the attention of the host, while it runs in this thread."""
        live: LivePrefix | None = HERE.call.held_by(self)
        return live

    @staticmethod
    def row_form(deltas: Sequence["AttentionPrefix | None"], ids: Tensor, owner: Any) -> Callable[..., Any] | None:
        """Runs a call with each row's own prefix, where there is a mask to say how long it is."""
        own = [delta for delta in deltas if delta is not None]
        if any(delta.site.route != "interface" for delta in own):
            return None

        def run(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return own[0]._seen(owner, _rows_of_prefixes(deltas, ids), call, *args, **kwargs)

        return run

    def _seen(self, owner: Any, live: LivePrefix, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a call while its attention sees a prefix."""
        here = HERE.call
        before = here.around
        here.around = (*before, (owner, live))
        try:
            output = call(*args, **kwargs)
        finally:
            here.around = before
        return self._used(live, output)

    @staticmethod
    def _used(live: LivePrefix, output: Any) -> Any:
        if not live.used:
            raise DeadSiteError(
                "a prefix was not seen by the attention that it belongs to: this attention runs in another way than "
                "when its structure was probed. Load the model with the attn_implementation that the prefix was made "
                "with, or exclude this site."
            )
        return output

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the host's call, with the prefix visible to its attention.

        Raises:
            DeadSiteError: if the call ended without any attention that the prefix could join.
        """
        live = LivePrefix(*self.key_value())
        if self.site.route == "interface":  # as in :meth:`_seen`: generation comes here in every layer for every token
            here = HERE.call
            before = here.around
            here.around = (*before, (self, live))
            try:
                output = call(*args, **kwargs)
            finally:
                here.around = before
            return output if live.used else self._used(live, output)
        route = FunctionalRoute(live, self.site.scale, self.site.axis)
        with route:
            output = call(*args, **kwargs)
        route.finish()
        return self._used(live, output)


class GatedPrefix(AttentionPrefix):
    """A prefix of which each example sees its own multiple: keys and values times a gate, read off what comes in.

    Source: Mao et al. 2022 (UniPELT).

    Args:
        site: the attention, which takes transformers' route.
        length: positions.
        **kwargs: further arguments of the prefix.
    """

    row_form = None  # type: ignore[assignment]

    def __init__(self, site: PrefixSite, length: int, **kwargs: Any) -> None:
        made = {name: kwargs.get(name) for name in ("device", "dtype")}
        gate = new_gate(site.width, **made)
        super().__init__(site, length, **kwargs)
        self.gate_weight, self.gate_bias = gate
        reset_gate(*gate)

    def reset_parameters(self) -> None:
        """As of every prefix; the gate nearly one half for every input."""
        super().reset_parameters()
        if "gate_weight" in self._parameters:  # the first call comes from the constructor, before there is one
            reset_gate(self.gate_weight, self.gate_bias)

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """As of every prefix, with the gate beside whatever it comes from."""
        gate = {name: tensor for name, tensor in tensors.items() if name in _GATE}
        rest = {name: tensor for name, tensor in tensors.items() if name not in _GATE}
        own = {name: tensor for name, tensor in self.state_dict().items() if name in _GATE}
        problems = [problem for problem in super().misfits(rest) if problem.partition(" ")[0] not in _GATE]
        return [*problems, *wrong_names(own.keys(), gate.keys()), *wrong_shapes(own, gate), *wrong_kinds(own, gate)]

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the host's call, with each example's prefix visible to its attention.

        Raises:
            DeadSiteError: if the call has no input of the width that the gate reads, or no attention.
        """
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.gate_weight.shape[-1]:
            raise DeadSiteError(
                f"the gate of a prefix reads the input of its attention, [batch, positions, "
                f"{self.gate_weight.shape[-1]}], and this one was called with "
                f"{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}. Exclude it, or set use_gating=False."
            )
        gate = opened(x, self.gate_weight, self.gate_bias)[..., None]
        key, value = (part * gate.to(part.dtype) for part in self.key_value())
        return self._seen(self, RowPrefixes(key, value, None), call, *args, **kwargs)


_GATE = ("gate_weight", "gate_bias")


def _rows_of_prefixes(deltas: Sequence[AttentionPrefix | None], ids: Tensor) -> RowPrefixes:
    """The prefix of each row; shorter ones, and that of rows without any, have hidden positions in front.

    Args:
        deltas: a prefix per group of rows, or ``None``.
        ids: of each row, its group.
    """
    pairs = [None if delta is None else delta.key_value() for delta in deltas]
    first = next(pair for pair in pairs if pair is not None)
    lengths = [0 if pair is None else pair[0].shape[1] for pair in pairs]
    longest, stacks = max(lengths), []
    for which in (0, 1):
        like = first[which]
        each = [like.new_zeros(len(like), 0, like.shape[2]) if pair is None else pair[which] for pair in pairs]
        padded = [F.pad(x.to(like.dtype), (0, 0, longest - x.shape[1], 0)) for x in each]
        stacks.append(torch.stack(padded).index_select(0, ids))
    if min(lengths) == longest:
        return RowPrefixes(stacks[0], stacks[1], None)
    columns = torch.arange(longest, device=ids.device)
    starts = longest - torch.tensor(lengths, device=ids.device)[ids]
    return RowPrefixes(stacks[0], stacks[1], columns >= starts[:, None])
