"""A delta of ours in the terms of the adapters library: exactly, or not at all.

Its wrappers have names of their own: one lies in a module that holds the end of a sub-layer and its norm, or in the
layer, by the kind of the sub-layer. Which layers have one follows from its configuration, so all of it has to be there.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.exchange.adapters.reader import pool_of
from lightning_pet.exchange.peft_hosts import Export
from lightning_pet.exchange.peft_low_rank import taken
from lightning_pet.insertion.low_rank_places import scale_of
from lightning_pet.model.named_roles import is_norm, roles_by_name
from lightning_pet.model.naming import CHILD, by_delta, join, module_at
from lightning_pet.model.structure import Target
from lightning_pet.store.reader import Stored
from lightning_pet.store.strict_json import fault

NAME: Final = "default"
_WRITTEN_FOR: Final = "adapters.1.3.0"
_LAYER: Final = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_MATRICES: Final[Mapping[str | None, str]] = {"attention.q": "q", "attention.k": "k", "attention.v": "v"}
_WAY_OUT: Final = "Merge it (to='transformers'), or keep it as a delta file."


def to_adapters(stored: Stored, root: nn.Module | None) -> Export:
    """The same delta as a folder of the adapters library would hold it.

    Args:
        stored: a delta of one method.
        root: the base that it is for.

    Raises:
        DeltaFileError: (``mismatch``) if that library has no counterpart, or there is no base.
    """
    methods = ", ".join(record.method for record in stored.methods)
    if len(stored.methods) != 1 or stored.methods[0].method not in _WRITERS:
        raise fault(
            str(stored.path),
            f"found {methods}; the adapters library has one method in a folder, of {', '.join(_WRITERS)}. {_WAY_OUT}",
            "mismatch",
        )
    export = Export(stored, root)
    if root is None or getattr(root, "config", None) is None:
        raise export.fault("names of the adapters library follow from the base, a transformers model: give it, base=….")
    if getattr(root, "main_input_name", "") == "pixel_values":
        raise export.fault(f"models of images have other names in the transformers that adapters 1.3 needs. {_WAY_OUT}")
    left = dict(stored.tensors)
    heads = {name: left.pop(name) for name in [*left] if CHILD not in name.split(".")}
    if inner := [name for name in heads if name.startswith(_inside(export))]:
        raise export.fault(f"the trained {inner[0]} is a part of the model, not of its head. {_WAY_OUT}")
    config = _WRITERS[export.record.method](export, left)
    if left:
        raise export.fault(f"nothing there holds {', '.join(sorted(left)[:4])}. {_WAY_OUT}")
    export.config = {"config": config, "name": NAME, **_said_of(root)}
    export.heads = heads
    return export


def head_config(root: nn.Module) -> dict[str, Any]:
    """What that library notes of the head of a model of transformers."""
    labels = getattr(root.config, "label2id", None)
    count = getattr(root.config, "num_labels", None)
    return {"config": None, "name": None, "label2id": labels, "num_labels": count, **_said_of(root)}


def _said_of(root: nn.Module) -> dict[str, Any]:
    config: Any = root.config
    return {
        "hidden_size": int(config.hidden_size),
        "model_class": type(root).__name__,
        "model_name": "",
        "model_type": config.model_type,
        "version": _WRITTEN_FOR,
    }


# --- bottlenecks ---------------------------------------------------------------------------------------------


def _bottleneck(export: Export, left: dict[str, Tensor]) -> dict[str, Any]:
    """Adapters, and Compacter, whose layers share a rule."""
    own, phm = export.record.config, export.record.method == "compacter"
    _refuse(export, ("inner_norm", "layer_norms", "cross_attention", "robust_drop", "use_gating"), False)
    _refuse(export, ("bias",), True)
    if phm:
        _refuse(export, ("factorized",), True)
        rule = left.pop("pet.compacter_default_rule.matrices", None)
        if rule is None:
            raise export.fault(f"its layers share no rule. {_WAY_OUT}")
        export.tensors[f"{_inside(export)}shared_parameters.{NAME}.phm_rule"] = rule
    there: dict[str, list[Target]] = {"attention": [], "ffn": []}
    sizes = set()
    for target, parts in taken(export, left):
        kind = (target.role or "").partition(".")[0]
        if kind not in there:
            raise export.fault(f"{target.module} is neither attention nor feed-forward. {_WAY_OUT}")
        there[kind].append(target)
        sizes.add(parts["down.bias" if phm else "down_bias"].numel())
        names = _PHM if phm else _BOTTLENECK
        export.tensors |= {
            f"{_place(export, target, kind)}.adapters.{NAME}.{names[part]}": tensor for part, tensor in parts.items()
        }
    left_out = {tuple(_left_out(export, targets)) for targets in there.values() if targets}
    if len(sizes) != 1 or len(left_out) != 1:
        raise export.fault(f"adapters of several sizes, or in other layers for one sub-layer than another. {_WAY_OUT}")
    placement = own.get("placement", "houlsby")
    usual = "gelu" if phm or placement == "houlsby" else "relu"
    return {
        **_FIXED,
        "mh_adapter": bool(there["attention"]),
        "output_adapter": bool(there["ffn"]),
        "original_ln_before": placement == "pfeiffer",
        "is_parallel": placement == "parallel",
        "non_linearity": own.get("non_linearity") or usual,
        "reduction_factor": _factor(int(module_width(export)), sizes.pop()),
        "scaling": float(own.get("scale", 1.0)),
        "leave_out": list(left_out.pop()),
        "phm_layer": phm,
        **({"phm_dim": int(own["phm_dim"]), "phm_rank": int(own["rank"])} if phm else {}),
    }


_BOTTLENECK: Final[Mapping[str, str]] = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}
_PHM: Final[Mapping[str, str]] = {
    f"{ours}.{part}": f"{theirs}.{name}"
    for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up"))
    for part, name in (("left", "W_left"), ("right", "W_right"), ("bias", "b"))
}
_FIXED: Final[Mapping[str, Any]] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "learn_phm": True,
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_rank": 1,
    "residual_before_ln": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}


def module_width(export: Export) -> int:
    """Width of the residual stream, as the model's configuration has it."""
    config: Any = export.needed("", "has a width").config
    return int(config.hidden_size)


