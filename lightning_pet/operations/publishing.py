"""A delta onto the hub: with a card, only when it is asked for."""

import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from torch import nn

from lightning_pet.arguments import one_of
from lightning_pet.exchange.hub import DELTA, card, upload
from lightning_pet.model.adaptation import adapted_root
from lightning_pet.operations.delta import save_delta
from lightning_pet.operations.exchanging import delta_in, export_delta
from lightning_pet.store.files import is_delta_file
from lightning_pet.store.reader import PathLike, extract_delta
from lightning_pet.version import VERSION

Form = Literal["delta", "peft"]
_CODE = {
    "delta": 'from lightning_pet import load_delta\n\nadapted = load_delta(model, "{}")',
    "peft": 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, "{}")',
}


def push_to_hub(
    source: nn.Module | PathLike,
    repo_id: str,
    *,
    to: Form = "delta",
    name: str | None = None,
    base: nn.Module | PathLike | None = None,
    base_model: str | None = None,
    metrics: Mapping[str, float] | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Add a delta",
    create_pr: bool = False,
) -> str:
    """Upload a delta and a card that says how to load it.

    Args:
        source: a delta file, a training checkpoint, or an adapted model.
        repo_id: ``owner/name``; made if there is none.
        to: ``"delta"``: our file, which holds every method, and the fingerprint of its base; ``"peft"``: a folder that
            HF PEFT reads, see :func:`~lightning_pet.export_delta`.
        name: which delta, of a model that has several.
        base: as in :func:`~lightning_pet.export_delta`.
        base_model: the base's name on the hub. Default: what a model calls itself, if that is such a name.
        metrics: numbers for the card.
        private: whether a new repository is.
        token: of the account. Default: that of the login.
        revision: branch to commit to.
        commit_message: of the commit.
        create_pr: ask for a merge in place of a commit.

    Returns:
        The address of the commit.

    Raises:
        DeltaFileError: if the delta cannot be written in that form, or the hub does not take it.
        PETError: if nothing was applied to a model.
    """
    one_of("to", to, Form)
    stored, found = delta_in(source, name), base_model
    if found is None:
        found = _name_on_hub(source if isinstance(source, nn.Module) else base)
    code = _CODE[to].format(repo_id)
    library = "peft" if to == "peft" else "lightning_pet"
    versions = {"lightning_pet": VERSION, **{name: version(name) for name in ("lightning", "torch")}}
    text = card(
        stored.methods, repo_id, library=library, base_model=found, metrics=metrics, versions=versions, code=code
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        if to == "peft":
            export_delta(source, folder, base=base, name=name)
        else:
            folder.mkdir()
            _write(source, folder / DELTA, name)
        (folder / "README.md").write_text(text, encoding="utf-8")
        options = {"revision": revision, "commit_message": commit_message, "create_pr": create_pr}
        return upload(folder, repo_id, private=private, token=token, **options)


def _write(source: nn.Module | PathLike, path: Path, name: str | None) -> None:
    if isinstance(source, nn.Module):
        save_delta(source, path, name=name)
        return
    if is_delta_file(source):
        path.write_bytes(Path(os.fspath(source)).read_bytes())
    else:
        extract_delta(source, path)


def _name_on_hub(model: object) -> str:
    """What a model calls itself, if that is no path of somebody's disk."""
    found = adapted_root(model) if isinstance(model, nn.Module) else None
    name = getattr(getattr(found[1] if found else model, "config", None), "_name_or_path", "")
    return name if isinstance(name, str) and name.count("/") <= 1 and not os.path.exists(name) else ""
