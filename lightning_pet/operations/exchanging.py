"""Deltas of other libraries as files of ours, and ours as folders of theirs."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.arguments import one_of
from lightning_pet.errors import ArgumentError, DeltaFileError, PETError
from lightning_pet.exchange.adapters.writer import head_config, to_adapters
from lightning_pet.exchange.folder import CONFIG, is_folder
from lightning_pet.exchange.images.files import is_image_file
from lightning_pet.exchange.peft_hosts import Export
from lightning_pet.exchange.peft_writer import for_server, to_peft
from lightning_pet.exchange.source import read_source
from lightning_pet.model.adaptation import adapted_root, record_at
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.combining.factors import as_low_rank
from lightning_pet.operations.combining.in_model import combined, file_of, options_of
from lightning_pet.operations.delta import load_delta, load_model, merge_into_folder, save_delta
from lightning_pet.operations.roots import root_of
from lightning_pet.operations.saved import meant
from lightning_pet.probe.trace import candidate_inputs
from lightning_pet.store.delta_file import write_delta
from lightning_pet.store.entry import written_by
from lightning_pet.store.files import atomic_folder, reap_once
from lightning_pet.store.manifest import Manifest
from lightning_pet.store.reader import PathLike, Stored, read

Format = Literal["peft", "adapters", "vllm", "llama.cpp", "lora", "transformers"]
_TENSORS: Final = "adapter_model.safetensors"


def import_delta(source: PathLike, path: PathLike, *, base: nn.Module | PathLike | None = None) -> int:
    """Write what a folder of HF PEFT, or a file of kohya or LyCORIS, holds into a delta file.

    Args:
        source: the folder, or that file.
        path: usually ends in ``.pet.safetensors``; an existing file is replaced.
        base: the model that it is for, or a local folder of it. With it everything is checked against the model, and
            the file knows its fingerprint; without it a note in the file says that this was not done, and ties and
            biases are looked at when it is loaded. PiSSA, OLoRA, prompts, prefixes and deltas on parameters that no
            layer calls cannot be understood without, nor files of kohya or LyCORIS.

    Returns:
        Bytes written.

    Raises:
        ArgumentError: if the source is neither.
        DeltaFileError: if it is damaged, has no counterpart here, or does not fit the base. Nothing is written then.
    """
    images = is_image_file(source)
    if not is_folder(source) and not images:
        raise ArgumentError(
            f"{source} is no folder: give the one that save_pretrained wrote, or a file of kohya or LyCORIS."
        )
    if base is None:
        stored = read_source(source)
        rank_zero_warn(
            f"{path}: imported without its base, so that nothing was compared with it: neither paths and shapes, nor "
            "which of its parameters are one. That is done when the file is loaded; give the base to have it done now."
        )
        notes = {**stored.notes, "not_compared": "imported without its base"}
        manifest = Manifest(stored.methods, notes=notes, written_by=written_by())
        return write_delta(path, stored.tensors, manifest)
    model = load_model(Path(os.fspath(base))) if isinstance(base, str | os.PathLike) else base
    adapted = load_delta(model, source, name="imported")
    try:
        return save_delta(
            model, path, name="imported", notes={"imported_from": "kohya or LyCORIS" if images else "HF PEFT"}
        )
    finally:
        adapted["imported"].remove()


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        rank: of the low-rank delta in it; 0 for other kinds.
        error: ‖what was written − what the delta changes‖ / ‖what it changes‖; 0 where the form is exact.
        difference: the largest difference of outputs between the delta here and the folder as its reader applies it;
            ``None`` without a base that describes itself.
        reader: which reader that was: PEFT, or where it is not installed this library's own.
    """

    folder: Path
    rank: int = 0
    error: float = 0.0
    difference: float | None = None
    reader: str = ""


