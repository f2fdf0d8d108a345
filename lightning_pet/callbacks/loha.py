"""LoHa: changes of weights by products, number by number, of low-rank matrices (Hyeon-Woo et al. 2022, LyCORIS)."""

from typing import Any, ClassVar

from torch import nn

from lightning_pet.callbacks.on_layers import FactoredCallback
from lightning_pet.insertion.change_places import beside, form_at
from lightning_pet.layers.hadamard import Hadamard, HadamardLinear, HadamardWeight
from lightning_pet.model.structure import Target


class LoHaCallback(FactoredCallback):
    r"""LoHa: :math:`y = (W + s\,(A_1 B_1) \odot (A_2 B_2))\,x`, with :math:`s = \alpha / r`.

    The rank of the change is up to r², with the numbers of a LoRA of rank 2r. B₂ starts at zero, so the model starts as
    the base, bit for bit. Defaults are HF PEFT's. Sources: Hyeon-Woo et al. 2022, *FedPara: Low-rank Hadamard Product
    for Communication-Efficient Federated Learning*; Yeh et al. 2023 (LyCORIS).

    Args:
        r: rank of each of the two matrices.
        alpha: numerator of the scale.
        use_effective_conv2d: on kernels of more than one place each matrix is a product of three factors: a core
            r × r × kernel, and a matrix for each of its sides (proposition 3 of FedPara).
        target_modules: roles, suffixes, globs, or ``"re:…"``; see :class:`LoRACallback`.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.on_layers.FactoredCallback`, which say in which
            layers, and of :class:`~lightning_pet.callbacks.base.PETCallback`.

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

    def __init__(
        self,
        r: int = 8,
        alpha: float = 8,
        use_effective_conv2d: bool = False,
        target_modules: list[str] | str = ["all-linear"],  # noqa: B006  # never mutated; the CLI shows it
        **kwargs: Any,
    ) -> None:
        super().__init__(r=r, alpha=alpha, target_modules=target_modules, **kwargs)
        self.use_effective_conv2d = use_effective_conv2d

    def build(self, root: nn.Module, target: Target) -> Hadamard:
        """Build the delta that fits the host's class."""
        form, linear = form_at(root, target)
        rank, scale = self.rank_and_scale(target)
        options = {"drops": self.drops(rescales=True), **beside(root, target)}
        if not linear:
            return HadamardWeight(form, rank, scale=scale, core=self.use_effective_conv2d, **options)
        options |= {"transposed": form.transposed, "rows": form.rows}
        return HadamardLinear(form.inputs, form.outputs, rank, scale=scale, **options)
