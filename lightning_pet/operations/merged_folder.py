"""Merging a delta into a transformers folder."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_pet.errors import ArgumentError
from lightning_pet.operations.delta import load_delta
from lightning_pet.store.writer import atomic_folder, reap_once

_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "*.tiktoken",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template*",
)


def merge_into_folder(
    path: Path, base: Path, output: Path, model_class: str = "auto", base_check: str = "error"
) -> Path:
    """Load a base model, add a delta into it, and save the result.

    The folder is complete or absent, also after a kill or a power loss: it is built beside its place and renamed at
    the end.

    Args:
        path: delta file or training checkpoint.
        base: local folder of the base model.
        output: folder to make.
        model_class: class of transformers; ``"auto"``: the first architecture in the base's ``config.json``.
        base_check: what to do about another base model.

    Returns:
        The folder.

    Raises:
        ArgumentError: if the output exists, or the class is unknown.
        DeltaFileError: if the delta does not fit the base; code ``io`` if the operating system refuses.
        NotMergeableError: if it cannot be merged exactly.
    """
    if output.exists():
        raise ArgumentError(f"{output} exists already; give a new folder.")
    if not (base / "config.json").is_file():
        raise ArgumentError(f"{base} is not a folder of a transformers model: it has no config.json.")
    model = _model_class(base, model_class).from_pretrained(base, local_files_only=True)
    load_delta(model, path, base_check=base_check).merge_()
    reap_once(output.parent)
    atomic_folder(output, lambda folder: _fill(Path(folder), model, base))
    return output


def _fill(folder: Path, model: Any, base: Path) -> None:
    with _system_errors():
        model.save_pretrained(folder)
    for pattern in _TOKENIZER_FILES:
        for file in base.glob(pattern):
            if not (folder / file.name).exists():
                shutil.copy2(file, folder / file.name)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """What safetensors raises when the operating system refuses is no OSError, and has its number in the text only."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _model_class(base: Path, name: str) -> Any:
    import transformers

    if name == "auto":
        architectures = transformers.AutoConfig.from_pretrained(base, local_files_only=True).architectures
        if not architectures:
            raise ArgumentError(
                f"{base}/config.json names no architecture; pass the class, e.g. --model_class BertModel."
            )
        name = architectures[0]
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ArgumentError(
            f"model_class={name!r} is not a model class of transformers, e.g. BertForSequenceClassification."
        )
    return cls
