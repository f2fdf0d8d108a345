"""Checkpoints: the ``lightning_pet`` entry of one, the checks on reading it, and the file around it.

Plain types only, so that ``torch.load(weights_only=True)`` reads it.
"""

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, BinaryIO, Final, cast

import torch
from torch import Tensor

from lightning_pet.errors import DeltaFileError
from lightning_pet.model.adaptation import Adaptation, Applied
from lightning_pet.model.naming import VALUE
from lightning_pet.store.container import Limits, open_regular
from lightning_pet.store.fingerprint import digest, require_finite, verify_digests
from lightning_pet.store.manifest import Fingerprint, MethodRecord, checked_methods, from_plain, to_plain
from lightning_pet.store.strict_json import check_fields, check_label, check_name, check_text, check_type, fault, shown
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


def described_methods(record: Adaptation) -> list[dict[str, Any]]:
    """The methods of a run in plain types; where several deltas train, each method says to which it belongs."""
    methods = [applied for applied in record.applied if applied.method != VALUE]
    if not record.together:
        return [describe(applied) for applied in methods]
    return [{**describe(applied), "delta": applied.delta} for applied in methods]


def deltas_in_entry(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the deltas that trained together in the run of a checkpoint; none if there was one."""
    return tuple(dict.fromkeys(item["delta"] for item in entry["methods"] if "delta" in item))


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
        "methods": described_methods(record),
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


def _checked(entry: Mapping[str, Any], where: str, delta: str | None = None) -> tuple[MethodRecord, ...]:
    where = f"{where}.methods"
    groups: dict[object, list[object]] = {}
    for index, item in enumerate(entry["methods"]):
        own = check_type(item, f"{where}[{index}]", (dict,))
        name = own.get("delta")
        if "delta" in own:
            check_label(name, f"{where}[{index}].delta")
        groups.setdefault(name, []).append({key: value for key, value in own.items() if key != "delta"})
    if None in groups and len(groups) > 1:
        raise fault(where, "found methods with and without the name of a delta, expected it for all or for none.")
    found = {name: checked_methods(items, where, _rows) for name, items in groups.items()}
    if not found:
        checked_methods([], where, _rows)
    return tuple(method for name, own in found.items() if delta in (None, name) for method in own)


def _rows(targets: Any, where: str) -> list[object]:
    rows: list[object] = []
    for target in check_type(targets, where, (list,)):
        fields = check_fields(target, where, _TARGET)
        rows.append([fields[name] for name in _TARGET])
    return rows


def methods_of(entry: Mapping[str, Any], path: object, delta: str | None = None) -> tuple[MethodRecord, ...]:
    """The methods of an entry, or of one of its deltas, as a manifest would hold them."""
    return _checked(entry, f"{path}: {KEY}", delta)


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


# --- reading ``.ckpt`` files: damage is found before anything is unpickled, every fault has one kind of error ---


_ANY_SIZE: Final = Limits(file_bytes=2**63)  # a checkpoint of full fine-tuning is as large as the model and more
_INFLATED: Final = 64 << 20  # torch.save compresses nothing; what else packs a checkpoint gains little


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a training checkpoint, on the CPU; the file is opened once, and never waited for.

    Raises:
        DeltaFileError: ``io`` if it cannot be opened, ``unsafe`` if it is a folder, pipe, socket or device;
            ``limit``, ``corrupt`` or ``schema`` as :func:`read_checkpoint`.
    """
    with open_regular(path, _ANY_SIZE) as (file, _):
        return read_checkpoint(path, lambda: torch.load(file, map_location="cpu", weights_only=True), file)


def read_checkpoint(
    path: str | os.PathLike[str], load: Callable[[], Any], file: BinaryIO | None = None
) -> dict[str, Any]:
    """Read a checkpoint file.

    ``torch.load`` does not compare the checksums that ``torch.save`` wrote, so they are compared here: a
    flipped bit in the state of an optimizer would otherwise change a run without a word.

    Args:
        path: local or remote; checksums are compared for local files.
        load: reads the file.
        file: the file, if it is open already.

    Raises:
        DeltaFileError: ``corrupt`` if the file is damaged or holds more than plain data; ``limit`` if it would
            inflate; ``unsafe`` if it is a pipe, socket or device; ``schema`` if it is no checkpoint of Lightning.
        FileNotFoundError: if there is no such file.
    """
    checkpoint = _plain(path, load, file, "a checkpoint")
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in (*checkpoint, *state)):
        raise DeltaFileError(f"{path} is not a Lightning checkpoint: it has no state_dict of names.", "schema")
    state.pop(MARK, None)
    return cast(dict[str, Any], checkpoint)


def load_plain(path: str | os.PathLike[str]) -> Any:
    """Plain data and tensors that ``torch.save`` wrote, on the CPU; an object of any class is refused.

    Raises:
        DeltaFileError: as :func:`load_checkpoint`, but ``unsafe`` for objects.
    """
    with open_regular(path, _ANY_SIZE) as (file, _):
        return _plain(path, lambda: torch.load(file, map_location="cpu", weights_only=True), file, "tensors")


def _plain(path: str | os.PathLike[str], load: Callable[[], Any], file: BinaryIO | None, what: str) -> Any:
    """Look for damage, then load; a file of whatever else is an error of one kind."""
    try:
        if file is not None:
            _look_into(path, file)
        elif os.path.isfile(path):
            with open(path, "rb") as opened:
                _look_into(path, opened)
        elif os.path.exists(path) and not os.path.isdir(path):  # reading it would wait for ever
            with open_regular(path, _ANY_SIZE):
                pass
        return load()
    except (FileNotFoundError, DeltaFileError):
        raise
    except Exception as error:
        raise DeltaFileError(
            f"{path} cannot be read as {what} ({type(error).__name__}: {_first_line(error)}): it is damaged, or "
            "holds objects that are not plain data. Copy it again, or use an earlier save.",
            "unsafe" if what == "tensors" and isinstance(error, pickle.UnpicklingError) else "corrupt",
        ) from error


def _look_into(path: str | os.PathLike[str], file: BinaryIO) -> None:
    """Compare sizes and checksums, and leave the file at its beginning."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    with zipfile.ZipFile(cast(Any, file)) as archive:
        inflated = sum(member.file_size for member in archive.infolist())
        if inflated > size + _INFLATED:
            raise DeltaFileError(
                f"{path}: found {size} bytes that inflate to {inflated}, expected a checkpoint as torch.save writes "
                "it, which is not compressed. Write it again with torch.save, or do not trust its source.",
                "limit",
            )
        damaged = archive.testzip() if torch.serialization.get_crc32_options() else None
    file.seek(0)
    if damaged is not None:
        raise DeltaFileError(
            f"{path} is damaged: the bytes of {damaged!r} do not match their checksum. Copy it again, or use an "
            "earlier save.",
            "corrupt",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
