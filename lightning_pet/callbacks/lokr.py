"""LoKr: changes of weights by Kronecker products (Yeh et al. 2023, LyCORIS)."""

from typing import Any, ClassVar

from torch import nn

from lightning_pet.arguments import one_of
from lightning_pet.callbacks.on_layers import FactoredCallback
from lightning_pet.errors import ArgumentError
from lightning_pet.insertion.change_places import beside, form_at
from lightning_pet.layers.kronecker import Init, Kronecker, KroneckerLinear, KroneckerWeight, Split
from lightning_pet.model.structure import Target


class LoKrCallback(FactoredCallback):
    r"""LoKr: :math:`y = (W + s\,W_1 \otimes W_2)\,x`, with :math:`s = \alpha / r`.

    The outputs are taken apart as p × k and the inputs as m × n, so that W₁ is p × m and W₂ is k × n. W₂ is a product
    of rank r where r is below max(k, n) / 2, else whole; the scale is α / r in both cases. W₁ starts at zero, so the
    model starts as the base, bit for bit. Defaults are HF PEFT's. Source: Yeh et al. 2023, *Navigating Text-To-Image
    Customization: From LyCORIS Fine-Tuning to Model Evaluation*.

    Args:
        r: rank of W₂, where it is taken apart.
        alpha: numerator of the scale.
        decompose_both: W₁ is a product of rank r, too, where r is below max(p, m) / 2.
        decompose_factor: p and m, as far as it divides the sizes (else the next divisor below); -1: near their roots.
        use_effective_conv2d: on kernels of more than one place W₂ is a product of three factors: a core r × r × kernel,
            and a matrix for each of its sides.
        init: ``"default"`` (W₁ zero, W₂ drawn) or ``"lycoris"`` (W₁ drawn, W₂ or its last factor zero).
        rank_dropout_scale: divide what is left by ``1 - rank_dropout``.
        target_modules: roles, suffixes, globs, or ``"re:…"``; see :class:`LoRACallback`.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.on_layers.FactoredCallback`, which say in which
            layers, and of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range.

    Example:
        >>> from lightning_pet import LoKrCallback
        >>> LoKrCallback(decompose_factor=0)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: decompose_factor=0: a positive integer, or -1 for sizes near their roots.
    """

    method: ClassVar[str] = "lokr"
    shards = True
    gives_meaning: ClassVar[frozenset[str]] = frozenset({"alpha", "r"})
    may_change: ClassVar[frozenset[str]] = FactoredCallback.may_change | {
        "rank_dropout_scale",
    }

    def __init__(
        self,
        r: int = 8,
        alpha: float = 8,
        decompose_both: bool = False,
        decompose_factor: int = -1,
        use_effective_conv2d: bool = False,
        init: Init = "default",
        rank_dropout_scale: bool = False,
        target_modules: list[str] | str = ["all-linear"],  # noqa: B006  # never mutated; the CLI shows it
        **kwargs: Any,
    ) -> None:
        super().__init__(r=r, alpha=alpha, target_modules=target_modules, **kwargs)
        self.decompose_both = decompose_both
        self.decompose_factor = decompose_factor
        self.use_effective_conv2d = use_effective_conv2d
        self.init = init
        self.rank_dropout_scale = rank_dropout_scale
        one_of("init", init, Init)
        factor: object = decompose_factor
        if not isinstance(factor, int) or isinstance(factor, bool) or (factor < 1 and factor != -1):
            raise ArgumentError(f"decompose_factor={factor!r}: a positive integer, or -1 for sizes near their roots.")

    def build(self, root: nn.Module, target: Target) -> Kronecker:
        """Build the delta that fits the host's class."""
        form, linear = form_at(root, target)
        rank, scale = self.rank_and_scale(target)
        split = Split(self.decompose_factor, self.decompose_both, self.use_effective_conv2d, self.init)
        options = {"split": split, "drops": self.drops(self.rank_dropout_scale), **beside(root, target)}
        if not linear:
            return KroneckerWeight(form, rank, scale=scale, **options)
        options |= {"transposed": form.transposed, "rows": form.rows}
        return KroneckerLinear(form.inputs, form.outputs, rank, scale=scale, **options)