def export_delta(
    source: nn.Module | PathLike,
    folder: PathLike,
    *,
    to: Format = "peft",
    base: nn.Module | PathLike | None = None,
    name: str | None = None,
    rank: int | None = None,
    max_error: float = 0.01,
) -> Exported:
    """Write a delta as another program reads it: exactly, or not at all.

    Args:
        source: a delta file, a training checkpoint, or an adapted model.
        folder: what to make; nothing, or an empty folder, may be there.
        to: ``"peft"``: a folder of HF PEFT, which ``PeftModel.from_pretrained`` and transformers'
            ``load_adapter`` read. ``"adapters"``: one of the adapters library, for its ``load_adapter``.
            ``"vllm"`` and ``"llama.cpp"``: the plain LoRA that these servers read. ``"lora"``: whatever changes
            weights, as a LoRA of this ``rank`` (PEFT's folder); without a rank where some LoRA says all of the
            change. ``"transformers"``: the merged model.
        base: the model that it is for, or a local folder of it. Deltas on fused weights, convolutions, embeddings or
            experts, and prefixes cannot be written without. With it outputs are compared.
        name: which delta, of a model that has several.
        rank: of the approximation that ``to="lora"`` makes.
        max_error: what such an approximation may leave out of the change, as a share of its norm.

    Raises:
        ArgumentError: if the format is unknown, the folder is not empty, or an argument is missing.
        DeltaFileError: if that program has no counterpart of the delta, the base is needed, or the approximation is
            worse than ``max_error``; nothing is written then.
    """
    one_of("to", to, Format)
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ArgumentError(f"{folder} exists already; give a new folder.")
    if to == "transformers":
        return _merged(source, Path(os.fspath(folder)), base)
    model = load_model(Path(os.fspath(base))) if isinstance(base, str | os.PathLike) else base
    stored, model = delta_in(source, name), source if isinstance(source, nn.Module) else model
    root = None if model is None else root_of(model)[1]
    error = 0.0
    if to == "lora":
        stored, error = _as_lora(stored, root, model, rank, max_error)
    export = to_adapters(stored, root) if to == "adapters" else to_peft(stored, root)
    if to in ("vllm", "llama.cpp"):
        for_server(export, to)
    reap_once(Path(os.fspath(folder)).parent)
    difference, reader = None, ""
    write = _write_adapters if to == "adapters" else _write

    def build(made: str) -> None:
        nonlocal difference, reader
        write(Path(made), export)
        if not error:
            difference, reader = _compare(source, model, Path(made), strict=to in ("peft", "adapters"))

    atomic_folder(folder, build)
    return Exported(Path(os.fspath(folder)), int(export.config.get("r", 0)), error, difference, reader)


def delta_in(source: nn.Module | PathLike, name: str | None = None) -> Stored:
    """A delta from wherever a user has it.

    Args:
        source: a delta file, a training checkpoint, or an adapted model.
        name: which, of a model that has several.

    Raises:
        PETError: if nothing was applied to a model.
        ArgumentError: if a file is given a name.
    """
    if not isinstance(source, nn.Module):
        if name is not None:
            raise ArgumentError(f"name={name!r} tells deltas of a model apart; {source} is a file, which holds one.")
        return read(source)
    found = adapted_root(source)
    if found is None:
        raise PETError(f"nothing was applied to this {type(source).__name__}: there is no delta in it.")
    record = record_at(found[1])
    return file_of(found[1], record, meant(record, name))


def _as_lora(
    stored: Stored, root: nn.Module | None, model: nn.Module | None, rank: int | None, max_error: float
) -> tuple[Stored, float]:
    if root is None or model is None:
        raise ArgumentError("to='lora' computes with the base's weights: give it, base=….")
    there = adapted_root(model) is not None
    delta = str(stored.path) if there else "exported"
    if not there:
        load_delta(model, stored.path, name=delta)
    own = root_of(model)[1]
    try:
        exact = as_low_rank(own, delta)
        if exact is not None and (rank is None or rank >= exact.methods[0].config["r"]):
            return exact, 0.0
        if rank is None:
            raise ArgumentError("to='lora' needs a rank, such as rank=16; without one it would have to be exact.")
        names, options = options_of(record_at(own), {delta: 1.0}, "svd", rank, None, 0)
        made, result = combined(own, names, options)
    finally:
        if not there:
            Adapted(own)[delta].remove()
    if result.error > max_error:
        raise DeltaFileError(
            f"{stored.path}: the best LoRA of rank {rank} leaves out {result.error:.2%} of the change, more than "
            f"max_error={max_error:g}. Raise rank or max_error, or merge it (to='transformers').",
            "mismatch",
        )
    return made, result.error


def _merged(source: nn.Module | PathLike, folder: Path, base: nn.Module | PathLike | None) -> Exported:
    if isinstance(source, nn.Module) or not isinstance(base, str | os.PathLike):
        raise ArgumentError(
            "to='transformers' merges a delta file into a folder of its base: give both paths. A model in memory is "
            "merged by adapted.merge_() and saved by its own save_pretrained."
        )
    merge_into_folder(Path(os.fspath(source)), Path(os.fspath(base)), folder)
    return Exported(folder)


