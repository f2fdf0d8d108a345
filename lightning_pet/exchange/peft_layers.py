"""Deltas of HF PEFT that sit on layers, in terms of ours: LoRA with its variants, AdaLoRA, (IA)³."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.exchange.folder import CONFIG, Base, Folder
from lightning_pet.exchange.peft_hosts import (
    WRAPPED,
    Host,
    Read,
    Values,
    biases_of,
    check_table,
    fits,
    is_kernel,
    placed,
    split_hosts,
    whole_of,
)
from lightning_pet.exchange.peft_tokens import token_rows
from lightning_pet.insertion.method import METHODS
from lightning_pet.model.layer_kinds import host_kind, matrix_of
from lightning_pet.model.naming import join, module_at, named_modules
from lightning_pet.model.structure import Target
from lightning_pet.store.strict_json import fault, shown
from lightning_pet.targets.patterns import exactly


def lora(folder: Folder, base: Base | None) -> Read:
    """LoRA, rsLoRA, DoRA, PiSSA and OLoRA."""
    config, root = folder.config, base.root if base else None
    hosts, rest = split_hosts(folder)
    rest, tokens = token_rows(folder, rest, base)
    init = _start(folder)
    if init != "kaiming" and root is None:
        raise fault(
            str(folder.path),
            f"init_lora_weights={config['init_lora_weights']!r} has moved a part of the base into A and B, which only "
            "the base itself can tell. Read the folder together with its base.",
            "mismatch",
        )
    rsl, dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    targets: list[Target] = []
    tensors: Values = {}
    ranks, alphas = {}, {}
    for host, target, parts in placed(folder, hosts, root, ("a", "b")):
        if dora is not ("magnitude" in parts):
            raise fault(str(folder.path), f"use_dora is {dora}, which {host.path} contradicts.", "mismatch")
        parts, ranks[exactly(target)], alphas[exactly(target)] = _rank_and_alpha(folder, host, target, parts, root)
        targets.append(target)
        tensors |= {(target, name): tensor for name, tensor in parts.items()}
    r, alpha = most(ranks), most(alphas)
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
    rest = without_tables(folder, rest, [target.module for target in targets], root)
    biases = biases_of(folder, rest, {target.module for target in targets})
    read = whole_of(folder, "lora", options, targets, tensors, rest, biases)
    read = read if init == "kaiming" else _with_starts(folder, read, targets, options, root)
    return read if tokens is None else Read((*read.methods, *tokens.methods), {**read.tensors, **tokens.tensors})


def _asked(host: Host, target: Target) -> str:
    """The path that PEFT asks its patterns about: of an attention's output projection that of the attention."""
    if host.inside:
        return host.path.rpartition(".")[0]
    return join(host.path, target.parameter) if host.named else host.path


def _rank_and_alpha(
    folder: Folder, host: Host, target: Target, parts: dict[str, Tensor], root: nn.Module | None
) -> tuple[dict[str, Tensor], int, float]:
    """A low-rank delta in a form that its layer has room for, its rank, and an alpha above zero."""
    given = rank = parts["a"].shape[0 if is_kernel(parts) else -2]
    limit = rank if root is None else _room(root, target)
    if rank > limit:
        parts = of_rank(parts, limit)
        rank = parts["a"].shape[0 if is_kernel(parts) else -2]
    # PEFT merges into an attention before each call, and adds the change of its output projection twice. Its rank of a
    # convolution in groups counts for all of them.
    wide = host.parts["a"].shape[0] / given if is_kernel(parts) else 1.0
    factor = (2 if host.inside else 1) * (rank / given / wide) ** (0.5 if folder.config.get("use_rslora") else 1)
    alpha = value_of(folder, "alpha_pattern", _asked(host, target), "lora_alpha", 8)
    if alpha <= 0:
        alpha, parts = _signed(folder, alpha, rank, parts)
    return parts, rank, alpha * factor if factor != 1 else alpha


