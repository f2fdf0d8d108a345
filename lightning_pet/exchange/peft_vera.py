"""VeRA as HF PEFT writes it: two vectors per layer, and what all layers share at the root, or only the key of that."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from torch import Tensor, nn

from lightning_pet.exchange.folder import CONFIG, PREFIX, Base, Folder
from lightning_pet.exchange.peft_hosts import Export, Read, Values, path_of, placed, split_hosts, whole_of
from lightning_pet.exchange.peft_low_rank import kind_at, names_of
from lightning_pet.layers.rows import spread
from lightning_pet.layers.vera import Projections
from lightning_pet.model.layer_kinds import matrix_of
from lightning_pet.model.naming import by_delta, join, named_modules
from lightning_pet.model.structure import Target
from lightning_pet.store.strict_json import fault, shown

_SHARED: Final = {"a": "base_model.vera_A", "b": "base_model.vera_B"}
_OWN: Final = "pet.vera_default_projections"


def read_vera(folder: Folder, base: Base | None) -> Read:
    """A folder with the shared matrices, or with the key that they are drawn from again if the base is at hand."""
    config, root = folder.config, base.root if base else None
    if config.get("bias", "none") != "none":
        raise fault(
            str(folder.path / CONFIG),
            f"bias={shown(config['bias'])} trains biases, too, which VeRACallback does not. Merge it with PEFT.",
            "mismatch",
        )
    stored = {own: folder.tensors[name] for own, name in _SHARED.items() if name in folder.tensors}
    hosts, rest = split_hosts(
        replace(folder, tensors={key: t for key, t in folder.tensors.items() if key not in _SHARED.values()})
    )
    targets: list[Target] = []
    tensors: Values = {}
    for _, target, parts in placed(folder, hosts, root, ("lambda_b", "lambda_d")):
        targets.append(target)
        tensors |= {(target, name): tensor for name, tensor in parts.items()}
    rank = len(tensors[targets[0], "lambda_d"])
    start = float(config.get("d_initial") or 0.0)
    options = {
        "r": rank,
        "d_initial": start if start > 0 else 0.1,  # of a start that is over
        "projection_prng_key": _key(folder),
        "dropout": float(config.get("vera_dropout") or 0.0),
        "target_modules": sorted({target.module for target in targets}),
    }
    shared = _shared(folder, stored, rank, root, targets)
    read = whole_of(folder, "vera", options, [Target("", ""), *targets], tensors, rest, frozenset())
    return replace(read, tensors={join(_OWN, name): tensor for name, tensor in shared.items()} | read.tensors)


def _key(folder: Folder) -> int:
    key = folder.config.get("projection_prng_key", 0)
    if isinstance(key, bool) or not isinstance(key, int) or key < 0:
        raise fault(str(folder.path / CONFIG), f"found projection_prng_key={shown(key)}, expected a whole number.")
    return key


def _shared(
    folder: Folder, stored: dict[str, Tensor], rank: int, root: nn.Module | None, targets: Sequence[Target]
) -> dict[str, Tensor]:
    """The two matrices, as large as the widest layer."""
    if len(stored) == 1 or (not stored and folder.config.get("save_projection", True)):
        absent = next(name for own, name in _SHARED.items() if own not in stored)
        raise fault(str(folder.path), f"found no {absent}, which save_projection promises. Copy it again.", "mismatch")
    if stored and root is None:
        return stored
    if root is None:
        raise fault(
            str(folder.path),
            "save_projection=false: the two matrices that all layers share are not in it, and how they are drawn again "
            "depends on the widest layer. Read the folder together with its base.",
            "mismatch",
        )
    modules = named_modules(root)
    outputs, inputs = zip(*(matrix_of(modules[target.module], target.parameter) for target in targets), strict=True)
    if not stored:
        drawn = Projections(rank, max(inputs), max(outputs), key=_key(folder))
        return {"a": drawn.a, "b": drawn.b}
    a, b = stored["a"], stored["b"]
    shapes = (rank, max(inputs)), (max(outputs), rank)
    if any(t.dim() != 2 or t.shape[0] < s[0] or t.shape[1] < s[1] for t, s in zip((a, b), shapes, strict=True)):
        raise fault(
            str(folder.path),
            f"found vera_A {tuple(a.shape)} and vera_B {tuple(b.shape)}, expected at least {shapes[0]} and {shapes[1]} "
            "for these layers. Load it into the base that it was trained on.",
            "mismatch",
        )
    return {"a": a[:, : max(inputs)].contiguous(), "b": b[: max(outputs)].contiguous()}


def write_vera(export: Export, left: dict[str, Tensor]) -> None:
    """VeRA on layers that PEFT can call, each with one pair of vectors."""
    groups = by_delta(left)
    shared = path_of(export.record.method, Target("", "projections"), export.record.name)
    if shared not in groups:
        raise export.fault("the two matrices that all layers share are not in it. Save it again.")
    for own, name in _SHARED.items():
        export.tensors[name] = left.pop(join(shared, own)).contiguous()
    layers: dict[str, Target] = {}
    for target in export.record.targets:
        parts = groups.get(export.path(target), {})
        if "lambda_d" not in parts:
            continue
        path = target.module
        if path in layers:
            raise export.fault(
                f"{path} has several roles in one weight, each with vectors of its own; PEFT has one pair for it. "
                f"Train it with target_modules=[{path.rpartition('.')[2]!r}], or write it as a LoRA (to='lora')."
            )
        if target.parameter != "weight" or target.reads or parts["lambda_b"].dim() != 1:
            raise export.fault(f"{target.path} is no layer that is called, as PEFT's VeRA needs. Merge it.")
        layers[path] = target
        b = left.pop(join(export.path(target), "lambda_b"))
        if target.rows is not None:
            host = export.needed(path, "has several roles in one weight")
            b = spread(b, target.rows, matrix_of(host, target.parameter)[0], 0.0, -1)
        export.tensors[f"{PREFIX}{path}.vera_lambda_b"] = b.contiguous()
        export.tensors[f"{PREFIX}{path}.vera_lambda_d"] = left.pop(join(export.path(target), "lambda_d")).contiguous()
    options = export.record.config
    export.config |= {
        "peft_type": "VERA",
        "r": len(export.tensors[_SHARED["a"]]),
        "d_initial": options.get("d_initial", 0.1),
        "projection_prng_key": options.get("projection_prng_key", 0),
        "save_projection": True,
        "vera_dropout": float(options.get("dropout") or 0.0),
        "bias": "none",
        "init_weights": True,
        "fan_in_fan_out": all(kind_at(export, target) == "conv1d_hf" for target in layers.values()),
        "target_modules": names_of(export, sorted(layers)),
    }
