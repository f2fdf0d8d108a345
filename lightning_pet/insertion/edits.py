"""Where the first and last tokens of a row are, for methods that edit what layers return there.

The module that takes a batch and its mask (the *consumer*) is called once for all layers. Around its call a delta holds
what the mask says; layers ask it. ``generate`` calls the consumer for every token: there only the positions of what it
was given count, so a delta around it remembers how many these were.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.errors import DeadSiteError, TargetError
from lightning_pet.insertion.method import Insertion
from lightning_pet.insertion.prompt_columns import cached_length
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.reft import Places, first_and_last
from lightning_pet.model.call import HERE
from lightning_pet.model.naming import named_modules
from lightning_pet.model.structure import Target

_INPUTS: Final = frozenset({"input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values"})
_MASK: Final = "attention_mask"
_PADDING: Final = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")
"""Arguments of torch's own modules: true, or below zero, where there is no token."""


@dataclass(eq=False)
class Seen:
    """What is known of the rows in one call of a consumer.

    Attributes:
        real: batch × positions, true for tokens; ``None``: all of them are.
        columns: only so many count, those that ``generate`` was given; ``None``: all.
        continues: the call goes on behind a cache: nothing in it counts.
        known: places by how many are asked for, and the size of an output.
    """

    real: Tensor | None = None
    columns: int | None = None
    continues: bool = False
    known: dict[tuple[int, ...], Places] = field(default_factory=dict)

    def places(self, output: Tensor, first: int, last: int) -> Places | None:
        """The positions in an output [batch, positions, width]; ``None``: none.

        Raises:
            TargetError: if the mask has padding, and is none of these positions.
        """
        if self.continues:
            return None
        key = (first, last, *output.shape[:2])
        if key not in self.known:
            self.known[key] = first_and_last(self._real(output), first, last)
        return self.known[key]

    def _real(self, output: Tensor) -> Tensor:
        batch, size = output.shape[:2]
        real = self.real
        if real is not None and real.shape != (batch, size):
            if not bool(real.all()):
                raise TargetError(
                    f"a mask of shape {tuple(real.shape)} has padding, and a layer returned {batch} rows of {size} "
                    "positions: which of these are padding cannot be told. Give batches without padding, or use an "
                    "adapter, which changes all positions alike."
                )
            real = None
        if real is None:
            real = torch.ones(batch, size, dtype=torch.bool, device=output.device)
        if self.columns is not None and self.columns < size:
            real = real & (torch.arange(size, device=real.device) < self.columns)
        return real.to(output.device)


class _Given:
    """How many positions ``generate`` was given: those of the first call in it."""

    columns: int | None = None


