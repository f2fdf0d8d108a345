"""Deltas of HF PEFT that sit on layers, in terms of ours: LoRA with its variants, AdaLoRA, (IA)³, norms.

Tensors of a PEFT folder are named by the module that they belong to, and that name is all that is believed: which
modules a configuration's patterns would hit is not asked. Every tensor has to find its place.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import DeltaFileError
from lightning_pet.exchange.folder import CONFIG, Folder, unused
from lightning_pet.insertion.method import METHODS, suffix_of
from lightning_pet.model.layer_kinds import transposed
from lightning_pet.model.naming import delta_path, join, named_modules
from lightning_pet.model.structure import Structure, Target
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.strict_json import fault, shown
from lightning_pet.targets.patterns import exactly

PREFIX: Final = "base_model.model."
_WRAPPED: Final = ".base_layer"
_PARTS: Final[Mapping[str, str]] = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_E": "e",
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "ia3_l": "scale",
}
_MAX_PATTERN: Final = 256
_QUANTIFIER: Final = re.compile(r"(?<!\\)(?:[*+]|\{\d+,\d*\})")


@dataclass
class Host:
    """One module of a folder, with the tensors that it holds there.

    Attributes:
        path: of the module, from the root.
        nested: how many wrappers of PEFT lie around it there: one for each further parameter of a module.
        parts: our names of the tensors, and their values.
            inside: it is a part of a wrapped module: the output projection of a MultiheadAttention.
        table: its keys were those of an embedding.
    """

    path: str
    nested: int = 0
    parts: dict[str, Tensor] = field(default_factory=dict)
    inside: bool = False
    table: bool = False


@dataclass(frozen=True)
class Read:
    """What a folder says in our terms."""

    methods: tuple[MethodRecord, ...]
    tensors: dict[str, Tensor]


def split_hosts(folder: Folder) -> tuple[list[Host], dict[str, Tensor]]:
    """Take the tensors of a folder apart: those of wrapped modules, and all others by their name from the root."""
    hosts: dict[tuple[str, int], Host] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in folder.tensors.items():
        if not key.startswith(PREFIX):
            raise unused(folder, [key], f"found tensors whose names do not begin with {PREFIX!r}, as PEFT's do")
        name = key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in _PARTS if name.endswith(f".{suffix}") or name == suffix), None)
        if suffix is None:
            rest[name] = tensor
            continue
        path = name.removesuffix(suffix).rstrip(".")
        outer, nested = path, 0
        while outer.endswith(_WRAPPED):
            outer, nested = outer.removesuffix(_WRAPPED), nested + 1
        path = outer.replace(_WRAPPED, "")
        host = hosts.setdefault((path, nested), Host(path, nested, inside=path != outer))
        host.parts[_PARTS[suffix]] = tensor
        host.table |= "embedding" in suffix
    return list(hosts.values()), rest


# --- low-rank ------------------------------------------------------------------------------------------------


def lora(folder: Folder, root: nn.Module | None) -> Read:
    """LoRA, rsLoRA, DoRA, PiSSA and OLoRA."""
    config = folder.config
    hosts, rest = split_hosts(folder)
    init = _start(folder)
    if init != "kaiming" and root is None:
        raise fault(
            str(folder.path),
            f"init_lora_weights={config['init_lora_weights']!r} has moved a part of the base into A and B, which only "
            "the base itself can tell. Read the folder together with its base.",
            "mismatch",
        )
    rsl, dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    ranks, alphas, targets, tensors = {}, {}, [], {}
    for host, target, parts in _placed(folder, hosts, root, ("a", "b")):
        if dora is not ("magnitude" in parts):
            raise fault(str(folder.path), f"use_dora is {dora}, which {host.path} contradicts.", "mismatch")
        rank = parts["a"].shape[0 if _is_kernel(parts) else -2]
        # PEFT merges into an attention before each call, and adds the change of its output projection twice.
        alphas[exactly(target)] = _alpha(folder, host.path) * (2 if host.inside else 1)
        ranks[exactly(target)] = rank
        targets.append(target)
        tensors |= {(target, name): tensor for name, tensor in parts.items()}
    r, alpha = _most(ranks), _most(alphas)
    options = {
        "r": r,
        "alpha": alpha,
        "dropout": float(config.get("lora_dropout") or 0.0),
        "use_rslora": rsl,
        "use_dora": dora,
        "init": init,
        "rank_pattern": {place: rank for place, rank in ranks.items() if rank != r} or None,
        "alpha_pattern": {place: value for place, value in alphas.items() if value != alpha} or None,
        "bias": config.get("bias", "none"),
        "lora_bias": bool(config.get("lora_bias")),
        "target_modules": sorted({target.module for target in targets}),
    }
    rest = _without_tables(folder, rest, [target.module for target in targets], root)
    biases = _biases(folder, rest, {target.module for target in targets})
    read = _whole(folder, "lora", options, targets, tensors, rest, biases)
    return read if init == "kaiming" else _with_starts(read, targets, options, root)


def _without_tables(
    folder: Folder, rest: Mapping[str, Tensor], hosts: Sequence[str], root: nn.Module | None
) -> dict[str, Tensor]:
    """PEFT writes the whole table beside a delta on an embedding or output layer: it has to be the base's."""
    left = dict(rest)
    modules = {} if root is None else named_modules(root)
    for path in hosts:
        for name in (f"{path}{_WRAPPED}.weight", f"{path}.weight"):
            table = left.pop(name, None)
            if table is None:
                continue
            own = modules[path]._parameters.get("weight") if path in modules else None
            if own is not None and not own.is_meta and (own.shape != table.shape or not _equal(own, table)):
                raise fault(
                    str(folder.path),
                    f"{name} {tuple(table.shape)} is not the base's {path}.weight {tuple(own.shape)}: the vocabulary "
                    "was resized, or the table trained, or this is another base. Resize the base as it was "
                    "(resize_token_embeddings) and give it these values first.",
                    "base",
                )
    return left


