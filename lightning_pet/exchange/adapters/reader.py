"""Reading a folder of the adapters library: bottleneck adapters, Compacter, prefixes, LoRA, (IA)³, and their unions.

Its names of places are those of its own wrappers, which are found here by layer and sub-layer; so the base is needed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from torch import Tensor, nn

from lightning_pet.attention.prefix import PrefixSite
from lightning_pet.exchange.adapters.heads import read_head
from lightning_pet.exchange.adapters.reft import read_reft
from lightning_pet.exchange.folder import CONFIG, Base, Folder, unused
from lightning_pet.exchange.peft_hosts import Read, path_of, place_of, record_of
from lightning_pet.insertion.method import METHODS
from lightning_pet.model.naming import is_inside, join, named_modules
from lightning_pet.model.structure import Target
from lightning_pet.store.reader import Stored
from lightning_pet.store.strict_json import fault, shown

_BOTTLENECK: Final[Mapping[str, str]] = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
}
_GATE: Final[Mapping[str, str]] = {"gate.weight": "gate_weight", "gate.bias": "gate_bias"}
_PHM: Final[Mapping[str, str]] = {
    f"{layer}.{theirs}": f"{own}.{ours}"
    for layer, own in (("adapter_down.0", "down"), ("adapter_up", "up"))
    for theirs, ours in (("W_left", "left"), ("W_right", "right"), ("b", "bias"))
}
_AS_HERE: Final[Mapping[str, Any]] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "inv_adapter": None,
    "learn_phm": True,
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "phm_bias": True,
    "residual_before_ln": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "shared_gating": True,
    "composition_mode": "add",
    "use_dora": False,
    "vera_b": None,
    "vera_d": None,
}
"""Options with the only value that has a counterpart here."""
_INTEGER: Final = re.compile(r"\.(\d+)(?:\.|$)")
_FAULTY_SCALE: Final = (1, 1, 0)


def read_adapters(folder: Folder, base: Base | None) -> Stored:
    """A folder of the adapters library as what one of our files would hold.

    Args:
        folder: as it was read.
        base: the model that it is for.

    Raises:
        DeltaFileError: if there is no base, an option has no counterpart here, or a tensor has no place.
    """
    if base is None:
        raise fault(
            str(folder.path / CONFIG),
            "a folder of the adapters library does not say which modules of the model are meant. Read it together with "
            "its base.",
            "mismatch",
        )
    parts = [(config, _reader(folder, config)) for config in _parts(folder)]
    left = dict(folder.tensors)
    reads = [reader(replace(folder, config={**folder.config, "config": own}), base, left) for own, reader in parts]
    read = Read(tuple(m for r in reads for m in r.methods), {name: t for r in reads for name, t in r.tensors.items()})
    if left:
        raise unused(folder, left, "found tensors that have no place here")
    heads, values = read_head(folder, base.root)
    if heads:
        first = read.methods[0]
        config = {option: value for option, value in first.config.items() if option != "modules_to_save"}
        first = replace(first, config=config, targets=(*first.targets, *heads))
        read = Read((first, *read.methods[1:]), read.tensors | values)
    notes = {"imported_from": "adapters", "base_model": str(folder.config.get("model_name") or "")[:512]}
    return Stored(folder.path, read.methods, read.tensors, None, notes={k: v for k, v in notes.items() if v})


def _parts(folder: Folder) -> list[dict[str, Any]]:
    """The configuration, or those of a union: at most one of each kind, as nothing else tells their tensors apart."""
    config = folder.config["config"]
    if config.get("architecture") != "union":
        return [config]
    parts = config.get("configs")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise fault(str(folder.path / CONFIG), "found a union without its configurations.", "schema")
    kinds = [part.get("architecture") for part in parts]
    if len({*map(str, kinds)}) != len(kinds):
        raise fault(str(folder.path / CONFIG), f"found a union of {kinds}: two of one kind have no counterpart here.")
    return parts


def _reader(folder: Folder, config: Mapping[str, Any]) -> Callable[[Folder, Base, dict[str, Tensor]], Read]:
    """Who reads a configuration, all of whose options have a counterpart."""
    readers: dict[Any, Callable[[Folder, Base, dict[str, Tensor]], Read]] = {
        None: _bottleneck,
        "lora": _lora,
        "prefix_tuning": _prefix,
        "reft": read_reft,
    }
    kind = config.get("architecture")
    if kind == "prompt_tuning":
        raise fault(
            str(folder.path / CONFIG),
            "found a prompt (architecture 'prompt_tuning'): that library puts it behind the norm and the positions of "
            "the embedding, where no prompt of this library is: no conversion computes the same. Use it with the "
            "library that trained it, or train PromptTuningCallback.",
            "version",
        )
    if kind not in readers:
        known = ", ".join(repr(name) for name in readers if name)
        raise fault(
            str(folder.path / CONFIG),
            f"found the architecture {shown(kind)}; a bottleneck adapter and {known} have a counterpart here.",
            "version",
        )
    for option, wanted in _AS_HERE.items():
        scales = option == "composition_mode" and config.get(option) == "scale"
        if option in config and config[option] != wanted and not scales:
            raise fault(
                str(folder.path / CONFIG),
                f"{option}={shown(config[option])} has no counterpart here, expected {shown(wanted)}.",
                "mismatch",
            )
    if config.get("use_gating") and (config.get("phm_layer") or config.get("composition_mode") == "scale"):
        raise fault(
            str(folder.path / CONFIG),
            "use_gating has a counterpart here for LoRA, prefixes and bottleneck adapters only, not for Compacter and "
            "(IA)³.",
            "mismatch",
        )
    return readers[kind]


# --- bottlenecks ---------------------------------------------------------------------------------------------


def _bottleneck(folder: Folder, base: Base, left: dict[str, Tensor]) -> Read:
    config = folder.config["config"]
    phm = bool(config.get("phm_layer"))
    method, parts = ("compacter", _PHM) if phm else ("adapter", {**_BOTTLENECK, **_GATE})
    name = str(folder.config.get("name"))
    found: dict[str, dict[str, Tensor]] = {}
    for key in [*left]:
        place, mark, part = key.partition(f".adapters.{name}.")
        if mark and part in parts:
            found.setdefault(place, {})[parts[part]] = left.pop(key)
    down = {tuple(own["down.left" if phm else "down"].shape) for own in found.values() if own}
    if len(down) != 1:
        raise fault(str(folder.path), f"found bottlenecks of {len(down)} sizes, expected one for all.", "mismatch")
    options = _options(folder, base, phm, next(iter(found.values())))
    targets = METHODS[method](**options).resolve(base.root, base.structure())
    shared = [target for target in targets if not target.module and not target.parameter]
    places = _matched(folder, found, [target for target in targets if target not in shared])
    tensors = {
        join(path_of(method, target), own): tensor
        for place, target in places.items()
        for own, tensor in found[place].items()
    }
    if phm:
        tensors["pet.compacter_default_rule.matrices"] = _rule(folder, left, name)
    return Read((record_of(method, options, [*shared, *places.values()], []),), tensors)


def _options(folder: Folder, base: Base, phm: bool, parts: Mapping[str, Tensor]) -> dict[str, Any]:
    config = folder.config["config"]
    attention, output = bool(config.get("mh_adapter")), bool(config.get("output_adapter"))
    before = bool(config.get("original_ln_before"))
    options: dict[str, Any] = {"non_linearity": config.get("non_linearity"), **_left_out(folder, base)}
    scale = config.get("scaling", 1.0)
    if not isinstance(scale, int | float):
        raise fault(str(folder.path / CONFIG), f"scaling={shown(scale)} trains, which it does not here.", "mismatch")
    if phm:
        if before or not output or scale != 1.0:
            raise fault(str(folder.path / CONFIG), "a Compacter in this place has no counterpart here.", "mismatch")
        size = parts["down.bias"].numel()
        return options | {
            "phm_dim": int(config["phm_dim"]),
            "rank": int(config["phm_rank"]),
            "bottleneck_size": size,
            "placement": "both" if attention else "ffn",
        }
    options["bottleneck_size"] = parts["down"].shape[0]
    options |= {"use_gating": True} if config.get("use_gating") else {}
    if config.get("is_parallel"):
        options |= {"placement": "parallel", "scale": float(scale)}
    else:
        options |= {"placement": "pfeiffer" if before else "houlsby", "scale": float(scale)}
    options["sublayers"] = [name for name, there in (("attention", attention), ("ffn", output)) if there]
    return options


def _left_out(folder: Folder, base: Base) -> dict[str, Any]:
    """The option for layers without an adapter; that library counts those of an encoder and a decoder in one row."""
    skipped = sorted(int(layer) for layer in folder.config["config"].get("leave_out") or ())
    config = getattr(base.root, "config", None)
    both = bool(getattr(config, "is_encoder_decoder", False))
    depth = int(getattr(config, "num_hidden_layers", 0) or 0)
    first = [layer for layer in skipped if not both or layer < depth]
    if both and [layer - depth for layer in skipped if layer >= depth] != first:
        raise fault(
            str(folder.path / CONFIG), f"leave_out={skipped}: encoder and decoder leave out the same here.", "mismatch"
        )
    if first == [*range(len(first))]:
        return {"drop_layers": len(first)} if first else {}
    if both or not depth:
        raise fault(
            str(folder.path / CONFIG), f"leave_out={skipped}: only the first layers can be left out here.", "mismatch"
        )
    return {"layers_to_transform": [layer for layer in range(depth) if layer not in skipped]}


def _rule(folder: Folder, left: dict[str, Tensor], name: str) -> Tensor:
    keys = [key for key in left if key.endswith(f"shared_parameters.{name}.phm_rule")]
    if len(keys) != 1:
        raise fault(
            str(folder.path),
            "found no phm_rule, which all its layers share; without it they cannot be computed. Save it again from a "
            "model with a head, which writes the rule.",
            "mismatch",
        )
    return left.pop(keys[0])


def _matched(folder: Folder, found: Mapping[str, object], targets: Sequence[Target]) -> dict[str, Target]:
    """Of each of their places our target: the one inside of it, or that of the same layer and sub-layer."""
    places, free = {}, list(targets)
    for place in found:
        own = [target for target in free if _same_place(place, target)]
        if len(own) != 1:
            raise fault(
                str(folder.path),
                f"found an adapter in {place}, for which this model has {len(own)} places of that kind "
                f"(leave_out={folder.config['config'].get('leave_out') or []}). Load it into the kind of model that it "
                "was trained on.",
                "mismatch",
            )
        places[place] = own[0]
        free.remove(own[0])
    if free:
        raise fault(
            str(folder.path),
            f"found adapters in {len(places)} places; this model has {len(free)} more, such as {free[0].module}.",
            "mismatch",
        )
    return places


def _same_place(place: str, target: Target) -> bool:
    ours = target.reads or target.module
    if not place.endswith(("attention_adapters", "output_adapters")):
        path = target.module
        return any(is_inside(path[cut:], place) or path[cut:] == place for cut in _cuts(path))
    theirs, mine = _INTEGER.search(f".{place}"), _INTEGER.search(f".{ours}")
    if theirs is None or mine is None or theirs[1] != mine[1] or _stack(place) != _stack(ours):
        return False
    attends = place.endswith("attention_adapters")
    return not target.cross and (target.role or "").startswith("attention" if attends else "ffn")


def _cuts(path: str) -> list[int]:
    """Where a path may begin, seen from the model inside of the one that is adapted."""
    return [0, path.find(".") + 1]


def _stack(path: str) -> str:
    return "decoder" if "decoder" in path.split(".") else ""


# --- products ------------------------------------------------------------------------------------------------


def _lora(folder: Folder, base: Base, left: dict[str, Tensor]) -> Read:
    config = folder.config["config"]
    name = str(folder.config.get("name"))
    hosts: dict[str, dict[str, Tensor]] = {}
    for key in [*left]:
        path, mark, part = key.partition(f".loras.{name}.")
        if mark and part in ("lora_A", "lora_B", *_GATE):
            hosts.setdefault(_path_here(folder, base.root, path), {})[part] = left.pop(key)
    targets = {path: place_of(path, "weight", base.root) for path in hosts}
    if config.get("composition_mode") == "scale":
        options: dict[str, Any] = {"target_modules": sorted(hosts), "feedforward_modules": []}
        tensors = {join(path_of("ia3", targets[path]), "scale"): own["lora_B"].flatten() for path, own in hosts.items()}
        return Read((record_of("ia3", options, [*targets.values()], []),), tensors)
    rank = int(config["r"])
    options = {
        "r": rank,
        # Behind a gate the library does not scale.
        "alpha": rank if config.get("use_gating") or _version(folder) < _FAULTY_SCALE else config["alpha"],
        "dropout": float(config.get("dropout") or 0.0),
        "target_modules": sorted(hosts),
        "use_gating": bool(config.get("use_gating")),
    }
    tensors = {
        join(path_of("lora", targets[path]), ours): own[theirs]
        for path, own in hosts.items()
        for theirs, ours in (("lora_A", "a"), ("lora_B", "b"), *_GATE.items())
        if theirs in own
    }
    return Read((record_of("lora", options, [*targets.values()], []),), tensors)


def _version(folder: Folder) -> tuple[int, ...]:
    """Of the library; before 1.1 it scaled by another number than it said, which it mends by alpha = r."""
    numbers = re.findall(r"\d+", str(folder.config.get("version", "")))
    return tuple(int(number) for number in numbers[:3])


def _path_here(folder: Folder, root: nn.Module, path: str) -> str:
    modules = named_modules(root)
    own = [other for other in (path, join(str(getattr(root, "base_model_prefix", "")), path)) if other in modules]
    if not own:
        raise fault(
            str(folder.path),
            f"found a delta for {path!r}, which this {type(root).__name__} does not have. Load it into the kind of "
            "model that it was trained on.",
            "mismatch",
        )
    return own[0]


# --- prefixes ------------------------------------------------------------------------------------------------


def _prefix(folder: Folder, base: Base, left: dict[str, Tensor]) -> Read:
    config = folder.config["config"]
    name = str(folder.config.get("name"))
    mark = f"prefix_tunings.{name}."
    pools: dict[str, Tensor] = {}
    for key in sorted(left, key=len):  # each layer repeats what the model holds
        own = key.partition(mark)[2]
        if own and own in pools and not (pools[own] == left[key]).all():
            raise fault(str(folder.path), f"{key} differs from what the model holds of it.", "mismatch")
        if own:
            pools.setdefault(own, left.pop(key))
    flat = bool(config.get("flat"))
    options: dict[str, Any] = {"length": int(config["prefix_length"]), "projection": not flat}
    options |= {} if flat else {"projection_size": int(config["bottleneck_size"])}
    if not flat and config.get("non_linearity") != "tanh":
        raise fault(str(folder.path / CONFIG), "the network of a prefix has a tanh here.", "mismatch")
    targets: tuple[Target, ...] = METHODS["prefix_tuning"](**options).resolve(base.root, base.structure())
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(pool_of(target, targets, base.root), []).append(target)
    if missing := {key.partition(".")[0] for key in pools} ^ groups.keys():
        raise fault(str(folder.path), f"found other kinds of prefixes than this model has: {missing}.", "mismatch")
    tensors = _prefix_gates(folder, left, name, targets) if config.get("use_gating") else {}
    options |= {"use_gating": True} if tensors else {}
    for number, (pool, places) in enumerate(groups.items()):
        values = {key.partition(".")[2]: tensor for key, tensor in pools.items() if key.partition(".")[0] == pool}
        tensors |= _flat(values, places) if flat else _network(values, places, number)
    shared = [] if flat else [Target("", "") for _ in groups]
    return Read((record_of("prefix_tuning", options, [*shared, *targets], []),), tensors)


def _prefix_gates(folder: Folder, left: dict[str, Tensor], name: str, targets: Sequence[Target]) -> dict[str, Tensor]:
    tensors = {}
    for key in [*left]:
        place, mark, part = key.partition(f".prefix_tuning.prefix_gates.{name}.")
        if not mark:
            continue
        own = [t for t in targets if any(t.module[cut:] == place for cut in _cuts(t.module))]
        if len(own) != 1:
            raise fault(str(folder.path), f"found a gate of {place}, which is no attention of this model.", "mismatch")
        tensors[join(path_of("prefix_tuning", own[0]), f"gate_{part}")] = left.pop(key)
    return tensors


def pool_of(target: Target, targets: Sequence[Target], root: nn.Module) -> str:
    """What that library calls the prefixes of an attention; it has a name of its own for those of one model type."""
    if target.cross:
        return "cross_prefix"
    if any("decoder" in other.module.split(".") for other in targets) and "encoder" in target.module.split("."):
        return "encoder_prefix"
    return "self" if getattr(getattr(root, "config", None), "model_type", "") == "distilbert" else "self_prefix"


def _network(own: Mapping[str, Tensor], places: Sequence[Target], number: int) -> dict[str, Tensor]:
    base = f"pet.prefix_tuning_default_network{number}"
    tensors = {
        f"{base}.embedding": own["wte.weight"],
        f"{base}.weight": own["control_trans.0.weight"],
        f"{base}.bias": own["control_trans.0.bias"],
    }
    weights = own["control_trans.2.weight"].chunk(len(places))
    biases = own["control_trans.2.bias"].chunk(len(places))
    for target, weight, bias in zip(places, weights, biases, strict=True):
        path = path_of("prefix_tuning", target)
        tensors |= {join(path, "weight"): weight.contiguous(), join(path, "bias"): bias.contiguous()}
    return tensors


def _flat(own: Mapping[str, Tensor], places: Sequence[Target]) -> dict[str, Tensor]:
    tensors = {}
    site = PrefixSite.read(places[0].sizes)
    values = own["control_trans"].reshape(-1, 2 * len(places), site.heads, site.key_dim)
    for index, target in enumerate(places):
        path = path_of("prefix_tuning", target)
        for slot, name in enumerate(("key", "value")):
            tensors[join(path, name)] = values[:, 2 * index + slot].transpose(0, 1).contiguous()
    return tensors
