"""Deltas on the hub of Hugging Face, by its own client; the network is asked only if a user names a repository."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lightning_pet.errors import DeltaFileError
from lightning_pet.model.adaptation import Applied
from lightning_pet.store.files import expanded
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.strict_json import fault

DELTA: Final = "delta.pet.safetensors"
_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES: Final = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".json", ".yaml")
_WANTED: Final = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter.safetensors",
    "pytorch_adapter.bin",
    "head_config.json",
    "model_head.safetensors",
    "pytorch_model_head.bin",
    "*.pet.safetensors",
]


def is_hub_id(source: object) -> bool:
    """Whether a source names a repository of the hub: ``owner/name``, where there is no such path.

    >>> is_hub_id("owner/topics"), is_hub_id("runs/last.ckpt"), is_hub_id("topics"), is_hub_id("./owner/topics")
    (True, False, False, False)
    """
    if not isinstance(source, str) or _ID.fullmatch(source) is None or source.endswith(_FILES):
        return False
    return not os.path.exists(expanded(source))


def fetched(repo_id: str, revision: str | None = None) -> Path:
    """Download what is needed of a repository, or find it in the cache.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; default: the main branch.

    Returns:
        The delta file, or the folder of another library.

    Raises:
        DeltaFileError: ``io`` if it cannot be had; ``schema`` if there is no delta in it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=_WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        at = f" at {revision!r}" if revision else ""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise fault(
            repo_id,
            f"there is no such file or folder here, and the repository of that name on the hub{at} could not be had "
            f"({type(error).__name__}: {(lines or ['no reason given'])[0][:300]}). Check the path or the name; a "
            "private repository needs a login (hf auth login).",
            "io",
        ) from error
    own = sorted(folder.glob("*.pet.safetensors"))
    if len(own) > 1:
        names = ", ".join(file.name for file in own[:8])
        raise fault(repo_id, f"found {len(own)} delta files ({names}), expected one. Download the one you mean.")
    return own[0] if own else folder


def upload(folder: Path, repo_id: str, **options: Any) -> str:
    """Make a repository if there is none, and put a folder into it as one commit.

    Args:
        folder: what to upload, all of it.
        repo_id: ``owner/name``.
        **options: ``private``, ``token``, ``revision``, ``commit_message``, ``create_pr``.

    Returns:
        The address of the commit.

    Raises:
        DeltaFileError: ``io`` if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(token=options.pop("token", None))
    private = options.pop("private", None)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise _refused(repo_id, error) from error
    except HFValidationError as error:
        raise fault(repo_id, f"is no name of a repository: {error}") from error
    return str(done.commit_url)


def _refused(repo_id: str, error: BaseException) -> DeltaFileError:
    text = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
    return fault(
        repo_id,
        f"the hub did not take it ({type(error).__name__}: {text}). Log in (hf auth login), or pass token=….",
        "io",
    )


def card(
    methods: Sequence[MethodRecord | Applied],
    repo_id: str,
    *,
    library: str,
    base_model: str = "",
    metrics: Mapping[str, float] | None = None,
    versions: Mapping[str, str] | None = None,
    code: str = "",
    merged: bool = False,
) -> str:
    """The README of a repository, with the header that the hub reads.

    Args:
        methods: those of the delta.
        repo_id: ``owner/name``.
        library: which library loads it.
        base_model: name of the base on the hub; ``""`` if it has none.
        metrics: a number for each, shown as a table.
        versions: of the libraries that wrote it.
        code: how to load it.
        merged: it is a whole model, into which the delta was merged.
    """
    from huggingface_hub import ModelCardData

    names = list(dict.fromkeys(record.method for record in methods))
    kind = "finetune" if merged else "adapter"
    relation: dict[str, Any] = {"base_model": base_model, "base_model_relation": kind} if base_model else {}
    data = ModelCardData(library_name=library, tags=[*names, "lightning_pet", "parameter-efficient-tuning"], **relation)
    parts = [f"---\n{data.to_yaml()}\n---", f"# {repo_id.rpartition('/')[2]}"]
    of, on = ", ".join(names), f" `{base_model}`" if base_model else ""
    parts += [
        f"The base{on}, into which a delta of {of} was merged." if merged else f"A delta of {of}{on and ' on' + on}."
    ]
    if metrics:
        rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
        parts += ["\n".join(["| metric | value |", "|---|---|", *rows])]
    parts += [f"```python\n{code}\n```"] if code else []
    if versions:
        parts += ["Written by " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    return "\n\n".join(parts) + "\n"
