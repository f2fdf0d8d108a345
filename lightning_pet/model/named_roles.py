"""What module names, classes and the tensor-parallel plan say about roles and layers. No forward is run.

Names are the second opinion behind :mod:`lightning_pet.probe.probe`, and the only one where no forward
can be run. The patterns are the vocabulary of the field, not a table of architectures.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_pet.model.layer_kinds import base_class, is_conv1d
from lightning_pet.model.naming import CHILD, canonical, is_below, join, named_modules
from lightning_pet.model.structure import Role, Rows, Structure, Target

_ATTENTION = re.compile(r"attention|attn|\bmha\b", re.I)
_FFN = re.compile(r"mlp|ffn|feed_?forward|intermediate|dense(?:relu|gated|act|silu)|expert|moe", re.I)
_FFN_CLASS = re.compile(r"(?<!self)(?<!attention)output$", re.I)  # BertOutput, but not BertSelfOutput
_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec|multihead_attn|encoder_decoder_att", re.I)

_Q = r"q|q_proj|query|q_lin|query_proj|wq|Wq|to_q|linear_q|q_b_proj|queries|q_linear|query_layer|q_attn|project_q|q_net"
_K = r"k|k_proj|key|k_lin|key_proj|wk|Wk|to_k|linear_k|keys|k_linear|key_layer|project_k"
_V = r"v|v_proj|value|v_lin|value_proj|wv|Wv|to_v|linear_v|values|v_linear|value_layer|project_v"
_O = (
    r"o|o_proj|out_proj|out_lin|wo|Wo|to_out|to_out\.0|linear_out|dense|c_proj|output\.dense|out|proj|projection|"
    r"output_proj|o_linear|post_proj|attn_out|output_linear|linear_o|proj_out|output_layer|fc_out|out_linear"
)
_QKV = (
    r"qkv|qkv_proj|c_attn|query_key_value|Wqkv|in_proj|att_proj|qkv_linear|to_qkv|in_proj_linear|qkv_net|attn_qkv|"
    r"W_pack|linear_qkv|query_key_value_proj|qkv_layer"
)
_KV = r"kv|kv_proj|kv_b_proj|to_kv|key_value|wkv|kv_linear|c_kv"
_UP = (
    r"up_proj|fc1|lin1|c_fc|dense_h_to_4h|intermediate\.dense|wi|wi_1|linear1|fc_in|w3|up|ff1|linear_1|layer_1|l1|"
    r"ffn1|lin_1|wi_up|dense1|intermediate_dense|linear_in|ffn|conv1"
)
_GATE = r"gate_proj|wi_0|w1|gate|linear_gate|wi_gate"
_DOWN = (
    r"down_proj|fc2|lin2|c_proj|dense_4h_to_h|output\.dense|wo|Wo|linear2|fc_out|w2|down|ff2|linear_2|layer_2|ffn2|dense2|"
    r"lin_2|output_dense|linear_out|ffn_output|conv2|dense"
)
_GATE_UP = r"gate_up_proj|gate_up|w12|Wi|gate_and_up_proj|input_linear|gate_up_projs"

_ATTENTION_PATTERNS: tuple[tuple[str, tuple[Role, ...]], ...] = (
    (_Q, ("attention.q",)),
    (_K, ("attention.k",)),
    (_V, ("attention.v",)),
    (_QKV, ("attention.q", "attention.k", "attention.v")),
    (_KV, ("attention.k", "attention.v")),
    (_O, ("attention.o",)),
)
_FFN_PATTERNS: tuple[tuple[str, tuple[Role, ...]], ...] = (
    (_GATE_UP, ("ffn.gate", "ffn.up")),
    (_GATE, ("ffn.gate",)),
    (_UP, ("ffn.up",)),
    (_DOWN, ("ffn.down",)),
)
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class NamedRoles:
    """The roles that the name of one parameter suggests.

    Attributes:
        module: path of the host.
        parameter: parameter inside the host.
        roles: one role, or several for a fused projection.
        cross: the name speaks of cross-attention.
    """

    module: str
    parameter: str
    roles: tuple[Role, ...]
    cross: bool = False


def named_places(model: nn.Module) -> dict[str, nn.Module]:
    """Every module once, under the first of its canonical names, in module order; inserted deltas are left out."""
    places: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        path = canonical(name)
        if "pet" not in path or "pet" not in path.split("."):
            places.setdefault(path, module)
    return places


def is_linear(module: nn.Module) -> bool:
    """A module that multiplies by a two-dimensional weight, also a quantised one."""
    if isinstance(module, nn.Linear) or not hasattr(module, "weight"):
        return isinstance(module, nn.Linear)
    return (hasattr(module, "in_features") and hasattr(module, "out_features")) or is_conv1d(type(module))


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear-like module."""
    linear: Any = module
    if is_conv1d(type(module)):
        rows, columns = linear.weight.shape
        return int(rows), int(columns)
    return int(linear.in_features), int(linear.out_features)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: by its class's name, as no base class is common to all norms, and its shape."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return "norm" in base_class(module).__name__.lower() and all(parameter.ndim <= 1 for parameter in own)


