"""Deltas of HF PEFT that are a LoRA in other words: they are put into LoRA's, and read as one.

The numbers that make A and B (norms, mixtures of a bank, random projections) are multiplied in, so a run that goes on
from such a delta trains A and B themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.errors import DeltaFileError
from lightning_pet.exchange.folder import PREFIX, Base, Folder, unused
from lightning_pet.exchange.peft_hosts import Read
from lightning_pet.exchange.peft_layers import lora
from lightning_pet.model.naming import named_modules
from lightning_pet.store.strict_json import fault

Parts = Mapping[str, Tensor]
_MOST: Final = 1 << 30
"""Numbers of an A or B: a bank makes many of few."""
_KEPT: Final = ("modules_to_save", "task_type", "base_model_name_or_path", "revision")


def delora(folder: Folder, base: Base | None) -> Read:
    """DeLoRA: B diag(λ / (r ‖a‖ ‖b‖)) A, times the norms of the base's columns, which the file holds."""

    def converted(path: str, parts: Parts) -> tuple[Tensor, Tensor]:
        a, b, strength, norms = _all(folder, path, parts, "delora_A", "delora_B", "delora_lambda", "delora_w_norm")
        lengths = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
        return a * norms, b * (strength / len(a) / lengths)

    return _as_lora(folder, base, "delora_", "module_dropout", converted)


def gralora(folder: Folder, base: Base | None) -> Read:
    """GraLoRA: every block of inputs reaches every block of outputs through ranks of its own."""
    config = folder.config

    def converted(path: str, parts: Parts) -> tuple[Tensor, Tensor]:
        a, b = _all(folder, path, parts, "gralora_A", "gralora_B")  # [k, in / k, r] and [k, r, out / k]
        count, rank = a.shape[0], a.shape[-1]
        made = _of_blocks(a.reshape(*a.shape[:2], count, -1), b.reshape(count, count, -1, b.shape[-1]))
        hybrid = int(config.get("hybrid_r") or 0)
        if hybrid:
            more = _all(folder, path, parts, "gralora_A_general.weight", "gralora_B_general.weight")
            made = torch.cat([made[0], more[0]]), torch.cat([made[1], more[1]], 1)
        return made[0], made[1] * (float(config.get("alpha", 64)) / (rank + hybrid))

    return _as_lora(folder, base, "gralora_", "gralora_dropout", converted)