def _factor(width: int, size: int) -> float:
    """Their reduction factor: the width over it, rounded down, is the size."""
    return width // size if width % size == 0 else width / (size + 0.5)


def _refuse(export: Export, options: Sequence[str], wanted: bool) -> None:
    for option in options:
        value = export.record.config.get(option, wanted)
        if bool(value) is not wanted:
            raise export.fault(f"{option}={value!r} is not written for the adapters library. {_WAY_OUT}")


def _place(export: Export, target: Target, kind: str) -> str:
    """The module that their wrapper of a sub-layer is in."""
    path, layer = target.module, _layer(export, target.module)
    parts = any(name != CHILD for name, _ in _module(export, path).named_children())
    inside = path if parts else path.rpartition(".")[0]
    ends = export.record.config.get("placement") == "pfeiffer"
    around = inside if ends else path.rpartition(".")[0]
    holds_norm = any(is_norm(child) for child in _module(export, around).children())
    if around != layer and around.startswith(layer) and holds_norm:
        return around
    return f"{layer}.{'attention' if kind == 'attention' else 'output'}_adapters"


def _module(export: Export, path: str) -> nn.Module:
    return module_at(export.needed("", "holds it"), path)


def _layer(export: Export, path: str) -> str:
    found = _LAYER.search(path)
    if found is None:
        raise export.fault(f"{path} is in no numbered layer, which the adapters library counts. {_WAY_OUT}")
    return path[: found.end()]


def _left_out(export: Export, targets: Sequence[Target]) -> Iterator[int]:
    """Layers without a delta, counted as that library does: those of an encoder first."""
    start = 0
    stacks = dict.fromkeys(_layer(export, target.module).rpartition(".")[0] for target in targets)
    for stack in sorted(stacks, key=lambda path: "decoder" in path.split(".")):
        there = {_layer(export, target.module) for target in targets}
        count = len([*_module(export, stack).children()])
        yield from (start + index for index in range(count) if join(stack, str(index)) not in there)
        start += count
    if start != _depth(export):
        raise export.fault(f"it is in {start} of the model's {_depth(export)} layers, or in parts. {_WAY_OUT}")


