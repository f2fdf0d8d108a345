"""Data modules of conversations and texts for causal language models."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_pet.data.base import TableDataModule, with_validation
from lightning_pet.data.chat.batches import Collator, Packs, StepSampler, packed
from lightning_pet.data.chat.encoding import ChatEncoder, Tokens
from lightning_pet.data.chat.messages import Conversation, Format, LineError, Text
from lightning_pet.data.chat.reader import Problems, read_conversations, read_files
from lightning_pet.data.tables import Table
from lightning_pet.errors import ArgumentError

MANY_CUT = 0.05
"""Share of examples that lose turns above which it is a warning."""


class ChatData(TableDataModule):
    """Conversations, prompts with completions, or texts for :class:`~lightning_pet.modules.causal_lm.CausalLMModule`.

    Conversations are written by the model's own chat template, and only the assistant's words are trained, with the
    token that ends its turn. A turn with ``"weight": 0`` is context. Where a template rewrites earlier turns (reasoning
    that it drops), a conversation becomes one example per answer.

    Args:
        train: JSON lines in OpenAI's formats, or a file, folder or hub repository of the forms below.
        val: file with the validation split; ``None`` takes that of the folder or repository, else cuts
            ``val_fraction`` off the training split.
        test: file with the test split.
        predict: file with conversations to answer, one answer per line: they end with a question, or with an answer
            that is left out.
        format: ``"chat"`` (``messages``), ``"completion"`` (``prompt``, ``completion``), ``"sharegpt"``
            (``conversations``), ``"alpaca"`` (``instruction``, ``input``, ``output``) or ``"text"``; ``"auto"`` goes by
            the keys of the first line.
        tokenizer: name of a tokenizer; ``None`` takes the LightningModule's.
        max_length: longest example in tokens. Longer conversations lose whole turns from the front (never the
            system's message or the last question), longer prompts their beginning; an answer that does not fit is left
            out. How many is reported. Longer texts become several pieces.
        batch_size: rows per batch and process.
        packing: put several short examples into one row, if an equality on a small example shows that this model
            keeps them apart; else rows of similar length are batched, and a warning says why.
        generate: number of validation and test examples that are also answered, for ``exact_match``.
        val_fraction: share of the training examples for validation when there is no validation split.
        seed: decides which examples these are, and the order of training.
        num_workers: processes that form batches.

    Raises:
        ArgumentError: a file is missing, or lines are wrong; up to twenty are named with what is expected.

    Example:
        >>> ChatData("train.jsonl", packing=True).max_length
        1024
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        format: Format = "auto",
        tokenizer: str | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        packing: bool = False,
        generate: int = 100,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, similar_lengths=True, num_workers=num_workers)
        if generate < 0 or max_length < 2:
            raise ArgumentError(f"generate={generate} must be at least 0, and max_length={max_length} at least 2")
        self.train, self.val, self.test, self.predict = train, val, test, predict
        self.form, self.packing, self.generate = format, packing, generate
        self.val_fraction, self.seed = val_fraction, seed
        self._packs = False

    def read(self) -> dict[str, Table]:
        """Read and check all splits; cut a validation split off if there is none."""
        rows = read_files(self.train, val=self.val, test=self.test, predict=self.predict)
        kinds = (Conversation, Text)
        tables = {
            split: read_conversations(table, self.form, kinds, answered=split != "predict")
            for split, table in rows.items()
        }
        return with_validation(tables, self.val_fraction, self.seed)

    def bind(self, module: Any) -> Hashable:
        """Whether several examples may share a row of this model."""
        self._packs = False
        if self.packing:
            gap = module.packing_gap() if hasattr(module, "packing_gap") else "the module has no packing_gap()"
            self._packs = not gap
            if gap:
                rank_zero_warn(f"packing=True is left out: {gap}. Rows of similar length are batched instead.")
        return self._packs

    def encode(self, table: Table, tokenizer: Any, targets: bool) -> list[Any]:
        """Turn conversations into tokens, and mark those that are trained; without targets one prompt for each."""
        encoder, problems = ChatEncoder(tokenizer, self.max_length), Problems(table.source)
        examples: list[Tokens] = []
        for line, example in zip(table.columns["line"], table.columns["example"], strict=True):
            try:
                if not targets:
                    examples.append(encoder.asked(example))
                else:
                    examples += encoder.text(example) if isinstance(example, Text) else encoder.conversation(example)
            except LineError as error:
                problems.add(line, str(error))
        problems.check()
        if not targets:
            return examples
        if not any(sum(tokens.trained[1:]) for tokens in examples):
            raise ArgumentError(
                f"{table.source}: nothing is trained: none of its {len(table)} answers fits into "
                f"max_length={self.max_length} tokens. Raise max_length."
            )
        self._report(table, examples, encoder)
        return examples

    def _report(self, table: Table, examples: list[Tokens], encoder: ChatEncoder) -> None:
        every, trained = sum(len(e.ids) for e in examples), sum(sum(e.trained) for e in examples)
        note = (
            f"{table.source}: {len(examples)} examples, {every} tokens, of which {trained} ({trained / every:.0%}) are "
            f"trained; {encoder.cut} lost earlier turns and {encoder.dropped} answers were left out to fit into "
            f"max_length={self.max_length}"
        )
        much = encoder.cut + encoder.dropped > MANY_CUT * (len(examples) + encoder.dropped)
        (rank_zero_warn if much else rank_zero_info)(note)

    def _report_cuts(self, split: str) -> None:
        """Said by ``encode``."""

    def loader(self, split: str) -> DataLoader[Any]:
        """Data loader over an encoded split; in training, of rows of similar length with the tokens of their step."""
        examples: Any = self._examples[split]
        pad = self._tokenizer.pad_token_id or 0
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
        if split != "train":
            rows = [[tokens] for tokens in examples]
            return DataLoader(Packs(rows), collate_fn=Collator(pad, prompts=True), **common)
        trained = [tokens for tokens in examples if any(tokens.trained[1:])]
        rows = packed(trained, self.max_length) if self._packs else [[tokens] for tokens in trained]
        sampler = StepSampler(rows, self.batch_size, self.trainer, self.seed)
        return DataLoader(Packs(rows), sampler=sampler, collate_fn=Collator(pad, packing=self._packs), **common)

    def collator(self, tokenizer: Any) -> Collator:
        """Pads rows."""
        return Collator(tokenizer.pad_token_id or 0)


def count(path: str, tokenizer: Any, format: Format = "auto", max_length: int = 1024) -> tuple[Table, list[Tokens]]:
    """Validate a file and encode it, without a model.

    Args:
        path: file with conversations or texts.
        tokenizer: of Hugging Face.
        format: of its lines.
        max_length: longest example in tokens.

    Returns:
        Its checked rows, and their tokens.

    Raises:
        ArgumentError: naming every wrong line.
    """
    data = ChatData(path, format=format, max_length=max_length)
    table = read_conversations(read_files(str(Path(path)))["train"], format, (Conversation, Text))
    return table, data.encode(table, tokenizer, targets=True)
