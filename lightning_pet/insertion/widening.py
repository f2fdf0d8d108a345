"""What trains in place of a half-precision base is kept in float32, and read in the precision of the base.

An update is far smaller than the value that it changes: in bfloat16 most round to nothing. The parameter keeps its
name, its identity and its place in optimizers; while its module's forward runs it is read in the base's precision, so
that the model computes in that as before. Where nobody can tell who reads it, it stays as it is.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.insertion.host import (
    WeightHost,
    deltas_of,
    give_class_back,
    give_fast_paths_back,
    is_swapped_by_others,
    let_read,
    let_read_no_more,
    swap,
)
from lightning_pet.insertion.slot import KEPT, READ_AS, SEQUENCES, Deltas
from lightning_pet.layers.sharding import is_partition, is_sharded, whole_shape
from lightning_pet.model.adaptation import record_of
from lightning_pet.model.layer_kinds import base_class, has_plain_forward
from lightning_pet.model.naming import (
    CHILD,
    delta_prefix,
    module_at,
    modules_on_the_way,
    named_modules,
    named_parameters,
    walk,
)
from lightning_pet.model.quantised import is_quantised
from lightning_pet.model.undisturbed import forbid


class _NarrowHost(WeightHost):
    """A host some of whose parameters are kept in a wider precision than its forward computes in."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A model may cast what it passes on to the precision of the weight that it sees from outside: the wider one.
        x, dtype = args[0] if args else None, self.__dict__[READ_AS].get("weight")
        if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() and _multiplies(type(self)):
            autocast = torch.is_autocast_enabled(x.device.type)
            args = args if autocast or x.dtype.itemsize <= dtype.itemsize else (x.to(dtype), *args[1:])
        return super().forward(*args, **kwargs)

    def _pet_effective(self, name: str, weight: Any) -> Any:
        weight, dtype = super()._pet_effective(name, weight), self.__dict__[READ_AS].get(name)
        return weight if dtype is None else weight.to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        own: dict[str, torch.dtype] = self.__dict__[READ_AS]  # to cast the module is to cast what it reads
        own.update({name: fn(torch.empty(0, dtype=dtype)).dtype for name, dtype in own.items()})
        return out


def _multiplies(cls: Any) -> bool:
    """Whether forward is a product that takes its input in the precision of the weight only."""
    return has_plain_forward(cls.__pet_base__) or issubclass(cls, nn.modules.conv._ConvNd)


def is_narrow(tensor: Tensor) -> bool:
    """Whether these are half-precision numbers."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _reads_as(module: nn.Module) -> Mapping[str, torch.dtype]:
    """The precision in which a module's forward reads those of its parameters that are kept in a wider one."""
    own: Mapping[str, torch.dtype] = module.__dict__.get(READ_AS, {})
    return own


def read_precisions(root: nn.Module) -> dict[int, torch.dtype]:
    """The same of a whole model, by ``id`` of the parameter."""
    modules = {module: None for _, module in walk(root, of_base=True) if READ_AS in module.__dict__}
    return {id(m._parameters[name]): dtype for m in modules for name, dtype in _reads_as(m).items()}


