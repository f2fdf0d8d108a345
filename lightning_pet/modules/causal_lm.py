"""A ready LightningModule for causal language models such as Llama, Qwen and GPT-2."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_pet.errors import ArgumentError
from lightning_pet.model.tokens import IGNORED
from lightning_pet.model.undisturbed import evaluating
from lightning_pet.modules.evaluation import EvaluatedModule
from lightning_pet.modules.optimization import Schedule, adamw, with_schedule
from lightning_pet.modules.pretrained import load_model, load_tokenizer
from lightning_pet.modules.token_loss import TokenLoss, token_loss

_NOT_OF_THE_MODEL = ("tokens_per_batch", "prompt_ids", "prompt_mask", "answers")
"""Parts of a batch that the model itself does not take."""

_APART = 1e-4
"""Largest difference of logits, as a share of their size, of examples in one row and alone."""


class _Scores(nn.Module):
    """Running scores of one evaluation data loader, weighted by tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.token_accuracy, self.exact_match = MeanMetric(), MeanMetric(), MeanMetric()

    def update(self, found: TokenLoss) -> None:
        """Add one batch."""
        if found.tokens and found.right is not None:
            self.loss.update(found.mean.detach(), found.tokens)
            self.token_accuracy.update(found.right / found.tokens, found.tokens)

    def compute(self) -> dict[str, Tensor]:
        """All scores since the last call, which are then reset."""
        scores = {name: metric for name, metric in self.named_children() if isinstance(metric, Metric)}
        result = {name: metric.compute() for name, metric in scores.items() if metric.update_count}
        if "loss" in result:
            result["perplexity"] = result["loss"].exp()
        for metric in scores.values():
            metric.reset()
        return result