def of_rank(parts: Mapping[str, Tensor], limit: int) -> dict[str, Tensor]:
    """The same product in no more ranks than its weight has: without those of zeros, or else from another pair."""
    first, second = (0, 1) if is_kernel(parts) else (-2, -1)
    a, b = parts["a"].movedim(first, 0), parts["b"].movedim(second, 0)
    used = (a.flatten(1).any(1) | b.flatten(1).any(1)).nonzero()[:, 0]
    used = used if len(used) else torch.zeros(1, dtype=torch.int64)
    if len(used) <= limit:
        return {**parts, "a": a[used].movedim(0, first), "b": b[used].movedim(0, second)}
    kernel = parts["a"].shape[1:] if is_kernel(parts) else ()
    a, b = (parts["a"].flatten(1), parts["b"].flatten(1)) if kernel else (parts["a"], parts["b"])
    outputs, inputs = b.shape[-2], a.shape[-1]
    whole = (b.double() @ a.double()).to(a.dtype)
    eye = torch.eye(min(outputs, inputs), dtype=a.dtype).expand(*whole.shape[:-2], -1, -1)
    a, b = (eye, whole) if inputs <= outputs else (whole, eye)
    if kernel:
        a, b = a.reshape(-1, *kernel), b.reshape(parts["b"].shape[0], -1, *(1,) * (len(kernel) - 1))
    return {**parts, "a": a.contiguous(), "b": b.contiguous()}


