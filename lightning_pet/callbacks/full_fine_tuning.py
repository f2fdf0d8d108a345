"""Full fine-tuning, as one more method: the point of reference for all others."""

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import TargetError
from lightning_pet.insertion.method import Insertion
from lightning_pet.model.named_roles import names_of_base
from lightning_pet.model.naming import named_parameters
from lightning_pet.model.quantised import format_of, is_quantised
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.heads import HEAD


class FullFineTuningCallback(PETCallback):
    """Every parameter that you let train does, as it is; nothing is inserted, nothing is frozen or thawed.

    Comparisons, checkpoints and delta files treat it like any other method. The delta is then all of the
    model's parameters, so a file is as large as the model, and loading it onto any base of the same shape
    gives the same model. Switching it off (``Adapted.disabled``) and taking it out need the weights as
    they were: a copy of them stays in host memory.

    Args:
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`. With ``module`` it is that submodule
            that counts as adapted; the rest trains as you let it.

    Example:
        >>> import torch
        >>> from lightning_pet import FullFineTuningCallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> apply(net, [FullFineTuningCallback()]).plan().share
        1.0
    """

    method: ClassVar[str] = "full_fine_tuning"
    in_place = True
    thaws = False
    shards = True

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """The whole model.

        Raises:
            TargetError: if a weight is stored in a form that cannot train.
        """
        fixed = [(name, p) for name, p in named_parameters(root) if is_quantised(p)]
        if fixed:
            name, parameter = fixed[0]
            raise TargetError(
                f"{name} is stored as {format_of(parameter)} and cannot train: full fine-tuning needs a base in "
                "floating point. Load it without quantisation, or use LoRACallback."
            )
        return (Target("", ""),)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build nothing."""
        return []

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """All parameters of the model, or of the submodule and the heads."""
        places = [target.module for target in targets if target.role != HEAD] or [""]
        names = [name for place in places for name in names_of_base(root, place)]
        return tuple(dict.fromkeys((*names, *self.head_parameters(root, targets))))