class Positions(Delta):
    """Around a consumer: holds which positions are tokens, for the edits in its layers.

    Args:
        names: names of the consumer's positional arguments, in order.
    """

    path = "around"

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the consumer."""
        return self._holding([self], call, args, kwargs)

    @staticmethod
    def row_form(deltas: Sequence["Positions | None"], ids: Tensor, owner: Any) -> Callable[..., Any]:
        """The same once for all of them."""
        own = [delta for delta in deltas if delta is not None]
        return lambda call, args, kwargs: own[0]._holding(own, call, args, kwargs)

    def _holding(
        self, owners: Sequence["Positions"], call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        here = HERE.call
        before, seen = here.around, self._seen({**dict(zip(self.names, args, strict=False)), **kwargs})
        here.around = (*before, *((owner, seen) for owner in owners))
        begin = here.number()
        try:
            return call(*args, **kwargs)
        finally:
            here.around = before
            here.passed(owners, seen, begin)

    def _seen(self, given: Mapping[str, Any]) -> Seen:
        seen = Seen(_real(given), continues=cached_length(dict(given)) > 0)
        asked = HERE.call.held_by(self)
        if isinstance(asked, _Given) and not seen.continues:
            if asked.columns is None:
                asked.columns = _size(given)
            seen.columns = asked.columns
        return seen

    def places(self, output: Tensor, first: int, last: int) -> Places | None:
        """The first and last tokens in the output of a layer; ``None``: none of them is in this call.

        Raises:
            DeadSiteError: if a layer is repeated for a backward pass whose forward is not remembered.
        """
        seen = HERE.call.held_by(self)
        if not isinstance(seen, Seen) and not torch.compiler.is_compiling():
            seen = HERE.call.held_before(self)
        if not isinstance(seen, Seen):
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise DeadSiteError(
                    "gradient checkpointing repeats a layer whose forward was too long ago: the positions of its edits "
                    "are not known any more. Call backward after fewer forwards."
                )
            seen = Seen()
        return seen.places(output, first, last)


class Given(Delta):
    """Around ``generate``: only what it was given is edited, not what comes of it.

    Args:
        consumers: the deltas around what it calls.
    """

    path = "generate"

    def __init__(self, consumers: Sequence[Positions]) -> None:
        super().__init__()
        self.__dict__["consumers"] = list(consumers)

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        return self._within(self.__dict__["consumers"], call, args, kwargs)

    @staticmethod
    def row_form(deltas: Sequence["Given | None"], ids: Tensor, owner: Any) -> Callable[..., Any]:
        """The same for the edits of all of them."""
        own = [delta for delta in deltas if delta is not None]
        every = [positions for delta in own for positions in delta.__dict__["consumers"]]
        return lambda call, args, kwargs: own[0]._within(every, call, args, kwargs)

    @staticmethod
    def _within(every: Iterable[Positions], call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        here = HERE.call
        before = here.around
        here.around = (*before, *((positions, _Given()) for positions in every))
        try:
            return call(*args, **kwargs)
        finally:
            here.around = before


def everywhere(output: Tensor, first: int, last: int) -> Places | None:
    """The places in a model without masks: every position counts."""
    return Seen().places(output, first, last)


def _size(given: Mapping[str, Any]) -> int | None:
    for name in ("input_ids", "inputs_embeds"):
        value = given.get(name)
        if isinstance(value, Tensor):
            return value.shape[1]
    return None


def _real(given: Mapping[str, Any]) -> Tensor | None:
    """Which positions are tokens, of what a consumer was given."""
    mask = given.get(_MASK)
    if isinstance(mask, Mapping):  # one per kind of attention; a window hides what is far away
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    if isinstance(mask, Tensor) and mask.dim() == 4:  # what any query sees of the present positions
        seen = mask if mask.dtype is torch.bool else mask >= 0
        return seen[:, 0, :, : mask.shape[2]].any(1)
    for name in _PADDING:
        mask = given.get(name)
        if isinstance(mask, Tensor):
            return ~mask if mask.dtype is torch.bool else mask >= 0
    return None


# --- places ---------------------------------------------------------------------------------------


def edit_insertions(
    root: nn.Module,
    targets: Sequence[Target],
    build: Callable[[Target, Callable[[Tensor, int, int], Places | None]], Delta],
) -> list[Insertion]:
    """The edits, and what tells them their positions: around the consumers of their layers, and around ``generate``.

    Args:
        root: the adapted root.
        targets: places of edits.
        build: makes the edit of a place from what answers where its positions are.

    Raises:
        TargetError: if positions of a place are not in the second dimension.
    """
    modules = named_modules(root)
    consumers: dict[str, Positions] = {}
    generators: dict[str, list[Positions]] = {}
    edits = []
    for target in targets:
        _check_batch_first(modules, target)
        path = _innermost(modules, target.module, _takes_mask)
        places: Callable[[Tensor, int, int], Places | None] = everywhere
        if path is not None:
            if path not in consumers:
                consumers[path] = Positions(_names(modules[path]))
                if (around := _innermost(modules, f"{path}.", _generates)) is not None:
                    generators.setdefault(around, []).append(consumers[path])
            places = consumers[path].places
        edits.append(Insertion(target, build(target, places)))
    calls = [Insertion(Target(path, "", "edit.call"), delta, "call") for path, delta in consumers.items()]
    calls += [Insertion(Target(path, "", "edit.generate"), Given(own), "generate") for path, own in generators.items()]
    return [*calls, *edits]


def is_edit(target: Target) -> bool:
    """Whether a place is that of an edit, and not of what tells it its positions."""
    return target.role not in ("edit.call", "edit.generate")


def _innermost(modules: Mapping[str, nn.Module], path: str, fits: Callable[[nn.Module], bool]) -> str | None:
    """The innermost module around a path for which this holds."""
    while path:
        path = path.rpartition(".")[0]
        if path in modules and fits(modules[path]):
            return path
    return None


def _names(module: nn.Module) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return ()


def _takes_mask(module: nn.Module) -> bool:
    names = {*_names(module)}
    return (_MASK in names and bool(names & _INPUTS)) or bool(names.intersection(_PADDING))


def _generates(module: nn.Module) -> bool:
    return hasattr(module, "prepare_inputs_for_generation") and hasattr(module, "generate")


def _check_batch_first(modules: Mapping[str, nn.Module], target: Target) -> None:
    around = target.module.rpartition(".")[0]
    for path in (target.module, around) if around else (target.module,):
        for part in modules[path].modules():
            if isinstance(part, nn.MultiheadAttention) and not part.batch_first:
                raise TargetError(
                    f"{target.path or 'the model'}: its attention has positions before the batch, and ReFT counts them "
                    "in the second dimension. Build it with batch_first=True, or use an adapter."
                )
