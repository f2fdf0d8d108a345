"""Prediction heads of a folder of the adapters library, which has a file of its own for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.exchange.folder import Folder, read_configuration, read_named
from lightning_pet.exchange.peft_hosts import shared_with
from lightning_pet.model.naming import named_modules, named_parameters
from lightning_pet.model.structure import Target
from lightning_pet.targets.heads import HEAD, find_heads

CONFIG: Final = "head_config.json"
FILES: Final = ("model_head.safetensors", "pytorch_model_head.bin")
_PLAIN: Final = ("tagging", "question_answering")
"""Heads of one layer that read each position's own features, as transformers' models for these tasks do."""


def read_head(folder: Folder, root: nn.Module) -> tuple[list[Target], dict[str, Tensor]]:
    """The head of a folder as the output layer of a model, where the two compute the same.

    A model of transformers keeps its own head in that library, and the folder has its values. Heads that the library
    makes itself are taken if they are one layer, and the model has one of that size that reads the same.

    Returns:
        Its places and tensors; none if there is no head, or it has no counterpart, which a warning says.
    """
    path = Path(folder.path)
    if not (path / CONFIG).is_file():
        return [], {}
    made = read_configuration(path / CONFIG).get("config")
    tensors = read_named(path, FILES)
    if not isinstance(made, Mapping):
        return _own_head(folder, tensors, root)
    found = _one_layer(made, tensors, root)
    if isinstance(found, str):
        rank_zero_warn(
            f"{path}: its prediction head is not read: {found}. Its tensors ({', '.join(sorted(tensors)[:4])}) are in "
            f"{_file(path).name}; copy them into a layer of yours, or train a head (modules_to_save)."
        )
        return [], {}
    return found


def _file(path: Path) -> Path:
    return next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])


def _own_head(folder: Folder, tensors: Mapping[str, Tensor], root: nn.Module) -> tuple[list[Target], dict[str, Tensor]]:
    """A head of a model of transformers: under its own names."""
    names = {name for name, _ in named_parameters(root, every_name=True)}
    if absent := sorted(tensors.keys() - names):
        rank_zero_warn(
            f"{folder.path}: its prediction head is not read, this {type(root).__name__} has no {absent[0]}. Load it "
            "into a model with that head."
        )
        return [], {}
    own = dict(named_parameters(root, every_name=True))
    paths = dict.fromkeys(name.partition(".")[0] for name, tensor in tensors.items() if not _is_base(own[name], tensor))
    if tied := [path for path in paths if shared_with(root, path)]:
        rank_zero_warn(f"{folder.path}: its prediction head is not read, as {tied[0]} is tied to another layer here.")
        return [], {}
    found = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in paths}
    return [Target(path, "", HEAD) for path in paths], found


def _is_base(own: Tensor, tensor: Tensor) -> bool:
    return own.shape == tensor.shape and not own.is_meta and torch.equal(own.detach().cpu().to(tensor.dtype), tensor)


def _one_layer(
    made: Mapping[str, Any], tensors: Mapping[str, Tensor], root: nn.Module
) -> tuple[list[Target], dict[str, Tensor]] | str:
    """A head of the library's own as the output layer of a model, or why it is none."""
    kind = made.get("head_type")
    pooled = kind == "classification" and bool(made.get("use_pooler"))
    if kind not in _PLAIN and not pooled:
        return f"no model of transformers computes what its head of type {kind!r} does"
    by_part = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    if made.get("layers") != 1 or len(by_part) != len(tensors):
        return f"it has {made.get('layers')} layers, and an output layer is one"
    modules = named_modules(root)
    linear = [path for path in find_heads(root, ()) if isinstance(modules[path], nn.Linear)]
    if len(linear) != 1:
        return f"this {type(root).__name__} has no output layer of its own"
    own = dict(modules[linear[0]].named_parameters())
    if {name: p.shape for name, p in own.items()} != {name: tensor.shape for name, tensor in by_part.items()}:
        return f"{linear[0]} of this {type(root).__name__} has another size"
    pools = any(path.rpartition(".")[2] == "pooler" for path in modules)
    if pooled and not pools:
        return f"it reads a pooler, which this {type(root).__name__} has not"
    return [Target(linear[0], "", HEAD)], {f"{linear[0]}.{name}": tensor for name, tensor in by_part.items()}
