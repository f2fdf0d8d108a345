"""Tensors of a HF PEFT folder, taken apart by the modules that they belong to, and put under our names.

That name is all that is believed: which modules a configuration's patterns would hit is not asked. Every tensor has to
find its place.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from lightning_pet.errors import DeltaFileError
from lightning_pet.exchange.folder import CONFIG, PREFIX, Folder, unused
from lightning_pet.insertion.method import METHODS, suffix_of
from lightning_pet.model.layer_kinds import host_kind, transposed, weight_of
from lightning_pet.model.naming import delta_path, join, named_modules
from lightning_pet.model.structure import Structure, Target
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import Stored
from lightning_pet.store.strict_json import fault, shown

WRAPPED: Final = ".base_layer"
_STARTS: Final = (PREFIX, "base_model.")
"""What the names of a folder begin with; those of virtual tokens have the second."""
_PARTS: Final[Mapping[str, str]] = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_E": "e",
    "vera_lambda_b": "lambda_b",
    "vera_lambda_d": "lambda_d",
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "ia3_l": "scale",
    "miss_block": "block",
    "shira_weight": "values",
    "shira_indices": "indices",
    **{f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "hira_A": "a",
    "hira_B": "b",
    "hira_embedding_A": "a",
    "hira_embedding_B": "b",
    "oft_R.weight": "skew",
    "hra_u": "u",
    "boft_R": "blocks",
    "boft_s": "row_scale",
}
_HEADS: Final[Mapping[str, tuple[str, ...]]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_MAX_PATTERN: Final = 256
_MAX_CHOICES: Final = 12
_QUANTIFIER: Final = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")
Values = dict[tuple[Target, str], Tensor]
"""Tensors of deltas by their place and our name."""


@dataclass
class Host:
    """One module of a folder, with the tensors that it holds there.

    Attributes:
        path: of the module, from the root.
        nested: how many wrappers of PEFT lie around it there: one for each further parameter of a module.
        parts: our names of the tensors, and their values.
            inside: it is a part of a wrapped module: the output projection of a MultiheadAttention.
        table: its keys were those of an embedding.
        named: its parameter was asked for by its own name, which is then a part of what patterns fit.
    """

    path: str
    nested: int = 0
    parts: dict[str, Tensor] = field(default_factory=dict)
    inside: bool = False
    table: bool = False
    named: bool = False


@dataclass(frozen=True)
class Read:
    """What a folder says in our terms."""

    methods: tuple[MethodRecord, ...]
    tensors: dict[str, Tensor]


@dataclass
class Export:
    """What a folder will hold.

    Attributes:
        stored: what is exported.
        root: the base, if it is at hand.
        config: ``adapter_config.json``.
        tensors: by the other library's names.
        heads: of the adapters library, which has a file of its own for them.
    """

    stored: Stored
    root: nn.Module | None
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)

    @property
    def record(self) -> MethodRecord:
        """The one method of the delta."""
        return self.stored.methods[0]

    def path(self, target: Target) -> str:
        """Where the delta of a place is among the tensors."""
        return path_of(self.record.method, target, self.record.name)

    def fault(self, text: str) -> DeltaFileError:
        """The error for something that PEFT cannot say."""
        return fault(str(self.stored.path), text, "mismatch")

    def module(self, path: str) -> nn.Module | None:
        """A module of the base, if that is at hand."""
        return None if self.root is None else named_modules(self.root)[path]

    def needed(self, path: str, why: str) -> nn.Module:
        """A module of the base.

        Raises:
            DeltaFileError: if there is none at hand.
        """
        module = self.module(path)
        if module is None:
            raise self.fault(f"{path} {why}, which only the base can tell: give it, base=….")
        return module


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
            if re.search(r"\.(lora_[AB]|lora_embedding_[AB]|ia3_l)\.", name):
                raise unused(
                    folder, [key], "found the name of an adapter in its keys: write it again by save_pretrained of PEFT"
                )
            rest[name] = tensor
            continue
        path = name.removesuffix(suffix).rstrip(".")
        outer, nested = path, 0
        while outer.endswith(WRAPPED):
            outer, nested = outer.removesuffix(WRAPPED), nested + 1
        path = outer.replace(WRAPPED, "")
        host = hosts.setdefault((path, nested), Host(path, nested, inside=path != outer))
        if _PARTS[suffix] in host.parts:
            raise unused(folder, [key], "found a second tensor for one part of a delta")
        if _PARTS[suffix] in ("a", "b") and tensor.dim() < 2:
            raise unused(folder, [key], "found tensors that are no matrices")
        host.parts[_PARTS[suffix]] = tensor
        host.table |= "embedding" in suffix
    return list(hosts.values()), rest


def path_in(name: str) -> str:
    """The module that a tensor of a folder is of, if it is a part of a delta, else ``""``."""
    suffix = next((suffix for suffix in _PARTS if name.endswith(f".{suffix}")), None)
    return "" if suffix is None else name.removesuffix(f".{suffix}").replace(WRAPPED, "")


def is_kernel(parts: Mapping[str, Tensor]) -> bool:
    """Whether A and B are those of a convolution: B has one element per position."""
    b = parts.get("b")
    return b is not None and b.dim() > 2 and all(size == 1 for size in b.shape[2:])


def placed(
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
            raise no_such(folder, host.path, modules)
        module, parameter = modules.get(host.path), parameters[host.path, host.nested]
        if module is not None:
            _check_kind(folder, host, module, parameter)
        target = place_of(host.path, parameter, root, "embedding" if host.table else None)
        if getattr(module, "max_norm", None) is not None:
            raise fault(str(folder.path), renormalised(host.path), "mismatch")
        yield host, target, _in_our_form(folder, host, target, module)


def _check_kind(folder: Folder, host: Host, module: nn.Module, parameter: str) -> None:
    """PEFT passes over tensors of another kind of layer in silence."""
    kind, what = host_kind(module, parameter), type(module).__name__
    if kind is None and weight_of(module, parameter) is not None:
        text = f"found a delta for {host.path!r}, which is a {what} here: no delta of PEFT's sits on its {parameter}."
    elif kind is not None and "a" in host.parts and host.table is not (kind == "embedding"):
        theirs = "an embedding" if host.table else "a layer that multiplies"
        text = f"found tensors that PEFT gives {theirs} for {host.path!r}, which is a {what} here."
    else:
        return
    raise fault(str(folder.path), f"{text} Load it into the base that it was trained on.", "mismatch")


def _parameters(folder: Folder, hosts: Sequence[Host], modules: Mapping[str, nn.Module]) -> dict[tuple[str, int], str]:
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
            host.named = True
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
    if isinstance(groups, int) and groups > 1 and is_kernel(parts):
        parts["a"] = _of_one_group(folder, host.path, parts["a"], groups)
    if module is None or is_kernel(parts):
        return parts
    weight = module._parameters.get(target.parameter)
    if weight is not None and weight.dim() == 3 and parts.keys() >= {"a", "b"}:
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
    a, b = parts["a"], parts["b"]
    a = a.reshape(count, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    if turned:  # the change of the stored weight is Bᵀ Aᵀ of a layer's
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return {"a": a.contiguous(), "b": b.contiguous()}


def fits(folder: Folder, pattern: str, path: str) -> bool:
    """Whether PEFT would say that a pattern of a folder fits a path.

    Raises:
        DeltaFileError: ``unsafe`` if it could take any time to say so.
    """
    # Of an expression with few repetitions, none of them of a group, the time is bounded by the length of the path;
    # each thing that may be left out doubles it, as does each group of two ways.
    choices = pattern.count("?") + (pattern.count("|") if pattern.count("(") > 1 else 0)
    repeats = len(_QUANTIFIER.findall(pattern)) > 2 or re.search(r"\)[*+{]", pattern)
    if len(pattern) > _MAX_PATTERN or repeats or choices > _MAX_CHOICES:
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


def whole_of(
    folder: Folder,
    method: str,
    options: dict[str, Any],
    targets: Sequence[Target],
    tensors: Values,
    rest: Mapping[str, Tensor],
    biases: frozenset[str],
) -> Read:
    """Deltas and what trained beside them, under our names."""
    named = {join(path_of(method, target), name): tensor for (target, name), tensor in tensors.items()}
    heads, values = heads_of(folder, {name: tensor for name, tensor in rest.items() if name not in biases})
    values |= {name.replace(WRAPPED, ""): rest[name] for name in biases}
    return Read((record_of(method, options, targets, heads),), named | values)


def record_of(
    method: str, options: Mapping[str, Any], targets: Sequence[Target], heads: Sequence[Target]
) -> MethodRecord:
    """What a file of ours would say; without a head in the folder, that there is none."""
    none: dict[str, Any] = {} if heads else {"modules_to_save": []}
    return MethodRecord(method, "default", {**options, **none}, (*targets, *heads))


def path_of(method: str, target: Target, name: str = "default") -> str:
    """Where the delta of a place is in a file."""
    return delta_path(target.module, "_".join(part for part in (method, name, suffix_of(target)) if part))


def heads_of(folder: Folder, rest: Mapping[str, Tensor]) -> tuple[list[Target], dict[str, Tensor]]:
    """Modules that trained as they are: those that a folder names, with every tensor that is left.

    Raises:
        DeltaFileError: (``mismatch``) if a tensor is of none of them.
    """
    named = [*(folder.config.get("modules_to_save") or ()), *usual_heads(folder.config.get("task_type"))]
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
        raise unused(folder, left, "found tensors that belong to no delta and to none of its modules_to_save")
    return [Target(path, "", "head") for path in found], dict(rest)


def usual_heads(task: object) -> tuple[str, ...]:
    """Names of the heads that PEFT saves for a task without being told."""
    return _HEADS.get(task, ()) if isinstance(task, str) else ()


def shared_with(root: nn.Module, path: str) -> str | None:
    """Another module that has a parameter of the one at a path, or of what is in it; ``None`` if there is none."""
    modules = named_modules(root)
    if path not in modules:
        return None
    inside = {id(module) for module in modules[path].modules()}
    own = {id(parameter) for parameter in modules[path].parameters()}
    others = ((name, module) for name, module in modules.items() if id(module) not in inside)
    return next((name for name, module in others if any(id(p) in own for p in module._parameters.values())), None)


def without_copies(folder: Folder, root: nn.Module) -> Folder:
    """A folder without the model's tables, if they are as in the base: ``save_embedding_layers`` writes them.

    Raises:
        DeltaFileError: (``base``) if one has other values.
    """
    asked = [getattr(root, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    tables = [table for ask in asked if callable(ask) and isinstance(getattr(table := ask(), "weight", None), Tensor)]
    saved = tuple(folder.config.get("modules_to_save") or ()) or ("\0",)
    left = dict(folder.tensors)
    for path, module in named_modules(root).items() if tables else ():
        names = [name for start in _STARTS if (name := f"{start}{path}.weight") in left]
        if names and any(module is table for table in tables) and not path.endswith(saved):
            check_table(folder, join(path, "weight"), left.pop(names[0]), cast(Tensor, module.weight))
    return replace(folder, tensors=left)


def check_table(folder: Folder, name: str, table: Tensor, own: Tensor) -> None:
    """A whole table that PEFT wrote beside a delta has to be the base's.

    Raises:
        DeltaFileError: (``base``) if it is not.
    """
    if own.is_meta or (own.shape == table.shape and torch.equal(own.detach().cpu().to(table.dtype), table)):
        return
    raise fault(
        str(folder.path),
        f"{name} {tuple(table.shape)} is not the base's {name.replace(WRAPPED, '')} {tuple(own.shape)}: the vocabulary "
        "was resized, or the table trained, or this is another base. Resize the base as it was "
        "(resize_token_embeddings) and give it these values first.",
        "base",
    )


def biases_of(folder: Folder, rest: Mapping[str, Tensor], hosts: set[str]) -> frozenset[str]:
    """Names of biases that trained in place, by the option that says so."""
    kind = folder.config.get("bias", "none")
    if kind not in ("none", "lora_only", "all"):
        raise fault(str(folder.path / CONFIG), f"bias={shown(kind)}, expected none, lora_only or all.")
    if kind == "none":
        return frozenset()
    found = {name for name in rest if "bias" in name.rpartition(".")[2]}
    if kind == "all":  # earlier releases of PEFT went by all of the name (T5's relative_attention_bias.weight)
        saved = tuple(folder.config.get("modules_to_save") or ()) or ("\0",)
        older = {name for name in rest if "bias" in name and not any(f".{path}." in f".{name}" for path in saved)}
        return frozenset(found | older)
    return frozenset(name for name in found if name.rpartition(".")[0].replace(WRAPPED, "") in hosts)


def renormalised(path: str) -> str:
    """What is said of a table whose rows are kept below a norm."""
    return (
        f"{path} is an embedding with max_norm, and PEFT keeps the rows of the delta below that norm, too, which this "
        "library does not. Merge it with the library that trained it."
    )


def no_such(folder: Folder, path: str, modules: Mapping[str, nn.Module]) -> DeltaFileError:
    """The error for a delta on a module that the base does not have."""
    near = difflib.get_close_matches(path, list(modules), n=3, cutoff=0.4)
    longer = [other.removesuffix(path) for other in modules if other.endswith(f".{path}")]
    example = f"{{'': {longer[0]!r}}}" if len(longer) == 1 else "{'there.': 'here.'}"
    return fault(
        str(folder.path),
        f"found a delta for {path!r}, which this {type(modules['']).__name__} does not have; near it: "
        f"{', '.join(map(repr, near)) or 'none'}. Load it into the base that it was trained on, or say how paths "
        f"differ: rename={example}.",
        "mismatch",
    )