def _equal(own: Tensor, table: Tensor) -> bool:
    return torch.equal(own.detach().cpu().to(table.dtype), table)


def _start(folder: Folder) -> str:
    """How A and B started, where that has changed the base."""
    start = folder.config.get("init_lora_weights", True)
    if start in ("pissa", "olora"):
        return str(start)
    if start in (True, False, None, "gaussian", "eva", "orthogonal", "mica"):
        return "kaiming"
    raise fault(
        str(folder.path / CONFIG),
        f"init_lora_weights={shown(start)} has changed the base in a way that cannot be repeated here. Save the delta "
        "again with path_initial_model_for_weight_conversion, which makes a plain LoRA of it.",
        "mismatch",
    )


def _with_starts(read: Read, targets: Sequence[Target], options: dict[str, Any], root: nn.Module | None) -> Read:
    """PiSSA and OLoRA took their start values out of the base: they are computed from it again."""
    assert root is not None
    tensors = dict(read.tensors)
    method = METHODS["lora"](**options)
    for insertion in method.insertions(root, targets):
        path = insertion.path(method)
        for name in ("a0", "b0"):
            tensors[join(path, name)] = getattr(insertion.delta, name).detach().clone()
    return replace(read, tensors=tensors)


def adalora(folder: Folder, root: nn.Module | None) -> Read:
    """AdaLoRA: its scale is ``lora_alpha / (init_r + 1e-5)``, whatever is left of the ranks."""
    config = folder.config
    hosts, rest = split_hosts(folder)
    start = int(config.get("init_r") or 12)
    targets, tensors = [], {}
    for _, target, parts in _placed(folder, hosts, root, ("a", "b", "e")):
        kept = parts["a"].shape[0]
        if kept > start:
            raise fault(str(folder.path), f"{target.module} has rank {kept}, above init_r={start}.", "mismatch")
        room = start - kept  # rows that the allocation has taken away are not in the file
        e = torch.cat([parts["e"].flatten(), torch.zeros(room)])
        # ours divides by init_r itself
        e *= start / (start + 1e-5)
        own = {
            "a": torch.cat([parts["a"], parts["a"].new_zeros(room, parts["a"].shape[1])]),
            "b": torch.cat([parts["b"], parts["b"].new_zeros(parts["b"].shape[0], room)], 1),
            "e": e,
            "kept": torch.tensor([1] * kept + [0] * room, dtype=torch.int32),
        }
        targets.append(target)
        tensors |= {(target, name): tensor for name, tensor in own.items()}
    options = {
        "init_r": start,
        "target_r": min(int(config.get("target_r") or 8), start),
        "alpha": config.get("lora_alpha", 8),
        "dropout": float(config.get("lora_dropout") or 0.0),
        "orth_reg_weight": float(config.get("orth_reg_weight", 0.5)),
        "beta1": float(config.get("beta1", 0.85)),
        "beta2": float(config.get("beta2", 0.85)),
        "target_modules": sorted({target.module for target in targets}),
    }
    return _whole(folder, "adalora", options, targets, tensors, rest, frozenset())


