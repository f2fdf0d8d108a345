"""Deltas whose change of the weights is of low rank by their nature, as LoRA: exactly."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from lightning_pet.insertion.method import suffix_of
from lightning_pet.model.adaptation import record_at
from lightning_pet.model.layer_kinds import host_kind
from lightning_pet.model.naming import delta_of, delta_path, join
from lightning_pet.model.quantised import dense_values
from lightning_pet.model.structure import Target, is_shared
from lightning_pet.operations.combining.in_model import file_of
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import Stored
from lightning_pet.targets.patterns import exactly

_NAME = "default"


def as_low_rank(root: nn.Module, name: str) -> Stored | None:
    """A delta of a model as a LoRA whose products are its whole change; what trained beside it goes along.

    Args:
        root: the adapted root.
        name: of the delta.

    Returns:
        What a file of it would hold; ``None`` if the change of one of the weights is of no low rank.
    """
    record = record_at(root).of(name)
    stored = file_of(root, record_at(root), name)
    if len(stored.methods) != 1:
        return None
    tensors = {path: tensor for path, tensor in stored.tensors.items() if delta_of(path) is None}
    ranks: dict[Target, int] = {}
    for inserted in record.deltas(root):
        if inserted.delta.path == "shared":
            continue  # a part of the others
        target = inserted.target
        factors = inserted.delta.low_rank_factors_on(partial(dense_values, inserted.host, target.parameter))
        if factors is None:
            return None
        a, b = (tensor.detach() for tensor in factors)
        ranks[target] = b.shape[1 if host_kind(inserted.host, target.parameter) == "conv" else -1]
        key = "_".join(part for part in ("lora", _NAME, suffix_of(target)) if part)
        path = delta_path(target.module, key)
        tensors |= {join(path, "a"): a.contiguous(), join(path, "b"): b.contiguous()}
    if not ranks:
        return None  # nothing but values that train as they are
    (own,) = stored.methods
    heads = tuple(target for target in own.targets if target not in ranks and not is_shared(target))
    method = MethodRecord("lora", _NAME, _config(ranks, own.config), (*ranks, *heads))
    return replace(stored, methods=(method,), tensors=tensors, base=None)


def _config(ranks: dict[Target, int], own: Any) -> dict[str, Any]:
    rank = max(ranks.values())
    other = {exactly(target): one for target, one in ranks.items() if one != rank}
    return {
        "r": rank,
        "alpha": float(rank),  # a scale of one
        "rank_pattern": other or None,
        "alpha_pattern": {place: float(one) for place, one in other.items()} or None,
        "target_modules": sorted({target.module for target in ranks}),
        "modules_to_save": own.get("modules_to_save"),
        "bias": own.get("bias") or "none",
    }
