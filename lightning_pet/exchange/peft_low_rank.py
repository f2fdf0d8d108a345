"""Low-rank deltas of ours as HF PEFT writes them.

All are written in one form that every reader understands: the scale goes into B, several deltas of one layer become one
of their ranks' sum, and zeros fill all up to one rank, so that ``lora_alpha = r`` holds for all.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.exchange.folder import PREFIX
from lightning_pet.exchange.peft_hosts import WRAPPED, Export, is_kernel, path_in, renormalised
from lightning_pet.insertion.low_rank_places import scale_of
from lightning_pet.layers.rows import spread
from lightning_pet.model.layer_kinds import host_kind, matrix_of, transposed
from lightning_pet.model.naming import CHILD, by_delta, join, named_modules
from lightning_pet.model.structure import Target

PROJECTIONS: Final = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.up", "ffn.gate", "ffn.down")


@dataclass
class Layer:
    """The low-rank deltas of one parameter, stacked."""

    target: Target
    a: list[Tensor] = field(default_factory=list)
    b: list[Tensor] = field(default_factory=list)
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The sum of their ranks."""
        return sum(a.shape[0 if a.dim() != 3 or self.is_kernel else 1] for a in self.a)

    @property
    def is_kernel(self) -> bool:
        """They are those of a convolution."""
        return is_kernel({"b": self.b[0]})

    @property
    def is_stack(self) -> bool:
        """They are those of several matrices in one parameter: experts."""
        return self.a[0].dim() == 3 and not self.is_kernel


def lora(export: Export, left: dict[str, Tensor]) -> None:
    """LoRA and its variants; PiSSA and OLoRA as a plain one of twice the rank, on the untouched base."""
    config = export.record.config
    layers: dict[tuple[str, str], Layer] = {}
    for target, parts in taken(export, left):
        layer = layers.setdefault((target.module, target.parameter), Layer(target))
        rank = parts["b"].shape[1 if is_kernel(parts) else -1]
        _stack(export, layer, target, parts, scale_of(config, target, rank))
    write_low_rank(export, list(layers.values()), bool(config.get("use_dora")))
    _lora_biases(export, left, {layer.target.module for layer in layers.values()})


def taken(export: Export, left: dict[str, Tensor]) -> Iterator[tuple[Target, dict[str, Tensor]]]:
    """Each place with the tensors of its delta, which are taken out of those that are left."""
    groups = by_delta(left)
    for target in export.record.targets:
        path = export.path(target)
        if path in groups:
            yield target, {name: left.pop(join(path, name)) for name in groups[path]}


def _stack(export: Export, layer: Layer, target: Target, parts: Mapping[str, Tensor], scale: float) -> None:
    layer.a.append(parts["a"])
    layer.b.append(wide(export, target, parts["b"] * scale))
    if "a0" in parts:
        layer.a.append(parts["a0"])
        layer.b.append(wide(export, target, parts["b0"] * -scale))
    if "bias" in parts:
        layer.bias = parts["bias"] * scale
    if "magnitude" in parts:
        layer.magnitude = _magnitude(export, layer, target, parts["magnitude"])


def wide(export: Export, target: Target, b: Tensor) -> Tensor:
    """B with a row for every output of its layer: zero where a role has none."""
    if target.rows is None:
        return b
    host = export.needed(target.module, "has several roles in one weight")
    return spread(b, target.rows, matrix_of(host, target.parameter)[0], 0.0, -2)


def _magnitude(export: Export, layer: Layer, target: Target, own: Tensor) -> Tensor:
    """Magnitudes of all outputs: those that no role has keep the norm of the base's row."""
    if target.rows is None:
        return own
    host = export.needed(target.module, "has several roles in one weight")
    if layer.magnitude is None:
        weight = host._parameters[target.parameter]
        assert weight is not None
        matrix = weight.detach().t() if transposed(host, target.parameter) else weight.detach()
        layer.magnitude = matrix.to(torch.promote_types(own.dtype, torch.float32)).norm(dim=1).to(own.dtype)
    filled, start = layer.magnitude.clone(), 0
    for first, end in target.rows:
        filled[first:end] = own[start : start + end - first]
        start += end - first
    return filled


def write_low_rank(export: Export, layers: Sequence[Layer], dora: bool, **config: Any) -> None:
    """Write the layers, and what the configuration says of them.

    Raises:
        DeltaFileError: if PEFT cannot say one of them, or only the base could tell how.
    """
    if not layers:
        raise export.fault("found no low-rank delta in it.")
    groups = [_groups(export, layer) for layer in layers]
    rank = max(layer.rank * count for layer, count in zip(layers, groups, strict=True))
    rank = math.lcm(*groups) * math.ceil(rank / math.lcm(*groups))
    attentions = {layer.target.module for layer in layers if layer.target.parameter == "in_proj_weight"}
    stacks = [layer for layer in layers if _is_parameter(export, layer)]
    for layer in layers:
        if layer in stacks:
            _write_parameter(export, layer, rank)
        else:
            _write_layer(export, layer, rank, attentions)
    for path in attentions:
        _fill_attention(export, path, rank)
    hosts = [layer for layer in layers if layer not in stacks]
    names = {layer.target.module for layer in hosts}
    names = (names | attentions) - {join(path, "out_proj") for path in attentions}  # PEFT wraps them as a whole
    export.config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": float(export.record.config.get("dropout") or 0.0),
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": dora,
        "lora_bias": any(layer.bias is not None for layer in layers),
        "fan_in_fan_out": bool(hosts) and all(kind_at(export, layer.target) == "conv1d_hf" for layer in hosts),
        **targets_of(export, sorted(names)),
        **config,
    }
    if stacks:
        _check_stacks(export, stacks, dora)
        export.config["target_parameters"] = sorted(layer.target.path for layer in stacks)


