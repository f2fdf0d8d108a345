"""Deltas of HF PEFT that act on the weight of a layer itself, in terms of ours and back: HiRA, MiSS, SHiRA."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.exchange.folder import CONFIG, PREFIX, Base, Folder
from lightning_pet.exchange.peft_hosts import (
    Export,
    Read,
    Values,
    is_kernel,
    placed,
    renormalised,
    split_hosts,
    whole_of,
)
from lightning_pet.exchange.peft_layers import of_rank, without_tables
from lightning_pet.exchange.peft_low_rank import PROJECTIONS, Layer, kind_at, names_of, padded, taken, targets_of, wide
from lightning_pet.model.layer_kinds import embed_scale, matrix_of, transposed
from lightning_pet.model.structure import Target
from lightning_pet.store.strict_json import fault, shown
from lightning_pet.targets.patterns import exactly

_CALLED: Final = ("linear", "conv1d_hf", "embedding", "conv")


def read_hira(folder: Folder, base: Base | None) -> Read:
    """HiRA: A and B whose product multiplies the weight."""
    root = base.root if base else None
    hosts, rest = split_hosts(folder)
    targets: list[Target] = []
    tensors: Values = {}
    ranks = {}
    for host, target, parts in placed(folder, hosts, root, ("a", "b")):
        module = None if root is None else root.get_submodule(target.module)
        if module is None and (host.table or is_kernel(parts)):
            raise fault(
                str(folder.path),
                f"found HiRA on the table or convolution {host.path}, which may do more than look up or multiply. Only "
                "the base can tell: read the folder together with its base.",
                "mismatch",
            )
        if why := _beyond_peft(module):
            raise fault(str(folder.path), f"{target.module} {why}, which PEFT leaves out of HiRA.", "mismatch")
        scale = embed_scale(module) if host.table and module is not None else 1.0
        if module is not None and len(parts["a"]) > (limit := min(matrix_of(module, target.parameter))):
            parts = of_rank(parts, limit)
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
        if path in tables:
            b = b * embed_scale(export.needed(path, "may multiply its rows"))
        export.tensors |= {f"{PREFIX}{path}.{name}": t.contiguous() for name, t in zip(names, (a, b), strict=True)}
    export.config |= {
        "peft_type": "HIRA",
        "r": rank,
        "hira_dropout": float(export.record.config.get("dropout") or 0.0),
        "init_weights": True,
        **said_of_hosts(export, layers),
    }


def said_of_hosts(export: Export, layers: Iterable[str]) -> dict[str, Any]:
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


def read_miss(folder: Folder, base: Base | None) -> Read:
    """MiSS: one matrix that the blocks of a weight share."""
    kind = folder.config.get("init_weights", True)
    if kind not in (True, False, "mini"):
        raise fault(
            str(folder.path / CONFIG),
            f"init_weights={shown(kind)} is another method (Bone's, whose change depends on the weight), which has no "
            "counterpart here. Merge it with PEFT and save the model, or train it again with the default.",
            "mismatch",
        )
    hosts, rest = split_hosts(folder)
    targets: list[Target] = []
    tensors: Values = {}
    sizes = set()
    for host, target, parts in placed(folder, hosts, base.root if base else None, ("block",)):
        if parts["block"].dim() != 2:
            raise fault(str(folder.path), f"{host.path} has a block that is no matrix.", "mismatch")
        sizes.add(tuple(parts["block"].shape) if kind == "mini" else (parts["block"].shape[0], None))
        targets.append(target)
        tensors[target, "block"] = parts["block"]
    if len(sizes) > 1:
        raise fault(str(folder.path), f"found blocks of different sizes, {sorted(sizes)}; PEFT writes one.", "mismatch")
    ((r, mini_r),) = sizes
    options = {
        "r": r,
        "mini_r": mini_r,
        "dropout": float(folder.config.get("miss_dropout") or 0.0),
        "target_modules": sorted({target.module for target in targets}),
    }
    return whole_of(folder, "miss", options, targets, tensors, rest, frozenset())


def write_miss(export: Export, left: dict[str, Tensor]) -> None:
    """MiSS on linear layers; roles of a fused weight side by side."""
    blocks: dict[str, Tensor] = {}
    mini = export.record.config.get("mini_r")
    mini = None if any(target.rows for target in export.record.targets) else mini
    for target, parts in taken(export, left):
        _check_called(export, target, ("linear",))
        block = parts["block"]
        if target.rows is not None:
            own = sum(stop - start for start, stop in target.rows)
            block = wide(export, target, block.repeat(1, own // block.shape[1]).t()).t()
        blocks[target.module] = blocks[target.module] + block if target.module in blocks else block
    if not blocks:
        raise export.fault("found no delta of any layer in it.")
    export.tensors |= {f"{PREFIX}{path}.miss_block": block.contiguous() for path, block in blocks.items()}
    export.config |= {
        "peft_type": "MISS",
        "r": int(next(iter(blocks.values())).shape[0]),
        "mini_r": mini or 1,
        "init_weights": "mini" if mini else True,
        "miss_dropout": float(export.record.config.get("dropout") or 0.0),
        "bias": "none",
        **targets_of(export, sorted(blocks)),
    }


def read_shira(folder: Folder, base: Base | None) -> Read:
    """SHiRA: values at places, which a folder holds as rows and columns."""
    hosts, rest = split_hosts(folder)
    targets: list[Target] = []
    tensors: Values = {}
    for host, target, parts in placed(folder, hosts, base.root if base else None, ("values", "indices")):
        if base is None:
            raise fault(
                str(folder.path),
                "found places by row and column, and only the base can tell how long its rows are. Read the folder "
                "together with its base.",
                "mismatch",
            )
        outputs, inputs = matrix_of(base.root.get_submodule(host.path), target.parameter)
        rows, columns = _places(folder, host.path, parts["indices"], parts["values"], (outputs, inputs))
        turned = bool(transposed(base.root.get_submodule(host.path), target.parameter))
        flat = columns * outputs + rows if turned else rows * inputs + columns
        places, inverse = flat.unique(return_inverse=True)  # type: ignore[no-untyped-call]  # sorted; PEFT adds twins
        index = torch.int32 if outputs * inputs < 2**31 else torch.int64
        targets.append(target)
        tensors[target, "indices"] = places.to(index)
        tensors[target, "values"] = parts["values"].new_zeros(len(places)).index_add_(0, inverse, parts["values"])
    options = {
        "r": int(folder.config.get("r") or 32),
        "target_modules": sorted({target.module for target in targets}),
    }
    return whole_of(folder, "shira", options, targets, tensors, rest, frozenset())


def _places(
    folder: Folder, path: str, indices: Tensor, values: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Rows and columns, checked; on one platform PEFT writes them as fractions."""
    whole = indices.long()
    fits = values.dim() == 1 and indices.shape == (2, len(values)) and torch.equal(whole.to(indices.dtype), indices)
    if not fits or any(bool(((at < 0) | (at >= size)).any()) for at, size in zip(whole, shape, strict=True)):
        raise fault(
            str(folder.path),
            f"{path}: found places {tuple(indices.shape)} for {values.numel()} values, expected a row and a column "
            f"within {shape[0]}×{shape[1]} for each. Copy the whole folder again, or load it into its own base.",
            "mismatch",
        )
    return whole[0], whole[1]


