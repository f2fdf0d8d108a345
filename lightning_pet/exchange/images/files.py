"""Files of deltas as the trainers of image models write them (kohya, LyCORIS): LoRA, LoCon, LoHa, LoKr.

One safetensors file without a configuration. A tensor's name is a prefix (``lora_unet_``), the path of its module with
"_" in place of ".", and what it is. Such a path can be read in several ways, so it is looked up among the modules of
the base, and refused unless exactly one fits.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.exchange.folder import Base
from lightning_pet.exchange.peft_hosts import path_of, record_of
from lightning_pet.layers.kronecker import divided
from lightning_pet.model.layer_kinds import host_kind, matrix_of
from lightning_pet.model.naming import join, named_modules
from lightning_pet.model.structure import Target
from lightning_pet.store.delta_file import read_tensors
from lightning_pet.store.files import expanded
from lightning_pet.store.manifest import MANIFEST_NAME, MethodRecord
from lightning_pet.store.reader import Stored
from lightning_pet.store.strict_json import fault
from lightning_pet.targets.patterns import exactly

_PREFIXES: Final = (
    *("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_"),
    *("lycoris_unet_", "lycoris_te_", "lycoris_", "lora_"),
)
_MARKS: Final = (b".lora_down.", b".hada_w1_a", b".lokr_w1", b".lokr_w2")
_HEADER_BYTES: Final = 4 << 20
_PARTS: Final[Mapping[str, tuple[str, str]]] = {
    "lora_down.weight": ("lora", "a"),
    "lora_up.weight": ("lora", "b"),
    "dora_scale": ("", "magnitude"),
    "alpha": ("", "alpha"),
    **{f"hada_{name}": ("loha", name) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": ("lokr", name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
"""Of the end of each name: the method, and our name of the tensor."""
_FORMS: Final[Mapping[str, tuple[frozenset[str], ...]]] = {
    "lora": (frozenset({"a", "b"}), frozenset({"a", "b", "magnitude"})),
    "loha": tuple(frozenset({"w1_a", "w1_b", "w2_a", "w2_b", *core}) for core in ((), ("t1", "t2"))),
    "lokr": tuple(
        frozenset({*first, *second})
        for first in (("w1",), ("w1_a", "w1_b"))
        for second in (("w2",), ("w2_a", "w2_b"), ("w2_a", "w2_b", "t2"))
    ),
}
"""Of each method which tensors make a change together."""


@dataclass
class _Layer:
    """What a file holds of one layer."""

    name: str
    method: str = ""
    parts: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None


def is_image_file(path: object) -> bool:
    """Whether a path is such a file; what cannot be read is not, and is left to the reader of our own."""
    if not isinstance(path, str | os.PathLike):
        return False
    try:
        if not os.path.isfile(expanded(path)):
            return False
        with open(expanded(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, _HEADER_BYTES))
    except (OSError, ValueError):
        return False
    return any(mark in header for mark in _MARKS) and MANIFEST_NAME.encode() not in header


def read_image_file(path: str | os.PathLike[str], base: Base | None, rename: Mapping[str, str] | None = None) -> Stored:
    """Read such a file as what one of ours would hold, with one method for each kind of change in it.

    Args:
        path: of the file.
        base: the model that it is for.
        rename: beginnings of names in the file (``"lora_te1_"``), and of the paths that they stand for
            (``"text_encoder."``).

    Raises:
        ArgumentError: if no name in it begins with one of these.
        DeltaFileError: if it is damaged, there is no base, or a tensor has no place or more than one.
    """
    where = Path(expanded(path))
    if base is None:
        raise fault(
            str(where),
            "found a file of kohya or LyCORIS, whose names only the modules of its base can tell apart. Read it "
            "together with its base (load_delta, or import with --base).",
            "mismatch",
        )
    modules = named_modules(base.root)
    found = _Names(where, modules, rename or {})
    layers = _layers(where, read_tensors(where))
    placed: dict[str, list[tuple[Target, _Layer]]] = defaultdict(list)
    taken: dict[str, str] = {}
    for layer in layers:
        module = found.module_of(layer.name)
        if module in taken:
            raise fault(str(where), f"{layer.name} and {taken[module]} are both {module}.", "mismatch")
        taken[module] = layer.name
        placed[layer.method].append((Target(module), layer))
    found.check_used()
    records: list[MethodRecord] = []
    tensors: dict[str, Tensor] = {}
    for method, own in placed.items():
        options = _OPTIONS[method](where, own, modules)
        targets = [target for target, _ in own]
        options["target_modules"] = sorted(target.module for target in targets)
        records.append(record_of(method, options, targets, ()))
        for target, layer in own:
            shaped = _shaped(layer, modules[target.module])
            tensors |= {join(path_of(method, target), name): tensor for name, tensor in shaped.items()}
    return Stored(where, tuple(records), tensors, None, notes={"imported_from": "kohya or LyCORIS"})


# --- names -------------------------------------------------------------------------------------------------------


class _Names:
    """Which module a name means."""

    def __init__(self, where: Path, modules: Mapping[str, nn.Module], rename: Mapping[str, str]) -> None:
        self.where, self.rename = where, rename
        self.used: set[str] = set()
        self.whole: dict[str, list[str]] = defaultdict(list)
        self.ends: dict[str, list[str]] = defaultdict(list)
        for path, module in modules.items():
            if not path or host_kind(module) is None:
                continue
            parts = path.split(".")
            self.whole["_".join(parts)].append(path)
            for start in range(1, len(parts)):
                self.ends["_".join(parts[start:])].append(path)

    def module_of(self, name: str) -> str:
        """The path of the one module that a name fits: as a whole, or else as the end of its path."""
        for old in sorted(self.rename, key=len, reverse=True):
            if name.startswith(old):
                self.used.add(old)
                new = self.rename[old]
                wanted = new.replace(".", "_") + name.removeprefix(old)
                fitting = [path for path in self.whole.get(wanted, ()) if path.startswith(new)]
                return self._only(name, fitting)
        plain = [name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)] or [name]
        for known in (self.whole, self.ends):
            if fitting := list(dict.fromkeys(path for one in plain for path in known.get(one, ()))):
                return self._only(name, fitting)
        return self._only(name, [])

    def _only(self, name: str, fitting: Sequence[str]) -> str:
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise fault(
                str(self.where),
                f"found the name {name!r}, which means {' or '.join(fitting[:4])} of this base. Say which: "
                f"rename={{'lora_te1_': 'text_encoder.'}}, with the beginning of the name and of the path.",
                "mismatch",
            )
        raise fault(
            str(self.where),
            f"found the name {name!r}, which is no layer of this base. Load it into the base that it was trained on; "
            "if the file is for several models, into one that holds all of them.",
            "mismatch",
        )

    def check_used(self) -> None:
        """Every beginning that was given has to stand somewhere."""
        if unknown := [old for old in self.rename if old not in self.used]:
            raise ArgumentError(f"rename: nothing in {self.where} begins with {unknown[0]!r}.")


def _layers(where: Path, tensors: Mapping[str, Tensor]) -> list[_Layer]:
    """The tensors by layer, each with the method that they are of."""
    layers: dict[str, _Layer] = {}
    for key, tensor in tensors.items():
        name, _, end = key.partition(".")
        if end not in _PARTS:
            raise fault(
                str(where),
                f"found the tensor {key!r}, which has no counterpart here: what is read are LoRA (down and up), DoRA, "
                "LoHa and LoKr. Merge it with the program that trained it.",
                "mismatch",
            )
        method, own = _PARTS[end]
        layer = layers.setdefault(name, _Layer(name))
        if method and layer.method not in ("", method):
            raise fault(str(where), f"{name} is {layer.method} and {method} at once.", "mismatch")
        layer.method = layer.method or method
        if own != "alpha":
            layer.parts[own] = tensor
            continue
        layer.alpha = float(tensor) if tensor.numel() == 1 else 0.0
        if not layer.alpha > 0:
            raise fault(str(where), f"found {key!r}, expected one number above zero.", "mismatch")
    for layer in layers.values():
        if not layer.method or frozenset(layer.parts) not in _FORMS[layer.method]:
            raise fault(
                str(where),
                f"{layer.name} has {', '.join(sorted(layer.parts)) or 'nothing but an alpha'}, which makes no change. "
                "Copy the file again, or merge it with the program that trained it.",
                "mismatch",
            )
    return list(layers.values())


# --- options -----------------------------------------------------------------------------------------------------

Placed = Sequence[tuple[Target, _Layer]]


def _by_place(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": int(r),
        "alpha": alpha,
        "rank_pattern": {place: rank for place, rank in ranks.items() if rank != r} or None,
        "alpha_pattern": {place: own for place, own in alphas.items() if own != alpha} or None,
    }


def _of_ranks(layers: Placed, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Rank and alpha by place; without an alpha the scale is one."""
    alphas = {exactly(t): float(ranks[exactly(t)]) if own.alpha is None else own.alpha for t, own in layers}
    return _by_place(ranks, alphas)