def kind_at(export: Export, target: Target) -> str | None:
    """What kind of layer a place is in, if the base is at hand."""
    module = export.module(target.module)
    return None if module is None else host_kind(module, target.parameter)


def _write_layer(export: Export, layer: Layer, rank: int, attentions: set[str]) -> None:
    target, path = layer.target, layer.target.module
    groups, kind = _groups(export, layer), kind_at(export, target)
    a, b = padded(torch.cat(layer.a), rank // groups, 0), padded(torch.cat(layer.b, 1), rank // groups, 1)
    if kind is None and not layer.is_kernel and target.role not in (*PROJECTIONS, "embedding"):
        export.needed(path, "may be a linear layer or a table")
    if groups > 1:
        a = _reading_all(a, groups)
    inside, parent = False, path.rpartition(".")[0]
    if path.endswith("out_proj") and (parent in attentions or isinstance(export.module(parent), nn.MultiheadAttention)):
        inside = True
        attentions.add(parent)
        path, b = f"{parent}{WRAPPED}.out_proj", b / 2  # PEFT adds this change twice
    if getattr(export.module(target.module), "max_norm", None) is not None:
        raise export.fault(renormalised(path))
    if kind == "embedding" or (kind is None and target.role == "embedding"):
        names = {"lora_embedding_A": a, "lora_embedding_B": b}
    else:
        names = {"lora_A.weight": a, "lora_B.weight": b}
    if layer.bias is not None:
        names["lora_B.bias"] = layer.bias
    if layer.magnitude is not None:
        if inside or target.parameter == "in_proj_weight":
            raise export.fault(f"{target.path}: PEFT has no DoRA in a MultiheadAttention. Merge it.")
        names["lora_magnitude_vector.weight"] = _shaped(layer, b)  # without the ending transformers leaves it out
    export.tensors |= {f"{PREFIX}{path}.{name}": tensor.contiguous() for name, tensor in names.items()}


def _shaped(layer: Layer, b: Tensor) -> Tensor:
    assert layer.magnitude is not None
    return layer.magnitude.reshape(1, -1, *(1,) * (b.dim() - 2)) if layer.is_kernel else layer.magnitude


def padded(tensor: Tensor, rank: int, dim: int) -> Tensor:
    """With zeros behind a dimension until it has this size."""
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim) if shape[dim] else tensor


def _groups(export: Export, layer: Layer) -> int:
    """Of a convolution; PEFT's A reads the inputs of all of them, and its rank counts for all."""
    if not layer.is_kernel:
        return 1
    return int(getattr(export.needed(layer.target.module, "is a convolution, which may have groups"), "groups", 1))


def _reading_all(a: Tensor, groups: int) -> Tensor:
    """An A for the inputs of one group becomes a copy for each group, zero elsewhere."""
    rank, inputs = a.shape[:2]
    wide = a.new_zeros(groups * rank, groups * inputs, *a.shape[2:])
    for group in range(groups):
        wide[group * rank : (group + 1) * rank, group * inputs : (group + 1) * inputs] = a
    return wide


def _fill_attention(export: Export, path: str, rank: int) -> None:
    """PEFT wraps both projections of a MultiheadAttention, and misses what only one of them has."""
    attention = export.needed(path, "is a MultiheadAttention")
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
        raise export.fault(f"{path}: PEFT wants a MultiheadAttention with one weight for q, k and v. Merge it.")
    width = attention.embed_dim
    like = next(iter(export.tensors.values()))
    for name, outputs in ((path, 3 * width), (f"{path}{WRAPPED}.out_proj", width)):
        export.tensors.setdefault(f"{PREFIX}{name}.lora_A.weight", like.new_zeros(rank, width))
        export.tensors.setdefault(f"{PREFIX}{name}.lora_B.weight", like.new_zeros(outputs, rank))


def _is_parameter(export: Export, layer: Layer) -> bool:
    """PEFT knows it by the name of a parameter: experts, and what no layer has as its weight."""
    if layer.is_stack or layer.target.parameter == "in_proj_weight":
        return layer.is_stack
    plain = isinstance(export.module(layer.target.module), nn.Linear)
    return not plain and kind_at(export, layer.target) == "weight"


