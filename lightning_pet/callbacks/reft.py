"""LoReFT, NoReFT and DiReFT: edits of the residual stream at a few positions (Wu et al. 2024)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from lightning_pet.arguments import one_of, share, whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.edits import edit_insertions, everywhere, is_edit
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.bottleneck import activation
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.reft import Edit
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.patterns import listed_if_given, listed_layers
from lightning_pet.targets.placement import Sublayer, delta_options, resolve_sites

Form = Literal["loreft", "noreft", "direft"]


class ReFTCallback(PETCallback):
    r"""ReFT: behind every layer, :math:`h \leftarrow h + R^\top(\sigma(W h + b) - R h)` at a few positions.

    Edited are the first ``prefix_positions`` and the last ``suffix_positions`` tokens of each row; padding on either
    side does not count, and while generating only what ``generate`` was given does. R (r × width) has orthonormal rows.
    It does not start as the base, and cannot be merged. Source: Wu et al. 2024, *ReFT: Representation Finetuning for
    Language Models*. Defaults are those of the adapters library; the paper has r of 4 to 8 and the first and last 7.

    Args:
        r: rank of the edits.
        form: ``"loreft"``; ``"noreft"``: R need not be orthonormal; ``"direft"``: nor is R h subtracted.
        prefix_positions: how many first tokens are edited.
        suffix_positions: how many last ones. Of a causal model that trains on prompts with answers they are those of
            the answer, where ``generate`` edits the last tokens of the prompt.
        tied_weights: one edit per layer for both; otherwise each has its own.
        non_linearity: between W and R, e.g. ``"relu"``; ``None``: none.
        dropout: probability of zeroing a feature of an edited position.
        exclude_modules: patterns of layers that stay as they are.
        layers_to_transform: only these layer indices.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range, or no position is edited.

    Example:
        >>> from lightning_pet import ReFTCallback
        >>> ReFTCallback(prefix_positions=0)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: prefix_positions=0 and suffix_positions=0: edit at least one position.
    """

    method: ClassVar[str] = "reft"
    shards = True
    width: ClassVar[str | None] = "r"
    gives_meaning: ClassVar[frozenset[str]] = frozenset(
        {"form", "prefix_positions", "suffix_positions", "tied_weights", "non_linearity"}
    )
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "dropout",
        "exclude_modules",
        "layers_to_transform",
    }

    def __init__(
        self,
        r: int = 1,
        form: Form = "loreft",
        prefix_positions: int = 3,
        suffix_positions: int = 0,
        tied_weights: bool = False,
        non_linearity: str | None = None,
        dropout: float = 0.05,
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.r = r
        self.form: Form = form
        self.prefix_positions = prefix_positions
        self.suffix_positions = suffix_positions
        self.tied_weights = tied_weights
        self.non_linearity = non_linearity
        self.dropout = dropout
        self.exclude_modules = listed_if_given(exclude_modules)
        self.layers_to_transform = listed_layers(layers_to_transform)
        self._validate()

    def _validate(self) -> None:
        whole("r", self.r, wanted="the rank must be a positive integer, e.g. r=4.")
        one_of("form", self.form, Form)
        for option in ("prefix_positions", "suffix_positions"):
            whole(option, getattr(self, option), 0, "a number of tokens, 0 or more.")
        if not self.prefix_positions + self.suffix_positions:
            raise ArgumentError("prefix_positions=0 and suffix_positions=0: edit at least one position.")
        share("dropout", self.dropout, "a probability in [0, 1), e.g. 0.05.", ends="[)")
        if self.non_linearity is not None:
            activation(self.non_linearity)

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find what the layers return: the residual stream behind the feed-forward, or what a layer has for one.

        Raises:
            TargetError: if there is none, or one cannot be adapted.
        """
        kinds = {site.kind for site in structure.sites}
        kind = next((kind for kind in get_args(Sublayer) if kind in kinds), None) if "ffn" not in kinds else None
        return resolve_sites(
            root,
            structure,
            "pfeiffer",
            sublayers=None if kind is None else [kind],
            layers=self.layers_to_transform,
            exclude=self.exclude_modules or (),
        )

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build an edit per layer, and what tells it its positions.

        Raises:
            TargetError: if the rank is larger than the width, or positions are not in the second dimension.
        """
        places = [target for target in targets if is_edit(target)]
        return edit_insertions(root, places, lambda target, where: self._edit(root, target, where))

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the edit for one place, where every position counts."""
        return self._edit(root, target, everywhere)

    def _edit(self, root: nn.Module, target: Target, places: Any) -> Edit:
        width = target.sizes[0]
        if self.r > width:
            raise TargetError(f"{target.path}: the rank can be at most {width}, its width, not {self.r}. Lower r.")
        return Edit(
            width,
            self.r,
            self.prefix_positions,
            self.suffix_positions,
            places,
            form=self.form,
            tied=self.tied_weights,
            non_linearity=self.non_linearity or "linear",
            dropout=self.dropout,
            **delta_options(root, target),
        )

    def group_options(self, delta_names: Sequence[str]) -> dict[str, dict[str, float]]:
        """No weight decay on what R is made of: only its direction counts."""
        if self.form != "loreft":
            return {}
        return {name: {"weight_decay": 0.0} for name in delta_names if name.endswith(".projection")}
