"""OFT, HRA and BOFT in HF PEFT's terms: rotations of what a layer gets."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.exchange.folder import PREFIX, Base, Folder
from lightning_pet.exchange.peft_hosts import Export, Host, Read, Values, placed, split_hosts, whole_of
from lightning_pet.exchange.peft_low_rank import PROJECTIONS, kind_at, targets_of
from lightning_pet.insertion.low_rank_places import is_called
from lightning_pet.model.layer_kinds import host_kind, matrix_of
from lightning_pet.model.naming import by_delta, join
from lightning_pet.model.structure import Target
from lightning_pet.store.strict_json import fault
from lightning_pet.targets.patterns import exactly


def oft(folder: Folder, base: Base | None) -> Read:
    """OFT v2: sizes of blocks are read off the tensors, as PEFT replaces one that does not fit and writes the other."""
    root = base.root if base else None
    if old := [name for name in folder.tensors if name.endswith(".oft_r")]:
        raise fault(
            str(folder.path),
            f"found {old[0]}, of OFT as PEFT had it before 0.16, which rotates the weight otherwise. Merge it with "
            "that version, or train it again with OFTCallback.",
            "version",
        )
    targets: list[Target] = []
    tensors: Values = {}
    sizes = {}
    for host, target, parts in _placed(folder, root, ("skew",)):
        size = _size_of(folder, host, parts["skew"], root, target)
        sizes[exactly(target)] = size
        targets.append(target)
        tensors[target, "skew"] = parts["skew"]
    return whole_of(folder, "oft", _oft_options(folder, sizes, targets), targets, tensors, *_rest(folder))


def _oft_options(folder: Folder, sizes: dict[str, int], targets: list[Target]) -> dict[str, Any]:
    config, most = folder.config, max({*sizes.values()}, key=[*sizes.values()].count)
    return {
        "oft_block_size": most,
        "block_size_pattern": {place: size for place, size in sizes.items() if size != most} or None,
        "use_cayley_neumann": bool(config.get("use_cayley_neumann", True)),
        "num_cayley_neumann_terms": config.get("num_cayley_neumann_terms", 5),
        "block_share": bool(config.get("block_share")),
        "coft": bool(config.get("coft")),
        "eps": float(config.get("eps", 6e-5)),
        "target_modules": sorted({target.module for target in targets}),
    }


def _size_of(folder: Folder, host: Host, skew: Tensor, root: nn.Module | None, target: Target) -> int:
    """Rows of a block, by how many numbers its triangle has."""
    numbers = skew.shape[-1] if skew.dim() == 2 else 0
    size = int((1 + (1 + 8 * numbers) ** 0.5) / 2)
    inputs = None if root is None else matrix_of(root.get_submodule(target.module))[1]
    shared = bool(folder.config.get("block_share"))
    if size * (size - 1) // 2 != numbers or size < 2 or (shared and skew.shape[0] != 1):
        raise fault(str(folder.path), f"{host.path}: {tuple(skew.shape)} are no triangles of blocks.", "mismatch")
    if inputs is not None and (inputs % size if shared else inputs != size * skew.shape[0]):
        raise fault(
            str(folder.path),
            f"{host.path} has {inputs} inputs, which {skew.shape[0]} blocks of {size} do not make up. Load it into the "
            "base that it was trained on.",
            "mismatch",
        )
    return size


def hra(folder: Folder, base: Base | None) -> Read:
    """HRA: one number of reflections for all."""
    root = base.root if base else None
    targets: list[Target] = []
    tensors: Values = {}
    for host, target, parts in _placed(folder, root, ("u",)):
        u = parts["u"]
        if not u.any(0).all():
            raise fault(str(folder.path), f"{host.path} has a column of zeros, which PEFT divides by.", "nonfinite")
        if targets and u.shape[-1] != tensors[targets[0], "u"].shape[-1]:
            raise fault(str(folder.path), "its layers have different numbers of reflections; PEFT has one r.")
        targets.append(target)
        tensors[target, "u"] = u
    options = {
        "r": tensors[targets[0], "u"].shape[-1],
        "apply_GS": bool(folder.config.get("apply_GS")),
        "target_modules": sorted({target.module for target in targets}),
    }
    return whole_of(folder, "hra", options, targets, tensors, *_rest(folder))


def boft(folder: Folder, base: Base | None) -> Read:
    """BOFT of one factor: OFT by Cayley's formula, and a factor for each output."""
    root = base.root if base else None
    targets: list[Target] = []
    tensors: Values = {}
    sizes, scales = {}, {}
    for host, target, parts in _placed(folder, root, ("blocks", "row_scale")):
        blocks = parts["blocks"]
        if blocks.dim() != 4 or blocks.shape[0] != 1:
            raise fault(
                str(folder.path),
                f"{host.path} has {blocks.shape[0]} butterfly factors: their product is full for little more "
                "expression and about seven times the time, and PEFT itself drops to one factor without its CUDA "
                "extension. Merge it with PEFT, or train it with one factor or with OFTCallback.",
                "mismatch",
            )
        size = blocks.shape[-1]
        rows, columns = torch.triu_indices(size, size, 1)
        skew = (blocks[0] - blocks[0].mT) / 2
        sizes[exactly(target)] = size
        targets.append(target)
        tensors[target, "skew"] = skew[:, rows, columns].contiguous()
        if (parts["row_scale"] != 1).any():
            scales[target] = parts["row_scale"].flatten()
    exact = _oft_options(folder, sizes, targets) | {"use_cayley_neumann": False}
    read = whole_of(folder, "oft", exact, targets, tensors, *_rest(folder))
    return read if not scales else _with_scales(folder, read, scales, root)