def is_router(module: nn.Module) -> bool:
    """A layer whose class says that it returns scores, maybe in a tuple, instead of features."""
    overrides = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return bool(re.search(r"router|topk|gating", type(module).__name__, re.I)) or (
        overrides and bool(re.search(r"gate", type(module).__name__, re.I))
    )


def gives_one_number(module: nn.Module) -> bool:
    """A linear layer with one output: a value, a score, the gate of a shared expert."""
    return is_linear(module) and features(module)[1] == 1


def is_named_gate(path: str) -> bool:
    """Whether a name speaks of weighing others, where no forward tells.

    >>> is_named_gate("mlp.shared_expert_gate"), is_named_gate("critic.value")
    (True, False)
    """
    return re.search(r"gate|gating|router", path.rpartition(".")[2], re.I) is not None


def layer_index(path: str, lists: Sequence[str] | None = None) -> int | None:
    """Index of the layer that a module belongs to: the first number in its path, ``None`` without one.

    Args:
        path: of the module.
        lists: names, or ends of dotted names, of the lists that hold the layers: the number behind one of them counts.

    >>> layer_index("encoder.block.3.layer.1.DenseReluDense.wi"), layer_index("layers.0.blocks.1.mlp", ["blocks"])
    (3, 1)
    """
    if lists:
        names = "|".join(re.escape(name) for name in lists)
        found = re.search(rf"(?:^|\.)(?:{names})\.(\d+)(?=\.|$)", path)
    else:
        found = _LAYER.search(path)
    return int(found.group(1)) if found else None


def without_numbers(path: str) -> str:
    """The path with every index replaced by ``*``: equal for the same place in all layers."""
    return _LAYER.sub(lambda found: found.group(0).replace(found.group(1), "*"), path)


def roles_by_name(model: nn.Module) -> list[NamedRoles]:
    """Roles of all projections, judged by leaf name and by the class of the nearest telling ancestor."""
    modules = named_places(model)
    found: list[NamedRoles] = []
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            continue  # known exactly, see multihead_targets
        if is_linear(module) and not is_router(module) and not gives_one_number(module):
            if not isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention):
                found.extend(_by_name(modules, path, "weight"))
        else:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() == 3:
                    found.extend(_by_name(modules, path, name))
    return found


def multihead_targets(path: str, module: nn.MultiheadAttention, cross: bool = False) -> Iterator[Target]:
    """Exact targets of one ``nn.MultiheadAttention``: its packed weight holds q, k, v in thirds."""
    roles: tuple[Role, ...] = ("attention.q", "attention.k", "attention.v")
    width = module.embed_dim
    for i, role in enumerate(roles):
        if module._parameters.get("in_proj_weight") is not None:
            yield Target(path, "in_proj_weight", role, cross, ((i * width, (i + 1) * width),))
        else:
            yield Target(path, f"{role[-1]}_proj_weight", role, cross)
    yield Target(f"{path}.out_proj".lstrip("."), "weight", "attention.o", cross)


def declared_rows(module: nn.Module, named: NamedRoles) -> dict[Role, Rows] | None:
    """Rows of a fused projection where only one layout is possible or the module states it, else ``None``.

    GPT-2's ``c_attn`` (contiguous thirds), and experts with the attributes ``is_concatenated`` and
    ``is_transposed``: gate and up one after the other, or alternating.
    """
    if named.parameter == "weight":
        if named.module.rpartition(".")[2] != "c_attn" or not is_conv1d(type(module)) or len(named.roles) != 3:
            return None
        width, outputs = features(module)
        thirds: dict[Role, Rows] = {role: ((i * width, (i + 1) * width),) for i, role in enumerate(named.roles)}
        return thirds if outputs == 3 * width else None
    concatenated, transposed = getattr(module, "is_concatenated", None), getattr(module, "is_transposed", None)
    if named.roles != ("ffn.gate", "ffn.up") or concatenated is None or transposed is None:
        return None
    size = int(getattr(module, named.parameter).shape[2 if transposed else 1])
    half = size // 2
    if concatenated:
        return {"ffn.gate": ((0, half),), "ffn.up": ((half, size),)}
    return {
        "ffn.gate": tuple((i, i + 1) for i in range(0, size, 2)),
        "ffn.up": tuple((i, i + 1) for i in range(1, size, 2)),
    }


def _by_name(modules: Mapping[str, nn.Module], path: str, parameter: str) -> Iterator[NamedRoles]:
    name = path if parameter == "weight" else f"{path}.{parameter}"
    kind = _context(modules, path, include_self=parameter != "weight")
    if kind is None:
        return
    patterns = _ATTENTION_PATTERNS if kind == "attention" else _FFN_PATTERNS
    for pattern, roles in patterns:
        if re.search(rf"(?:^|\.)(?:{pattern})$", name):
            yield NamedRoles(path, parameter, roles, kind == "attention" and is_cross(modules, path))
            return


