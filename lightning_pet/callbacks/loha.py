"""LoHa: changes of weights by products, number by number, of low-rank matrices (Hyeon-Woo et al. 2022, LyCORIS)."""

from typing import Any, ClassVar

from torch import nn

from lightning_pet.callbacks.base import PETCallback
from lightning_pet.insertion.change_places import Factored, beside, form_at
from lightning_pet.layers.hadamard import Hadamard, HadamardLinear, HadamardWeight
from lightning_pet.model.structure import Target
from lightning_pet.targets.patterns import listed, listed_if_given, listed_layers


class LoHaCallback(Factored, PETCallback):
    r"""LoHa: :math:`y = (W + s\,(A_1 B_1) \odot (A_2 B_2))\,x`, with :math:`s = \alpha / r`.

    The rank of the change is up to r², with the numbers of a LoRA of rank 2r. B₂ starts at zero, so the model starts as
    the base, bit for bit. Defaults are HF PEFT's. Sources: Hyeon-Woo et al. 2022, *FedPara: Low-rank Hadamard Product
    for Communication-Efficient Federated Learning*; Yeh et al. 2023 (LyCORIS).

    Args:
        r: rank of each of the two matrices.
        alpha: numerator of the scale.
        use_effective_conv2d: on kernels of more than one place each matrix is a product of three factors: a core
            r × r × kernel, and a matrix for each of its sides (proposition 3 of FedPara).
        rank_dropout: probability of leaving out an output feature of the change, what is left being divided by
            ``1 - rank_dropout``; active in training only.
        module_dropout: probability of leaving out the whole change of a layer; active in training only.
        target_modules: roles, suffixes, globs, or ``"re:…"``; see :class:`LoRACallback`.
        exclude_modules: patterns of the same kinds, taken out again.
        layers_to_transform: only these layer indices. Every pattern must have a target in one of them.
        layers_pattern: name of the list of layers whose indices are meant (``"blocks"``), where the first number in
            the names of modules is that of something else, such as a stage.
        rank_pattern: rank for some targets, by role, suffix, glob or ``"re:…"``; the first pattern that hits counts.
        alpha_pattern: alpha for some targets, likewise.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range.

    Example:
        >>> from lightning_pet import LoHaCallback
        >>> LoHaCallback(r=0)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: r=0: the rank must be a positive integer, e.g. r=8.
    """

    method: ClassVar[str] = "loha"
    width: ClassVar[str | None] = "r"
    shards = True
    gives_meaning: ClassVar[frozenset[str]] = frozenset({"alpha"})
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "rank_dropout",
        "module_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __init__(
        self,
        r: int = 8,
        alpha: float = 8,
        use_effective_conv2d: bool = False,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        target_modules: list[str] | str = ["all-linear"],  # noqa: B006  # never mutated; the CLI shows it
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.r = r
        self.alpha = alpha
        self.use_effective_conv2d = use_effective_conv2d
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.target_modules = listed(target_modules)
        self.exclude_modules = listed_if_given(exclude_modules)
        self.layers_to_transform = listed_layers(layers_to_transform)
        self.layers_pattern = listed_if_given(layers_pattern)
        self.rank_pattern = rank_pattern
        self.alpha_pattern = alpha_pattern
        self.checked_options()

    def build(self, root: nn.Module, target: Target) -> Hadamard:
        """Build the delta that fits the host's class."""
        form, linear = form_at(root, target)
        rank, scale = self.rank_and_scale(target)
        options = {"drops": self.drops(rescales=True), **beside(root, target)}
        if not linear:
            return HadamardWeight(form, rank, scale=scale, core=self.use_effective_conv2d, **options)
        options |= {"transposed": form.transposed, "rows": form.rows}
        return HadamardLinear(form.inputs, form.outputs, rank, scale=scale, **options)
