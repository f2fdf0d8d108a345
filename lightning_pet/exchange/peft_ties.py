"""Weights that several modules share: PEFT copies them or keeps them tied, by its options; here they stay tied."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from lightning_pet.errors import DeltaFileError
from lightning_pet.exchange.folder import CONFIG, PREFIX, Base, Folder
from lightning_pet.model.naming import named_modules
from lightning_pet.store.strict_json import fault

OPTION: Final = "ensure_weight_tying"


def holders_of(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Every module that holds the weight of one, itself among them."""
    weight = modules[path]._parameters.get("weight")
    if weight is None:
        return [path]
    return [other for other, module in modules.items() if module._parameters.get("weight") is weight]


def table_of(root: nn.Module, modules: Mapping[str, nn.Module], holders: Sequence[str]) -> str:
    """Which of them the model calls its input embedding, else the first."""
    getter: Any = getattr(root, "get_input_embeddings", None)
    try:
        table = getter() if callable(getter) else None
    except Exception:  # models without one raise all kinds of errors here
        table = None
    return next((path for path in holders if modules[path] is table), holders[0])


def says_tied(root: nn.Module) -> bool:
    """Whether a model says that it ties its weights, which is what PEFT asks it."""
    return bool(getattr(getattr(root, "config", None), "tie_word_embeddings", True))


def kept_tied(folder: Folder, base: Base | None) -> Folder:
    """A folder whose weights PEFT has kept tied, without the copies that it holds of them.

    Raises:
        DeltaFileError: (``mismatch``) if the base does not tie them, or the copies are none.
    """
    named = [name for name in folder.config.get("modules_to_save") or () if isinstance(name, str)]
    tables = [key.removesuffix("lora_embedding_A") for key in folder.tensors if key.endswith(".lora_embedding_A")]
    saved = [key.removesuffix("weight") for key in folder.tensors if _is_of(key, named)]
    if not folder.config.get(OPTION) or not (tables or saved):
        return folder
    if base is None:
        raise _fault(folder, "which only the base can tell. Read the folder together with its base")
    modules, left = named_modules(base.root), dict(folder.tensors)
    for prefix in (*saved, *tables):
        path = prefix.removeprefix(PREFIX).rstrip(".")
        others = [other for other in holders_of(modules, path) if other != path] if path in modules else []
        if not others and (extra := _surplus(folder, named)):
            kind = type(base.root).__name__
            raise _fault(folder, f"and this {kind} does not tie {path} to {extra}. Load it into the base of its run")
        for other in others:
            _drop_copy(folder, left, prefix, f"{PREFIX}{other}.", prefix in tables)
    return replace(folder, tensors=left)


def _is_of(key: str, named: Sequence[str]) -> bool:
    """Whether a tensor is the weight of one of these modules."""
    path = key.removesuffix(".weight")
    return path != key and any(path.endswith(f".{name}") for name in named)


def _surplus(folder: Folder, named: Sequence[str]) -> str:
    """A module that was kept like another: its own tensors are there, and no option names it."""
    found = [
        key for key in folder.tensors if key.endswith(".weight") and ".lora_" not in key and not _is_of(key, named)
    ]
    heads = [key.partition(".lora_A")[0] for key in folder.tensors if key.endswith(".lora_A.weight")]
    targets = folder.config.get("target_modules")
    if isinstance(targets, list):
        found += [path for path in heads if not any(path.endswith(f".{name}") for name in targets)]
    return found[0].removeprefix(PREFIX).removesuffix(".weight") if found else ""


def _drop_copy(folder: Folder, left: dict[str, torch.Tensor], prefix: str, copy: str, low_rank: bool) -> None:
    if not low_rank:
        value = left.pop(f"{copy}weight", None)
        if value is not None and not torch.equal(value, left[f"{prefix}weight"]):
            raise _fault(folder, f"and {copy.removeprefix(PREFIX)}weight has other values. Save it again with PEFT")
        return
    pairs = (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A"))
    for own, theirs in pairs:  # they stay: of two deltas of equal values each acts on its own module
        value = left.get(f"{copy}{own}")
        if value is not None and not torch.equal(value, left[f"{prefix}{theirs}"].t()):
            raise _fault(folder, "and A and B of its modules are no transposes of each other. Save it again with PEFT")


def _fault(folder: Folder, why: str) -> DeltaFileError:
    return fault(str(folder.path / CONFIG), f"{OPTION} has kept weights tied, {why}.", "mismatch")


def is_kept_tied(root: nn.Module, path: str) -> bool:
    """Whether PEFT has kept a module tied that it was told to: one of those that share the input embedding."""
    modules = named_modules(root)
    holders = holders_of(modules, path)
    table = modules[table_of(root, modules, holders)]
    return says_tied(root) and isinstance(table, nn.Embedding) and len(holders) > 1