def _depth(export: Export) -> int:
    config: Any = export.needed("", "has layers").config
    decoder = getattr(config, "num_decoder_layers", getattr(config, "decoder_layers", 0))
    return int(config.num_hidden_layers) + (int(decoder or 0) if config.is_encoder_decoder else 0)


def _inside(export: Export) -> str:
    """What names of the model without a head begin with."""
    root = export.needed("", "has a name for it")
    prefix = str(getattr(root, "base_model_prefix", ""))
    return f"{prefix}." if prefix and isinstance(getattr(root, prefix, None), nn.Module) else ""


# --- products ------------------------------------------------------------------------------------------------


def _lora(export: Export, left: dict[str, Tensor]) -> dict[str, Any]:
    """LoRA and (IA)³: one rank and one scale, in whole roles of layers that are not fused."""
    own, scales = export.record.config, export.record.method == "ia3"
    _refuse(export, ("use_dora", "lora_bias", "use_gating"), False)
    if own.get("init", "kaiming") not in ("kaiming", "gaussian") or own.get("bias", "none") != "none":
        raise export.fault(f"the adapters library has no init={own.get('init')!r}, and trains no biases. {_WAY_OUT}")
    roles: dict[str, list[Target]] = {}
    ranks, factors = set(), set()
    for target, parts in _with_roles(export, left):
        if target.rows is not None or target.parameter != "weight" or target.cross:
            what = "is of cross-attention" if target.cross else "is a part of a fused weight"
            raise export.fault(f"{target.path} {what}, which is not written for the adapters library. {_WAY_OUT}")
        if target.role not in (*_MATRICES, "ffn.up", *(() if scales else ("ffn.down",))):
            why = "rescales what a layer gets" if scales else f"is {target.role or 'no projection of one role'}"
            raise export.fault(f"{target.path} {why}, which the adapters library does not adapt. {_WAY_OUT}")
        roles.setdefault(str(target.role), []).append(target)
        names = {"scale": "lora_B"} if scales else {"a": "lora_A", "b": "lora_B"}
        if parts.keys() != names.keys():
            raise export.fault(f"{target.path} holds {', '.join(parts)}. {_WAY_OUT}")
        if not scales:
            ranks.add(parts["a"].shape[0])
            factors.add(scale_of(own, target, parts["a"].shape[0]))
        for part, tensor in parts.items():
            value = tensor[:, None] if scales else tensor
            export.tensors[f"{target.module}.loras.{NAME}.{names[part]}"] = value.contiguous()
    left_out = {tuple(_left_out(export, targets)) for targets in roles.values()}
    if len(ranks) > 1 or len(factors) > 1 or len(left_out) != 1:
        raise export.fault(f"of several ranks or scales, or with other layers for one role than another. {_WAY_OUT}")
    rank = ranks.pop() if ranks else 1
    scale = factors.pop() * rank if factors else 1
    _check_stacks(export, roles)
    return {
        "architecture": "lora",
        "selfattn_lora": any(role in _MATRICES for role in roles),
        "intermediate_lora": "ffn.up" in roles,
        "output_lora": "ffn.down" in roles,
        "attn_matrices": [_MATRICES[role] for role in roles if role in _MATRICES],
        "r": rank,
        "alpha": int(scale) if scale == int(scale) else scale,
        "dropout": float(own.get("dropout") or 0.0),
        "composition_mode": "scale" if scales else "add",
        "init_weights": "ia3" if scales else "lora",
        "init_weights_seed": None,
        "leave_out": list(left_out.pop()),
        "use_gating": False,
        "use_dora": False,
        "vera_b": None,
        "vera_d": None,
        "dtype": None,
    }


def _with_roles(export: Export, left: dict[str, Tensor]) -> Iterator[tuple[Target, dict[str, Tensor]]]:
    """As :func:`taken`; places that were given by name alone, as a folder of PEFT does, have the role it says."""
    named = {(one.module, one.parameter): one for one in roles_by_name(export.needed("", "has roles"))}
    for target, parts in taken(export, left):
        own = named.get((target.module, target.parameter))
        if target.role is None and own is not None and len(own.roles) == 1:
            yield replace(target, role=own.roles[0], cross=own.cross), parts
        else:
            yield target, parts