def _write(folder: Path, export: Export) -> None:
    from safetensors.torch import save_file

    save_file(export.tensors, folder / _TENSORS, metadata={"format": "pt"})
    text = json.dumps(export.config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_card(export), encoding="utf-8")


def _write_adapters(folder: Path, export: Export) -> None:
    """Both of the files that its loader may be told to take; heads in files of their own."""
    from safetensors.torch import save_file

    files = [("adapter.safetensors", "pytorch_adapter.bin", CONFIG, export.config, export.tensors)]
    if export.heads and export.root is not None:
        head = head_config(export.root)
        files.append(("model_head.safetensors", "pytorch_model_head.bin", "head_config.json", head, export.heads))
    for safe, pickled, config, told, tensors in files:
        save_file(tensors, folder / safe)
        torch.save(tensors, folder / pickled)
        (folder / config).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(export: Export) -> str:
    base = export.config["base_model_name_or_path"]
    head = {"library_name": "peft", **({"base_model": base, "base_model_relation": "adapter"} if base else {})}
    lines = [f"{key}: {value}" for key, value in head.items()]
    return "\n".join(
        [
            "---",
            *lines,
            "tags:",
            f"- {export.config['peft_type'].lower()}",
            "---",
            "",
            f"# A delta of {export.record.method}",
            "",
            f"Written by {written_by()}. Load it onto its base:",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            "model = PeftModel.from_pretrained(base, folder)",
            "```",
            "",
        ]
    )


# --- what comes out of it there ------------------------------------------------------------------------------


def _compare(
    source: nn.Module | PathLike, model: nn.Module | None, folder: Path, strict: bool
) -> tuple[float | None, str]:
    """The largest difference of outputs, on a copy of the base in the reader's hands.

    Raises:
        DeltaFileError: if it is ``strict``, and the reader cannot load or run what was written, or has other outputs.
    """
    if model is None:
        return None, ""
    ours = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    if isinstance(source, nn.Module):
        Adapted(plain).remove()
    else:
        load_delta(ours, source)
    root = root_of(ours)[1]
    inputs = _working_inputs(root)
    bare = root_of(plain)[1]
    try:
        theirs, reader = _with_reader(bare, folder)
        b = None if inputs is None else _output(theirs, inputs)
    except Exception as error:  # whatever it is that PEFT says
        if not strict:
            return None, ""
        who = "PEFT" if (folder / _TENSORS).is_file() else "the reader here"
        raise DeltaFileError(
            f"{_name_of(source)}: {who} cannot take it on this {type(bare).__name__}: {type(error).__name__}: "
            f"{str(error)[:300]}. Merge it (to='transformers').",
            "mismatch",
        ) from error
    a = None if inputs is None else _output(root, inputs)
    if a is None or b is None:
        return None, ""
    virtual = json.loads((folder / CONFIG).read_text()).get("num_virtual_tokens", 0)
    if virtual and b.shape != a.shape:
        b = b[:, virtual:]
    return float((a.double() - b.double()).abs().max()), reader


def _name_of(source: nn.Module | PathLike) -> str:
    return f"this {type(source).__name__}" if isinstance(source, nn.Module) else os.fspath(source)


def _with_reader(base: nn.Module, folder: Path) -> tuple[nn.Module, str]:
    theirs = not (folder / _TENSORS).is_file()
    if theirs or find_spec("peft") is None:
        load_delta(base, folder, base_check="off")
        return base.eval(), f"this library's own reader of {'the adapters library' if theirs else 'PEFT'}'s folders"
    import peft

    model: Any = peft.PeftModel.from_pretrained(base, folder)
    return model.eval(), f"PEFT {peft.__version__}"


def _working_inputs(root: nn.Module) -> dict[str, Any] | None:
    for inputs in candidate_inputs(root):
        try:
            if _output(root, inputs) is not None:
                return inputs
        except Exception:  # a guess that this model does not take
            continue
    return None


def _output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    with torch.no_grad():
        output = model.eval()(**inputs)
    found = output.logits if hasattr(output, "logits") else output[0] if isinstance(output, tuple) else None
    found = getattr(output, "last_hidden_state", None) if found is None else found
    return found if isinstance(found, Tensor) else None
