"""Find and read pretrained models and tokenizers: local folders, installed Python packages, the Hugging Face hub.

A model is named by one string:

===================================  ==================================================================
``./folder`` or ``/path/to/folder``  a local folder in the Hugging Face layout; the hub is never contacted
``package:<name>/<subfolder>``       a folder inside an installed Python package, which is not imported
``builtin:dates``                    the date model of :mod:`lightning_pet.modules.date_model`, trained on first use
``builtin:date_chat``                the same as a chat, :mod:`lightning_pet.modules.date_chat`
``owner/name``                       a repository of the Hugging Face hub
===================================  ==================================================================

Weights are read from safetensors files only, and no code that comes with a model is run.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_pet.errors import ArgumentError
from lightning_pet.modules.date_chat import date_chat_folder
from lightning_pet.modules.date_model import date_model_folder, quiet_transformers

_BUILTIN: Mapping[str, Callable[[], Path]] = {"dates": date_model_folder, "date_chat": date_chat_folder}
_WEIGHTS = "model.safetensors"


def find_model(model: str) -> Path | str:
    """Resolve the name of a model to a local folder (``Path``) or a hub repository (``str``).

    Args:
        model: see the table at the head of this module.

    Returns:
        An existing folder, or the hub repository's id unchanged.

    Raises:
        ArgumentError: the folder, package or builtin model does not exist.

    Example:
        >>> find_model("sentence-transformers/all-MiniLM-L6-v2")
        'sentence-transformers/all-MiniLM-L6-v2'
    """
    scheme, _, rest = model.partition(":")
    if scheme == "package":
        return _package_folder(rest)
    if scheme == "builtin":
        if rest not in _BUILTIN:
            raise ArgumentError(f"model={model!r}: there is no such builtin model; known: {sorted(_BUILTIN)}")
        return _BUILTIN[rest]()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ArgumentError(f"model={model!r}: there is no folder {folder.absolute()}; give an existing folder")
    return model


def _package_folder(place: str) -> Path:
    package, _, subfolder = place.partition("/")
    if not package.isidentifier():
        raise ArgumentError(f"model='package:{place}': expected 'package:<top-level module>/<subfolder>'")
    spec = importlib.util.find_spec(package)  # of a top-level name: finds it without running its code
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ArgumentError(f"model='package:{place}': no package {package!r} is installed; `pip install {name}`")
    root = Path(spec.submodule_search_locations[0]).resolve()
    folder = (root / subfolder).resolve()
    if not folder.is_relative_to(root) or not folder.is_dir():
        raise ArgumentError(f"model='package:{place}': {package!r} has no folder {subfolder!r} (looked in {root})")
    return folder


def check_digest(source: Path | str, sha256: str) -> None:
    """Compare the weights file's SHA-256 with a pinned one.

    Args:
        source: what :func:`find_model` returned.
        sha256: 64 hexadecimal digits.

    Raises:
        ArgumentError: the digests differ, or the weights are not one ``model.safetensors``.
    """
    path = source / _WEIGHTS if isinstance(source, Path) else _hub_weights(source)
    if not path.is_file():
        raise ArgumentError(f"sha256 pins one file {_WEIGHTS}, and {source} has none; remove sha256")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise ArgumentError(
            f"{path} has sha256 {found}, not the pinned {sha256}: these are other weights. "
            f"Install the pinned version, or change sha256 if you trust this file"
        )


def _hub_weights(repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, _WEIGHTS))


def load_model(auto_class: str, model: str | dict[str, Any], sha256: str | None = None, **config: Any) -> Any:
    """Build a Hugging Face model.

    Args:
        auto_class: name of the ``transformers`` class that builds it, such as ``"AutoModel"``.
        model: name of a pretrained model, or a mapping with ``model_type`` and the configuration of a new
            model with random weights.
        sha256: digest that the weights file must have; ``None`` accepts any.
        config: further fields of the configuration, such as ``num_labels``.

    Returns:
        The model in float32, in training mode.

    Raises:
        ArgumentError: the model does not exist, is not the pinned one, or is badly described.
    """
    import transformers

    factory = getattr(transformers, auto_class)
    if isinstance(model, dict):
        if "model_type" not in model:
            raise ArgumentError(f"model={model}: a new model needs 'model_type' (such as 'bert') in its configuration")
        if sha256 is not None:
            raise ArgumentError("sha256 pins pretrained weights, but model describes a new one; remove sha256")
        return factory.from_config(transformers.AutoConfig.for_model(**model, **config)).train()
    source = find_model(model)
    if sha256 is not None:
        check_digest(source, sha256)
    local = isinstance(source, Path)
    with quiet_transformers():  # its load report says nothing that _check_complete does not check
        loaded, info = factory.from_pretrained(
            str(source),
            use_safetensors=True,
            local_files_only=local,
            dtype="float32",
            output_loading_info=True,
            **config,
        )
    body = loaded.base_model_prefix
    _check_complete(loaded, info["missing_keys"], source, body if hasattr(loaded, body) else "")
    return loaded.train()


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer.

    Args:
        name: a model's name as in :func:`find_model`, or ``"bytes"`` for UTF-8 bytes (ByT5), which needs no files.

    Returns:
        The Hugging Face tokenizer, with a padding token.

    Raises:
        ArgumentError: the folder or package does not exist.
    """
    import transformers

    if name == "bytes":
        return transformers.ByT5Tokenizer(extra_ids=0)
    source = find_model(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), local_files_only=isinstance(source, Path))
    if tokenizer.pad_token is None:  # GPT-like: padding is masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_complete(model: Any, missing: Iterable[str], source: Path | str, body: str) -> None:
    # A file of another architecture would otherwise leave the model's body random. A new head and a
    # pooler (which sentence encoders do without) may be absent.
    absent = sorted(key for key in missing if key.startswith(body) and "pooler." not in key)
    if absent:
        raise ArgumentError(
            f"the weights in {source} lack {len(absent)} tensors of {type(model).__name__}, such as {absent[0]!r}; "
            f"they belong to another architecture"
        )