def _signed(folder: Folder, alpha: float, rank: int, parts: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """An alpha of zero or below, which no scale has here: B takes its sign."""
    if (init := _start(folder)) != "kaiming":
        raise fault(
            str(folder.path / CONFIG),
            f"found an alpha of {alpha} with init_lora_weights={init!r}, which has moved a part of the base by it. "
            "Save the delta again with path_initial_model_for_weight_conversion, which makes a plain LoRA of it.",
            "mismatch",
        )
    sign = -1.0 if alpha else 0.0
    turned = {name: parts[name] * sign for name in ("b", "bias") if name in parts}
    return -alpha or rank, {**parts, **turned}


def without_tables(
    folder: Folder, rest: Mapping[str, Tensor], hosts: Sequence[str], root: nn.Module | None
) -> dict[str, Tensor]:
    """PEFT writes the whole table beside a delta on an embedding or output layer: it has to be the base's."""
    left = dict(rest)
    modules = {} if root is None else named_modules(root)
    for path in hosts:
        for name in (f"{path}{WRAPPED}.weight", f"{path}.weight"):
            table = left.pop(name, None)
            if table is None:
                continue
            if root is None:
                raise fault(
                    str(folder.path),
                    f"found the whole table {name} beside its delta, which only the base can tell from a trained one. "
                    "Read the folder together with its base.",
                    "mismatch",
                )
            own = modules[path]._parameters.get("weight") if path in modules else None
            if own is not None:
                check_table(folder, name, table, own)
    return left


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


def _with_starts(
    folder: Folder, read: Read, targets: Sequence[Target], options: dict[str, Any], root: nn.Module | None
) -> Read:
    """PiSSA and OLoRA took their start values out of the base: they are computed from it again.

    Tables and kernels start at random in PEFT, whatever is asked for: nothing was taken out of them.
    """
    assert root is not None
    modules = named_modules(root)
    tensors = dict(read.tensors)
    method = METHODS["lora"](**options)
    for insertion in method.insertions(root, targets):
        path = insertion.path(method)
        kind = host_kind(modules[insertion.target.module], insertion.target.parameter)
        if kind == "conv1d_hf" and options["init"] == "olora":
            raise fault(
                str(folder.path),
                f"{insertion.target.module} keeps its weight as [in, out], where OLoRA of PEFT takes the transpose of "
                "its start values out of the base, so that its model does not start as the base. Merge it with PEFT.",
                "mismatch",
            )
        for name in ("a0", "b0"):
            start = getattr(insertion.delta, name).detach().clone()
            tensors[join(path, name)] = torch.zeros_like(start) if kind in ("embedding", "conv") else start
    return replace(read, tensors=tensors)


def adalora(folder: Folder, base: Base | None) -> Read:
    """AdaLoRA: its scale is ``lora_alpha / (init_r + 1e-5)``, whatever is left of the ranks."""
    config, root = folder.config, base.root if base else None
    hosts, rest = split_hosts(folder)
    start = int(config.get("init_r") or 12)
    targets: list[Target] = []
    tensors: Values = {}
    found = list(placed(folder, hosts, root, ("a", "b", "e")))
    if root is not None and any(start > _room(root, target) for _, target, _ in found):
        return _adalora_as_lora(folder, root, [(target, parts) for _, target, parts in found], rest, start)
    for _, target, parts in found:
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
    return whole_of(folder, "adalora", options, targets, tensors, rest, frozenset())


def _room(root: nn.Module, target: Target) -> int:
    """The largest rank that a place can have."""
    return min(matrix_of(module_at(root, target.module), target.parameter))


def _adalora_as_lora(
    folder: Folder,
    root: nn.Module,
    found: Sequence[tuple[Target, Mapping[str, Tensor]]],
    rest: Mapping[str, Tensor],
    start: int,
) -> Read:
    """The LoRA of its triplets, where PEFT has given a layer more of them than it has ranks."""
    scale = float(folder.config.get("lora_alpha", 8)) / (start + 1e-5)
    tensors: Values = {}
    ranks = {}
    for target, parts in found:
        pair = {"a": parts["a"] * parts["e"].reshape(-1, 1), "b": parts["b"] * scale}
        if len(pair["a"]) > _room(root, target):
            pair = of_rank(pair, _room(root, target))
        a, b, host = pair["a"], pair["b"], module_at(root, target.module)
        ranks[exactly(target)] = len(a)
        if isinstance(host, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            a, b = a.reshape(len(a), -1, *host.kernel_size), b.reshape(*b.shape, *(1,) * len(host.kernel_size))
        tensors |= {(target, "a"): a.contiguous(), (target, "b"): b.contiguous()}
    options = {
        "r": most(ranks),
        "alpha": most(ranks),
        "dropout": float(folder.config.get("lora_dropout") or 0.0),
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "target_modules": sorted({target.module for target, _ in found}),
    }
    return whole_of(folder, "lora", options, [target for target, _ in found], tensors, rest, frozenset())


def value_of(folder: Folder, option: str, path: str, otherwise: str, default: Any) -> Any:
    """What the first pattern of an option that fits gives, in the order of the file; else another option's value."""
    found = [value for key, value in (folder.config.get(option) or {}).items() if fits(folder, key, path)]
    if len({*found}) > 1:
        rank_zero_warn(
            f"{folder.path}: {len(found)} keys of {option} fit {path}, with different values. The first one in "
            "the file counts, which may be another than in training: PEFT sorts them when it saves."
        )
    return found[0] if found else folder.config.get(otherwise, default)


def most(values: Mapping[str, Any]) -> Any:
    """The commonest value, so that few places need one of their own."""
    return Counter(values.values()).most_common(1)[0][0]


def ia3(folder: Folder, base: Base | None) -> Read:
    """(IA)³: a column rescales what a layer returns, a row what it gets."""
    root = base.root if base else None
    hosts, rest = split_hosts(folder)
    targets: list[Target] = []
    tensors: Values = {}
    for _, place, parts in placed(folder, hosts, root, ("scale",)):
        inner = _reads(folder, place.module, parts["scale"])
        target = replace(place, role="ffn.down" if inner else None)
        targets.append(target)
        tensors[target, "scale"] = parts["scale"].flatten()
    options = {
        "target_modules": [target.module for target in targets if target.role != "ffn.down"],
        "feedforward_modules": [target.module for target in targets if target.role == "ffn.down"],
    }
    return whole_of(folder, "ia3", options, targets, tensors, rest, frozenset())


def _reads(folder: Folder, path: str, scale: Tensor) -> bool:
    """Whether a vector rescales what its layer gets: by its shape, or where that does not tell by the configuration."""
    rows, columns = scale.shape[:2]
    if scale.dim() == 2 and (rows == 1) is not (columns == 1):
        return bool(rows == 1)
    named = folder.config.get("feedforward_modules") or []
    if isinstance(named, str):
        return fits(folder, named, path)
    return any(f".{path}".endswith(f".{name}") for name in named)
