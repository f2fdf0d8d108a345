"""A ready LightningModule for the classification of texts and pairs of texts."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_pet.errors import ArgumentError
from lightning_pet.modules.optimization import Schedule, adamw, with_schedule
from lightning_pet.modules.pretrained import load_model, load_tokenizer


def mean_over_tokens(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Average token vectors where the mask is 1.

    Args:
        hidden: (batch, tokens, width).
        attention_mask: (batch, tokens) of 0 and 1; ``None`` means all 1.

    Returns:
        (batch, width).
    """
    if attention_mask is None:
        return hidden.mean(1)
    weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1.0)


class MeanPoolingClassifier(nn.Module):
    """An encoder, the mean over its token vectors, a layer norm without weights, and a linear classifier.

    Attributes:
        encoder: Hugging Face encoder without pooler.
        classifier: linear layer, (width) to (labels).
    """

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        self.config = config
        self.classifier = nn.Linear(config.hidden_size, labels)

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Vectors that the classifier sees: (batch, tokens) to (batch, width)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        pooled = mean_over_tokens(hidden, attention_mask)
        return nn.functional.layer_norm(pooled, pooled.shape[-1:])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Logits: (batch, tokens) to (batch, labels)."""
        logits: Tensor = self.classifier(self.features(input_ids, attention_mask, **inputs))
        return logits


def build_classifier(
    model: str | dict[str, Any], labels: Sequence[str], pooling: Literal["mean", "model"], sha256: str | None
) -> nn.Module:
    """Build a pretrained text classifier with a new head.

    Args:
        model: see :func:`lightning_pet.modules.pretrained.load_model`.
        labels: names of the classes.
        pooling: ``"mean"`` for :class:`MeanPoolingClassifier`, ``"model"`` for the head that transformers defines.
        sha256: pinned digest of the weights file.

    Returns:
        A module that maps a batch to logits, or to an output with ``logits``.
    """
    if pooling == "model":
        names = dict(enumerate(labels))
        config = {"num_labels": len(labels), "id2label": names, "label2id": {v: k for k, v in names.items()}}
        classifier: nn.Module = load_model("AutoModelForSequenceClassification", model, sha256, **config)
        return classifier
    encoder = load_model("AutoModel", model, sha256)
    if encoder.config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # its parameters would never receive a gradient
    return MeanPoolingClassifier(encoder, len(labels))


class TextClassifier(L.LightningModule):
    """Classify texts with a pretrained model and a new linear head.

    Logs ``train/loss``, ``val/loss``, ``val/accuracy``, ``val/f1`` (macro) and the same under ``test/``.
    Batches are mappings with ``input_ids`` and ``attention_mask``, (batch, tokens), further inputs of the model,
    and ``labels``, (batch,). ``predict_step`` returns the names of the predicted labels.

    Args:
        model: folder, ``package:<name>/<subfolder>`` or hub repository
            (:mod:`lightning_pet.modules.pretrained`), or a mapping with ``model_type`` and the configuration
            of a new model. The model is built at once if the labels are known, otherwise in ``setup``.
        labels: names of the classes or their number; ``None`` takes them from the data module.
        pooling: ``"mean"`` puts a linear layer on the mean of the token vectors; ``"model"`` uses the
            classification model that transformers defines for this architecture.
        sha256: digest that the ``model.safetensors`` file must have.
        optimizer: makes the optimizer from parameter groups; AdamW, rate 2e-3, weight decay 0.01 by default.
        head_lr: learning rate of the head; ``None`` means the optimizer's.
        lr_scheduler: ``"cosine"`` or ``"linear"`` decay to zero, ``"constant"``, or a callable that makes a
            torch scheduler (stepped every epoch).
        warmup: share of the run in which a built-in schedule rises to the full rate.

    Raises:
        ArgumentError: fewer than two labels, an unknown model, or weights with another digest.

    Example:
        >>> import torch
        >>> bert = dict(model_type="bert", vocab_size=99, hidden_size=8, num_hidden_layers=1,
        ...             num_attention_heads=2, intermediate_size=16)
        >>> classifier = TextClassifier(model=bert, labels=["no", "yes"])
        >>> classifier(dict(input_ids=torch.ones(3, 5, dtype=torch.long))).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        labels: int | list[str] | None = None,
        pooling: Literal["mean", "model"] = "mean",
        sha256: str | None = None,
        optimizer: OptimizerCallable = adamw,
        head_lr: float | None = None,
        lr_scheduler: Schedule | LRSchedulerCallable = "cosine",
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.source = model
        self.pooling: Literal["mean", "model"] = pooling
        self.sha256 = sha256
        self.optimizer = optimizer
        self.head_lr = head_lr
        self.lr_scheduler = lr_scheduler
        self.warmup = warmup
        self.labels: list[str] | None = labels if isinstance(labels, list) else None
        if labels is not None:
            self._build([str(i) for i in range(labels)] if isinstance(labels, int) else labels)

    def _build(self, labels: list[str]) -> None:
        if len(set(labels)) < 2 or len(set(labels)) < len(labels):
            raise ArgumentError(f"labels={labels}: a classifier needs two or more labels, all different")
        self.model = build_classifier(self.source, labels, self.pooling, self.sha256)
        self.metrics = nn.ModuleDict({stage: _metrics(stage, len(labels)) for stage in ("val", "test")})

    @cached_property
    def tokenizer(self) -> Any:
        """The pretrained model's own tokenizer."""
        if isinstance(self.source, dict):
            raise ArgumentError("a model built from a configuration has no tokenizer; set data.tokenizer")
        return load_tokenizer(self.source)

    def setup(self, stage: str) -> None:
        """Take the names of the labels from the data module if the constructor did not get them."""
        if self.labels is not None:
            return
        labels: list[str] | None = getattr(getattr(self.trainer, "datamodule", None), "labels", None)
        if not hasattr(self, "model"):
            if labels is None:
                raise ArgumentError(
                    "labels=None needs a data module with `labels`; else pass TextClassifier(labels=...)"
                )
            self._build(labels)
        elif labels is not None and len(labels) != self.hparams["labels"]:
            raise ArgumentError(
                f"TextClassifier(labels={self.hparams['labels']}), but the data has the labels {labels}"
            )
        if labels is not None:
            self.labels = labels
            self.hparams["labels"] = labels  # a checkpoint must know them without the data

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of a batch: (batch, labels)."""
        output = self.model(**{key: value for key, value in batch.items() if key != "labels"})
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Sentence vectors under the current weights: (batch, width)."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if isinstance(self.model, MeanPoolingClassifier):
            return self.model.features(**inputs)
        body: Any = self.model.base_model
        return mean_over_tokens(body(**inputs)[0], inputs.get("attention_mask"))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        loss = nn.functional.cross_entropy(self(batch), batch["labels"])
        self.log("train/loss", loss, batch_size=len(batch["labels"]))
        return loss

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        logits, labels = self(batch), batch["labels"]
        loss = nn.functional.cross_entropy(logits, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), sync_dist=True)
        metrics: Any = self.metrics[stage]
        metrics.update(logits, labels)
        self.log_dict(metrics, batch_size=len(labels), prog_bar=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str]:
        """Names of the most probable labels, one per text."""
        best = self(batch).argmax(-1).tolist()
        return [self.labels[i] if self.labels else str(i) for i in best]

    def param_groups(self) -> list[dict[str, Any]]:
        """Two parameter groups, the body and the head; frozen parameters are listed and do not move."""
        body: Any = self.model.encoder if self.pooling == "mean" else self.model.base_model
        inside = {id(p) for p in body.parameters()}
        head: dict[str, Any] = {"params": [p for p in self.model.parameters() if id(p) not in inside]}
        if self.head_lr is not None:
            head["lr"] = self.head_lr
        return [{"params": list(body.parameters())}, head]

    def configure_optimizers(self) -> Any:
        """One optimizer over :meth:`param_groups`, and its schedule."""
        return with_schedule(self, self.optimizer(self.param_groups()), self.lr_scheduler, self.warmup)


def _metrics(stage: str, labels: int) -> MetricCollection:
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(labels, average="micro"),
            "f1": MulticlassF1Score(labels, average="macro"),
        },
        prefix=f"{stage}/",
    )