def _is_kernel(parts: Mapping[str, Tensor]) -> bool:
    """Whether A and B are those of a convolution: B has one element per position."""
    b = parts["b"]
    return b.dim() > 2 and all(size == 1 for size in b.shape[2:])


def _placed(
    folder: Folder, hosts: Sequence[Host], root: nn.Module | None, needed: Sequence[str]
) -> Iterator[tuple[Host, Target, dict[str, Tensor]]]:
    """Of each host its place here, and its tensors in our form."""
    if not hosts:
        raise fault(str(folder.path), "found no delta of any layer in it. Ask for the whole folder.", "mismatch")
    modules = {} if root is None else named_modules(root)
    parameters = _parameters(folder, hosts, modules)
    for host in hosts:
        if absent := [name for name in needed if name not in host.parts]:
            raise fault(
                str(folder.path), f"{host.path} has no {absent[0].upper()}. Copy the whole folder again.", "mismatch"
            )
        if root is not None and host.path not in modules:
            raise _no_such(folder, host.path, modules)
        target = place_of(host.path, parameters[host.path, host.nested], root, "embedding" if host.table else None)
        module = modules.get(host.path)
        yield host, target, _in_our_form(folder, host, target, module)


def _parameters(
    folder: Folder, hosts: Sequence[Host], modules: Mapping[str, nn.Module]
) -> dict[tuple[str, int], str]:
    """Which parameter of its module each host is: the weight, but where PEFT was given names of parameters."""
    named: list[str] = list(folder.config.get("target_parameters") or ())
    found, attentions = {}, {host.path.rpartition(".")[0] for host in hosts if host.inside}
    for host in hosts:
        module = modules.get(host.path)
        own = [
            name
            for name in (module._parameters if module is not None else {})
            if any(f".{join(host.path, name)}".endswith(f".{given}") for given in named)
        ]
        if host.path in attentions or isinstance(module, nn.MultiheadAttention):
            found[host.path, host.nested] = "in_proj_weight"
        elif own:  # the first one is innermost
            if host.nested >= len(own):
                raise fault(str(folder.path), f"{host.path} has {len(own)} of target_parameters.", "mismatch")
            found[host.path, host.nested] = own[len(own) - 1 - host.nested]
        else:
            found[host.path, host.nested] = "weight"
    return found


def place_of(path: str, parameter: str, root: nn.Module | None, role: Any = None) -> Target:
    """The place of a delta on one parameter: as a search in the model finds it, if there is one."""
    plain = Target(path, parameter, role)
    if root is None:
        return plain
    method = METHODS["lora"](target_modules=[f"re:{re.escape(plain.path)}"])
    found: tuple[Target, ...] = method.resolve(root, Structure())
    return found[0]


