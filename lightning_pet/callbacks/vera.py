"""VeRA: two trained vectors per layer between frozen random matrices that all layers share (Kopiczko et al. 2024)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast

from torch import nn

from lightning_pet.arguments import positive, share, whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.callbacks.on_layers import OnLayersCallback
from lightning_pet.errors import TargetError
from lightning_pet.insertion.low_rank_places import Forms, Options, fitted
from lightning_pet.insertion.method import Insertion, suffix_of
from lightning_pet.layers.vera import Projections, VeraLinear, VeraParameter
from lightning_pet.model.layer_kinds import host_kind, matrix_of
from lightning_pet.model.naming import named_modules
from lightning_pet.model.structure import Target
from lightning_pet.targets.placement import delta_options

_HOSTS = ("linear", "conv1d_hf", "weight")


class VeRACallback(OnLayersCallback):
    r"""VeRA: :math:`y = W x + \mathrm{diag}(\lambda_b)\,B\,\mathrm{diag}(\lambda_d)\,A x`.

    A (r × in) and B (out × r) are random, frozen, and shared by all layers: each reads a corner of the same two
    matrices. The vectors λ_d (r) and λ_b (out) of each layer train. λ_b starts at zero, so the model starts as the
    base, bit for bit. Needs a learning rate some ten times LoRA's. Source: Kopiczko et al. 2024, *VeRA:
    Vector-based Random Matrix Adaptation*. Defaults are those of HF PEFT, which draws the same matrices from the key.

    The file holds both matrices once: they depend on the widest target and on torch's generator.

    Args:
        r: rank, which may be larger than the layers: it costs one trained number per layer and unit.
        d_initial: value of λ_d at the start.
        projection_prng_key: seed of A and B.
        dropout: probability of dropping an input of the low-rank branch.
        target_modules: roles, suffixes, globs, or ``"re:…"``; see :class:`LoRACallback`.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.on_layers.OnLayersCallback`, which say in which
            layers, and of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range.

    Example:
        >>> from lightning_pet import VeRACallback
        >>> VeRACallback(d_initial=0.0)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: d_initial=0.0: must be positive; at 0 neither vector would ever learn.
    """

    method: ClassVar[str] = "vera"
    shards = True
    width: ClassVar[str | None] = "r"
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {"dropout"}

    def __init__(
        self,
        r: int = 256,
        d_initial: float = 0.1,
        projection_prng_key: int = 0,
        dropout: float = 0.0,
        target_modules: list[str] | str = ["attention.q", "attention.v"],  # noqa: B006  # never mutated; the CLI shows it
        **kwargs: Any,
    ) -> None:
        super().__init__(target_modules=target_modules, **kwargs)
        self.r = r
        self.d_initial = d_initial
        self.projection_prng_key = projection_prng_key
        self.dropout = dropout
        self._validate()

    def _validate(self) -> None:
        whole("r", self.r, wanted="the rank must be a positive integer, e.g. r=256.")
        positive("d_initial", self.d_initial, "must be positive; at 0 neither vector would ever learn.")
        wanted = "a seed: an integer of at least 0, and less than 2**64."
        whole("projection_prng_key", self.projection_prng_key, 0, wanted, below=2**64)
        share("dropout", self.dropout, "a probability in [0, 1), e.g. 0.05.", ends="[)")

    @staticmethod
    def serves(module: nn.Module, parameter: str) -> bool:
        """Whether a delta can sit on this parameter of a module."""
        return host_kind(module, parameter) in _HOSTS

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build what is shared, as large as the widest target, and a pair of vectors per target."""
        modules = named_modules(root)
        outputs, inputs = zip(*(matrix_of(modules[target.module], target.parameter) for target in targets), strict=True)
        shared = Projections(
            self.r,
            max(inputs),
            max(outputs),
            key=self.projection_prng_key,
            **delta_options(root, targets[0]),
        )
        own: dict[str, Any] = {"projections": shared, "d_initial": float(self.d_initial)}
        forms = Forms(*(cast(Any, partial(form, **own)) for form in (VeraLinear, VeraParameter)))
        options = Options(self.r, 1.0, self.dropout)
        layers = [Insertion(target, fitted(root, target, options, forms), suffix_of(target)) for target in targets]
        return [Insertion(Target("", ""), shared, "projections"), *layers]

    def numbers(self, root: nn.Module, targets: Sequence[Target]) -> int:
        """Numbers that the method would train at the present rank.

        Raises:
            TargetError: if the rank is larger than the widest target, where more of it buys little.
        """
        modules = named_modules(root)
        widest = max(max(matrix_of(modules[target.module], target.parameter)) for target in targets)
        if self.r > widest:
            raise TargetError(f"r={self.r}: a budget buys no more than {widest}, the width of the widest target.")
        return super().numbers(root, targets)
