"""User code that runs before every verb, and gives new values to what was trained."""

from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.core.applied import adapted_root, record_of
from lightning_pet.core.marks import Mark, compare, mark
from lightning_pet.core.naming import named_tensors
from lightning_pet.engine.parameter_groups import shown
from lightning_pet.engine.unaccompanied import reads_checkpoint
from lightning_pet.errors import PETError


@dataclass(frozen=True)
class Trained:
    """What a delta was before ``setup`` or ``configure_model`` ran again."""

    root: nn.Module
    marks: dict[str, Mark | None]

    @classmethod
    def of(cls, root: nn.Module) -> "Trained":
        """Remember the delta of a root, and what trains with it."""
        record = record_of(root)
        own = {*record.delta_names, *record.trained_names} if record is not None else set()
        return cls(root, {name: mark(tensor) for name, tensor in named_tensors(root) if name in own})

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare, after the hook.

        Raises:
            PETError: if modules of the delta are gone; if values are others, and this run neither trains nor reads
                a checkpoint.
        """
        found = adapted_root(module)
        whole = found is None or found[1] is not self.root
        own = dict(named_tensors(self.root))
        gone = [name for name in self.marks if name not in own]
        if gone and not whole:
            raise PETError(
                f"{type(module).__name__} replaced modules that carry a trained delta: {shown(gone)} are gone. setup "
                "and configure_model run once per fit, validate, test and predict; let them build the model only if it "
                "is not there yet."
            )
        if reads_checkpoint(trainer):
            return  # all of it comes from the file
        names = [name for name, before in self.marks.items() if before is not None]
        answers = [True] * len(names) if whole else compare((own[name], self.marks[name]) for name in names)
        lost = [name for name, changed in zip(names, answers, strict=True) if changed is not False]
        if not lost:
            return
        text = (
            f"{type(module).__name__} gave new values to what was trained, or built it anew: {shown(lost)}. setup and "
            "configure_model run once per fit, validate, test and predict; let them build and load the model only if "
            "it is not there yet, or pass ckpt_path."
        )
        if trainer.state.fn != TrainerFn.FITTING:
            raise PETError(text)
        rank_zero_warn(f"{text} This fit starts from the new values.")
