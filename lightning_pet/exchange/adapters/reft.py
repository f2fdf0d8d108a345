"""LoReFT, NoReFT and DiReFT of the adapters library: edits of what layers return, by layer."""

import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.exchange.folder import CONFIG, Base, Folder
from lightning_pet.exchange.peft_hosts import Read, path_of, record_of
from lightning_pet.insertion.method import METHODS
from lightning_pet.model.naming import join
from lightning_pet.model.structure import Target
from lightning_pet.store.strict_json import fault, shown

_NUMBER: Final = re.compile(r"\.(\d+)(?:\.|$)")
_ROTATED: Final = "projection.parametrizations.weight."
_BASE: Final = f"{_ROTATED}0.base"
_APART: Final = 1e-2  # of rows that are orthonormal but for half precision


def read_reft(folder: Folder, base: Base, left: dict[str, Tensor]) -> Read:
    """A folder of an edit; its orthonormal matrices are evaluated, and nothing but their rows is kept.

    Raises:
        DeltaFileError: (``mismatch``) if it does not say which of two forms it is, or a layer has no place.
    """
    options = _options(folder)
    name = str(folder.config.get("name"))
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key in [*left]:
        place, mark, part = key.partition(f".reft_layer.refts.{name}.units.")
        if mark:
            number, _, own = part.partition(".")
            found.setdefault(place, {}).setdefault(number, {})[own] = left.pop(key)
    targets = METHODS["reft"](**options).resolve(base.root, base.structure())
    places = _matched(folder, found, targets)
    tensors = {
        join(path_of("reft", target), unit, own): tensor
        for place, target in places.items()
        for unit, number in _units(options).items()
        for own, tensor in _unit(folder, place, found[place].get(number, {})).items()
    }
    return Read((record_of("reft", options, [*places.values()], []),), tensors)


def _options(folder: Folder) -> dict[str, Any]:
    config = folder.config["config"]
    orthonormal, subtracts = bool(config.get("orthogonality")), config.get("subtract_projection")
    if not orthonormal and not isinstance(subtracts, bool):
        raise fault(
            str(folder.path / CONFIG),
            "the adapters library writes the same for a NoReFT and a DiReFT, which compute different things. Say which "
            'it was: put "subtract_projection": true (NoReFT) or false (DiReFT) into its "config".',
            "mismatch",
        )
    if orthonormal and subtracts is False:
        raise fault(
            str(folder.path / CONFIG),
            "orthogonality with subtract_projection=false has no counterpart here: DiReFT has no orthogonality.",
            "mismatch",
        )
    if config.get("output_reft", True) is not True:
        raise fault(str(folder.path / CONFIG), "output_reft=false has no counterpart here.", "mismatch")
    first, last = (config.get(f"{end}_positions", 0) for end in ("prefix", "suffix"))
    counts = [config.get("r"), first, last]
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
        raise fault(str(folder.path / CONFIG), f"found r and positions {shown(counts)}, expected whole numbers.")
    return {
        "r": config["r"],
        "form": "loreft" if orthonormal else "noreft" if subtracts else "direft",
        "prefix_positions": first,
        "suffix_positions": last,
        "tied_weights": bool(config.get("tied_weights")),
        "non_linearity": config.get("non_linearity"),
        "dropout": float(config.get("dropout") or 0.0),
    }


def _units(options: Mapping[str, Any]) -> dict[str, str]:
    """Our names of the units, and their numbers. What edits no position is in the folder nevertheless."""
    if options["tied_weights"]:
        return {"begin": "0"}
    counts = {"begin": "prefix_positions", "end": "suffix_positions"}
    return {name: str(number) for number, (name, count) in enumerate(counts.items()) if options[count]}


def _unit(folder: Folder, place: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rotated = f"{_ROTATED}original"
    own = {"learned_source.weight", "learned_source.bias"}
    own |= {rotated, _BASE} if rotated in parts else {"projection.weight"}
    if parts.keys() != own or parts["learned_source.weight"].dim() != 2:
        raise fault(
            str(folder.path),
            f"{place} has {', '.join(sorted(parts)) or 'nothing'}, expected {', '.join(sorted(own))}. Copy it again.",
            "mismatch",
        )
    projection = _rows(folder, parts[rotated], parts[_BASE]) if rotated in parts else parts["projection.weight"]
    return {
        "weight": parts["learned_source.weight"],
        "bias": parts["learned_source.bias"],
        "projection": projection,
    }


def _rows(folder: Folder, original: Tensor, base: Tensor) -> Tensor:
    """The orthonormal rows that torch makes of a parameter and the square matrix beside it."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    r, width = original.shape
    with torch.random.fork_rng(devices=[]):  # a new layer draws what it is given right away
        layer: Any = nn.utils.parametrizations.orthogonal(nn.Linear(width, r, bias=False, dtype=dtype))
    names = dict(zip((f"{_ROTATED}original", _BASE), (original, base), strict=True))
    try:
        layer.load_state_dict({name.removeprefix("projection."): tensor.to(dtype) for name, tensor in names.items()})
    except RuntimeError as error:
        raise fault(str(folder.path), f"found an orthogonal matrix of other sizes: {error}", "mismatch") from error
    rows: Tensor = layer.weight.detach().clone()
    if (rows @ rows.mT - torch.eye(r, dtype=dtype)).abs().max() > _APART:
        raise fault(
            str(folder.path),
            "found a projection whose rows are not orthonormal: torch reads signs off the diagonal of its parameter, "
            "which weight decay has made fractions. It does nothing any more; train it again without weight decay.",
            "mismatch",
        )
    return rows


def _matched(folder: Folder, found: Mapping[str, object], targets: tuple[Target, ...]) -> dict[str, Target]:
    """Of each of their layers our place in that layer of the same stack."""
    ours = {_layer(target.module): target for target in targets}
    places = {place: ours[_layer(place)] for place in found if _layer(place) in ours}
    absent = [place for place in found if place not in places]
    every = folder.config["config"].get("layers", "all") == "all"
    if absent or not places or (every and len(places) != len(targets)):
        raise fault(
            str(folder.path),
            f"found edits behind {len(found)} layers, and this model has {len(targets)}"
            f"{f'; {absent[0]} is none of them' if absent else ''}. Load it into the kind of model that it was trained "
            "on.",
            "mismatch",
        )
    return places


def _layer(path: str) -> tuple[bool, str]:
    number = _NUMBER.search(f".{path}")
    return "decoder" in path.split("."), number[1] if number is not None else path
