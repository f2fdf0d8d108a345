"""A ready LightningModule for encoder-decoder models such as T5 and BART."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.text import CHRFScore, ROUGEScore, SacreBLEUScore

from lightning_pet.errors import ArgumentError
from lightning_pet.model.tokens import IGNORED
from lightning_pet.modules import t_few
from lightning_pet.modules.evaluation import EvaluatedModule
from lightning_pet.modules.optimization import Schedule, adamw, with_schedule
from lightning_pet.modules.pretrained import load_model, load_tokenizer

CHOICES = ("choices", "choice")
"""Parts of a batch that the model itself does not take: possible answers, and which one is right."""

TextMetric = Literal["rouge", "bleu", "chrf"]


def token_accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Share of target tokens predicted from the true prefix, and their number.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens), -100 where there is no target.
    """
    counted = labels != IGNORED
    right = (logits.argmax(-1) == labels)[counted]
    return right.float().mean(), int(counted.sum())


class Scores(nn.Module):
    """Running scores of one evaluation data loader.

    Args:
        text_metrics: what to measure on generated texts beside exact match.
    """

    def __init__(self, text_metrics: Sequence[TextMetric] = ()) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.token_accuracy = MeanMetric()
        self.exact_match = MeanMetric()
        self.choice_accuracy = MeanMetric()
        self.text = nn.ModuleDict({name: _text_metric(name) for name in text_metrics})

    def update(self, loss: Tensor, accuracy: Tensor, tokens: int, texts: list[str], targets: list[str]) -> None:
        """Add one batch.

        Args:
            loss: mean over the batch's target tokens.
            accuracy: share of the target tokens predicted.
            tokens: number of target tokens.
            texts: generated texts.
            targets: reference texts.
        """
        self.loss.update(loss, tokens)
        self.token_accuracy.update(accuracy, tokens)
        self.exact_match.update(torch.tensor([float(a == b) for a, b in zip(texts, targets, strict=True)]))
        for name, metric in self.text.items():
            assert isinstance(metric, Metric)
            # ROUGE reads a flat list as one target per text; BLEU and chrF read a list of references per text.
            metric.update(texts, targets if name == "rouge" else [[target] for target in targets])

    def update_choices(self, right: Tensor) -> None:
        """Add one batch of ranked answers: which of them are right."""
        self.choice_accuracy.update(right.float())

    def compute(self) -> dict[str, Tensor]:
        """All scores since the last call, which are then reset."""
        result: dict[str, Tensor] = {
            "loss": self.loss.compute(),
            "token_accuracy": self.token_accuracy.compute(),
            "exact_match": self.exact_match.compute(),
        }
        if self.choice_accuracy.update_count:
            result["choice_accuracy"] = self.choice_accuracy.compute()
        for name, metric in self.text.items():
            assert isinstance(metric, Metric)
            value = metric.compute()
            result |= (
                {key.removesuffix("_fmeasure"): value[key] for key in value if key.endswith("_fmeasure")}
                if (isinstance(value, dict))
                else {name: value}
            )
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()
        return result


def _text_metric(name: TextMetric) -> Metric:
    if name == "rouge":
        return ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL"))  # rougeLsum would download a sentence splitter
    return SacreBLEUScore() if name == "bleu" else CHRFScore()


