"""Wherever a delta comes from: a file of ours, a training checkpoint, a folder of another library."""

from collections.abc import Mapping
from typing import Final

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_pet.errors import ArgumentError, BaseMismatchError
from lightning_pet.exchange.adapters.reader import read_adapters
from lightning_pet.exchange.folder import Base, Folder, is_folder, read_folder, renamed
from lightning_pet.exchange.hub import fetched, is_hub_id
from lightning_pet.exchange.images.files import is_image_file, read_image_file
from lightning_pet.exchange.peft import read_peft
from lightning_pet.store.reader import PathLike, Stored, read

_NAMES: Final = {"peft": "base_model_name_or_path", "adapters": "model_name"}


def local(source: PathLike, revision: str | None = None) -> PathLike:
    """What a source is on this machine: itself, or the file or folder that was downloaded of ``owner/name``.

    Args:
        source: a path, or the name of a repository of the hub.
        revision: branch, tag or commit of a repository.

    Raises:
        ArgumentError: if a path is given a revision.
        DeltaFileError: (``io``) if the hub does not have it, or cannot be asked.
    """
    if is_hub_id(source):
        return fetched(str(source), revision)
    if revision is not None:
        raise ArgumentError(f"revision={revision!r} is for a repository of the hub (owner/name); {source} is a path.")
    return source


def is_foreign(source: object) -> bool:
    """Whether a source is a folder or file of another program."""
    return is_folder(source) or is_image_file(source)


def read_source(
    source: PathLike,
    base: Base | None = None,
    base_check: str = "error",
    rename: Mapping[str, str] | None = None,
    delta: str | None = None,
) -> Stored:
    """Read a delta from wherever it comes.

    Args:
        source: a file of :func:`~lightning_pet.save_delta`, a training checkpoint, a folder that HF PEFT or
            the adapters library wrote, or a file of kohya or LyCORIS.
        base: the model that it is for; some folders cannot be understood without.
        base_check: what to do about another base. A folder of another library has no fingerprint of it, so all that
            can be compared is its name, and then the shapes.
        rename: prefixes of paths in a folder of another library, and what they are in the base.
        delta: which, of a checkpoint in which several have trained together.

    Raises:
        ArgumentError: if nothing in the folder has one of the prefixes.
        DeltaFileError: if it is damaged, or cannot be understood.
        BaseMismatchError: if ``base_check`` is ``"exact"``, which nothing in such a folder can answer.
    """
    source = local(source)
    if is_image_file(source):
        stored = read_image_file(source, base, rename)
        if base is not None:
            _compare_names(Folder(stored.path, "peft", {}, {}), base.root, base_check)
        return stored
    if not is_folder(source):
        return read(source, delta)
    folder = renamed(read_folder(source), rename)
    stored = read_peft(folder, base) if folder.kind == "peft" else read_adapters(folder, base)
    if base is not None:
        _compare_names(folder, base.root, base_check)
    return stored


def _compare_names(folder: Folder, root: nn.Module, base_check: str) -> None:
    """Say what is known of the base: its name, or nothing."""
    if base_check == "off":
        return
    if base_check == "exact":
        raise BaseMismatchError(
            f"{folder.path}: base_check='exact' cannot be answered, as a folder of another library has no fingerprint "
            "of its base. Use base_check='error', which compares names and shapes."
        )
    named = folder.config.get(_NAMES[folder.kind])
    own = getattr(getattr(root, "config", None), "_name_or_path", "")
    if not isinstance(named, str) or not named:
        rank_zero_warn(
            f"{folder.path} does not name its base: its shapes are those of this {type(root).__name__}, and more "
            "cannot be known. Compare outputs on an example of yours."
        )
    elif own and own != named:
        rank_zero_warn(
            f"{folder.path} was trained on {named!r}, and this model is called {own!r}: its shapes fit, and more "
            "cannot be known. Compare outputs on an example of yours; base_check='off' silences this."
        )
    else:
        rank_zero_info(f"{folder.path} was trained on {named!r}; its shapes fit, its values cannot be compared.")
