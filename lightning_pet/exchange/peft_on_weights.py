"""Deltas of HF PEFT that act on the weight of a layer itself, in terms of ours and back: HiRA."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.exchange.folder import PREFIX, Base, Folder
from lightning_pet.exchange.peft_hosts import (
    Export,
    Read,
    Values,
    placed,
    renormalised,
    split_hosts,
    whole_of,
)
from lightning_pet.exchange.peft_layers import of_rank, without_tables
from lightning_pet.exchange.peft_low_rank import PROJECTIONS, Layer, kind_at, padded, taken, targets_of, wide
from lightning_pet.model.layer_kinds import embed_scale, matrix_of
from lightning_pet.model.structure import Target
from lightning_pet.store.strict_json import fault
from lightning_pet.targets.patterns import exactly

_CALLED = ("linear", "conv1d_hf", "embedding", "conv")


def read_hira(folder: Folder, base: Base | None) -> Read:
    """HiRA: A and B whose product multiplies the weight."""
    root = base.root if base else None
    hosts, rest = split_hosts(folder)
    targets: list[Target] = []
    tensors: Values = {}
    ranks = {}
    for host, target, parts in placed(folder, hosts, root, ("a", "b")):
        module = None if root is None else root.get_submodule(target.module)
        if why := _beyond_peft(module):
            raise fault(str(folder.path), f"{target.module} {why}, which PEFT leaves out of HiRA.", "mismatch")
        scale = embed_scale(module) if host.table and module is not None else 1.0
        if module is not None:
            parts = of_rank(parts, min(matrix_of(module, target.parameter)))
        ranks[exactly(target)] = parts["a"].shape[0]
        targets.append(target)
        tensors |= {(target, "a"): parts["a"], (target, "b"): parts["b"] / scale}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    options = {
        "r": rank,
        "dropout": float(folder.config.get("hira_dropout") or 0.0),
        "rank_pattern": {place: own for place, own in ranks.items() if own != rank} or None,
        "target_modules": sorted({target.module for target in targets}),
    }
    rest = without_tables(folder, rest, [target.module for target in targets], root)
    return whole_of(folder, "hira", options, targets, tensors, rest, frozenset())


def _beyond_peft(module: nn.Module | None) -> str:
    """What a layer does that PEFT's own product with its weight does not."""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return "pads in its own way"
    if getattr(module, "groups", 1) != 1:
        return "has groups"
    return ""


def write_hira(export: Export, left: dict[str, Tensor]) -> None:
    """HiRA, its roles of a fused weight side by side, all ranks filled up to one."""
    layers: dict[str, Layer] = {}
    for target, parts in taken(export, left):
        _check_called(export, target)
        layer = layers.setdefault(target.module, Layer(target))
        layer.a.append(parts["a"])
        layer.b.append(wide(export, target, parts["b"]))
    if not layers:
        raise export.fault("found no delta of any layer in it.")
    rank = max(layer.rank for layer in layers.values())
    tables = {path for path, layer in layers.items() if _is_table(export, layer.target)}
    for path, layer in layers.items():
        module = export.module(path)
        if layer.is_kernel and (why := _beyond_peft(export.needed(path, "is a convolution"))):
            raise export.fault(f"{path} {why}, which PEFT leaves out of HiRA. Merge it (to='transformers').")
        if getattr(module, "max_norm", None) is not None:
            raise export.fault(renormalised(path))
        a, b = padded(torch.cat(layer.a), rank, 0), padded(torch.cat(layer.b, 1), rank, 1)
        names = ("hira_embedding_A", "hira_embedding_B") if path in tables else ("hira_A", "hira_B")
        if path in tables and module is not None:
            b = b * embed_scale(module)
        export.tensors |= {f"{PREFIX}{path}.{name}": t.contiguous() for name, t in zip(names, (a, b), strict=True)}
    export.config |= {
        "peft_type": "HIRA",
        "r": rank,
        "hira_dropout": float(export.record.config.get("dropout") or 0.0),
        "init_weights": True,
        **said_of_hosts(export, layers),
    }


def said_of_hosts(export: Export, layers: Any) -> dict[str, Any]:
    """Which modules carry a delta, and which way their weights lie."""
    kinds = [kind_at(export, Target(path)) for path in layers]
    return {"fan_in_fan_out": all(kind == "conv1d_hf" for kind in kinds), **targets_of(export, sorted(layers))}


def _is_table(export: Export, target: Target) -> bool:
    kind = kind_at(export, target)
    if kind is None and target.role not in (*PROJECTIONS, "embedding"):
        export.needed(target.module, "may be a linear layer or a table")
    return kind == "embedding" or (kind is None and target.role == "embedding")


def _check_called(export: Export, target: Target, kinds: tuple[str, ...] = _CALLED) -> None:
    """PEFT changes what a layer is called with, not what others read from it."""
    kind = kind_at(export, target)
    parent = export.module(target.module.rpartition(".")[0])
    inside = isinstance(parent, nn.MultiheadAttention)
    if target.parameter != "weight" or inside or (kind is not None and kind not in kinds):
        raise export.fault(
            f"{target.path}: PEFT has no {export.record.method} on such a weight. Merge it (to='transformers')."
        )