def _in_our_form(folder: Folder, host: Host, target: Target, module: nn.Module | None) -> dict[str, Tensor]:
    parts = {name: tensor for name, tensor in host.parts.items()}
    if "magnitude" in parts:
        parts["magnitude"] = parts["magnitude"].flatten()
    groups = getattr(module, "groups", 1)
    if isinstance(groups, int) and groups > 1 and _is_kernel(parts):
        parts["a"] = _of_one_group(folder, host.path, parts["a"], groups)
    weight = None if module is None else module._parameters.get(target.parameter)
    if weight is not None and weight.dim() == 3 and not _is_kernel(parts):
        return parts | _experts(parts, weight.shape[0], bool(transposed(module, target.parameter)))
    return parts


def _of_one_group(folder: Folder, path: str, a: Tensor, groups: int) -> Tensor:
    """PEFT's A reads the inputs of all groups; ours is one for each group's own inputs."""
    blocks = a.reshape(groups, a.shape[0] // groups, groups, a.shape[1] // groups, *a.shape[2:]).transpose(1, 2)
    own = blocks[0, 0]
    across = blocks * (1 - torch.eye(groups).reshape(groups, groups, *(1,) * (blocks.dim() - 2)))
    if across.any() or any(not torch.equal(blocks[i, i], own) for i in range(groups)):
        raise fault(
            str(folder.path),
            f"{path} is a convolution of {groups} groups whose A reads the inputs of all of them: no change of its "
            "weight does that. Train it without this layer.",
            "mismatch",
        )
    return own.contiguous()


def _experts(parts: Mapping[str, Tensor], count: int, turned: bool) -> dict[str, Tensor]:
    """A has its rows expert by expert, B its columns rank by rank."""
    a = parts["a"].unflatten(0, (count, -1))
    b = parts["b"].unflatten(1, (-1, count)).permute(2, 0, 1)
    if turned:  # the change of the stored weight is Bᵀ Aᵀ of a layer's
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return {"a": a.contiguous(), "b": b.contiguous()}


def _alpha(folder: Folder, path: str) -> Any:
    """What the first pattern that fits gives, in the order of the file."""
    found = [value for key, value in (folder.config.get("alpha_pattern") or {}).items() if fits(folder, key, path)]
    if len({*found}) > 1:
        rank_zero_warn(
            f"{folder.path}: {len(found)} keys of alpha_pattern fit {path}, with different values. The first one in "
            "the file counts, which may be another than in training: PEFT sorts them when it saves."
        )
    return found[0] if found else folder.config.get("lora_alpha", 8)


def fits(folder: Folder, pattern: str, path: str) -> bool:
    """Whether PEFT would say that a pattern of a folder fits a path.

    Raises:
        DeltaFileError: ``unsafe`` if it could take any time to say so.
    """
    # Of an expression with few repetitions, none of them of a group, the time is bounded by the length of the path.
    if len(pattern) > _MAX_PATTERN or len(_QUANTIFIER.findall(pattern)) > 2 or re.search(r"\)[*+{]", pattern):
        raise fault(
            str(folder.path / CONFIG),
            f"the pattern {shown(pattern)} is too intricate to be run for a stranger. Write the names of the modules "
            "in its place.",
            "unsafe",
        )
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise fault(str(folder.path / CONFIG), f"{shown(pattern)} is no regular expression: {error}.") from error


def _most(values: Mapping[str, Any]) -> Any:
    """The commonest value, so that few places need one of their own."""
    return Counter(values.values()).most_common(1)[0][0]


# --- vectors -------------------------------------------------------------------------------------------------


def ia3(folder: Folder, root: nn.Module | None) -> Read:
    """(IA)³: a column rescales what a layer returns, a row what it gets."""
    hosts, rest = split_hosts(folder)
    targets, tensors = [], {}
    for _, place, parts in _placed(folder, hosts, root, ("scale",)):
        inner = _reads(folder, place.module, parts["scale"])
        target = replace(place, role="ffn.down" if inner else None)
        targets.append(target)
        tensors[target, "scale"] = parts["scale"].flatten()
    options = {
        "target_modules": [target.module for target in targets if target.role != "ffn.down"],
        "feedforward_modules": [target.module for target in targets if target.role == "ffn.down"],
    }
    return _whole(folder, "ia3", options, targets, tensors, rest, frozenset())


def _reads(folder: Folder, path: str, scale: Tensor) -> bool:
    """Whether a vector rescales what its layer gets: by its shape, or where that does not tell by the configuration."""
    rows, columns = scale.shape[:2]
    if scale.dim() == 2 and (rows == 1) is not (columns == 1):
        return bool(rows == 1)
    named = folder.config.get("feedforward_modules") or []
    if isinstance(named, str):
        return fits(folder, named, path)
    return any(f".{path}".endswith(f".{name}") for name in named)


# --- all of a folder -----------------------------------------------------------------------------------------


def _whole(
    folder: Folder,
    method: str,
    options: dict[str, Any],
    targets: Sequence[Target],
    tensors: Mapping[tuple[Target, str], Tensor],
    rest: Mapping[str, Tensor],
    biases: frozenset[str],
) -> Read:
    """Deltas and what trained beside them, under our names."""
    named = {join(_path(method, target), name): tensor for (target, name), tensor in tensors.items()}
    heads, values = heads_of(folder, {name: tensor for name, tensor in rest.items() if name not in biases})
    values |= {name.replace(_WRAPPED, ""): rest[name] for name in biases}
    return Read((record_of(method, options, targets, heads),), named | values)


def record_of(
    method: str, options: Mapping[str, Any], targets: Sequence[Target], heads: Sequence[Target]
) -> MethodRecord:
    """What a file of ours would say; without a head in the folder, that there is none."""
    none = {} if heads else {"modules_to_save": []}
    return MethodRecord(method, "default", {**options, **none}, (*targets, *heads))


def _path(method: str, target: Target) -> str:
    """Where the delta of a place is in a file."""
    return delta_path(target.module, "_".join(part for part in (method, "default", suffix_of(target)) if part))


def heads_of(folder: Folder, rest: Mapping[str, Tensor]) -> tuple[list[Target], dict[str, Tensor]]:
    """Modules that trained as they are: those that a folder names, with every tensor that is left.

    Raises:
        DeltaFileError: (``mismatch``) if a tensor is of none of them.
    """
    named = [*(folder.config.get("modules_to_save") or ()), *_usual_heads(folder)]
    found: dict[str, None] = {}
    left = []
    for name in rest:
        parts = name.split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts)))
        around = next((path for path in paths if path.endswith(tuple(named))), None)  # PEFT's rule, too
        if around is not None:
            found[around] = None
        else:
            left.append(name)
    if left:
        raise unused(
            folder, left, "found tensors that belong to no delta and to none of its modules_to_save"
        )
    return [Target(path, "", "head") for path in found], dict(rest)


