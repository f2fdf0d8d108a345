"""The ``lightning_pet`` entry of a checkpoint: what it holds, and the checks on reading it.

Plain types only, so that ``torch.load(weights_only=True)`` reads it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lightning_pet.core.applied import Adaptation, Applied
from lightning_pet.core.structure import Target
from lightning_pet.errors import DeltaFileError
from lightning_pet.store.fingerprint import Fingerprint, from_plain, to_plain
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.strict_json import check_fields, check_type, fault
from lightning_pet.store.tensors import digest, require_finite, verify_digests
from lightning_pet.version import VERSION

KEY = "lightning_pet"
FORMAT = 1

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
    """Build the entry for a checkpoint whose delta-only state dict is ``state``."""
    return {
        "format": FORMAT,
        "written_by": written_by(),
        "root": root_path,
        "methods": [describe(applied) for applied in record.applied],
        "base": to_plain(base),
        "digests": {name: digest(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)},
    }


def read_entry(checkpoint: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Take the entry out of a checkpoint, with its format checked.

    Raises:
        DeltaFileError: if there is none, or it is of a newer format.
    """
    entry = checkpoint.get(KEY)
    if not isinstance(entry, dict):
        raise DeltaFileError(
            f"{path} is not a delta checkpoint: it has no {KEY!r} entry (found {', '.join(sorted(checkpoint)[:6])}…). "
            "ckpt_path resumes a run of lightning_pet. To start from other base weights, load them where the "
            "LightningModule builds its model; to start from a delta, use start_from.",
            "mismatch",
        )
    if entry.get("format") != FORMAT:
        raise DeltaFileError(
            f"{path} has format {entry.get('format')!r}, this release reads {FORMAT}. It was written by "
            f"{entry.get('written_by')}; install that release or a newer one.",
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
    }
    given = {key: types for key, types in optional.items() if key in entry}
    check_fields(dict(entry), where, {**schema, "methods": (list,), "digests": (dict,), **given})
    for name, digest_ in entry["digests"].items():
        check_type(name, f"{where}.digests: a name", (str,))
        check_type(digest_, f"{where}.digests.{name}", (str,))
    for index, method in enumerate(entry["methods"]):
        here = f"{where}.methods[{index}]"
        check_fields(method, here, {"method": (str,), "name": (str,), "config": (dict,), "targets": (list,)})
        for target in method["targets"]:
            check_fields(target, f"{here}.targets", _TARGET)
            for pair in target["rows"] or ():
                if len(check_type(pair, f"{here}.targets.rows", (list,))) != 2:
                    raise fault(f"{here}.targets.rows", "found a range that is no pair of first row and end.")
                for bound in pair:
                    check_type(bound, f"{here}.targets.rows", (int,))
            for size in target["sizes"]:
                check_type(size, f"{here}.targets.sizes", (int,))


def methods_of(entry: Mapping[str, Any]) -> tuple[MethodRecord, ...]:
    """The methods of a checked entry."""
    return tuple(
        MethodRecord(m["method"], m["name"], m["config"], tuple(_target(target) for target in m["targets"]))
        for m in entry["methods"]
    )


def _target(plain: Mapping[str, Any]) -> Target:
    rows = plain["rows"]
    ranges = None if rows is None else tuple((int(a), int(b)) for a, b in rows)
    return Target(**{**plain, "rows": ranges, "sizes": tuple(plain["sizes"])})


def check_tensors(checkpoint: Mapping[str, Any], entry: Mapping[str, Any], path: object) -> None:
    """Every tensor must be the one that was written, and finite."""
    state = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    verify_digests(state, entry["digests"], where=str(path))
    for name, tensor in state.items():
        if tensor.is_floating_point():
            require_finite(name, tensor, where=str(path))


def saved_fingerprint(entry: Mapping[str, Any], path: object) -> Fingerprint:
    """The fingerprint stored in an entry."""
    return from_plain(entry["base"], str(path))