def _context(modules: Mapping[str, nn.Module], path: str, include_self: bool) -> str | None:
    """``"attention"`` or ``"ffn"`` by the nearest ancestor whose class or name speaks of one of them."""
    parts = path.split(".")
    last = len(parts) if include_self else len(parts) - 1
    for length in range(last, -1, -1):
        ancestor = ".".join(parts[:length])
        module = modules.get(ancestor)
        words = (type(module).__name__ if module is not None else "", parts[length - 1] if length else "")
        if any(_ATTENTION.search(word) and not re.search(r"block|layer$", word, re.I) for word in words):
            return "attention"
        if any(_FFN.search(word) for word in words) or _FFN_CLASS.search(words[0]):
            return "ffn"
        if any(_ATTENTION.search(word) for word in words):
            return "attention"
        if re.search(r"Layer$|Block$", words[0]):
            return "ffn" if _looks_ffn(parts[-1]) else None
    return None


def _looks_ffn(leaf: str) -> bool:
    names = r"fc1|fc2|linear1|linear2|lin1|lin2|wi|ffn|ffn_output|up_proj|down_proj|gate_proj"
    return re.fullmatch(names, leaf) is not None


def is_cross(modules: Mapping[str, nn.Module], path: str) -> bool:
    """The path, or the class of an attention around it, speaks of cross-attention."""
    parts = path.split(".")
    around = (modules.get(".".join(parts[:i])) for i in range(1, len(parts)))
    classes = [type(module).__name__ for module in around if module is not None]
    return bool(_CROSS.search(path)) or any(_CROSS.search(name) and "Attention" in name for name in classes)


def tensor_parallel_plan(model: nn.Module) -> dict[str, str]:
    """Hugging Face's own plan, ``{glob: "colwise" | "rowwise" | ...}``; empty where there is none."""
    plan: dict[str, str] = {}
    config = getattr(model, "config", None)
    prefix = getattr(model, "base_model_prefix", "")
    for source, start in (
        (getattr(config, "base_model_tp_plan", None), f"{prefix}." if prefix and hasattr(model, prefix) else ""),
        (getattr(model, "_tp_plan", None), ""),
    ):
        if isinstance(source, Mapping):
            plan.update({f"{start}{name}": str(style) for name, style in source.items() if style is not None})
    return plan


# --- where layers are: the numbered modules that the residual stream runs through -----------------


@dataclass(frozen=True)
class Stack:
    """Layers that follow each other.

    Attributes:
        path: module that holds them (``"encoder.layer"``), ``""`` for the root.
        layers: paths of those that have parameters, in order.
    """

    path: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Outside:
    """Parameters outside of all layers, by what they belong to.

    Attributes:
        embeddings: embeddings of any kind, with the norms among them.
        norms: the other norms (after the last layer).
    """

    embeddings: tuple[str, ...]
    norms: tuple[str, ...]


def layer_stacks(model: nn.Module, structure: Structure) -> tuple[Stack, ...]:
    """All stacks of a model: one for most, two for an encoder with a decoder, one per stage of a staged model.

    Stacks are outermost modules with numbered children. Where it is known which of them the residual stream
    runs through, or else which hold projections of a transformer, the others (lists of embeddings or heads)
    are left out.
    """
    stacks = []
    for path, module in named_modules(model).items():
        if any(part.isdigit() or part == CHILD for part in path.split(".")):
            continue
        numbered = [(n, m) for n, m in module.named_children() if canonical(n).isdigit()]
        layers = [join(path, canonical(n)) for n, m in numbered if any(True for _ in m.parameters())]
        if layers:
            stacks.append(Stack(path, tuple(layers)))
    sites = [branch for site in structure.sites for branch in site.branch]
    for places in (sites, [target.module for target in structure.targets]):
        holding = [s for s in stacks if any(is_below(place, layer) for place in places for layer in s.layers)]
        if holding:
            return tuple(holding)
    return tuple(stacks)


def outside(model: nn.Module, stacks: Sequence[Stack], heads: Sequence[str]) -> Outside:
    """What is outside of all layers and is no head."""
    modules = named_modules(model)
    layers = [layer for stack in stacks for layer in stack.layers]
    found: dict[str, list[str]] = {"embeddings": [], "norms": []}
    for name in names_of_base(model):
        owner = name.rpartition(".")[0]
        if name in heads or any(is_below(name, layer) for layer in layers):
            continue
        if isinstance(modules[owner], nn.Embedding) or re.search("embed|token", name, re.I):
            found["embeddings"].append(name)
        elif is_norm(modules[owner]):
            found["norms"].append(name)
    return Outside(tuple(found["embeddings"]), tuple(found["norms"]))


def norms_inside(model: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
    """Parameters of all norms in the given layers."""
    modules = named_modules(model)
    return tuple(
        name
        for name in names_of_base(model)
        if is_norm(modules[name.rpartition(".")[0]]) and any(is_below(name, layer) for layer in layers)
    )


def names_of_base(model: nn.Module, path: str = "") -> tuple[str, ...]:
    """Parameters in a module, without deltas; a tied one under its first name."""
    return tuple(
        canonical(name)
        for name, _ in model.named_parameters()
        if is_below(canonical(name), path) and CHILD not in canonical(name).split(".")
    )