def write_shira(export: Export, left: dict[str, Tensor]) -> None:
    """SHiRA on linear layers. PEFT wants r · (in + out) places of each, with one r: zeros fill them up."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for target, parts in taken(export, left):
        _check_called(export, target, ("linear",))
        found.setdefault(target.module, []).append((parts["indices"].long(), parts["values"]))
    if not found:
        raise export.fault("found no delta of any layer in it.")
    shapes = {path: matrix_of(export.needed(path, "has rows of some length")) for path in found}
    counts = {path: sum(len(places) for places, _ in parts) for path, parts in found.items()}
    r = max(1, *(-(-counts[path] // sum(shape)) for path, shape in shapes.items()))
    for path, (outputs, inputs) in shapes.items():
        if r * (outputs + inputs) > outputs * inputs:
            raise export.fault(
                f"{path} is {outputs}×{inputs}, which has no room for the r={r} that PEFT wants of all layers alike. "
                "Merge it (to='transformers')."
            )
        places, values = (torch.cat(parts) for parts in zip(*found[path], strict=True))
        places, values = _filled(places, values, r * (outputs + inputs), outputs * inputs)
        indices = torch.stack([places // inputs, places % inputs]).to(torch.int32)
        export.tensors |= {f"{PREFIX}{path}.shira_weight": values, f"{PREFIX}{path}.shira_indices": indices}
    export.config |= {
        "peft_type": "SHIRA",
        "r": r,
        "mask_type": "random",
        "random_seed": None,
        "init_weights": True,
        "fan_in_fan_out": said_of_hosts(export, found)["fan_in_fan_out"],
        "target_modules": names_of(export, sorted(found)),
    }


def _filled(places: Tensor, values: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """So many places, rising, with zeros at those that were free."""
    dense, used = values.new_zeros(size), torch.zeros(size, dtype=torch.bool)
    dense[places], used[places] = values, True
    used[(~used).nonzero().squeeze(-1)[: count - len(places)]] = True
    filled = used.nonzero().squeeze(-1)
    return filled, dense[filled]
