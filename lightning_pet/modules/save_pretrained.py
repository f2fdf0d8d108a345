"""A tuned model as a folder that every ready module, and transformers, reads."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_pet.errors import ArgumentError
from lightning_pet.store.files import atomic_folder


class SavePretrained(pl.Callback):
    """At the end of a fit, write the LightningModule's ``model`` and ``tokenizer`` into a folder.

    For runs that train the whole model, such as language-model adaptation: the folder is the base of the runs
    that follow.

    Args:
        folder: where to; below the Trainer's ``default_root_dir`` if relative.

    Raises:
        ArgumentError: the module has no ``model`` that can write itself.

    Example:
        >>> SavePretrained("adapted").folder
        'adapted'
    """

    def __init__(self, folder: str = "model") -> None:
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look before the run, not after it."""
        if not hasattr(getattr(pl_module, "model", None), "save_pretrained"):
            raise ArgumentError(f"{type(pl_module).__name__} has no `model` of transformers that could be saved")

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the folder: whole or not at all, unless one is there already, which is overwritten file by file."""
        folder = Path(trainer.default_root_dir) / self.folder

        def write(path: str) -> None:
            pl_module.model.save_pretrained(path)  # type: ignore[union-attr, operator]
            tokenizer = getattr(pl_module, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(path)

        if folder.exists():
            write(str(folder))
        else:
            atomic_folder(folder, write)
        rank_zero_info(f"the model is in {folder}")