def _write_parameter(export: Export, layer: Layer, rank: int) -> None:
    """Of experts A has its rows expert by expert, B its columns rank by rank."""
    target = layer.target
    host = export.needed(target.module, "holds a matrix of no layer, or several")
    a, b = padded(torch.cat(layer.a, -2), rank, -2), padded(torch.cat(layer.b, -1), rank, -1)
    if layer.is_stack:
        if transposed(host, target.parameter):
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        a, b = a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
    own = [t.parameter for t in export.record.targets if t.module == target.module]
    order = [name for name in host._parameters if name in own]
    path = target.module + WRAPPED * (len(order) - 1 - order.index(target.parameter))
    export.tensors[f"{PREFIX}{path}.lora_A.weight"] = a.contiguous()
    export.tensors[f"{PREFIX}{path}.lora_B.weight"] = b.contiguous()


def _check_stacks(export: Export, stacks: Sequence[Layer], dora: bool) -> None:
    if dora or export.config["lora_dropout"] or any(layer.bias is not None for layer in stacks):
        raise export.fault(
            f"{stacks[0].target.path}: PEFT has neither DoRA nor dropout nor a bias of B on a parameter that is no "
            "layer's weight. Merge it (to='transformers')."
        )


def _lora_biases(export: Export, left: dict[str, Tensor], hosts: set[str]) -> None:
    """Biases that trained in place, by PEFT's option for them; one that was named alone is one of all for PEFT."""
    kind, saved = export.record.config.get("bias", "none"), export.record.config.get("modules_to_save") or ()
    own = [name for name in left if "bias" in name.rpartition(".")[2]]
    if kind == "none":
        own = [name for name in own if any(f".{name}".endswith(f".{path}") for path in saved)]
    elif kind != "all":
        own = [name for name in own if name.rpartition(".")[0] in hosts]
    if own:
        export.config["bias"] = "all" if kind == "none" else kind
    write_biases(export, left, own)


def write_biases(export: Export, left: dict[str, Tensor], names: Sequence[str]) -> None:
    """Write values of the base's own parameters, under the names that they have where PEFT has wrapped layers."""
    hosts = {path_in(name.removeprefix(PREFIX)) for name in export.tensors}
    for name in names:
        parts = name.split(".")
        wrapped = [".".join(parts[:end]) in hosts for end in range(1, len(parts) + 1)]
        path = "".join(f".{part}{WRAPPED * inside}" for part, inside in zip(parts, wrapped, strict=True))
        export.tensors[f"{PREFIX}{path[1:]}"] = left.pop(name)


def adalora(export: Export, left: dict[str, Tensor]) -> None:
    """AdaLoRA as the plain LoRA of the triplets that are kept: A takes their factors."""
    config = export.record.config
    scale = float(config["alpha"]) / int(config["init_r"])
    layers: dict[tuple[str, str], Layer] = {}
    for target, parts in taken(export, left):
        layer = layers.setdefault((target.module, target.parameter), Layer(target))
        a, b = _of_triplets(parts)
        module = export.module(target.module)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            a = a.reshape(len(a), -1, *module.kernel_size)
            b = b.reshape(*b.shape, *(1,) * len(module.kernel_size))
        _stack(export, layer, target, {"a": a, "b": b}, scale)
    write_low_rank(export, list(layers.values()), False)


def _of_triplets(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A with its factors, and B; a file may hold only those that are left, of experts one after another."""
    a, b, e = parts["a"], parts["b"], parts["e"]
    kept = parts["kept"].bool() if "kept" in parts else torch.ones_like(e, dtype=torch.bool)
    if e.shape == kept.shape:
        return a * (e * kept).unsqueeze(-1), b
    whole_a, whole_b = a.new_zeros(*kept.shape, a.shape[-1]), b.new_zeros(*kept.shape, b.shape[-1])
    whole_a[kept], whole_b[kept] = a * e.unsqueeze(-1), b
    return whole_a, whole_b.mT


def targets_of(export: Export, paths: Sequence[str]) -> dict[str, Any]:
    """Names that PEFT resolves to exactly these modules: the last parts of their paths if that does, else all."""
    known = [] if export.root is None else [path for path in named_modules(export.root) if path and not _is_ours(path)]
    short = sorted({path.rpartition(".")[2] for path in paths})
    if known and {path for path in known if path.rpartition(".")[2] in short} == {*paths}:
        return {"target_modules": short, "exclude_modules": None}
    also = [other for other in known if other not in paths and any(other.endswith(f".{path}") for path in paths)]
    return {"target_modules": list(paths), "exclude_modules": also or None}


def names_of(export: Export, paths: Sequence[str]) -> list[str] | str:
    """Names of exactly these modules for what has no exceptions in PEFT: an expression where a list needs them."""
    found = targets_of(export, paths)
    if found["exclude_modules"]:
        return "|".join(map(re.escape, paths))
    names: list[str] = found["target_modules"]
    return names


def _is_ours(path: str) -> bool:
    return CHILD in path.split(".")
