"""LoKr and LoHa of HF PEFT: the same factors under other names, one layer each.

PEFT has them on ``nn.Linear`` and on convolutions of one and two dimensions, as a change of the whole weight.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

from lightning_pet.exchange.folder import CONFIG, PREFIX, Base, Folder
from lightning_pet.exchange.peft_hosts import Export, Host, Read, Values, placed, split_hosts, whole_of
from lightning_pet.exchange.peft_layers import most, value_of
from lightning_pet.exchange.peft_low_rank import kind_at, taken, targets_of
from lightning_pet.model.naming import named_modules
from lightning_pet.model.structure import Target
from lightning_pet.store.strict_json import fault, shown
from lightning_pet.targets.patterns import exactly, value_at

LOKR: Final = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
LOHA: Final = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_CORES: Final = ("t1", "t2")
_DROPS: Final = ("rank_dropout", "module_dropout")


def lokr(folder: Folder, base: Base | None) -> Read:
    """LoKr, in every form that its sizes lead to."""
    config = folder.config
    factor = config.get("decompose_factor", -1)
    if isinstance(factor, bool) or not isinstance(factor, int) or (factor < 1 and factor != -1):
        raise fault(
            str(folder.path / CONFIG), f"found decompose_factor={shown(factor)}, expected -1 or a positive integer."
        )
    options = {
        "decompose_both": bool(config.get("decompose_both")),
        "decompose_factor": factor,
        "use_effective_conv2d": bool(config.get("use_effective_conv2d")),
        "init": "lycoris" if config.get("init_weights") == "lycoris" else "default",
        "rank_dropout_scale": bool(config.get("rank_dropout_scale")),
    }
    return _read(folder, base, "lokr", options)


def loha(folder: Folder, base: Base | None) -> Read:
    """LoHa, with and without cores."""
    options = {"use_effective_conv2d": bool(folder.config.get("use_effective_conv2d"))}
    return _read(folder, base, "loha", options)


def _read(folder: Folder, base: Base | None, method: str, options: dict[str, Any]) -> Read:
    root = base.root if base else None
    modules = {} if root is None else named_modules(root)
    hosts, rest = split_hosts(folder)
    for host in hosts:
        check_parts(folder, method, host)
    targets: list[Target] = []
    tensors: Values = {}
    ranks, alphas = {}, {}
    for host, target, parts in placed(folder, hosts, root, ()):
        _check_padding(folder, host.path, modules.get(host.path))
        ranks[exactly(target)] = _rank(folder, host, parts)
        alphas[exactly(target)] = alpha = value_of(folder, "alpha_pattern", host.path, "alpha", 8)
        if alpha <= 0:
            raise fault(
                str(folder.path), f"{host.path} has alpha={alpha}, which turns its change around or off.", "mismatch"
            )
        targets.append(target)
        tensors |= {(target, name): _core(folder, host, name, own, modules) for name, own in parts.items()}
    r, alpha = most(ranks), most(alphas)
    options |= {
        "r": r,
        "alpha": alpha,
        **{name: float(folder.config.get(name) or 0.0) for name in _DROPS},
        "rank_pattern": {place: rank for place, rank in ranks.items() if rank != r} or None,
        "alpha_pattern": {place: value for place, value in alphas.items() if value != alpha} or None,
        "target_modules": sorted({target.module for target in targets}),
    }
    return whole_of(folder, method, options, targets, tensors, rest, frozenset())


def check_parts(folder: Folder, method: str, host: Host) -> None:
    """Refuse factors that make no change together.

    Raises:
        DeltaFileError: (``mismatch``) naming the layer.
    """
    found = frozenset(host.parts)
    if method == "lokr":
        first, second = found & {"w1", "w1_a", "w1_b"}, found - {"w1", "w1_a", "w1_b"}
        whole = first in ({"w1"}, {"w1_a", "w1_b"}) and second in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
    else:
        whole = found - set(_CORES) == set(LOHA) - set(_CORES) and found & set(_CORES) in (set(), set(_CORES))
    if not whole:
        raise fault(
            str(folder.path),
            f"{host.path} has the factors {', '.join(sorted(found))}, which make no change together. Copy the whole "
            "folder again.",
            "mismatch",
        )


def _rank(folder: Folder, host: Host, parts: Mapping[str, Tensor]) -> int:
    """Of a pair of factors the size that they share; of whole ones what the configuration says."""
    if "t2" in parts:
        return parts["t2"].shape[0]
    for name in ("w2_b", "w1_b"):
        if name in parts:
            return parts[name].shape[0]
    rank = value_of(folder, "rank_pattern", host.path, "r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise fault(str(folder.path / CONFIG), f"found the rank {shown(rank)}, expected a positive whole number.")
    return rank


def _core(folder: Folder, host: Host, name: str, own: Tensor, modules: Mapping[str, nn.Module]) -> Tensor:
    """A tensor in our form: PEFT's cores have two dimensions of a kernel on convolutions of one, too."""
    if name not in _CORES:
        return own
    if host.path not in modules:
        raise fault(
            str(folder.path),
            f"{host.path} has a core, whose kernel only the base can tell. Read the folder together with its base.",
            "mismatch",
        )
    one = isinstance(modules[host.path], nn.Conv1d)
    return own.squeeze(-1) if one and own.dim() == 4 and own.shape[-1] == 1 else own


