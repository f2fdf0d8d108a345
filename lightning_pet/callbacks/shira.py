"""SHiRA (Bhardwaj et al. 2024): values at a few fixed places of each weight."""

from typing import Any, ClassVar, Literal

from torch import nn

from lightning_pet.arguments import one_of, whole
from lightning_pet.callbacks.on_layers import OnLayersCallback
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.layers.delta import Delta, is_filled_later, options_beside
from lightning_pet.layers.hard_concrete import mixed
from lightning_pet.layers.sharding import is_partition
from lightning_pet.layers.sparse_values import SparseValues
from lightning_pet.model.layer_kinds import host_kind, matrix_of, transposed, weight_of
from lightning_pet.model.naming import module_at
from lightning_pet.model.quantised import is_quantised
from lightning_pet.model.structure import Target

Mask = Literal["random", "magnitude"]


class SHiRACallback(OnLayersCallback):
    r"""Sparse high-rank adaptation: :math:`W + S`, where S has values at fixed places only.

    Of every weight r · (in + out) entries train, as many numbers as a LoRA of rank r has. The change is of a high rank,
    touches a small share of the weight, and starts at zero, so the model starts as the base, bit for bit. The places
    are chosen before training, and files hold them. Source: Bhardwaj et al. 2024, *Sparse High Rank Adapters*.

    Args:
        r: size; r · (in + out) entries of each weight train. Default of HF PEFT.
        target_modules: roles, suffixes, globs, or ``"re:…"``; see :class:`~lightning_pet.LoRACallback`.
        mask_type: which entries: ``"random"`` ones, or those of largest ``"magnitude"``.
        random_seed: of the random places; every weight has its own.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.on_layers.OnLayersCallback`, which say in which
            layers, and of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_pet import SHiRACallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> apply(net, [SHiRACallback(r=1, target_modules=["0"])]).plan().trainable
        7
    """

    method: ClassVar[str] = "shira"
    shards = True
    width: ClassVar[str | None] = "r"
    may_change: ClassVar[frozenset[str]] = OnLayersCallback.may_change | {
        "mask_type",
        "random_seed",
    }

    def __init__(
        self,
        r: int = 32,
        target_modules: list[str] | str = ["all-linear"],  # noqa: B006  # never mutated; the CLI shows it
        mask_type: Mask = "random",
        random_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(target_modules=target_modules, **kwargs)
        self.r = r
        self.mask_type = mask_type
        self.random_seed = random_seed
        whole("r", r, wanted="must be a positive integer, e.g. r=32: r · (in + out) entries of a weight train.")
        one_of("mask_type", mask_type, Mask)
        whole("random_seed", random_seed, 0, "must be an integer of at least 0.")

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Choose the places, and build their values.

        Raises:
            TargetError: if there are fewer entries than places.
            ArgumentError: if the places are those of values that are not there.
        """
        host = module_at(root, target.module)
        weight = weight_of(host, target.parameter)
        assert weight is not None  # resolve_targets returned it
        outputs, inputs = matrix_of(host, target.parameter)
        outputs = outputs if target.rows is None else sum(stop - start for start, stop in target.rows)
        stacked = weight.shape[0] if weight.dim() == 3 and host_kind(host, target.parameter) == "weight" else 1
        count = self.r * (outputs + inputs)
        if count > outputs * inputs:
            raise TargetError(
                f"{target.path} reads as {outputs}×{inputs}: r can be at most "
                f"{outputs * inputs // (outputs + inputs)}, not {self.r}. Lower r, or exclude it (exclude_modules)."
            )
        return SparseValues(
            tuple(weight.shape),
            count * stacked,
            seed=mixed(self.random_seed, target.path),
            weight=self._looked_at(weight, target) if self.mask_type == "magnitude" else None,
            rows=target.rows,
            dim=-1 if transposed(host, target.parameter) else -2,
            **options_beside(weight),
        )

    def _looked_at(self, weight: nn.Parameter | Any, target: Target) -> Any:
        if is_filled_later() or is_quantised(weight):  # the file brings the places; refused elsewhere
            return weight
        if weight.is_meta or is_partition(weight):
            raise ArgumentError(
                f"{target.path} is on the meta device, or in parts, but mask_type='magnitude' needs its values. Load "
                "the weights first, or use mask_type='random'."
            )
        return weight