def _usual_heads(folder: Folder) -> tuple[str, ...]:
    kind = folder.config.get("task_type")
    return ("classifier", "score") if kind in ("SEQ_CLS", "TOKEN_CLS") else ("qa_outputs",) if kind == "QUESTION_ANS" else ()


def _biases(folder: Folder, rest: Mapping[str, Tensor], hosts: set[str]) -> frozenset[str]:
    """Names of biases that trained in place, by the option that says so."""
    kind = folder.config.get("bias", "none")
    if kind not in ("none", "lora_only", "all"):
        raise fault(str(folder.path / CONFIG), f"bias={shown(kind)}, expected none, lora_only or all.")
    if kind == "none":
        return frozenset()
    found = {name for name in rest if "bias" in name.rpartition(".")[2]}
    if kind == "all":
        return frozenset(found)
    return frozenset(name for name in found if name.rpartition(".")[0].replace(_WRAPPED, "") in hosts)


def _no_such(folder: Folder, path: str, modules: Mapping[str, nn.Module]) -> DeltaFileError:
    import difflib

    near = difflib.get_close_matches(path, list(modules), n=3, cutoff=0.4)
    return fault(
        str(folder.path),
        f"found a delta for {path!r}, which this {type(modules['']).__name__} does not have; near it: "
        f"{', '.join(map(repr, near)) or 'none'}. Load it into the base that it was trained on, or say how paths "
        "differ: rename={'there.': 'here.'}.",
        "mismatch",
    )