class Seq2SeqModule(EvaluatedModule):
    """Train an encoder-decoder model to turn a source text into a target text.

    Logs ``train/loss`` and, for each validation (or test) data loader, ``val/loss``, ``val/token_accuracy``
    (from the true prefix) and ``val/exact_match`` of generated texts, plus the chosen ``text_metrics``.
    When the data module has ``eval_names``, the loaders after the first log under
    ``val/<name>/exact_match`` and so on. Batches are mappings with ``input_ids``, ``attention_mask`` and
    ``labels``, (batch, tokens), where -100 marks padding. ``predict_step`` returns generated texts.

    Where the data has possible answers for each source (``choices``, (batch, choices, tokens), and ``choice``, the
    index of the right one), they are ranked by their mean log-probability per token: ``val/choice_accuracy`` is
    logged, and ``predict_step`` returns the best of them. With ``unlikely_loss`` and ``choice_loss`` the module
    trains as T-Few does (Liu et al. 2022).

    Args:
        model: folder, ``package:<name>/<subfolder>``, ``builtin:dates`` or hub repository
            (:mod:`lightning_pet.modules.pretrained`), or a mapping with ``model_type`` and the configuration
            of a new model.
        tokenizer: name of the tokenizer; ``None`` means the model's own, ``"bytes"`` UTF-8 bytes.
        sha256: digest that the ``model.safetensors`` file must have.
        label_smoothing: share of the target probability spread over the vocabulary, in training.
        unlikely_loss: weight of T-Few's unlikelihood loss, which lowers the probability of the tokens of wrong
            answers; T-Few uses 1.
        choice_loss: weight of T-Few's length-normalised loss, the cross-entropy of the right answer among all by
            their scores; T-Few uses 1.
        length_norm: exponent of the length in a score: 1 is the mean per token, 0 the sum.
        max_new_tokens: limit of a generated text.
        num_beams: beams of the search; 1 is greedy.
        text_metrics: scores of generated texts beside exact match: ``"rouge"``, ``"bleu"``, ``"chrf"``.
        optimizer: makes the optimizer from parameters; AdamW, rate 2e-3, weight decay 0.01 by default.
        lr_scheduler: ``"cosine"`` or ``"linear"`` decay to zero, ``"constant"``, or a callable that makes a
            torch scheduler (stepped every epoch).
        warmup: share of the run in which a built-in schedule rises to the full rate.

    Raises:
        ArgumentError: an unknown model, weights with another digest, or a number out of range.

    Example:
        >>> t5 = dict(model_type="t5", vocab_size=259, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        >>> module = Seq2SeqModule(model=t5, tokenizer="bytes", max_new_tokens=3)
        >>> module.configure_optimizers  # doctest: +ELLIPSIS
        <bound method ...>
    """

    shown = ("exact_match",)

    def __init__(
        self,
        model: str | dict[str, Any],
        tokenizer: str | None = None,
        sha256: str | None = None,
        label_smoothing: float = 0.0,
        unlikely_loss: float = 0.0,
        choice_loss: float = 0.0,
        length_norm: float = 1.0,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        text_metrics: Sequence[TextMetric] = (),
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: Schedule | LRSchedulerCallable = "cosine",
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ArgumentError(f"label_smoothing={label_smoothing}: expected 0 <= label_smoothing < 1")
        if min(unlikely_loss, choice_loss, length_norm) < 0:
            found = f"unlikely_loss={unlikely_loss}, choice_loss={choice_loss}, length_norm={length_norm}"
            raise ArgumentError(f"{found}: expected numbers of at least 0")
        if label_smoothing > 0 and (unlikely_loss > 0 or choice_loss > 0):
            raise ArgumentError("label_smoothing and T-Few's losses exclude each other; set label_smoothing=0")
        if max_new_tokens < 1 or num_beams < 1:
            raise ArgumentError(f"max_new_tokens={max_new_tokens} and num_beams={num_beams} must be at least 1")
        if tokenizer is None and isinstance(model, dict):
            raise ArgumentError("a model built from a configuration has no tokenizer; set tokenizer, e.g. to 'bytes'")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.model = load_model("AutoModelForSeq2SeqLM", model, sha256)
        self.tokenizer = load_tokenizer(tokenizer if tokenizer is not None else str(model))
        self.label_smoothing = label_smoothing
        self.unlikely_loss, self.choice_loss, self.length_norm = unlikely_loss, choice_loss, length_norm
        self.generation = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
        self.text_metrics = tuple(text_metrics)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup = warmup

    def forward(self, batch: dict[str, Tensor]) -> Any:
        """The model's output for a batch: ``loss`` and ``logits`` (batch, tokens, vocabulary)."""
        return self.model(**{name: value for name, value in batch.items() if name not in CHOICES})

    def choice_log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-probability of every token of every choice, (batch, choices, tokens).

        A source is encoded once for all its choices, which see the same dropout in it.
        """
        choices, mask = batch["choices"], batch["attention_mask"]
        count = choices.shape[1]
        encoded = self.model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask)[0]
        logits = self.model(
            encoder_outputs=(encoded.repeat_interleave(count, 0),),
            attention_mask=mask.repeat_interleave(count, 0),
            labels=choices.flatten(0, 1),
        ).logits
        return t_few.token_log_probs(logits.unflatten(0, choices.shape[:2]), choices)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy per target token, smoothed if asked for; with T-Few's losses if asked for."""
        if self.unlikely_loss > 0 or self.choice_loss > 0:
            return self._t_few_step(batch)
        output = self(batch)
        loss: Tensor = output.loss
        if self.label_smoothing > 0.0:
            loss = nn.functional.cross_entropy(
                output.logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=self.label_smoothing
            )
        self.log("train/loss", loss, batch_size=len(batch["labels"]))
        return loss

    def _t_few_step(self, batch: dict[str, Tensor]) -> Tensor:
        if not batch.keys() >= set(CHOICES):
            raise ArgumentError(
                "unlikely_loss and choice_loss need the possible answers: give the data a column 'choices' (or "
                "Seq2SeqData(choices=[…])), or set both losses to 0"
            )
        labels, right = batch["choices"], batch["choice"]
        log_probs = self.choice_log_probs(batch)
        scores = t_few.choice_scores(log_probs, labels, self.length_norm)
        parts = {
            "likelihood": t_few.likelihood_loss(log_probs, labels, right),
            "unlikelihood": self.unlikely_loss * t_few.unlikelihood_loss(log_probs, labels, right),
            "choice": self.choice_loss * t_few.length_normalised_loss(scores, right),
        }
        loss = torch.stack(tuple(parts.values())).sum()
        self.log_dict({f"train/{name}_loss": part for name, part in parts.items()}, batch_size=len(right))
        self.log("train/loss", loss, batch_size=len(right))
        return loss

    @torch.no_grad()
    def rank(self, batch: dict[str, Tensor]) -> Tensor:
        """Index of the best choice of each source, (batch,)."""
        return t_few.choice_scores(self.choice_log_probs(batch), batch["choices"], self.length_norm).argmax(-1)

    @torch.no_grad()
    def generate(self, batch: dict[str, Tensor]) -> list[str]:
        """Generate one text per source.

        Args:
            batch: ``input_ids`` and ``attention_mask``, (batch, tokens).

        Returns:
            Texts without special tokens.
        """
        tokens = self.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **self.generation
        )
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def new_scores(self) -> Scores:
        """Loss, accuracy and exact match, and the chosen text metrics."""
        return Scores(self.text_metrics)

    def _evaluate(self, batch: dict[str, Tensor], stage: str, loader: int) -> None:
        output = self(batch)
        labels = batch["labels"]
        targets = labels.masked_fill(labels == IGNORED, self.tokenizer.pad_token_id)
        references = self.tokenizer.batch_decode(targets, skip_special_tokens=True)
        accuracy, tokens = token_accuracy(output.logits, labels)
        scores = self.stage_scores(stage, loader)
        scores.update(output.loss, accuracy, tokens, self.generate(batch), references)
        if "choices" in batch:
            scores.update_choices(self.rank(batch) == batch["choice"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of validation data."""
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of test data."""
        self._evaluate(batch, "test", dataloader_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str]:
        """One text per source: the best choice where there are choices, else a generated one."""
        if "choices" not in batch:
            return self.generate(batch)
        best = batch["choices"][torch.arange(len(batch["choices"]), device=self.device), self.rank(batch)]
        texts: list[str] = self.tokenizer.batch_decode(
            best.masked_fill(best == IGNORED, self.tokenizer.pad_token_id), skip_special_tokens=True
        )
        return texts

    def configure_optimizers(self) -> Any:
        """One parameter group; frozen parameters stay listed and do not move."""
        optimizer = self.optimizer(self.model.parameters())
        return with_schedule(self, optimizer, self.lr_scheduler, self.warmup)
