"""The ``lightning_pet`` entry of a checkpoint: what it holds, and the checks on reading it.

Plain types only, so that ``torch.load(weights_only=True)`` reads it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import torch
from torch import Tensor

from lightning_pet.errors import DeltaFileError
from lightning_pet.model.adaptation import Adaptation, Applied
from lightning_pet.store.manifest import MethodRecord, checked_methods
from lightning_pet.store.remembered import Fingerprint, from_plain, to_plain
from lightning_pet.store.strict_json import check_fields, check_name, check_text, check_type, fault, shown
from lightning_pet.store.tensors import digest, require_finite, verify_digests
from lightning_pet.version import VERSION

KEY = "lightning_pet"
FORMAT = 1
MARK: Final = (
    "lightning_pet: this checkpoint holds a delta without its base - load it with lightning_pet.load_from_checkpoint "
    "or load_delta, or give the Trainer the PET callbacks that wrote it"
)
"""A name in ``state_dict``, without a value: other loaders put the names that they do not expect into their error."""

_TARGET: dict[str, tuple[type, ...]] = {
    "module": (str,),
    "parameter": (str,),
    "role": (str, type(None)),
    "cross": (bool,),
    "rows": (list, type(None)),
    "reads": (str, type(None)),
    "sizes": (list,),
}


def written_by() -> str:
    """Name and version of this library."""
    return f"lightning_pet {VERSION}"


def describe(applied: Applied) -> dict[str, Any]:
    """One applied method in plain types."""
    targets = [asdict(target) for target in applied.targets]
    return {"method": applied.method, "name": applied.name, "config": applied.config, "targets": _lists(targets)}


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def make_entry(record: Adaptation, root_path: str, base: Fingerprint, state: Mapping[str, Any]) -> dict[str, Any]:
    """Build the entry for a checkpoint whose delta-only state dict is ``state``.

    Raises:
        DeltaFileError: naming the option or place that no reader would accept.
    """
    entry = {
        "format": FORMAT,
        "written_by": written_by(),
        "root": root_path,
        "methods": [describe(applied) for applied in record.applied],
        "base": to_plain(base),
        "digests": {name: digest(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)},
    }
    _check_schema(entry, KEY)
    return entry


def read_entry(checkpoint: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Take the entry out of a checkpoint, with its format and every field of its methods checked.

    Raises:
        DeltaFileError: if there is none, it is of a newer format, or a field is not what it has to be.
    """
    entry = checkpoint.get(KEY)
    if not isinstance(entry, dict):
        raise DeltaFileError(
            f"{path} is not a delta checkpoint: it has no {KEY!r} entry (found {', '.join(sorted(checkpoint)[:6])}…). "
            "ckpt_path resumes a run of lightning_pet. To start from other base weights, load them where the "
            "LightningModule builds its model; to start from a delta, use start_from.",
            "mismatch",
        )
    if type(entry.get("format")) is not int or entry["format"] != FORMAT:
        raise DeltaFileError(
            f"{path} has format {shown(entry.get('format'))}, this release reads {FORMAT}. It was written by "
            f"{shown(entry.get('written_by'))}; install that release or a newer one.",
            "version",
        )
    _check_schema(entry, f"{path}: {KEY}")
    return entry


def _check_schema(entry: Mapping[str, Any], where: str) -> None:
    schema: dict[str, tuple[type, ...]] = {"format": (int,), "written_by": (str,), "root": (str,), "base": (dict,)}
    optional: dict[str, tuple[type, ...]] = {
        "optimizers": (list,),
        "optimizer_classes": (list,),
        "resume": (dict,),
        "left_out": (dict,),
    }
    given = {key: types for key, types in optional.items() if key in entry}
    check_fields(dict(entry), where, {**schema, "methods": (list,), "digests": (dict,), **given})
    check_text(entry["written_by"], f"{where}.written_by", 256)
    if entry["root"]:
        check_name(entry["root"], f"{where}.root")
    for name, reason in entry.get("left_out", {}).items():
        check_text(name, f"{where}.left_out: a name")
        check_text(reason, f"{where}.left_out")
    for name, digest_ in entry["digests"].items():
        check_type(name, f"{where}.digests: a name", (str,))
        check_type(digest_, f"{where}.digests.{name}", (str,))
    _checked(entry, where)


def _checked(entry: Mapping[str, Any], where: str) -> tuple[MethodRecord, ...]:
    return checked_methods(entry["methods"], f"{where}.methods", _rows)


def _rows(targets: Any, where: str) -> list[object]:
    rows: list[object] = []
    for target in check_type(targets, where, (list,)):
        fields = check_fields(target, where, _TARGET)
        rows.append([fields[name] for name in _TARGET])
    return rows


def methods_of(entry: Mapping[str, Any], path: object) -> tuple[MethodRecord, ...]:
    """The methods of an entry, as a manifest would hold them."""
    return _checked(entry, f"{path}: {KEY}")


def check_tensors(checkpoint: Mapping[str, Any], entry: Mapping[str, Any], path: object) -> None:
    """Every tensor must be the one that was written, and finite."""
    state = {name: t for name, t in checkpoint["state_dict"].items() if isinstance(t, Tensor) and name != MARK}
    for name, tensor in state.items():
        _check_memory(name, tensor, path)
    digests = {name: digest_ for name, digest_ in entry["digests"].items() if name != MARK}
    verify_digests(state, digests, where=str(path))
    for name, tensor in state.items():
        if tensor.is_floating_point():
            require_finite(name, tensor, where=str(path))


def _check_memory(name: str, tensor: Tensor, path: object) -> None:
    """A tensor that repeats a few numbers by its strides would need memory that the file does not have."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return  # refused where its digest is compared
    held, stands_for = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
    if stands_for > held:
        text = f"found {held} bytes that stand for {stands_for}, expected a tensor that holds each of its numbers."
        raise fault(f"{path}: tensor {name!r}", text, "limit")


def saved_fingerprint(entry: Mapping[str, Any], path: object) -> Fingerprint:
    """The fingerprint stored in an entry."""
    return from_plain(entry["base"], f"{path}: {KEY}.base")
