"""Adding deltas into weights: everything is checked first, then one weight after the other is changed in place.

All or nothing without a second copy of the base. A copy would be the simple way back, and would need the memory that
merging a large model must save. So nothing may need a way back:

* What can refuse does so before the first number changes: places, ties, readers, formats, and whether every sum is
  finite. For most methods that is shown by a bound (the largest number in the weight and in the factors); where a
  bound does not decide, the sum itself is computed and thrown away, one layer at a time.
* Then every weight is changed by operations in place, with next to no memory. Signals (Ctrl-C) wait until the last
  one is done: an interrupted merge is a finished one.
* Should the machine fail in between all the same (a device, its memory), the deltas that are in their weights leave
  the model and the others stay: it computes what it computed before, nothing is added twice, and the error says so.
"""

import math
import signal
import threading
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_pet.errors import NotMergeableError
from lightning_pet.insertion.commit import forget, keys_of, take_out
from lightning_pet.layers.delta import Delta, Tied
from lightning_pet.model.adaptation import deltas_in
from lightning_pet.model.layer_kinds import is_made
from lightning_pet.model.naming import canonical, join, named_modules
from lightning_pet.model.quantised import DENSE, check_replaceable, dense_values, is_quantised, replace_by_dense
from lightning_pet.model.structure import Target

_ORDER = ("shared", "weight", "activation", "around", "generate")  # in which deltas act on one host, innermost first


class Merge:
    """A merge that was checked, and is to be written.

    Args:
        root: the adapted root.
        dequantize: quantised layers may become ordinary ones.
        deltas: names of the deltas to merge, others stay; ``None``: all.

    Raises:
        NotMergeableError: naming the first delta that no weight expresses; nothing is changed then.
    """

    def __init__(self, root: nn.Module, dequantize: bool = False, deltas: tuple[str, ...] | None = None) -> None:
        self.root = root
        self.deltas = deltas
        self.units = _Planner(root, dequantize, deltas).units()
        with torch.no_grad():
            for unit in self.units:
                unit.check()

    @torch.no_grad()
    def write(self) -> None:
        """Add the deltas into their weights, and take them out; to be called where :func:`signals_wait`."""
        _write(self.root, self.units)
        take_out(self.root, None if self.deltas is None else keys_of(self.root, self.deltas))
        replace_by_dense(self.root, [pair for unit in self.units for pair in unit.dense])


def _write(root: nn.Module, units: "list[_Unit]") -> None:
    done: list[_Unit] = []
    try:
        for unit in units:
            unit.write()
            done.append(unit)
    except BaseException as error:
        forget(root, [path for unit in done if not unit.dense for path in unit.places])
        error.add_note(
            f"merge_() failed after {len(done)} of {len(units)} layers. Their deltas are in their weights and out of "
            "the model, the others are still attached: it computes what it did before. Call merge_() again to merge "
            "the rest, or load the base model again."
        )
        raise


class _Place(NamedTuple):
    """One delta in its host."""

    method: str
    target: Target
    host: nn.Module
    delta: Delta
    path: str


class _Change(Protocol):
    """What is done to one parameter: a delta, or what a delta does to a bias beside it."""

    def merged(self, weight: Tensor, /) -> Tensor:
        """See :meth:`Delta.merged`."""

    def merge_(self, weight: Tensor, /) -> None:
        """See :meth:`Delta.merge_`."""

    def reach(self, largest: float, /) -> float:
        """See :meth:`Delta.reach`."""

    def merges_finite(self, weight: Tensor, /) -> bool:
        """See :meth:`Delta.merges_finite`."""


class _OfBias:
    def __init__(self, delta: Delta) -> None:
        self.merged = delta.merged_bias

    def merge_(self, bias: Tensor, /) -> None:
        bias.copy_(self.merged(bias))

    def reach(self, largest: float, /) -> float:
        return math.inf

    def merges_finite(self, bias: Tensor, /) -> bool:
        return False