class CausalLMModule(EvaluatedModule):
    """Train a causal language model on conversations or texts.

    The loss is the mean over the trained tokens of an optimizer step: of all its batches and all processes
    (:class:`~lightning_pet.data.chat.data.ChatData` says how many these are; of other data, over those of each batch).
    Logs ``train/loss`` and, for each validation (or test) data loader, ``val/loss``, ``val/token_accuracy`` and
    ``val/perplexity``, weighted by tokens, and ``val/exact_match`` of generated answers where the batch has prompts.
    When the data module has ``eval_names``, the loaders after the first log under ``val/<name>/loss`` and so on.
    ``predict_step`` returns generated answers.

    Args:
        model: folder, ``package:<name>/<subfolder>``, ``builtin:date_chat`` or hub repository
            (:mod:`lightning_pet.modules.pretrained`), or a mapping with ``model_type`` and the configuration of a new
            model.
        tokenizer: name of the tokenizer; ``None`` means the model's own, ``"bytes"`` UTF-8 bytes.
        sha256: digest that the ``model.safetensors`` file must have.
        max_new_tokens: limit of a generated answer.
        optimizer: makes the optimizer from parameters; AdamW, rate 2e-3, weight decay 0.01 by default.
        lr_scheduler: ``"cosine"`` or ``"linear"`` decay to zero, ``"constant"``, or a callable that makes a torch
            scheduler (stepped every epoch).
        warmup: share of the run in which a built-in schedule rises to the full rate.

    Raises:
        ArgumentError: an unknown model, weights with another digest, or a number out of range.

    Example:
        >>> gpt2 = dict(model_type="gpt2", vocab_size=259, n_embd=8, n_layer=1, n_head=1)
        >>> module = CausalLMModule(model=gpt2, tokenizer="bytes")
        >>> module.packing_gap()
        ''
    """

    shown = ("loss", "exact_match")

    def __init__(
        self,
        model: str | dict[str, Any],
        tokenizer: str | None = None,
        sha256: str | None = None,
        max_new_tokens: int = 64,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: Schedule | LRSchedulerCallable = "cosine",
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise ArgumentError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if tokenizer is None and isinstance(model, dict):
            raise ArgumentError("a model built from a configuration has no tokenizer; set tokenizer, e.g. to 'bytes'")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.model = load_model("AutoModelForCausalLM", model, sha256)
        self.tokenizer = load_tokenizer(tokenizer if tokenizer is not None else str(model))
        self.max_new_tokens = max_new_tokens
        self.optimizer, self.lr_scheduler, self.warmup = optimizer, lr_scheduler, warmup
        self._packs = False

    def forward(self, batch: dict[str, Tensor]) -> Any:
        """The model's output for a batch: ``logits`` (batch, tokens, vocabulary)."""
        return self.model(**{name: value for name, value in batch.items() if name not in _NOT_OF_THE_MODEL})

    def losses(self, batch: dict[str, Tensor]) -> TokenLoss:
        """Losses of the trained tokens of a batch."""
        return token_loss(self.model, {k: v for k, v in batch.items() if k not in _NOT_OF_THE_MODEL})

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """This batch's part of the mean over the trained tokens of the optimizer step."""
        if "position_ids" in batch and not self._packs:
            self._check_packing()
        found = self.losses(batch)
        self.log("train/loss", found.mean.detach(), batch_size=max(found.tokens, 1), prog_bar=True)
        if "tokens_per_batch" not in batch:
            return found.mean
        return found.total / batch["tokens_per_batch"].to(found.total.dtype)

    # --- several examples in one row ---------------------------------------------------------------

    @torch.no_grad()
    def packing_gap(self) -> str:
        """Why examples in one row of a batch would not be kept apart by this model; empty if they are.

        Measured on two examples, alone and in one row: models that read positions as they are given and masks that
        follow from them agree to rounding; others let an example see the one before it.
        """
        try:
            with evaluating(self), torch.random.fork_rng(devices=[]):
                return self._gap()
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"{type(self.model).__name__} takes no positions ({error})"

    def _gap(self) -> str:
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        pieces = [torch.randint(vocabulary, (1, size), generator=generator).to(self.device) for size in (24, 17)]
        alone = torch.cat([self.model(input_ids=piece, use_cache=False).logits for piece in pieces], 1)
        positions = torch.cat([torch.arange(piece.shape[1], device=self.device) for piece in pieces])[None]
        together = self.model(input_ids=torch.cat(pieces, 1), position_ids=positions, use_cache=False).logits
        gap = ((together - alone).abs().max() / alone.abs().max()).item()
        few = 8 if alone.dtype == torch.float32 else 300
        if gap <= _APART * few / 8:
            return ""
        return f"in {type(self.model).__name__}, examples in one row see each other (logits differ by {gap:.1%})"

    def _check_packing(self) -> None:
        if gap := self.packing_gap():
            raise ArgumentError(f"the batch is packed, but {gap}, with the deltas that it has. Set data.packing=False.")
        self._packs = True

    # --- evaluation ----------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, batch: dict[str, Tensor]) -> list[str]:
        """Answer the prompts of a batch, greedily.

        Args:
            batch: ``prompt_ids`` and ``prompt_mask``, (batch, tokens), padded on the left.

        Returns:
            Texts without special tokens.
        """
        asked = batch["prompt_ids"]
        tokens = self.model.generate(
            input_ids=asked,
            attention_mask=batch["prompt_mask"],
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        texts: list[str] = self.tokenizer.batch_decode(tokens[:, asked.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def new_scores(self) -> _Scores:
        """Loss, token accuracy and exact match."""
        return _Scores()

    def _evaluate(self, batch: dict[str, Tensor], stage: str, loader: int, index: int) -> None:
        scores = self.stage_scores(stage, loader)
        scores.update(self.losses(batch))
        for right in self.matches(batch, index):
            scores.exact_match.update(right)

    def matches(self, batch: dict[str, Tensor], index: int) -> list[float]:
        """Whether generated answers are the expected ones, for as many examples as the data module asks for.

        Args:
            batch: with ``prompt_ids``, ``prompt_mask`` and ``answers``; without them nothing is generated.
            index: of the batch.
        """
        if "prompt_ids" not in batch:
            return []
        rows = len(batch["prompt_ids"])
        asked = getattr(getattr(self.trainer, "datamodule", None), "generate", rows * (index + 1))
        if index * rows >= asked:
            return []
        answers = batch["answers"].masked_fill(batch["answers"] == IGNORED, self.tokenizer.pad_token_id)
        expected = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [float(text == wanted.strip()) for text, wanted in zip(self.generate(batch), expected, strict=True)]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of validation data."""
        self._evaluate(batch, "val", dataloader_idx, batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of test data."""
        self._evaluate(batch, "test", dataloader_idx, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str]:
        """One answer per prompt."""
        return self.generate(batch)

    def configure_optimizers(self) -> Any:
        """One parameter group; frozen parameters stay listed and do not move."""
        optimizer = self.optimizer(self.model.parameters())
        return with_schedule(self, optimizer, self.lr_scheduler, self.warmup)
