"""What every weight becomes when deltas are added into it, computed and checked before anything changes."""

from collections.abc import Container, Iterable
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_pet.errors import NotMergeableError
from lightning_pet.layers.delta import Delta, Tied
from lightning_pet.model.adaptation import deltas_in
from lightning_pet.model.layer_kinds import is_made
from lightning_pet.model.naming import canonical, join, named_modules
from lightning_pet.model.quantised import check_replaceable, dense_values, is_quantised
from lightning_pet.model.structure import Target

_ORDER = ("shared", "weight", "activation", "around", "generate")  # in which deltas act on one host, innermost first


class _Place(NamedTuple):
    """One delta in its host."""

    method: str
    target: Target
    host: nn.Module
    delta: Delta


def merged_weights(
    root: nn.Module, dequantize: bool = False, deltas: Container[str] | None = None
) -> list[tuple[nn.Parameter, Tensor]]:
    """The base parameters of an adapted root that deltas would change, and their values with the deltas added.

    Args:
        root: the adapted root.
        dequantize: quantised layers may become ordinary ones.
        deltas: names of those to add; ``None``: all.

    Raises:
        NotMergeableError: naming the first delta that no weight expresses.
    """
    holders = _Holders(root)
    places = _places(root, deltas)
    served: dict[tuple[str, int], set[int]] = {}
    for place in places:
        base = place.host._parameters.get(place.target.parameter)
        served.setdefault((place.method, id(base)), set()).add(id(place.host))
    own: dict[tuple[str, int], Target] = {}
    merged: dict[int, tuple[nn.Parameter, Tensor]] = {}
    made: dict[int, _Made] = {}
    for method, target, host, delta in places:
        if delta.path == "shared" or isinstance(delta, Tied):
            continue  # part of what the deltas that use it, or that it repeats, merge
        base = host._parameters.get(target.parameter)
        if base is None and target.parameter == "weight" and is_made(host):
            weight = made[id(host)].weight if id(host) in made else _made_weight(target, host)
            made[id(host)] = _Made(target, host, _finite(target.path, weight, delta.merged(weight)))
            if delta.changes_bias:
                _merge_bias(target, host, delta, holders, merged)
            continue
        if base is None:
            delta.merged(torch.empty(0))  # raises: there is no weight to merge into
            raise NotMergeableError(f"{target.path} has no weight that the delta could be added to.")
        _check_host(target, host, delta)
        holders.check(target, base, served[method, id(base)])
        first = own.setdefault((method, id(base)), target)
        if first.module != target.module:
            raise NotMergeableError(
                f"{first.path} and {target.path} are one tensor, and each has a delta of its own: one weight cannot "
                "be both sums. Keep them attached, exclude one of the two, or untie the weights first."
            )
        if is_quantised(base):
            check_replaceable(host, target.path, base, dequantize)
        weight = merged[id(base)][1] if id(base) in merged else dense_values(host, target.parameter)
        merged[id(base)] = (base, _finite(target.path, weight, delta.merged(weight)))
        if target.parameter == "weight" and delta.changes_bias:
            _merge_bias(target, host, delta, holders, merged)
    return [*merged.values(), *(pair for one in made.values() for pair in _made_from(one, holders, merged))]


class _Made(NamedTuple):
    """What a weight that is made for each call is to become."""

    target: Target
    host: nn.Module
    weight: Tensor


def _made_weight(target: Target, host: nn.Module) -> Tensor:
    """The weight that a parametrisation makes, without what making it changes in a run (spectral norm)."""
    if not is_parametrized(host, "weight"):
        raise NotMergeableError(
            f"{target.path} is made by a hook before each call, and there is nothing to add the delta to. Keep it "
            "attached, or make the weight by torch.nn.utils.parametrizations instead."
        )
    with torch.no_grad():
        weight: Tensor = deepcopy(cast(Any, host).parametrizations.weight).eval()()
    return weight.detach()


def _made_from(made: _Made, holders: "_Holders", merged: Container[int]) -> list[tuple[nn.Parameter, Tensor]]:
    """What a weight is made from, such that it comes out as it should be: the parametrisation itself says that."""
    own: Any = cast(Any, made.host).parametrizations.weight
    if any(id(parameter) in merged for parameter in own._parameters.values()):
        raise NotMergeableError(
            f"{made.target.path} has a delta, and so has what it is made from ({made.target.module}.parametrizations)."
            " Keep them attached, or remove one of the two."
        )
    twin = deepcopy(own).eval()
    try:
        twin.right_inverse(made.weight)
        error = torch.linalg.vector_norm(twin() - made.weight)
    except Exception as reason:  # whatever a parametrisation says of a weight that it cannot make
        error, why = torch.tensor(torch.inf), f" ({reason})"
    else:
        why = ""
    if not error <= 10 * torch.finfo(made.weight.dtype).eps * torch.linalg.vector_norm(made.weight):
        kinds = ", ".join(type(part).__name__.lstrip("_") for part in own)
        raise NotMergeableError(
            f"{made.target.path} is made by {kinds}, which cannot make it with the delta in it{why}. Keep it attached."
        )
    for name, parameter in own._parameters.items():
        holders.check(Target(f"{made.target.module}.parametrizations.weight", name), parameter, {id(own)})
    values = dict(twin.named_parameters())
    return [(parameter, values[name].detach()) for name, parameter in own._parameters.items()]


def _places(root: nn.Module, deltas: Container[str] | None) -> list[_Place]:
    found = [
        _Place(applied.key, target, host, delta)
        for applied, target, host, delta, _ in deltas_in(root)
        if deltas is None or applied.delta in deltas
    ]
    return sorted(found, key=lambda place: _ORDER.index(place.delta.path))


def _merge_bias(
    target: Target, host: nn.Module, delta: Delta, holders: "_Holders", merged: dict[int, tuple[nn.Parameter, Tensor]]
) -> None:
    bias = host._parameters.get("bias")
    if bias is None:
        if not delta.needs_bias:
            return
        raise NotMergeableError(
            f"{target.path}: the delta has a bias, which the {type(host).__name__} has no place for. Keep it attached, "
            "or train without it."
        )
    holders.check(Target(target.module, "bias"), bias, {id(host)})
    old = merged[id(bias)][1] if id(bias) in merged else bias.detach()
    merged[id(bias)] = (bias, _finite(f"{target.module}.bias", old, delta.merged_bias(old)))


def _check_host(target: Target, host: nn.Module, delta: Delta) -> None:
    """Refuse where the host does more with its weight than the delta assumes."""
    if delta.path != "weight" and getattr(host, "max_norm", None) is not None:
        raise NotMergeableError(
            f"{target.path} is scaled down to max_norm={host.max_norm} where it is looked up, and would be with the "
            "delta in it, which is added after that. Keep it attached."
        )


def _finite(path: str, before: Tensor, after: Tensor) -> Tensor:
    lost = before.isfinite() & ~after.isfinite()
    if bool(lost.any()):
        raise NotMergeableError(
            f"{path}: {int(lost.sum())} of {lost.numel()} values would be NaN or infinite with the delta in it "
            f"({after.dtype}). Look at the delta: a run that diverged leaves such values. If they are finite, but too "
            "large for this dtype, load the base in a wider one."
        )
    return after


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