def _with_scales(folder: Folder, read: Read, scales: dict[Target, Tensor], root: nn.Module | None) -> Read:
    """The factors of outputs as (IA)³, which rescales a bias, too: PEFT's BOFT does not."""
    for target in scales:
        host = None if root is None else root.get_submodule(target.module)
        why = "rescales the weight but not the bias, and nothing here does that. Merge it with PEFT."
        if host is None:
            why = "has no counterpart where there is a bias, which only the base can tell. Read both together."
        if host is None or getattr(host, "bias", None) is not None:
            raise fault(str(folder.path), f"boft_s has trained for {target.module}: it {why}", "mismatch")
    values: Values = {(target, "scale"): scale for target, scale in scales.items()}
    options = {"target_modules": [target.module for target in scales], "feedforward_modules": []}
    beside = whole_of(folder, "ia3", options | {"modules_to_save": []}, [*scales], values, {}, frozenset())
    return Read((*read.methods, *beside.methods), read.tensors | beside.tensors)


def _rest(folder: Folder) -> tuple[dict[str, Tensor], frozenset[str]]:
    return split_hosts(folder)[1], frozenset()


def _placed(
    folder: Folder, root: nn.Module | None, needed: tuple[str, ...]
) -> Iterator[tuple[Host, Target, dict[str, Tensor]]]:
    """Of each host its place and tensors, if PEFT does there what is done here."""
    hosts, _ = split_hosts(folder)
    for host, target, parts in placed(folder, hosts, root, needed):
        if root is not None and (why := _unlike(root, target)):
            raise fault(
                str(folder.path), f"{target.module} {why}. Merge it with PEFT, or train it without.", "mismatch"
            )
        yield host, target, parts


def _unlike(root: nn.Module, target: Target) -> str:
    """Why a rotation of PEFT on a layer is none of ours; empty if it is."""
    host: Any = root.get_submodule(target.module)
    if host_kind(host) == "conv":
        regular = (
            isinstance(host, nn.Conv2d)
            and len({*host.kernel_size}) == len({*host.stride}) == 1
            and {*host.dilation} == {1}
            and host.groups == 1
            and not isinstance(host.padding, str)
            and len({*host.padding}) == 1
            and host.padding_mode == "zeros"
        )
        return "" if regular else "is a convolution whose options PEFT does not take over in a rotation"
    if not is_called(root, target):
        return "is read without a call of its layer, where a rotation of PEFT has no effect until it is merged"
    return "" if host_kind(host) in ("linear", "conv1d_hf") else "is no linear layer"