@dataclass
class Step:
    """One parameter of a host, and what goes into it, in order, with the name for messages."""

    host: nn.Module
    name: str
    parameter: nn.Parameter
    changes: list[tuple[str, _Change]] = field(default_factory=list)

    def result(self) -> Tensor:
        """What the parameter is to be; refused if that is not finite where the parameter was."""
        return self.of(dense_values(self.host, self.name))

    def of(self, values: Tensor) -> Tensor:
        """The same of other values that the parameter may have, in their dtype."""
        for path, change in self.changes:
            values = _finite(path, values, change.merged(values))
        return values

    def reads(self) -> list[Tensor]:
        """The parameter, and those of the deltas on it."""
        deltas = [change for _, change in self.changes if isinstance(change, nn.Module)]
        return [self.parameter, *(parameter for delta in deltas for parameter in delta.parameters())]

    def is_finite(self) -> bool:
        """Whether a bound shows that the result is, or a look at it in pieces."""
        if not self.is_large():
            return False
        bound = size = _size(self.parameter.detach())
        for _, change in self.changes:
            bound = change.reach(bound)
        if bound < torch.finfo(self.parameter.dtype).max / 2:  # a bound knows nothing of rounding
            return True
        return (
            len(self.changes) == 1 and math.isfinite(size) and self.changes[0][1].merges_finite(self.parameter.detach())
        )

    def is_large(self) -> bool:
        """Whether to change it in place."""
        return self.parameter.dim() > 1 and type(self.parameter) in DENSE

    def write(self) -> None:
        """Change the parameter: in one operation, or not at all."""
        values = self.parameter.detach()
        result = values if len(self.changes) == 1 else values.clone()
        for _, change in self.changes:
            change.merge_(result)
        if result is not values:
            values.copy_(result)


class _Unit:
    """What merging changes on one host: it is done as a whole, so that afterwards the deltas on it can go.

    Attributes:
        steps: by ``id`` of the parameter.
        made: what goes into a weight that is made for each call, in order.
        places: paths of its deltas.
        dense: quantised parameters, and what is to be in their place; known after the check.
    """

    def __init__(self, target: Target, host: nn.Module) -> None:
        self.target = target
        self.host = host
        self.steps: dict[int, Step] = {}
        self.made: list[Delta] = []
        self.places: list[str] = []
        self.dense: list[tuple[nn.Parameter, Tensor]] = []

    def check(self) -> None:
        """Refuse what has no values, what would not be finite, and what a parametrisation cannot make."""
        if any(tensor.is_meta for step in self.steps.values() for tensor in step.reads()):
            raise NotMergeableError(
                f"{self.target.path} or its delta is on the meta device and has no values that could be merged. Load "
                "the model with its weights, and the delta onto it, first."
            )
        self._from_made()
        for step in self.steps.values():
            if is_quantised(step.parameter):
                self.dense.append((step.parameter, step.result()))
            elif not step.is_finite():
                step.result()

    def write(self) -> None:
        """Change what is not quantised. What takes memory comes first: until then nothing has changed."""
        steps = [step for step in self.steps.values() if not is_quantised(step.parameter)]
        values = self._from_made()
        values += [(step.parameter, step.result()) for step in steps if not step.is_large()]
        for step in steps:
            if step.is_large():
                step.write()
        for parameter, value in values:
            parameter.copy_(value)

    def _from_made(self) -> list[tuple[nn.Parameter, Tensor]]:
        if not self.made:
            return []
        weight = _made_weight(self.target, self.host)
        for delta in self.made:
            weight = _finite(self.target.path, weight, delta.merged(weight))
        return _parts_of(self.target, self.host, weight)


