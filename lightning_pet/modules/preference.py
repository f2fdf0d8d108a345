"""A ready LightningModule for preference tuning of causal language models: DPO and its relatives."""

from collections.abc import Iterable
from typing import Any, Final, Literal, cast, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import move_data_to_device, rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_pet.errors import ArgumentError
from lightning_pet.model.adaptation import adapted_root
from lightning_pet.model.undisturbed import evaluating
from lightning_pet.modules.causal_lm import CausalLMModule
from lightning_pet.modules.optimization import Schedule
from lightning_pet.modules.preference_loss import (
    NEEDS_REFERENCE,
    Answers,
    PreferenceLoss,
    ipo_loss,
    margins,
    orpo_loss,
    sigmoid_loss,
    simpo_loss,
)
from lightning_pet.modules.token_loss import row_log_probs
from lightning_pet.operations.adapted import Adapted

_DROPOUTS: Final = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_APART: Final = 1e-3
"""Margin at the first step above which the reference is not the model that the run has found."""


def gentle_adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW with a tenth of the rate of supervised tuning (2e-4), and no weight decay."""
    return torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0)


class _Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        names = ("loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio", "exact_match")
        self.means = nn.ModuleDict({name: MeanMetric() for name in names})

    def update(self, found: dict[str, Tensor], pairs: int) -> None:
        """Add one batch."""
        for name, value in found.items():
            self.metric(name).update(value.detach(), pairs)

    def metric(self, name: str) -> MeanMetric:
        """One of the means."""
        return cast(MeanMetric, self.means[name])

    def compute(self) -> dict[str, Tensor]:
        """All scores since the last call, which are then reset."""
        seen = {name: self.metric(name) for name in self.means if self.metric(name).update_count}
        result = {name: metric.compute() for name, metric in seen.items()}
        for metric in seen.values():
            metric.reset()
        return result


class PreferenceModule(CausalLMModule):
    """Tune a causal language model to prefer some answers to others (DPO; Rafailov et al. 2023).

    The reference is the model as the run found it: without a second model in memory, the switched-off delta (bit for
    bit the base) or, where the run starts from a delta or changes weights without one, log-probabilities that are
    computed once before the first step and kept in checkpoints. All dropout is off, as the reference has none.

    A rate that suits supervised tuning destroys a model here while loss and accuracy look perfect: the preferred
    answers become unlikely as well, only less so. So the rate is a tenth by default, ``chosen_log_ratio`` (nats by
    which the preferred answers have become likelier than in the reference; it should not fall far below zero) is in the
    log beside ``val/exact_match``, and ``sft_weight`` holds the preferred answers.

    Logs ``train/`` and ``val/`` ``loss``, ``accuracy`` (share of pairs that the policy prefers more than the reference
    does), ``margin``, ``chosen_log_ratio`` and ``rejected_log_ratio``, and ``val/exact_match``.

    Args:
        model: as of :class:`~lightning_pet.modules.causal_lm.CausalLMModule`; ``tokenizer``, ``sha256`` and
            ``max_new_tokens`` likewise.
        loss: ``"sigmoid"`` (DPO), ``"ipo"``, or without a reference ``"orpo"`` or ``"simpo"``.
        beta: how closely the reference is kept to: larger is closer. 0.1 is usual; per token about 2.
        label_smoothing: share of pairs that may be the wrong way round (``"sigmoid"``).
        per_token: compare means per token instead of sums, so that length counts for nothing (``"sigmoid"``); ``"ipo"``
            always does.
        sft_weight: weight of the supervised loss per token of the preferred answers, which is a brake. ORPO has 1
            by definition.
        gamma: margin of ``"simpo"``.
        reference: ``"auto"``, ``"live"`` (the switched-off delta) or ``"cached"`` (computed before the first step).
        optimizer: makes the optimizer from parameters; AdamW, rate 2e-4 by default.
        lr_scheduler: as of ``CausalLMModule``.
        warmup: likewise.

    Raises:
        ArgumentError: an unknown loss, a number out of range, or ``reference="live"`` without a delta to switch off.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        tokenizer: str | None = None,
        sha256: str | None = None,
        loss: PreferenceLoss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        per_token: bool = False,
        sft_weight: float = 0.2,
        gamma: float = 0.5,
        reference: Literal["auto", "live", "cached"] = "auto",
        max_new_tokens: int = 64,
        optimizer: OptimizerCallable = gentle_adamw,
        lr_scheduler: Schedule | LRSchedulerCallable = "cosine",
        warmup: float = 0.1,
    ) -> None:
        if loss not in get_args(PreferenceLoss):
            raise ArgumentError(f"loss={loss!r}: expected one of {list(get_args(PreferenceLoss))}")
        if beta <= 0 or sft_weight < 0 or not 0 <= label_smoothing < 0.5:
            found = f"beta={beta}, sft_weight={sft_weight}, label_smoothing={label_smoothing}"
            raise ArgumentError(f"{found}: expected beta > 0, sft_weight >= 0 and 0 <= label_smoothing < 0.5")
        if loss != "sigmoid" and (label_smoothing or per_token):
            raise ArgumentError(f"loss={loss!r} knows neither label_smoothing nor per_token; leave them out")
        super().__init__(model, tokenizer, sha256, max_new_tokens, optimizer, lr_scheduler, warmup)
        self.loss, self.beta, self.label_smoothing, self.per_token = loss, beta, label_smoothing, per_token
        self.sft_weight, self.gamma, self.reference = 1.0 if loss == "orpo" else sft_weight, gamma, reference
        self._adapted: Adapted | None = None
        self._cached: dict[str, Tensor] = {}

    # --- the reference -------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Switch all dropout off; keep the log-probabilities of the reference where it cannot be switched to."""
        _without_dropout(self.model)
        self._find_reference()
        if self.loss in NEEDS_REFERENCE and self._adapted is None and not self._cached:
            self._cache_reference()

    def _find_reference(self) -> None:
        adapted = adapted_root(self) is not None
        methods = [callback for callback in self.trainer.callbacks if hasattr(callback, "start_from")]  # type: ignore[attr-defined]
        from_delta = any(method.start_from is not None for method in methods)
        if self.reference == "live" and not adapted:
            raise ArgumentError("reference='live' needs a delta that can be switched off; use reference='cached'.")
        live = self.reference == "live" or (self.reference == "auto" and adapted and not from_delta)
        self._adapted = Adapted(self) if live else None

    @torch.no_grad()
    def _cache_reference(self) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "loader"):
            raise ArgumentError(
                "this run starts from a delta or changes weights without one, so its reference has to be computed "
                "before the first step, which needs the pairs of a PreferenceData: give it as datamodule."
            )
        rank_zero_info("Log-probabilities of the reference are computed once, before the first step.")
        with evaluating(self):
            self._cached = {split: self._computed(data, split) for split in ("train", "val")}

    def _computed(self, data: Any, split: str) -> Tensor:
        """Log-probabilities of both answers of each pair, (pairs, 2)."""
        pairs, collate = data._examples[split], data.loader(split).collate_fn
        found = torch.zeros(len(pairs), 2)
        for begin in range(0, len(pairs), data.batch_size):
            chosen = pairs[begin : begin + data.batch_size]
            answers = self._answers(move_data_to_device(collate(chosen), self.device))
            found[begin : begin + len(chosen)] = torch.stack([answers.chosen, answers.rejected], 1).cpu()
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed run compares with the same reference."""
        if self._cached:
            checkpoint["preference_reference"] = self._cached

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference of the run that is resumed."""
        self._cached = checkpoint.get("preference_reference", {})

    def _reference(self, batch: dict[str, Tensor], policy: Answers, split: str) -> Answers:
        if self._adapted is not None:
            with torch.no_grad(), self._adapted.disabled():
                return self._answers(batch)
        if split not in self._cached:
            raise ArgumentError(f"there is no reference for {split} batches: fit first, or use a delta.")
        found = self._cached[split][batch["index"].cpu()].to(policy.chosen.device)
        return Answers(found[:, 0], found[:, 1], policy.chosen_tokens, policy.rejected_tokens)

    # --- the loss ------------------------------------------------------------------------------------

    def _answers(self, batch: dict[str, Tensor]) -> Answers:
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        sums, tokens = row_log_probs(self.model, given)
        pairs = len(sums) // 2
        return Answers(sums[:pairs], sums[pairs:], tokens[:pairs], tokens[pairs:])

    def compare(self, batch: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        """The loss of a batch of pairs, with a gradient, and what is logged of it."""
        policy = self._answers(batch)
        sft = -(policy.chosen.sum() / policy.chosen_tokens.sum().clamp(min=1))
        if self.loss not in NEEDS_REFERENCE:
            each = orpo_loss(policy, self.beta) if self.loss == "orpo" else simpo_loss(policy, self.beta, self.gamma)
            right = policy.per_token().chosen > policy.per_token().rejected
            return {"loss": each.mean() + self.sft_weight * sft, "accuracy": right.float().mean()}
        reference = self._reference(batch, policy, split)
        by_token = self.per_token or self.loss == "ipo"
        sides = (policy.per_token(), reference.per_token()) if by_token else (policy, reference)
        margin = margins(*sides)
        each = (
            sigmoid_loss(margin, self.beta, self.label_smoothing)
            if self.loss == "sigmoid"
            else ipo_loss(margin, self.beta)
        )
        return {
            "loss": each.mean() + self.sft_weight * sft,
            "accuracy": (margin > 0).float().mean(),
            "margin": margin.mean(),
            "chosen_log_ratio": (policy.chosen - reference.chosen).mean(),
            "rejected_log_ratio": (policy.rejected - reference.rejected).mean(),
        }

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of pairs."""
        found = self.compare(batch, "train")
        if self.global_step == 0 and batch_idx == 0 and abs(found.get("margin", torch.zeros(()))) > _APART:
            rank_zero_warn(
                f"the margin is {found['margin']:.3g} before the first step, where policy and reference should agree: "
                "does a method change the model at its start, or at random? Use reference='cached' for the former."
            )
        pairs = len(batch["index"])
        self.log_dict({f"train/{name}": value.detach() for name, value in found.items()}, batch_size=pairs)
        return found["loss"]

    def new_scores(self) -> Any:
        """What is logged of pairs, and exact match."""
        return _Scores()

    def _evaluate(self, batch: dict[str, Tensor], stage: str, loader: int, index: int) -> None:
        scores = self.stage_scores(stage, loader)
        scores.update(self.compare(batch, stage), len(batch["index"]))
        for right in self.matches(batch, index):
            scores.metric("exact_match").update(right)


def _without_dropout(model: nn.Module) -> None:
    """Set every probability of dropping to zero: that of layers, and that which attention reads off its module."""
    for module in model.modules():
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
