"""User code that runs before every verb, and gives new values to what was trained."""

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import PETError
from lightning_pet.model.adaptation import adapted_root, record_of
from lightning_pet.model.marks import Mark, compare, mark
from lightning_pet.model.naming import named_tensors
from lightning_pet.operations.unaccompanied import reads_checkpoint
from lightning_pet.strategies.parameter_groups import shown


@dataclass(frozen=True)
class Trained:
    """What a delta was before ``setup`` or ``configure_model`` ran again."""

    root: nn.Module
    marks: dict[str, Mark | None]
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]

    @classmethod
    def of(cls, root: nn.Module) -> "Trained":
        """Remember the delta of a root, and what trains with it."""
        record = record_of(root)
        own = {*record.delta_names, *record.trained_names} if record is not None else set()
        tensors = {name: tensor for name, tensor in named_tensors(root) if name in own}
        values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return cls(root, {name: mark(tensor) for name, tensor in tensors.items()}, tensors, values)

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare, after the hook, and put back what was only loaded over.

        Raises:
            PETError: if modules of the delta are gone; if others took their places, and this run neither trains nor
                reads a checkpoint.
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
        lost = list(self.marks) if whole else self._put_back(own, type(module).__name__)
        if not lost:
            return
        text = (
            f"{type(module).__name__} built anew what was trained: {shown(lost)}. setup and "
            "configure_model run once per fit, validate, test and predict; let them build the model only if "
            "it is not there yet, or pass ckpt_path."
        )
        if trainer.state.fn != TrainerFn.FITTING:
            raise PETError(text)
        rank_zero_warn(f"{text} This fit starts from what is new.")

    def _put_back(self, own: dict[str, Tensor], kind: str) -> list[str]:
        """Give tensors their trained values again that were loaded over; return names of replaced ones."""
        changed = self._changed(own)
        there = [name for name in changed if own[name] is self.tensors[name]]
        with torch.no_grad():
            for name in there:
                own[name].copy_(self.values[name])
        lost = self._changed(own)
        if there and not lost:
            rank_zero_info(
                f"{kind} loaded other values over what was trained ({shown(there)}), as it does for the base; "
                "the trained ones are put back."
            )
        return lost

    def _changed(self, own: dict[str, Tensor]) -> list[str]:
        names = [name for name, before in self.marks.items() if before is not None]
        answers = compare((own[name], self.marks[name]) for name in names)
        return [name for name, changed in zip(names, answers, strict=True) if changed is not False]