class _Planner:
    """Finds what a merge would change, and refuses what cannot be one.

    Args:
        root: the adapted root.
        dequantize: quantised layers may become ordinary ones.
        deltas: names of those to merge; ``None``: all.
    """

    def __init__(self, root: nn.Module, dequantize: bool, deltas: Container[str] | None) -> None:
        self.places = _places(root, deltas)
        self.holders = _Holders(root)
        self.dequantize = dequantize
        self._units: dict[int, _Unit] = {}  # by id of the host
        self._holding: dict[int, _Unit] = {}  # by id of the parameter
        self._first: dict[tuple[str, int], Target] = {}
        self._served: dict[tuple[str, int], set[int]] = {}
        for place in self.places:
            base = place.host._parameters.get(place.target.parameter)
            self._served.setdefault((place.method, id(base)), set()).add(id(place.host))

    def units(self) -> list[_Unit]:
        """Everything, what becomes dense last.

        Raises:
            NotMergeableError: naming the first delta that no weight expresses.
        """
        for place in self.places:
            if place.delta.path != "shared" and not isinstance(place.delta, Tied):
                self._add(place)
        for place in self.places:  # part of what the deltas that it repeats merge
            if isinstance(place.delta, Tied):
                self._holding[id(place.host._parameters[place.target.parameter])].places.append(place.path)
        for unit in self._units.values():
            self._check_made(unit)
        return sorted(
            self._units.values(), key=lambda unit: any(is_quantised(s.parameter) for s in unit.steps.values())
        )

    def _add(self, place: _Place) -> None:
        method, target, host, delta, path = place
        base = host._parameters.get(target.parameter)
        unit = self._holding.get(id(base)) or self._units.setdefault(id(host), _Unit(target, host))
        unit.places.append(path)
        if target.parameter == "weight" and base is None and is_made(host):
            unit.target = target
            unit.made.append(delta)
        elif base is None:
            try:
                delta.merged(torch.empty(0))  # raises: there is no weight to merge into
            except NotMergeableError as error:
                raise NotMergeableError(f"{method} on {target.path}: {error}") from None
            raise NotMergeableError(f"{target.path} has no weight that the delta could be added to.")
        else:
            _check_host(target, host, delta)
            self.holders.check(target, base, self._served[method, id(base)])
            self._check_alone(method, target, base)
            if is_quantised(base):
                check_replaceable(host, target.path, base, self.dequantize)
            self._step(unit, host, target.parameter, base).changes.append((target.path, delta))
        if target.parameter == "weight" and delta.changes_bias:
            self._add_bias(unit, place)

    def _add_bias(self, unit: _Unit, place: _Place) -> None:
        target, host, delta = place.target, place.host, place.delta
        bias = host._parameters.get("bias")
        if bias is None:
            if not delta.needs_bias:
                return
            raise NotMergeableError(
                f"{target.path}: the delta has a bias, which the {type(host).__name__} has no place for. Keep it "
                "attached, or train without it."
            )
        self.holders.check(Target(target.module, "bias"), bias, {id(host)})
        self._step(unit, host, "bias", bias).changes.append((f"{target.module}.bias", _OfBias(delta)))

    def _step(self, unit: _Unit, host: nn.Module, name: str, parameter: nn.Parameter) -> Step:
        unit = self._holding.setdefault(id(parameter), unit)
        return unit.steps.setdefault(id(parameter), Step(host, name, parameter))

    def _check_alone(self, method: str, target: Target, base: nn.Parameter) -> None:
        first = self._first.setdefault((method, id(base)), target)
        if first.module != target.module:
            raise NotMergeableError(
                f"{first.path} and {target.path} are one tensor, and each has a delta of its own: one weight cannot "
                "be both sums. Keep them attached, exclude one of the two, or untie the weights first."
            )

    def _check_made(self, unit: _Unit) -> None:
        if not unit.made or not is_parametrized(unit.host, "weight"):
            return  # the check of the unit refuses the latter
        own: Any = cast(Any, unit.host).parametrizations.weight
        if any(id(parameter) in self._holding for parameter in own._parameters.values()):
            raise NotMergeableError(
                f"{unit.target.path} has a delta, and so has what it is made from ({unit.target.module}."
                "parametrizations). Keep them attached, or remove one of the two."
            )
        for name, parameter in own._parameters.items():
            self.holders.check(Target(f"{unit.target.module}.parametrizations.weight", name), parameter, {id(own)})


def steps_of(root: nn.Module, delta: str) -> dict[int, Step]:
    """What one delta would do to parameters of the base, by ``id`` of the parameter; nothing is changed.

    Raises:
        NotMergeableError: naming the first place where no change of a weight expresses it.
    """
    steps: dict[int, Step] = {}
    for unit in _Planner(root, True, (delta,)).units():
        if unit.made:
            raise NotMergeableError(
                f"{unit.target.path} is made from other parameters for each call, of which no sum is meant."
            )
        steps |= unit.steps
    return steps


def _places(root: nn.Module, deltas: Container[str] | None) -> list[_Place]:
    found = [
        _Place(method.key, target, host, delta, path)
        for method, target, host, delta, path in deltas_in(root)
        if deltas is None or method.delta in deltas
    ]
    return sorted(found, key=lambda place: _ORDER.index(place.delta.path))


def _made_weight(target: Target, host: nn.Module) -> Tensor:
    """The weight that a parametrisation makes, without what making it changes in a run (spectral norm)."""
    if not is_parametrized(host, "weight"):
        raise NotMergeableError(
            f"{target.path} is made by a hook before each call, and there is nothing to add the delta to. Keep it "
            "attached, or make the weight by torch.nn.utils.parametrizations instead."
        )
    weight: Tensor = deepcopy(cast(Any, host).parametrizations.weight).eval()()
    return weight.detach()