def _check_padding(folder: Folder, path: str, module: nn.Module | None) -> None:
    """PEFT pads with zeros what goes through a change, whatever the layer does."""
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros":
        raise fault(
            str(folder.path),
            f"{path} is a convolution with padding_mode={mode!r}; PEFT pads with zeros before its change, which no "
            "change of the weight does. Merge it with PEFT.",
            "mismatch",
        )


# --- writing -----------------------------------------------------------------------------------------------------


def write_lokr(export: Export, left: dict[str, Tensor]) -> None:
    """LoKr as it is."""
    own = ("decompose_both", "decompose_factor", "use_effective_conv2d", "rank_dropout_scale")
    defaults = {"decompose_both": False, "decompose_factor": -1, "use_effective_conv2d": False}
    config = {name: export.record.config.get(name, defaults.get(name, False)) for name in own}
    lycoris = export.record.config.get("init") == "lycoris"
    _write(export, left, "LOKR", "lokr_", {**config, "init_weights": "lycoris" if lycoris else True})


def write_loha(export: Export, left: dict[str, Tensor]) -> None:
    """LoHa as it is."""
    config = {"use_effective_conv2d": bool(export.record.config.get("use_effective_conv2d")), "init_weights": True}
    _write(export, left, "LOHA", "hada_", config)


def _write(export: Export, left: dict[str, Tensor], kind: str, prefix: str, config: Mapping[str, Any]) -> None:
    own = export.record.config
    layers = []
    for target, parts in taken(export, left):
        path = target.module
        _check_layer(export, target, kind, export.needed(path, "is a layer of some kind"))
        for name, tensor in parts.items():
            if name in _CORES and tensor.dim() == 3:
                tensor = tensor.unsqueeze(-1)
            export.tensors[f"{PREFIX}{path}.{prefix}{name}"] = tensor.contiguous()
        layers.append(target)
    if not layers:
        raise export.fault(f"found no delta of {export.record.method} in it.")
    r, alpha = own.get("r", 8), own.get("alpha", 8)
    ranks = {_exact(target): value_at(own.get("rank_pattern"), target, r) for target in layers}
    alphas = {_exact(target): value_at(own.get("alpha_pattern"), target, alpha) for target in layers}
    export.config |= {
        "peft_type": kind,
        "r": r,
        "alpha": alpha,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        **{name: float(own.get(name) or 0.0) for name in _DROPS},
        **config,
        **targets_of(export, sorted({target.module for target in layers})),
    }


def _exact(target: Target) -> str:
    """A pattern that fits this path alone."""
    return f"^{re.escape(target.module)}"


def _check_layer(export: Export, target: Target, kind: str, host: nn.Module) -> None:
    """Refuse what PEFT has no such delta on.

    Raises:
        DeltaFileError: (``mismatch``) with the way out.
    """
    why = ""
    if target.rows is not None:
        why = "is a part of a fused projection"
    elif target.parameter != "weight" or kind_at(export, target) not in ("linear", "conv"):
        why = f"is {target.parameter!r} of a {type(host).__name__}"
    elif isinstance(host, nn.Conv3d):
        why = "is a convolution of three dimensions"
    elif getattr(host, "padding_mode", "zeros") != "zeros":
        why = f"is a convolution with padding_mode={getattr(host, 'padding_mode', '')!r}"
    elif not isinstance(host, nn.Linear | nn.Conv1d | nn.Conv2d):
        why = f"is a {type(host).__name__}"
    if why:
        raise export.fault(
            f"{target.path} {why}, on which PEFT has no {kind}. Export it as a LoRA (to='lora'), or merge it "
            "(to='transformers')."
        )
