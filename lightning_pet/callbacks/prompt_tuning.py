"""Prompt tuning (Lester et al. 2021) and P-tuning's prompt encoder (Liu et al. 2021)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.arguments import at_least, one_of, whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError
from lightning_pet.insertion.method import Insertion
from lightning_pet.insertion.prompt_places import Where, prompt_insertions, prompt_targets
from lightning_pet.layers.delta import options_beside
from lightning_pet.layers.prompt import VirtualRows
from lightning_pet.model.naming import module_at
from lightning_pet.model.quantised import initialize
from lightning_pet.model.structure import Structure, Target
from lightning_pet.model.tokens import common_ids, load_tokenizer, text_ids, unknown_rows

Init = Literal["random", "vocabulary", "class_labels", "text"]
Encoder = Literal["none", "mlp"]


class PromptTuningCallback(PETCallback):
    r"""Prompt tuning: trained vectors before the embedded input, :math:`[P;\,X] \in R^{(l+T) \times d}`.

    The prompt exists inside the model only. Ids behind the end of the vocabulary are prepended where the
    model takes its ids, and the output is cut back, so labels, logits and heads keep their positions.
    ``generate`` works as before. Sources: Lester et al. 2021, Liu et al. 2021 (``encoder="mlp"``), Liu et
    al. 2022 (``where="both"``).

    Args:
        length: virtual tokens, l; the paper uses 100, from 20 on little is gained.
        init: ``"random"`` is U(−0.5, 0.5); ``"vocabulary"`` copies rows of common tokens; ``"class_labels"``
            starts one row per label from the mean of its tokens and the others from the vocabulary;
            ``"text"`` copies the tokens of ``init_text``, repeated or cut to ``length``.
        init_text: for ``init="text"``.
        class_labels: for ``init="class_labels"``, such as ``["negative", "positive"]``.
        tokenizer: name or folder of the model's tokenizer, for these two (``"bytes"`` for UTF-8 bytes); with
            ``"vocabulary"`` it leaves out tokens that are no text. ``None`` there: the one beside the model's weights.
        where: part of an encoder-decoder whose input gets the prompt; ``"both"``: one prompt each.
        encoder: ``"mlp"`` trains the prompt through an MLP, which files hold next to the folded prompt.
        encoder_size: width of this MLP; ``None``: that of the embedding.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range, or two options exclude each other.

    Example:
        >>> from lightning_pet import PromptTuningCallback
        >>> PromptTuningCallback(init="text")
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: init='text' needs init_text, for example init_text='Classify this review:'.
    """

    method: ClassVar[str] = "prompt_tuning"
    shards = True
    width: ClassVar[str | None] = "length"
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {"init", "init_text", "class_labels", "tokenizer"}

    def __init__(
        self,
        length: int = 20,
        init: Init = "random",
        init_text: str | None = None,
        class_labels: list[str] | None = None,
        tokenizer: str | None = None,
        where: Where = "encoder",
        encoder: Encoder = "none",
        encoder_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.length = length
        self.init = init
        self.init_text = init_text
        self.class_labels = class_labels
        self.tokenizer = tokenizer
        self.where = where
        self.encoder = encoder
        self.encoder_size = encoder_size
        self._sources: list[list[int]] | None = None
        self._validate()

    def _validate(self) -> None:
        whole("length", self.length, wanted="the number of virtual tokens must be at least 1, e.g. 20.")
        one_of("init", self.init, Init)
        one_of("where", self.where, Where)
        one_of("encoder", self.encoder, Encoder)
        if self.init == "text" and not self.init_text:
            raise ArgumentError("init='text' needs init_text, for example init_text='Classify this review:'.")
        if self.init == "class_labels" and not self.class_labels:
            raise ArgumentError("init='class_labels' needs class_labels, for example ['negative', 'positive'].")
        if self.class_labels and len(self.class_labels) > self.length:
            raise ArgumentError(
                f"length={self.length} is less than the {len(self.class_labels)} class_labels; each takes a row."
            )
        if self.init in ("text", "class_labels") and self.tokenizer is None:
            raise ArgumentError(
                f"init={self.init!r} needs a tokenizer: pass tokenizer='…', the model's name or folder."
            )
        if self.encoder == "mlp" and self.init != "random":
            raise ArgumentError(f"encoder='mlp' with init={self.init!r}: the MLP changes every row; use init='random'.")
        if self.encoder_size is not None:
            at_least("encoder_size", self.encoder_size, 1, "the width of the MLP must be at least 1.")

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find where the model takes its ids; see :mod:`lightning_pet.insertion.prompt_places`."""
        return prompt_targets(root, structure, self.where)

    def spend_budget(self, root: nn.Module, targets: Sequence[Target]) -> None:
        """Pick the length, and with it the tokens that the rows start from."""
        super().spend_budget(root, targets)
        # Asked only of a new prompt: one that comes from a file needs no tokenizer.
        self._sources = self._start(root, targets)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build the rows and all that puts them into place."""
        return prompt_insertions(root, targets, lambda target: self.build(root, target))

    def build(self, root: nn.Module, target: Target) -> VirtualRows:
        """Build the rows of one token table; the other places hold nothing that trains."""
        table = cast(nn.Embedding, module_at(root, target.module))
        weight = table.weight
        rows = VirtualRows(
            self.length,
            table.embedding_dim,
            table.num_embeddings,
            hidden=(self.encoder_size or table.embedding_dim) if self.encoder == "mlp" else 0,
            sources=self._sources if self._sources and len(self._sources) == self.length else None,
            scale=float(getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0))),
            **options_beside(weight),
        )
        if not weight.is_meta:
            initialize(rows, table, "weight")
        elif self.init != "random":
            raise ArgumentError(
                f"init={self.init!r} needs the values of the token embedding, which is on the meta device. Load the "
                "weights first, or use init='random'."
            )
        return rows

    def _start(self, root: nn.Module, targets: Sequence[Target]) -> list[list[int]] | None:
        """Source ids of every row."""
        if self.init == "random":
            return None
        table = module_at(root, next(target.module for target in targets if target.role == "prompt.rows"))
        vocabulary: Any = table.num_embeddings
        words = load_tokenizer(self.tokenizer, f"init={self.init!r}") if self.tokenizer is not None else None
        if self.init == "text":
            ids = text_ids(words, self.init_text or "")
            rows = [[ids[index % len(ids)]] for index in range(self.length)]
        else:
            labels = (self.class_labels or ()) if self.init == "class_labels" else ()
            rows = [text_ids(words, label) for label in labels]
            sample, known = common_ids(self.length - len(rows), vocabulary, getattr(root, "config", None), words)
            rows += [[token] for token in sample]
            if not known:
                rank_zero_warn(unknown_rows(vocabulary))
        largest = max(token for row in rows for token in row)
        if largest >= vocabulary:
            raise ArgumentError(
                f"tokenizer={self.tokenizer!r} makes id {largest}, but the model has {vocabulary} rows: it is another "
                "model's tokenizer."
            )
        return rows
