"""Tuning in a random subspace (Li et al. 2018, Aghajanyan et al. 2020)."""

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_pet.arguments import whole
from lightning_pet.callbacks.base import PETCallback, affordable, base_numbers, check_affordable
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.delta import Tied, delta_dtype
from lightning_pet.layers.fastfood import LONGEST, padded_length
from lightning_pet.layers.subspace import Projected, Subspace
from lightning_pet.model.naming import named_modules
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.parameters import chosen_parameters, suffix_of, tied
from lightning_pet.targets.patterns import listed_if_given
from lightning_pet.training.controller import Controller


class IntrinsicDimensionCallback(PETCallback):
    r"""Intrinsic dimension: all weights move, in d directions: :math:`W_i = W_{i,0} + \lambda_i P_i \theta`.

    The projections P are random and fixed (Fastfood: no matrix, nothing stored but a seed), θ starts at zero and λ
    at one, so the model starts as the base, bit for bit. With ``structure_aware`` (SAID) every tensor has its
    own trained factor λ; without it (DID) there is none. θ and λ together are exactly ``d`` numbers, which
    are all that is saved. Sources: Li et al. 2018, *Measuring the Intrinsic Dimension of Objective
    Landscapes*; Aghajanyan et al. 2020, *Intrinsic Dimensionality Explains the Effectiveness of Language Model
    Fine-Tuning*; Le et al. 2013, *Fastfood*.

    Args:
        d: trained numbers: the dimension of the subspace and, with SAID, one factor per tensor.
        structure_aware: SAID; ``False``: DID.
        seed: the projections are a function of it, on every device.
        embeddings: move lookup tables, too.
        norms: move normalisation layers, too.
        heads: move fresh task heads in the subspace; default: they train as they are, beside the d numbers.
        exclude_modules: modules (with all below them), parameters or roles to leave as they are.
        authors_gradient: scale gradients as the code of Aghajanyan et al. does, which divides those of θ by
            the length of each tensor's transform; to compare with their learning rates.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range.

    Example:
        >>> import torch
        >>> from lightning_pet import IntrinsicDimensionCallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> apply(net, [IntrinsicDimensionCallback(d=10)]).plan().trainable
        10
    """

    method: ClassVar[str] = "intrinsic_dimension"
    mirrors = False
    width: ClassVar[str | None] = "d"
    shards = True

    def __init__(
        self,
        d: int = 20_000,
        structure_aware: bool = True,
        seed: int = 0,
        embeddings: bool = True,
        norms: bool = True,
        heads: bool = False,
        exclude_modules: list[str] | str | None = None,
        authors_gradient: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        whole("d", d, wanted="the dimension must be a positive integer, e.g. d=20000.")
        whole("seed", seed, 0, "must be an integer of at least 0 and below 2**63.", below=2**63)
        self.d = d
        self.structure_aware = structure_aware
        self.seed = seed
        self.embeddings = embeddings
        self.norms = norms
        self.heads = heads
        self.exclude_modules = listed_if_given(exclude_modules)
        self.authors_gradient = authors_gradient
        self._read = False

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find every parameter; see :func:`~lightning_pet.targets.parameters.every_parameter`."""
        return chosen_parameters(root, structure, self)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build the common vector and one projection per tensor.

        Raises:
            ArgumentError: if d is larger than the model, or leaves nothing for the vector.
            TargetError: if a tensor is too long, or tied to one that does not move.
        """
        groups = tied(root, targets)
        modules = named_modules(root)
        tensors = [cast(nn.Parameter, modules[group[0].module]._parameters[group[0].parameter]) for group in groups]
        factors = len(groups) if self.structure_aware else 0
        self._check(tensors, factors)
        subspace = Subspace(self.d - factors, factors, device=tensors[0].device, dtype=delta_dtype(*tensors))
        found = [Insertion(Target("", ""), subspace, "subspace")]
        for index, (group, tensor) in enumerate(zip(groups, tensors, strict=True)):
            first, *others = group
            delta = self._projection(subspace, index, first, tensor.numel())
            found.append(Insertion(first, delta, suffix_of(first)))
            found += [Insertion(other, Tied(delta), suffix_of(other)) for other in others]
        return found

    def _check(self, tensors: Sequence[nn.Parameter], factors: int) -> None:
        total = sum(tensor.numel() for tensor in tensors)
        if self.d > total:
            raise ArgumentError(
                f"d={self.d} is more than the {total:,} numbers that it would move. Lower d; beyond that, full "
                "fine-tuning does the same with less work."
            )
        if self.d <= factors:
            raise ArgumentError(
                f"d={self.d}: the model has {factors} tensors, each of which has a factor of its own in SAID, so d "
                f"must be at least {factors + 1}. Raise d, exclude modules, or use structure_aware=False."
            )

    def _projection(self, subspace: Subspace, index: int, target: Target, numel: int) -> Projected:
        size = len(subspace.vector)
        if padded_length(size, numel) > LONGEST:
            raise TargetError(
                f"{target.path} has {numel:,} numbers; one projection can have at most {LONGEST:,}. Exclude it with "
                f"exclude_modules=[{target.path!r}]."
            )
        # From the name, so that leaving out one tensor does not change the projection of the others.
        digest = hashlib.sha256(f"{self.seed}:{target.path}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        return Projected(subspace, index, numel, seed, authors_gradient=self.authors_gradient)

    def spend_budget(self, root: nn.Module, targets: Sequence[Target]) -> None:
        """Set d to the numbers that ``budget`` pays for, and say so.

        Raises:
            ArgumentError: if it does not pay for one number besides the factors.
        """
        if self.budget is None:
            return
        base = base_numbers(root)
        smallest = 1 + (len(tied(root, targets)) if self.structure_aware else 0)
        check_affordable(smallest, base, self.budget, f"d={smallest}")
        self.d = affordable(self.budget, base)
        rank_zero_info(
            f"{type(self).__name__}(budget={self.budget}) picks d={self.d:,}, {self.d / base:.3%} of the base."
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the first step of every run."""
        self._read = False
        super().on_fit_start(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Before the first step: name the tensors that move without any effect.

        A gradient cannot tell, as all tensors share one vector.
        """
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._read:
            return
        self._read = True
        deltas = [(t, d) for t, d in self.deltas(Controller.get(trainer).adapted.root) if isinstance(d, Projected)]
        idle = [target.path for target, delta in deltas if not delta.ran]
        if 0 < len(idle) < len(deltas):
            more = f" and {len(idle) - 4} more" if len(idle) > 4 else ""
            rank_zero_warn(
                f"{len(idle)} of {len(deltas)} tensors were not read in the first step: {', '.join(idle[:4])}{more}. "
                "They belong to modules that did not run, and count for nothing; leave them out with exclude_modules."
            )
