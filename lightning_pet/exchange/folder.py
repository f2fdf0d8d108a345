"""A folder of another library: its configuration and its tensors, read as strictly as our own files."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.model.structure import Structure
from lightning_pet.store.container import DEFAULT, Limits, open_regular, read_exact
from lightning_pet.store.delta_file import read_tensors
from lightning_pet.store.entry import load_plain
from lightning_pet.store.files import expanded
from lightning_pet.store.fingerprint import require_finite
from lightning_pet.store.strict_json import check_type, fault, parse

Kind = Literal["peft", "adapters"]
CONFIG: Final = "adapter_config.json"
_CONFIG_BYTES: Final = 1 << 20
_FILES: Final[Mapping[Kind, tuple[str, str]]] = {
    "peft": ("adapter_model.safetensors", "adapter_model.bin"),
    "adapters": ("adapter.safetensors", "pytorch_adapter.bin"),
}
_NAMES: Final[Mapping[Kind, str]] = {"peft": "HF PEFT", "adapters": "the adapters library"}


@dataclass(frozen=True)
class Folder:
    """What one folder of another library holds.

    Attributes:
        path: of the folder.
        kind: whose it is.
        config: its ``adapter_config.json``.
        tensors: its values in main memory, by the other library's names.
    """

    path: Path
    kind: Kind
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Base:
    """The model that a folder is read for.

    Attributes:
        root: what would be adapted.
        structure: what a forward of it shows; asked for only where names do not tell.
    """

    root: nn.Module
    structure: Callable[[], Structure]


def is_folder(path: object) -> bool:
    """Whether a source is a folder; all that this library writes itself are files."""
    return isinstance(path, str | os.PathLike) and os.path.isdir(expanded(path))


def read_folder(path: str | os.PathLike[str], *, limits: Limits = DEFAULT) -> Folder:
    """Read a folder of HF PEFT or of adapters, by copy; nothing in it is run or imported.

    Args:
        path: the folder.
        limits: sizes to accept; the folder cannot raise them.

    Raises:
        DeltaFileError: ``schema`` if it is no such folder, or is incomplete; ``io``, ``limit``, ``corrupt``,
            ``nonfinite``; ``unsafe`` for a pickle that holds more than plain tensors.
    """
    where = Path(expanded(path))
    config = _config(where)
    kind = _kind(where, config)
    return Folder(where, kind, config, _tensors(where, kind, limits))


PREFIX: Final = "base_model.model."


def renamed(folder: Folder, rename: Mapping[str, str] | None) -> Folder:
    """The same folder for a model whose paths begin otherwise; what PEFT puts before all of them stays.

    Raises:
        ArgumentError: if nothing in the folder begins with one of the prefixes.
    """
    if not rename:
        return folder
    head = PREFIX if folder.kind == "peft" else ""
    pairs = sorted(rename.items(), key=lambda pair: -len(pair[0]))
    used: set[str] = set()

    def moved(name: str) -> str:
        own = name.removeprefix(head)
        for old, new in pairs:
            if own.startswith(old):
                used.add(old)
                return f"{head}{new}{own.removeprefix(old)}"
        return name

    tensors = {moved(name): tensor for name, tensor in folder.tensors.items()}
    if unknown := [old for old in rename if old not in used]:
        raise ArgumentError(
            f"rename: nothing in {folder.path} begins with {unknown[0]!r}; it has "
            f"{', '.join(name.removeprefix(head) for name in list(folder.tensors)[:3])} …"
        )
    return replace(folder, tensors=tensors)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        below = (
            sorted(child.name for child in folder.iterdir() if (child / CONFIG).is_file()) if folder.is_dir() else []
        )
        if below:
            raise fault(
                str(folder),
                f"found no {CONFIG}, but folders that have one: {', '.join(below[:8])}. Give one of them, such as "
                f"{folder / below[0]}.",
            )
        if (folder / "adapter_fusion_config.json").is_file():
            raise fault(
                str(folder),
                "found a fusion of the adapters library, which holds none of the adapters that it weighs, and is not "
                "read. Import each adapter (lightning-pet import), and train AdapterFusionCallback(adapters=[…]) on "
                "them.",
                "version",
            )
        parts = [name for files in _FILES.values() for name in files if (folder / name).is_file()]
        raise fault(
            str(folder),
            f"found a folder without {CONFIG}, expected one that HF PEFT or the adapters library has written. Give "
            "such a folder, whole, or the path of a delta file or checkpoint itself.",
            "schema" if parts else "unsafe",
        )
    return read_configuration(file)


def read_configuration(file: Path) -> dict[str, Any]:
    """The JSON of a folder, as strictly as everything.

    Raises:
        DeltaFileError: if it is none.
    """
    limits = Limits(file_bytes=_CONFIG_BYTES)
    with open_regular(file, limits) as (opened, size):
        data = read_exact(opened, size, str(file))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise fault(str(file), "found no UTF-8 text. Copy the file again.", "corrupt") from None
    return cast(dict[str, Any], check_type(parse(text, str(file)), str(file), (dict,)))


def _kind(folder: Path, config: Mapping[str, Any]) -> Kind:
    said: list[Kind] = [
        *(["peft"] if "peft_type" in config else []),  # type: ignore[list-item]
        *(["adapters"] if isinstance(config.get("config"), Mapping) else []),  # type: ignore[list-item]
    ]
    there: list[Kind] = [kind for kind, files in _FILES.items() if any((folder / name).is_file() for name in files)]
    if len(said) == 1 and there == said:
        return said[0]
    if len(there) > 1:
        raise fault(
            str(folder),
            "found the tensors of HF PEFT and of the adapters library, expected those of one. Keep the ones that its "
            f"{CONFIG} belongs to.",
        )
    if not said:
        raise fault(
            str(folder / CONFIG),
            "found neither the peft_type of HF PEFT nor the config of the adapters library. Ask for the folder as "
            "save_pretrained or save_adapter wrote it.",
        )
    expected = " or ".join(_FILES[said[0]])
    raise fault(
        str(folder),
        f"found a configuration of {_NAMES[said[0]]} without its tensors, expected {expected}. Copy the whole folder "
        "again.",
    )


def _tensors(folder: Path, kind: Kind, limits: Limits) -> dict[str, Tensor]:
    return read_named(folder, _FILES[kind], limits)


def read_named(folder: Path, files: tuple[str, str], limits: Limits = DEFAULT) -> dict[str, Tensor]:
    """The tensors of one of two files: a safetensors file, or a pickle of plain tensors.

    Raises:
        DeltaFileError: if they are damaged, or there are objects among them.
    """
    safe, pickled = (folder / name for name in files)
    if safe.is_file():
        return read_tensors(safe, limits=limits)
    found = load_plain(pickled)
    where = str(pickled)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise fault(where, "found no dictionary of named tensors. Ask for the folder as the library wrote it.")
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise fault(f"{where}: {name!r}", f"found {type(value).__name__}, expected a dense tensor.")
        tensor = value.detach().contiguous()
        require_finite(name, tensor, where=where)
        tensors[name] = tensor
    return tensors


def unused(folder: Folder, names: object, why: str) -> DeltaFileError:
    """The error for tensors that nothing here has a place for."""
    left = sorted(cast(Any, names))
    more = f" and {len(left) - 4} more" if len(left) > 4 else ""
    return fault(str(folder.path), f"{why}: {', '.join(left[:4])}{more}.", "mismatch")