# --- written -----------------------------------------------------------------------------------------------------


def write_oft(export: Export, left: dict[str, Tensor]) -> None:
    """OFT, if there is one option of PEFT from which all block sizes follow."""
    config = export.record.config
    shared = bool(config.get("block_share"))
    sizes: list[tuple[int, int]] = []
    layers = []
    for target, skew in _taken(export, left, "skew"):
        size = int((1 + (1 + 8 * skew.shape[-1]) ** 0.5) / 2)
        inputs = size * skew.shape[0]
        if shared:
            inputs = matrix_of(export.needed(target.module, "shares one block for all of its inputs"))[1]
        sizes.append((inputs, size))
        layers.append(target)
        export.tensors[f"{PREFIX}{target.module}.oft_R.weight"] = skew.contiguous()
    option = _option_for(sizes)
    if option is None:
        raise export.fault(
            f"PEFT has one block size for all layers, and no one gives {', '.join(sorted({str(s) for _, s in sizes}))} "
            "where they are. Merge it (to='transformers'), or train it with one oft_block_size."
        )
    export.config |= {
        "peft_type": "OFT",
        **option,
        "module_dropout": 0.0,
        "coft": bool(config.get("coft")),
        "eps": float(config.get("eps", 6e-5)),
        "block_share": shared,
        "use_cayley_neumann": bool(config.get("use_cayley_neumann", True)),
        "num_cayley_neumann_terms": config.get("num_cayley_neumann_terms", 5),
        "bias": "none",
        "init_weights": True,
        **targets_of(export, sorted(target.module for target in layers)),
    }


def _option_for(sizes: list[tuple[int, int]]) -> dict[str, int] | None:
    """A size of blocks, or a number of them, that PEFT makes these of."""
    asked = [*dict.fromkeys(size for _, size in sizes), *range(2, max(inputs for inputs, _ in sizes) + 1)]
    for size in asked:
        if all(_as_peft(inputs, size) == own for inputs, own in sizes):
            return {"oft_block_size": size, "r": 0}
    for count in asked:
        if all(inputs // _as_peft(inputs, count) == own for inputs, own in sizes):
            return {"oft_block_size": 0, "r": count}
    return None


def _as_peft(inputs: int, asked: int) -> int:
    """The divisor that PEFT takes for a number that may be none."""
    if asked >= inputs:
        return inputs
    above = next(number for number in range(asked, inputs + 1) if inputs % number == 0)
    below = next(number for number in range(asked, 0, -1) if inputs % number == 0)
    return below if asked - below <= above - asked else above


def write_hra(export: Export, left: dict[str, Tensor]) -> None:
    """HRA of one number of reflections."""
    layers = []
    for target, u in _taken(export, left, "u"):
        layers.append(target)
        export.tensors[f"{PREFIX}{target.module}.hra_u"] = u.contiguous()
    export.config |= {
        "peft_type": "HRA",
        "r": int(export.record.config["r"]),
        "apply_GS": bool(export.record.config.get("apply_GS")),
        "bias": "none",
        "init_weights": True,
        **targets_of(export, sorted(target.module for target in layers)),
    }


def _taken(export: Export, left: dict[str, Tensor], name: str) -> Iterator[tuple[Target, Tensor]]:
    """Each place with its tensor, which is taken out of those that are left."""
    groups = by_delta(left)
    for target in export.record.targets:
        if export.path(target) not in groups:
            continue
        if export.root is not None and (why := _unlike(export.root, target)):
            raise export.fault(f"{target.path} {why}. Merge it (to='transformers').")
        if target.role not in PROJECTIONS:
            export.needed(target.module, "may be no linear layer")
        if kind_at(export, target) == "conv1d_hf":
            raise export.fault(
                f"{target.path} is of a Conv1D, on which PEFT has no rotation. Merge it (to='transformers')."
            )
        if target.parameter != "weight":
            raise export.fault(f"{target.path} is read without a call of its layer, which PEFT cannot turn. Merge it.")
        yield target, left.pop(join(export.path(target), name))
