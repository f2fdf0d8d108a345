"""Values of HF PEFT that take the place of the base's own: LN tuning."""

from collections.abc import Mapping
from typing import Final

from torch import Tensor, nn

from lightning_pet.exchange.folder import PREFIX, Base, Folder, unused
from lightning_pet.exchange.peft_hosts import Export, Read, heads_of, no_such, record_of, shared_with
from lightning_pet.exchange.peft_low_rank import targets_of
from lightning_pet.model.naming import join, named_modules
from lightning_pet.model.structure import Target
from lightning_pet.store.strict_json import fault

_NORMS: Final = ".ln_tuning_layers."


def ln_tuning(folder: Folder, base: Base | None) -> Read:
    """LN tuning: the values of whole modules, which are norms in all but name only."""
    targets: list[Target] = []
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in folder.tensors.items():
        if not key.startswith(PREFIX):
            raise unused(folder, [key], f"found tensors whose names do not begin with {PREFIX!r}, as PEFT's do")
        path, mark, name = key.removeprefix(PREFIX).partition(_NORMS)
        if mark:
            targets.append(Target(path, name))
            tensors[join(path, name)] = tensor
        else:
            rest[path] = tensor
    if not targets:
        raise fault(str(folder.path), "found no values of any norm in it. Ask for the whole folder.", "mismatch")
    if base is not None:
        _check_modules(folder, targets, base.root)
    heads, values = heads_of(folder, rest)
    options = {"target_modules": sorted({target.module for target in targets})}
    return Read((record_of("ln_tuning", options, targets, heads),), tensors | values)


def _check_modules(folder: Folder, targets: list[Target], root: nn.Module) -> None:
    modules = named_modules(root)
    for target in targets:
        if target.module not in modules:
            raise no_such(folder, target.module, modules)
        if target.parameter not in modules[target.module]._parameters:
            raise fault(
                str(folder.path), f"{target.module} of this base has no parameter {target.parameter!r}.", "mismatch"
            )
        if other := shared_with(root, target.module):
            raise fault(
                str(folder.path),
                f"it has trained {target.module}, of which {other} shares a weight in this {type(root).__name__}; PEFT "
                f"has trained a copy and left {other} as it was. Untie them in the base first.",
                "mismatch",
            )


def write_ln_tuning(export: Export, left: dict[str, Tensor]) -> None:
    """LN tuning: PEFT holds whole modules, so that what did not train of one is the base's."""
    places = [target for target in export.record.targets if target.role != "head" and target.path in left]
    paths = list(dict.fromkeys(target.module for target in places))
    for target in places:
        export.tensors[f"{PREFIX}{target.module}{_NORMS}{target.parameter}"] = left.pop(target.path).contiguous()
    for path in paths:
        if export.root is not None and (other := shared_with(export.root, path)):
            raise export.fault(f"{other} shares a weight with {path}, of which PEFT would train a copy. Merge it.")
        for name, value in _own(export.module(path)).items():
            export.tensors.setdefault(f"{PREFIX}{path}{_NORMS}{name}", value.detach().cpu().clone())
    export.config |= {"peft_type": "LN_TUNING", **targets_of(export, sorted(paths))}


def _own(module: nn.Module | None) -> Mapping[str, Tensor]:
    parameters = {} if module is None else module._parameters
    return {name: parameter for name, parameter in parameters.items() if parameter is not None}