def _lora(where: Path, layers: Placed, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    scaled = [target for target, layer in layers if "magnitude" in layer.parts]
    if scaled and len(scaled) < len(layers):
        raise fault(str(where), f"{scaled[0].module} has a dora_scale and other layers have none.", "mismatch")
    for target, layer in layers if scaled else ():
        outputs, magnitude = layer.parts["b"].shape[0], layer.parts["magnitude"]
        if magnitude.numel() != outputs or magnitude.shape[0] != outputs:
            raise fault(
                str(where),
                f"the dora_scale of {target.module} is {tuple(magnitude.shape)}: a number for each input, and this "
                "library has one for each output. Merge it with the program that trained it.",
                "mismatch",
            )
    ranks = {exactly(target): layer.parts["a"].shape[0] for target, layer in layers}
    return _of_ranks(layers, ranks) | {"use_dora": bool(scaled)}


def _loha(where: Path, layers: Placed, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    _check_no_magnitude(where, layers)
    ranks = {exactly(target): layer.parts["w1_b"].shape[0] for target, layer in layers}
    return _of_ranks(layers, ranks) | {"use_effective_conv2d": any("t1" in layer.parts for _, layer in layers)}


def _lokr(where: Path, layers: Placed, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Whole factors have no rank, and their writers no scale: what ``alpha`` says there counts for nothing."""
    _check_no_magnitude(where, layers)
    sizes, ranks, alphas = [], {}, {}
    for target, layer in layers:
        own, module = layer.parts, modules[target.module]
        if isinstance(module, nn.Conv1d) and "w2" in own:
            raise fault(str(where), f"{target.module} is a Conv1d with a whole lokr_w2, which is not read.", "mismatch")
        outputs, inputs = matrix_of(module)
        inputs = inputs if host_kind(module) != "conv" else int(module.in_channels // module.groups)  # type: ignore[operator]
        first = own["w1"].shape if "w1" in own else (own["w1_a"].shape[0], own["w1_b"].shape[1])
        sizes.append(((int(first[0]), outputs), (int(first[1]), inputs)))
        place = exactly(target)
        if "w1_b" in own or "w2_b" in own:
            ranks[place] = own["t2" if "t2" in own else "w2_b" if "w2_b" in own else "w1_b"].shape[0]
            alphas[place] = float(ranks[place]) if layer.alpha is None else layer.alpha
        else:
            ranks[place] = max(outputs, inputs)  # enough for whole factors
            alphas[place] = float(ranks[place])
    return _by_place(ranks, alphas) | {
        "decompose_factor": _factor(where, sizes),
        "decompose_both": any("w1_a" in layer.parts for _, layer in layers),
        "use_effective_conv2d": any("t2" in layer.parts for _, layer in layers),
    }


def _factor(where: Path, sizes: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> int:
    """The factor that takes all layers apart as they are."""
    for factor in (-1, *sorted({first for pairs in sizes for first, _ in pairs})):
        if all(divided(size, factor)[0] == first for pairs in sizes for first, size in pairs):
            return factor
    raise fault(
        str(where),
        "no decompose_factor takes all layers of this base apart as the LoKr factors in it are. Load it into the base "
        "that it was trained on.",
        "mismatch",
    )


_OPTIONS: Final = {"lora": _lora, "loha": _loha, "lokr": _lokr}


def _check_no_magnitude(where: Path, layers: Placed) -> None:
    for target, layer in layers:
        if "magnitude" in layer.parts:
            raise fault(str(where), f"{target.module} has a dora_scale beside {layer.method}.", "mismatch")


# --- shapes ------------------------------------------------------------------------------------------------------


def _shaped(layer: _Layer, module: nn.Module) -> dict[str, Tensor]:
    """The tensors in our form: one program's linear layer is a convolution of size 1 in another's model."""
    parts, kernel = dict(layer.parts), tuple(getattr(module, "kernel_size", ()))
    if "magnitude" in parts:
        parts["magnitude"] = parts["magnitude"].flatten()
    for name, ones in (("a", kernel), ("b", (1,) * len(kernel)), ("w2", kernel)):
        own = parts.get(name)
        if own is None:
            continue
        if not kernel and all(size == 1 for size in own.shape[2:]):
            parts[name] = own.flatten(1)
        elif own.dim() == 2 and all(size == 1 for size in ones):
            parts[name] = own.reshape(*own.shape, *ones)
    return parts