def _check_stacks(export: Export, roles: Mapping[str, Sequence[Target]]) -> None:
    """What that library would adapt beside what is there, or elsewhere."""
    config: Any = export.needed("", "has layers").config
    if config.is_encoder_decoder and any(role in _MATRICES for role in roles):
        raise export.fault(f"the adapters library would adapt cross-attention, too, where it has no delta. {_WAY_OUT}")
    named = {role for own in roles_by_name(export.needed("", "has roles")) for role in own.roles}
    there = {role for role in roles if role.startswith("ffn.")}
    if "ffn.gate" in named and there and (len(there) < 2 or config.is_encoder_decoder):
        raise export.fault(
            f"its feed-forward has a gate, where the adapters library means other layers by the two it adapts than "
            f"their names say; only both together (ffn.up, ffn.down) are told apart by nothing. {_WAY_OUT}"
        )


# --- prefixes ------------------------------------------------------------------------------------------------


def _prefix(export: Export, left: dict[str, Tensor]) -> dict[str, Any]:
    """Prefixes by their network where it is there, else as rows of keys and values."""
    _refuse(export, ("use_gating",), False)
    places = [target for target in export.record.targets if target.role == "attention.core"]
    decodes = any("decoder" in target.module.split(".") for target in places)
    groups: dict[str, list[Target]] = {}
    for target in places:
        groups.setdefault(pool_of(target, places, export.needed("", "names its prefixes")), []).append(target)
    _whole(export, groups)
    found = by_delta(left)
    named = f"pet.{export.record.method}_{export.record.name}"
    length = 0
    for number, (pool, own) in enumerate(groups.items()):
        start = f"{_inside(export)}prefix_tuning.prefix_tunings.{NAME}.{pool}"
        parts = [{name: left.pop(join(path, name)) for name in found[path]} for path in map(export.path, own)]
        network = {name: left.pop(f"{named}_network{number}.{name}", None) for name in ("embedding", "weight", "bias")}
        length = next(tensor.shape[1] for name, tensor in parts[0].items() if name == "key")
        tensors = _rows(parts) if network["embedding"] is None else _network(network, parts)
        export.tensors |= {f"{start}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    flat = not any(name.endswith("wte.weight") for name in export.tensors)
    return {
        "architecture": "prefix_tuning",
        "bottleneck_size": 512 if flat else int(export.record.config["projection_size"]),
        "cross_prefix": "cross_prefix" in groups or not decodes,
        "dropout": 0.0,
        "encoder_prefix": "encoder_prefix" in groups or not decodes,
        "flat": flat,
        "init_weights_seed": None,
        "leave_out": [],
        "non_linearity": "tanh",
        "prefix_length": int(length),
        "shared_gating": True,
        "use_gating": False,
    }


def _whole(export: Export, groups: Mapping[str, Sequence[Target]]) -> None:
    for pool, own in groups.items():
        stack = _layer(export, own[0].module).rpartition(".")[0]
        if len(own) != len([*_module(export, stack).children()]):
            raise export.fault(f"the {pool} is not in every layer of {stack}. {_WAY_OUT}")


def _rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    slots = [own[name].transpose(0, 1) for own in parts for name in ("key", "value")]
    return {"control_trans": torch.stack(slots, 1).reshape(-1)}


def _network(network: Mapping[str, Tensor | None], parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = {"embedding": "wte.weight", "weight": "control_trans.0.weight", "bias": "control_trans.0.bias"}
    tensors = {theirs: own for name, theirs in names.items() if (own := network[name]) is not None}
    for name in ("weight", "bias"):
        tensors[f"control_trans.2.{name}"] = torch.cat([own[name] for own in parts])
    return tensors


_WRITERS: Final[Mapping[str, Callable[[Export, dict[str, Tensor]], dict[str, Any]]]] = {
    "adapter": _bottleneck,
    "compacter": _bottleneck,
    "lora": _lora,
    "ia3": _lora,
    "prefix_tuning": _prefix,
}