def _parts_of(target: Target, host: nn.Module, weight: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """What a weight is made from, such that it comes out as it should be: the parametrisation itself says that."""
    own: Any = cast(Any, host).parametrizations.weight
    twin = deepcopy(own).eval()
    try:
        twin.right_inverse(weight)
        error = torch.linalg.vector_norm(twin() - weight)
    except Exception as reason:  # whatever a parametrisation says of a weight that it cannot make
        error, why = torch.tensor(torch.inf), f" ({reason})"
    else:
        why = ""
    if not error <= 10 * torch.finfo(weight.dtype).eps * torch.linalg.vector_norm(weight):
        kinds = ", ".join(type(part).__name__.lstrip("_") for part in own)
        raise NotMergeableError(
            f"{target.path} is made by {kinds}, which cannot make it with the delta in it{why}. Keep it attached."
        )
    values = dict(twin.named_parameters())
    return [(parameter, values[name].detach()) for name, parameter in own._parameters.items()]


def _check_host(target: Target, host: nn.Module, delta: Delta) -> None:
    """Refuse where the host does more with its weight than the delta assumes."""
    if delta.path != "weight" and getattr(host, "max_norm", None) is not None:
        raise NotMergeableError(
            f"{target.path} is scaled down to max_norm={host.max_norm} where it is looked up, and would be with the "
            "delta in it, which is added after that. Keep it attached."
        )


def _size(values: Tensor) -> float:
    """The size of the largest number; none if one of them is none."""
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    return float(torch.maximum(-low, high))


def _finite(path: str, before: Tensor, after: Tensor) -> Tensor:
    if type(after) in DENSE and math.isfinite(_size(after)):  # needs less memory than the look at each of them
        return after
    lost = before.isfinite() & ~after.isfinite()
    if bool(lost.any()):
        raise NotMergeableError(
            f"{path}: {int(lost.sum())} of {lost.numel()} values would be NaN or infinite with the delta in it "
            f"({after.dtype}). Look at the delta: a run that diverged leaves such values. If they are finite, but too "
            "large for this dtype, load the base in a wider one."
        )
    return after


@contextmanager
def signals_wait() -> Iterator[None]:
    """Handlers of signals, which may raise between any two operations, run after the block."""
    if threading.current_thread() is not threading.main_thread():  # no handler runs in this one
        yield
        return
    found = {number: signal.getsignal(number) for number in signal.valid_signals()}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    came: dict[int, None] = {}
    try:
        for number in handlers:
            signal.signal(number, lambda kind, _: came.setdefault(kind))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for kind in came:
            signal.raise_signal(kind)


class _Holders:
    """Which modules hold a parameter, also as a part of the same memory under another name."""

    def __init__(self, root: nn.Module) -> None:
        self.names: dict[int, list[str]] = {}
        self.modules: dict[int, set[int]] = {}
        parameters: dict[int, nn.Parameter] = {}
        for path, module in named_modules(root).items():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    parameters[id(parameter)] = parameter
                    self.names.setdefault(id(parameter), []).append(join(canonical(path), name))
                    self.modules.setdefault(id(parameter), set()).add(id(module))
        self.overlaps = _overlaps(parameters.values())

    def check(self, target: Target, base: nn.Parameter, served: set[int]) -> None:
        """Refuse if others than those that are served read this tensor."""
        others = self.overlaps.get(id(base), ())
        if not others and self.modules[id(base)] <= served:
            return
        names = sorted(name for key in (id(base), *others) for name in self.names[key])
        raise NotMergeableError(
            f"{target.path} is tied ({', '.join(names)}): merging would change every one of them. Keep the delta "
            "attached, or untie the weights first."
        )


def _overlaps(parameters: Iterable[nn.Parameter]) -> dict[int, list[int]]:
    """Parameters that are other tensors in the same memory, by ``id``."""
    spans: list[tuple[int, int, int]] = []
    for parameter in parameters:
        if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel():
            last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            start = parameter.data_ptr()
            spans.append((start, start + (last + 1) * parameter.element_size(), id(parameter)))
    found: dict[int, list[int]] = {}
    end, holder = 0, 0
    for start, stop, key in sorted(spans):
        if start < end:
            found.setdefault(holder, []).append(key)
            found.setdefault(key, []).append(holder)
        if stop > end:
            end, holder = stop, key
    return found