def _of_blocks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One A and one B of k × k blocks.

    Args:
        a: what block n of the inputs gives to the ranks of block j of the outputs, [n, in / k, j, s].
        b: what block j of the outputs gets from the ranks of block n of the inputs, [j, n, s, out / k].
    """
    count, inputs, _, each = a.shape
    outputs = b.shape[-1]
    rank = count * count * each
    if rank > count * min(inputs, outputs):  # more than a change of this shape can have
        change = torch.einsum("nijs,jnso->joni", a, b).reshape(count * outputs, count * inputs)
        return _of_full_rank(change)
    one = torch.eye(count, dtype=a.dtype)
    wide = torch.einsum("nijs,nm->njsmi", a, one).reshape(rank, count * inputs)
    back = torch.einsum("jnso,jm->monjs", b, one).reshape(count * outputs, rank)
    return wide, back


def vblora(folder: Folder, base: Base | None) -> Read:
    """VB-LoRA: pieces of A and B are mixtures of the vectors of a bank that all layers share."""
    topk = folder.config.get("topk", 2)

    def mixed(path: str, parts: Parts, name: str) -> Tensor:
        (bank,) = _all(folder, "", _roots(folder), "vblora_vector_bank")
        if f"{name}_topk_indices" in parts:
            places, first = _all(folder, path, parts, f"{name}_topk_indices", f"{name}_topk_weights")
            shares, places = torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1), places.long()
        else:
            (logits,) = _all(folder, path, parts, name)
            best, places = logits.topk(topk, dim=-1)
            shares = best.softmax(-1)
        if places[..., 0].numel() * bank.shape[1] > _MOST:
            raise fault(str(folder.path), f"{path} would be larger than a layer can be.", "limit")
        if int(places.max()) >= len(bank) or int(places.min()) < 0:
            raise fault(str(folder.path), f"{path} takes vectors that the bank does not have.", "mismatch")
        return (shares.unsqueeze(-1) * bank[places]).sum(-2)

    def converted(path: str, parts: Parts) -> tuple[Tensor, Tensor]:
        a, b = mixed(path, parts, "vblora_logits_A"), mixed(path, parts, "vblora_logits_B")
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    return _as_lora(folder, base, "vblora_", "vblora_dropout", converted)


def tinylora(folder: Folder, base: Base | None) -> Read:
    """TinyLoRA: B (Σ v_u P_u) A with singular vectors A and B of the base; layers share v in groups of their order."""
    if base is None:
        raise fault(
            str(folder.path),
            "which layers share a vector follows from their order in the base. Read the folder together with it.",
            "mismatch",
        )
    owned = [path for path in _grouped(folder, "tinylora_")[0] if path]
    order = [path for path in named_modules(base.root) if path in {*owned}]
    count = max(1, round(len(owned) * (1.0 - float(folder.config.get("weight_tying") or 0.0))))
    size = max(1, len(owned) // count)

    def converted(path: str, parts: Parts) -> tuple[Tensor, Tensor]:
        if "tinylora_P" not in parts:
            raise fault(
                str(folder.path),
                "its random projections were not saved (save_projection=False), and a seed makes the same ones only "
                "with the same generator. Save it again with save_projection=True.",
                "mismatch",
            )
        a, b, p = _all(folder, path, parts, "tinylora_A", "tinylora_B", "tinylora_P")
        number = order.index(path) if path in order else 0  # a path that the base does not have is named later
        (v,) = _all(folder, "", _roots(folder), f"tinylora_v.{min(number // size, count - 1)}")
        if isinstance(named_modules(base.root).get(path), nn.Embedding):
            raise fault(str(folder.path), f"{path} is an embedding, whose TinyLoRA is not read. Merge it.", "mismatch")
        return torch.einsum("u,ujk->jk", v, p.to(v.dtype)).to(a.dtype) @ a, b

    return _as_lora(folder, base, "tinylora_", "tinylora_dropout", converted)


def _as_lora(
    folder: Folder,
    base: Base | None,
    own: str,
    dropout: str,
    converted: Callable[[str, Parts], tuple[Tensor, Tensor]],
) -> Read:
    """The folder as LoRA's, of A and B that a layer's tensors are converted to; the scale is in B."""
    groups, rest = _grouped(folder, own)
    groups.pop("", None)
    made = {}
    for path, parts in groups.items():
        try:
            a, b = converted(path, parts)
            made[path] = (a, b) if len(a) <= min(a.shape[1], b.shape[0]) else _of_full_rank(b @ a)
        except DeltaFileError:
            raise
        except (RuntimeError, IndexError, ValueError, ZeroDivisionError) as error:
            where, shapes = str(folder.path), {name: tuple(tensor.shape) for name, tensor in parts.items()}
            raise fault(where, f"the tensors of {path} do not fit together: {shapes}.", "mismatch") from error
    if not made:
        raise fault(str(folder.path), "found no delta of any layer in it. Ask for the whole folder.", "mismatch")
    rank = max(len(a) for a, _ in made.values())
    tensors = dict(rest)
    for path, (a, b) in made.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = (b * (len(a) / rank)).contiguous()
    config: dict[str, Any] = {name: folder.config[name] for name in _KEPT if name in folder.config}
    config |= {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": folder.config.get(dropout) or 0.0}
    return lora(replace(folder, config=config, tensors=tensors), base)


def _of_full_rank(change: Tensor) -> tuple[Tensor, Tensor]:
    """A change of a weight as a product, one of whose factors is the identity."""
    outputs, inputs = change.shape
    one = torch.eye(min(outputs, inputs), dtype=change.dtype)
    return (one, change) if inputs <= outputs else (change, one)


def _grouped(folder: Folder, own: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of a kind by module (``""``: those of the root, for all), and all others."""
    groups: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in folder.tensors.items():
        path, found, name = key.partition(f".{own}")
        if not found:
            rest[key] = tensor
        elif path == PREFIX.partition(".")[0]:
            groups.setdefault("", {})[own + name] = tensor
        elif key.startswith(PREFIX):
            groups.setdefault(path.removeprefix(PREFIX), {})[own + name] = tensor
        else:
            raise unused(folder, [key], f"found tensors whose names do not begin with {PREFIX!r}, as PEFT's do")
    return groups, rest


def _roots(folder: Folder) -> Parts:
    own = ("vblora_", "tinylora_")
    return {name: tensor for kind in own for name, tensor in _grouped(folder, kind)[0].get("", {}).items()}


def _all(folder: Folder, path: str, parts: Parts, *names: str) -> Sequence[Tensor]:
    """These tensors of a layer, in float32 at least.

    Raises:
        DeltaFileError: (``mismatch``) if one is not there.
    """
    if absent := [name for name in names if name not in parts]:
        raise fault(str(folder.path), f"{path or 'it'} has no {absent[0]}. Copy the whole folder again.", "mismatch")
    found = [parts[name] for name in names]
    return [t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t for t in found]
