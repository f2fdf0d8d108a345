"""A language model as a classifier: a label is the words that the model would say."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_pet.errors import ArgumentError
from lightning_pet.modules.optimization import Schedule, adamw, with_schedule
from lightning_pet.modules.pretrained import load_model, load_tokenizer

_CLASSES = {"masked": "AutoModelForMaskedLM", "causal": "AutoModelForCausalLM"}


def select_label_tokens(
    features: Tensor, labels: Tensor, output: Tensor, count: int, passes: int = 10, lr: float = 3e-4
) -> Tensor:
    """The tokens that speak for each class (Shin et al. 2020).

    A logistic head w_y is fitted to the vectors h that the output embedding reads. Then each token's output
    embedding takes the place of h, and those of the largest probability of a class are its label tokens.

    Args:
        features: h, (examples, width).
        labels: classes of the examples, (examples,).
        output: output embedding, (tokens, width).
        count: tokens for each class.
        passes: passes over the examples, in batches of 32.
        lr: rate of Adam; the paper's by default.

    Returns:
        Token ids, (classes, count), the best first.
    """
    classes = int(labels.max()) + 1
    with torch.enable_grad():
        head = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
        bias = torch.zeros(classes, device=features.device, requires_grad=True)
        optimizer = torch.optim.Adam([head, bias], lr=lr)
        for _ in range(passes):
            for h, y in zip(torch.split(features.float(), 32), torch.split(labels, 32), strict=True):
                optimizer.zero_grad()
                loss: Any = nn.functional.cross_entropy(h @ head.T + bias, y)
                loss.backward()
                optimizer.step()
    return (output.float() @ head.detach().T).softmax(-1).topk(count, dim=0).indices.T


class LabelWordClassifier(L.LightningModule):
    """Classify texts by the words that a masked or causal language model expects there; nothing is new in it.

    A masked model reads the text and a mask token, a causal one the text; p(y | x) is the sum of the
    probabilities of the label's words at the mask, or after the last token. The loss is −log p(y | x). That is
    the score for which :class:`~lightning_pet.AutoPromptCallback` searches; every other method trains on it as well.

    Logs ``train/loss``, ``val/loss`` and ``val/accuracy``, and the same under ``test/``. Batches are mappings with
    ``input_ids`` and ``attention_mask``, (batch, tokens), padded on the right, and ``labels``, (batch,).

    Args:
        model: see :func:`lightning_pet.modules.pretrained.load_model`.
        kind: ``"masked"`` or ``"causal"``.
        labels: names of the classes; ``None`` takes them from the data module.
        label_words: words of each class, such as ``[["bad", "awful"], ["good", "great"]]``; or how many
            tokens of the vocabulary to choose for each at the start of the fit (:func:`select_label_tokens`).
        tokenizer: name of the tokenizer; ``None`` means the model's own.
        sha256: digest that the ``model.safetensors`` file must have.
        optimizer: makes the optimizer from parameters; AdamW, rate 2e-3, weight decay 0.01 by default.
        lr_scheduler: as in :class:`~lightning_pet.modules.text_classification.TextClassifier`.
        warmup: share of the run in which a built-in schedule rises to the full rate.

    Raises:
        ArgumentError: a word is no single token, the words do not fit the labels, or a masked model's
            tokenizer has no mask token.
    """

    label_ids: Tensor

    def __init__(
        self,
        model: str | dict[str, Any],
        kind: Literal["masked", "causal"] = "masked",
        labels: list[str] | None = None,
        label_words: int | list[list[str]] = 3,
        tokenizer: str | None = None,
        sha256: str | None = None,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: Schedule | LRSchedulerCallable = "cosine",
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        if kind not in _CLASSES:
            raise ArgumentError(f"kind={kind!r}: use 'masked' or 'causal'")
        if tokenizer is None and isinstance(model, dict):
            raise ArgumentError("a model built from a configuration has no tokenizer; set tokenizer")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.model = load_model(_CLASSES[kind], model, sha256)
        self.tokenizer = load_tokenizer(tokenizer if tokenizer is not None else str(model))
        if kind == "masked" and self.tokenizer.mask_token_id is None:
            raise ArgumentError("kind='masked', but the tokenizer has no mask token; use kind='causal'")
        self.kind = kind
        self.label_words = label_words
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup = warmup
        self.labels: list[str] | None = None
        if labels is not None:
            self._build(labels)

    def _build(self, labels: list[str]) -> None:
        words = self.label_words
        if isinstance(words, int):
            ids = torch.full((len(labels), words), -1)
        else:
            if len(words) != len(labels):
                raise ArgumentError(f"label_words has {len(words)} lists, but there are {len(labels)} labels: {labels}")
            rows = [[self._token(word) for word in row] for row in words]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
        self.labels = labels
        self.register_buffer("label_ids", ids.to(self.device))
        self.metrics = nn.ModuleDict({stage: MulticlassAccuracy(len(labels), average="micro") for stage in _STAGES})

    def _token(self, word: str) -> int:
        # Most vocabularies hold a word with the space before it.
        for text in (f" {word}", word):
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1:
                return ids[0]
        raise ArgumentError(f"label word {word!r} is no single token of this tokenizer; choose a more common word")

    def setup(self, stage: str) -> None:
        """Take the names of the labels from the data module if the constructor did not get them."""
        if self.labels is None:
            labels = getattr(getattr(self.trainer, "datamodule", None), "labels", None)
            if labels is None:
                raise ArgumentError("labels=None needs a data module with `labels`; else pass labels=[...]")
            self._build(labels)

    def on_fit_start(self) -> None:
        """Choose the label tokens, unless they were given or come from a checkpoint."""
        if isinstance(self.label_words, int) and bool((self.label_ids < 0).all()):
            datamodule: Any = getattr(self.trainer, "datamodule", None)
            if datamodule is None:
                raise ArgumentError("label_words as a number needs a data module; else pass the words")
            self.label_ids.copy_(self.select(datamodule.train_dataloader(), self.label_words))

    @torch.no_grad()
    def select(self, batches: Any, count: int) -> Tensor:
        """Label tokens that these batches suggest, (labels, count)."""
        output: Any = self.model.get_output_embeddings()
        seen: list[Tensor] = []
        handle = output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        features, labels = [], []
        training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                moved = {name: value.to(self.device) for name, value in batch.items()}
                _, place = self._scores(moved)
                features.append(seen.pop()[torch.arange(len(place), device=place.device), place])
                labels.append(moved["labels"])
        finally:
            handle.remove()
            self.model.train(training)
        return select_label_tokens(torch.cat(features), torch.cat(labels), output.weight, count)

    def _scores(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits over the vocabulary, (batch, tokens, vocabulary), and the place to read, (batch,)."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        place = mask.sum(1) - 1
        if self.kind == "masked":
            last = ids.gather(1, place[:, None])[:, 0]
            place = place + (last != self.tokenizer.sep_token_id).long()  # before the separator, if there is one
            column = torch.arange(ids.shape[1] + 1, device=ids.device)
            source = torch.where(column <= place[:, None], column, column - 1).clamp(max=ids.shape[1] - 1)
            ids = ids.gather(1, source).scatter(1, place[:, None], self.tokenizer.mask_token_id)
            mask = nn.functional.pad(mask, (1, 0), value=1)
        return self.model(input_ids=ids, attention_mask=mask).logits, place

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logarithm of p(y | x): (batch, labels)."""
        logits, place = self._scores(batch)
        spoken = logits[torch.arange(len(place), device=place.device), place].float().log_softmax(-1)
        words = spoken[:, self.label_ids.clamp(min=0)]
        return words.masked_fill(self.label_ids < 0, -torch.inf).logsumexp(-1)

    def _step(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        scores, labels = self(batch), batch["labels"]
        loss = nn.functional.nll_loss(scores, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), sync_dist=stage != "train")
        if stage != "train":
            metric: Any = self.metrics[stage]
            metric(scores, labels)
            self.log(f"{stage}/accuracy", metric, batch_size=len(labels), prog_bar=True)
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean of −log p(y | x)."""
        return self._step(batch, "train")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._step(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the test metrics."""
        self._step(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str]:
        """Names of the most probable labels, one per text."""
        names: Sequence[str] = self.labels or ()
        return [names[i] for i in self(batch).argmax(-1).tolist()]

    def configure_optimizers(self) -> Any:
        """One optimizer, and its schedule."""
        return with_schedule(self, self.optimizer(self.parameters()), self.lr_scheduler, self.warmup)


_STAGES = ("val", "test")
