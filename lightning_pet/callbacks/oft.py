"""OFT (Qiu et al. 2023, 2025): the input of a layer is rotated, block by block."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from lightning_pet.arguments import positive, whole
from lightning_pet.callbacks.on_layers import OnLayersCallback, by_name
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.input_places import InputPlace, input_place, turns_inputs
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.rotation import BlockRotatedWeight, BlockRotation
from lightning_pet.model.structure import Target
from lightning_pet.targets.patterns import value_at

_MOST_TERMS = 100


class OFTCallback(OnLayersCallback):
    r"""Orthogonal fine-tuning: :math:`y = W (x R) + b` with a block-diagonal rotation R.

    Lengths and angles of what a layer reads stay, and with them the angles between its neurons. All blocks start as the
    identity, so the model starts as the base, bit for bit, and they merge exactly: :math:`W' = W R^T`. Only the layer
    itself reads W, so bases of any format will do. Sources: Qiu et al. 2023 (OFT), Qiu et al. 2025 (OFT v2: the input
    is turned instead of the weight, and Cayley's inverse is a short series). Defaults as in HF PEFT, but for the
    targets, which are the papers'.

    Args:
        oft_block_size: rows of a block, b: it has to divide the inputs of every target, each of which trains inputs ×
            (b - 1) / 2 numbers. 0: by ``r``.
        r: number of blocks instead of their size; one of the two is 0.
        block_size_pattern: size for some targets, by role, suffix, glob or ``"re:…"``, e.g. ``{"ffn.down": 24}``.
            The first pattern that hits counts, and every one must count somewhere.
        use_cayley_neumann: make R by a series, which is a rotation as long as it turns little; ``False``: exactly,
            with a system of equations per block.
        num_cayley_neumann_terms: terms of the series; three are what four are.
        block_share: one block for all of a layer.
        coft: constrained: keep the Frobenius norm of each block's Q within ``eps / √blocks``.
        eps: that bound.
        target_modules: layers whose input is rotated: roles, suffixes, globs or ``"re:…"``; see
            :class:`~lightning_pet.LoRACallback`. A fused projection has one input: name it as a whole.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.on_layers.OnLayersCallback`, which say in which
            layers, and of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range, or none or both of ``oft_block_size`` and ``r`` are given.

    Example:
        >>> import torch
        >>> from lightning_pet import OFTCallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> apply(net, [OFTCallback(oft_block_size=4, target_modules=["0"])]).plan().trainable
        12
    """

    method: ClassVar[str] = "oft"
    shards = True
    gives_meaning: ClassVar[frozenset[str]] = frozenset(
        {"use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps"}
    )
    serves = staticmethod(turns_inputs)
    by_pattern: ClassVar[tuple[str, ...]] = ("block_size_pattern",)

    def __init__(
        self,
        oft_block_size: int = 32,
        r: int = 0,
        block_size_pattern: dict[str, int] | None = None,
        use_cayley_neumann: bool = True,
        num_cayley_neumann_terms: int = 5,
        block_share: bool = False,
        coft: bool = False,
        eps: float = 6e-5,
        target_modules: list[str] | str = ["all-linear"],  # noqa: B006  # never mutated; the CLI shows it
        **kwargs: Any,
    ) -> None:
        super().__init__(target_modules=target_modules, **kwargs)
        self.oft_block_size = oft_block_size
        self.r = r
        self.block_size_pattern = by_name("block_size_pattern", block_size_pattern)
        self.use_cayley_neumann = use_cayley_neumann
        self.num_cayley_neumann_terms = num_cayley_neumann_terms
        self.block_share = block_share
        self.coft = coft
        self.eps = eps
        self._validate()

    def _validate(self) -> None:
        wanted = "a block has two rows at least, e.g. 32; or 0, and r says how many blocks there are."
        if self.oft_block_size != 0:
            whole("oft_block_size", self.oft_block_size, 2, wanted)
        whole("r", self.r, 0, "the number of blocks is a positive integer; or 0, and oft_block_size says their size.")
        for key, size in (self.block_size_pattern or {}).items():
            whole(f"block_size_pattern[{key!r}]", size, 2, "a block has two rows at least, e.g. 32.")
        if (self.oft_block_size == 0) is (self.r == 0):
            raise ArgumentError(
                f"oft_block_size={self.oft_block_size}, r={self.r}: their product is the number of inputs of each "
                "layer, so give one of the two and set the other to 0."
            )
        wanted = f"2 to {_MOST_TERMS} terms: with one no number has an effect, and so many are the exact inverse."
        whole("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 2, wanted, _MOST_TERMS + 1)
        positive("eps", self.eps)

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the rotation that fits the host."""
        place = input_place(root, target)
        if place.options.get("kernel") and any(size > 1 for size in self._kernel(root, target)):
            raise TargetError(
                f"{target.path} is a convolution with a kernel of {'×'.join(map(str, self._kernel(root, target)))}, "
                "of whose inputs OFT has no agreed rotation: other libraries turn patches one way and merge another. "
                "Exclude it with exclude_modules, or use HRACallback, LoRACallback or IA3Callback."
            )
        return (BlockRotation if place.called else BlockRotatedWeight)(
            place.features,
            self._size(target, place),
            block_share=self.block_share,
            terms=self.num_cayley_neumann_terms if self.use_cayley_neumann else None,
            limit=self.eps if self.coft else None,
            **place.options,
        )

    @staticmethod
    def _kernel(root: nn.Module, target: Target) -> Sequence[int]:
        kernel: Sequence[int] = root.get_submodule(target.module).kernel_size  # type: ignore[assignment]
        return kernel

    def _size(self, target: Target, place: InputPlace) -> int:
        inputs = place.features
        size: int = value_at(self.block_size_pattern, target, self.oft_block_size)
        if size == 0:
            size, rest = divmod(inputs, self.r)
            if rest or size < 2:
                raise TargetError(f"{target.path} has {inputs} inputs: r={self.r} blocks {_ways(inputs, False)}")
        elif inputs % size:
            raise TargetError(f"{target.path} has {inputs} inputs: blocks of {size} {_ways(inputs, True)}")
        return size


def _ways(inputs: int, sizes: bool) -> str:
    """What does divide a number of inputs, for a message."""
    fit = [size for size in range(2, inputs + 1) if inputs % size == 0]
    fit = fit if sizes else [inputs // size for size in reversed(fit)]
    shown = ", ".join(map(str, fit[:8])) + (" …" if len(fit) > 8 else "")
    return (
        f"of one size do not make them up; {'sizes' if sizes else 'numbers'} that do: {shown or 'none'}. Choose one, "
        "give this layer a size of its own by block_size_pattern, or exclude it."
    )