def trained_in_place(root: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the base that the plan trains as they are."""
    record = record_of(root)
    names = dict.fromkeys(name for applied in (record.applied if record else ()) for name in applied.trained)
    found = ((name, _split(root, name)) for name in names)
    return {name: p for name, (host, own) in found if host and (p := host._parameters.get(own)) is not None}


def widen(
    root: nn.Module,
    values: Mapping[str, Tensor] | None = None,
    names: Iterable[str] | None = None,
    model: nn.Module | None = None,
) -> None:
    """Keep what trains in place in float32 from now on, wherever it is known who reads it.

    Args:
        root: the adapted root.
        values: what to hold, where that is known more exactly than the parameters are now.
        names: widen these only.
        model: what the root is in.
    """
    record, values = record_of(root), values or {}
    half = {name: p for name, p in trained_in_place(root).items() if is_narrow(p)}
    if record is None or not half:
        return
    wanted = set(half if names is None else names)
    kept = _seen_from_outside(root) | _shared(root) | _averaged(root, record.scopes, root if model is None else model)
    readings = {name: reader for applied in record.applied for name, reader in applied.readings.items()}
    for name, parameter in half.items():
        if name not in wanted or name not in readings or id(parameter) in kept:
            continue
        if not _can_read(root, name, reader := readings[name]):
            continue
        path, _, own = name.rpartition(".")
        *around, host = modules_on_the_way(root, path)
        dtype = parameter.dtype
        _fill(host, own, values[name] if name in values else parameter.data.float())
        host.__dict__.setdefault(READ_AS, {})[own] = dtype
        swap(host, _NarrowHost, own)
        if (exposed := host.__dict__.get(KEPT)) is not None:
            exposed.extra.discard(own)
        if reader is not None:
            let_read(module_at(root, reader), host)
        for module in (*around, host):
            forbid(module)


def narrow(root: nn.Module, keep: Iterable[str] = ()) -> None:
    """Undo :func:`widen`, but for these names."""
    kept, done = set(keep), []
    for path, host in named_modules(root).items():
        for own, dtype in list(_reads_as(host).items()):
            if (f"{path}.{own}" if path else own) in kept:
                continue
            parameter = host._parameters.get(own)
            if parameter is not None and parameter.dtype != dtype:
                _fill(host, own, parameter.data.to(dtype))
            del host.__dict__[READ_AS][own]
            done.append(host)
    bare = {host for host in done if not _reads_as(host) and not deltas_of(host)}
    if not done:
        return
    let_read_no_more(root, bare)
    for host in bare:
        give_class_back(host)
    give_fast_paths_back(root)


def _fill(host: nn.Module, name: str, data: Tensor) -> None:
    """Let a parameter hold other data, of another precision maybe."""
    parameter = host._parameters[name]
    assert parameter is not None
    if is_sharded(parameter):
        # A part of a tensor cannot change its precision; engines look for the new one when the module moves.
        host._parameters[name] = nn.Parameter(data.to(parameter.device), requires_grad=parameter.requires_grad)
        return
    gradient, parameter.grad = parameter.grad, None
    parameter.data = data.to(parameter.device)
    if gradient is not None:
        parameter.grad = gradient.to(data.dtype)


def _split(root: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    path, _, own = name.rpartition(".")
    *above, module = modules_on_the_way(root, path)
    return (module if len(above) == (path.count(".") + 1 if path else 0) else None), own


def _can_read(root: nn.Module, name: str, reader: str | None) -> bool:
    """Whether the one who reads a parameter can be let read it in another precision."""
    host, own = _split(root, name)
    assert host is not None
    by = host if reader is None else module_at(root, reader)
    if any(is_swapped_by_others(module) or "forward" in vars(module) for module in (host, by)):
        return False
    if type(by).forward is nn.Module.forward or isinstance(host, (*SEQUENCES, torch.jit.ScriptModule)):
        return False
    if CHILD in host._modules and not isinstance(host._modules[CHILD], Deltas):
        return False
    parameter = host._parameters[own]
    assert parameter is not None
    if is_quantised(parameter) or is_partition(parameter):
        return False
    # A table that scales its rows down as it looks them up changes them itself; and gradients may be sparse.
    if getattr(host, "max_norm", None) is not None or getattr(host, "sparse", False):
        return False
    # A hook makes tensors of the parameters (weight_norm) before the forward runs.
    return not any(isinstance(value, Tensor) for value in vars(host).values())


def _seen_from_outside(root: nn.Module) -> set[int]:
    """First parameters of models: their precision is taken for the model's."""
    models = [root, *(m for m in root.modules() if isinstance(getattr(type(m), "dtype", None), property))]
    firsts = (next((p for p in model.parameters() if p.is_floating_point()), None) for model in models)
    return {id(parameter) for parameter in firsts if parameter is not None}


def _averaged(root: nn.Module, scopes: Iterable[str], model: nn.Module) -> set[int]:
    """Parameters of a base beside which there is another of its form: code that averages the two reads both."""
    found: set[int] = set()
    for base in (module_at(root, scope) for scope in scopes):
        inside, form = set(base.modules()), _form(base)
        others = (m for m in model.modules() if m not in inside and base_class(m) is base_class(base))
        if any(_form(other) == form for other in others):
            found.update(id(parameter) for parameter in base.parameters())
    return found


def _form(module: nn.Module) -> dict[str, torch.Size]:
    named = ((name, p) for name, p in named_parameters(module))
    return {name: whole_shape(p) for name, p in named if not delta_prefix(name)}


def _shared(root: nn.Module) -> set[int]:
    """Parameters that several modules have."""
    holders: dict[int, set[tuple[int, str]]] = {}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add((id(module), name))
    return {number for number, held in holders.items() if len(held) > 1}
