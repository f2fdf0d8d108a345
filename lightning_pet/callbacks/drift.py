"""How far a tuned model has moved from its base: the KL divergence of their predictions, measured and bounded."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pet.arguments import at_least, checked, positive
from lightning_pet.errors import ArgumentError, PETError
from lightning_pet.model.adaptation import adapted_root
from lightning_pet.model.tokens import IGNORED
from lightning_pet.model.undisturbed import evaluating
from lightning_pet.operations.adapted import Adapted
from lightning_pet.strategies import private

_CHUNK = 1 << 24
"""Logits of which a float32 copy is made at a time."""


class DriftCallback(Callback):
    """Log KL(base ‖ tuned) per prediction on validation batches, and bound it by a penalty if wanted.

    The base is the same model with its delta switched off, so there is no second one in memory. What the adapted model
    is first called with in a batch is called twice again, without dropout: with the delta and without. It has to return
    logits, with the classes in the last dimension: a tensor, an object with ``logits``, or a mapping that holds them.
    Predictions that count are those whose label is not -100 (of causal models the label of the next token), else those
    that the attention mask keeps, else all.

    Logs ``val/drift``, in nats per prediction over all data loaders and processes, and with ``weight`` also
    ``train/drift`` of each batch.

    Args:
        batches: validation batches of each data loader in which it is measured; ``None`` means all.
        weight: of the penalty ``weight`` · KL(base ‖ tuned) that is added to what ``training_step`` returns, as a
            mean over the predictions of the batch. Costs two more forward passes and one backward pass, with all logits
            of the batch in memory; without dropout transformers models do not checkpoint gradients there either.
        max_drift: the run stops, with a warning, after a validation in which ``val/drift`` is above it.

    Attributes:
        drift: the last ``val/drift``, or ``None``.

    Raises:
        ArgumentError: a number out of range; a penalty with manual optimization; no logits found.
        PETError: nothing was applied that could be switched off.

    >>> from lightning_pet import DriftCallback, LoRACallback
    >>> callbacks = [LoRACallback(r=8), DriftCallback(weight=0.1, max_drift=2.0)]
    """

    @checked
    def __init__(self, batches: int | None = 8, weight: float = 0.0, max_drift: float | None = None) -> None:
        super().__init__()
        if batches is not None:
            at_least("batches", batches, 1, "must be at least 1, or None for all of them.")
        at_least("weight", weight, 0, "must be 0 or more.")
        if max_drift is not None:
            positive("max_drift", max_drift)
        self.batches, self.weight, self.max_drift = batches, weight, max_drift
        self.drift: float | None = None
        self._adapted: Adapted | None = None
        self._undo: dict[str, Callable[[], None]] = {}
        self._sums: Tensor | None = None  # divergence and predictions of this validation

    # --- where it hangs in ---------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See to it that there is something to switch off."""
        if self.weight and not pl_module.automatic_optimization:
            raise ArgumentError(
                f"DriftCallback(weight={self.weight}) adds to the loss that training_step returns, and this "
                f"{type(pl_module).__name__} optimizes manually. Use weight=0, which only measures."
            )
        self._find(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the training step return the penalised loss."""
        if self.weight:
            self._wrap(pl_module, "training_step", self._penalised)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the training step back."""
        self._unwrap("training_step")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look on at the validation step."""
        self._find(pl_module)
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._wrap(pl_module, "validation_step", self._measured)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was found in all processes, and stop the run if it is too much."""
        if self._sums is None:
            return
        sums = self._sums.to(pl_module.device, torch.float32 if pl_module.device.type == "mps" else torch.float64)
        total, count = cast(Tensor, trainer.strategy.reduce(sums, reduce_op="sum")).tolist()
        self._sums = None
        if trainer.sanity_checking or not count:
            return
        self.drift = total / count
        pl_module.log("val/drift", self.drift, batch_size=1, prog_bar=True, sync_dist=True)
        if self.max_drift is not None and not self.drift <= self.max_drift and trainer.state.fn == TrainerFn.FITTING:
            trainer.should_stop = True
            rank_zero_warn(
                f"the tuned model has drifted {self.drift:.3g} nats per prediction from its base, above "
                f"max_drift={self.max_drift}: the run stops. Use a lower rate, or a penalty (weight=)."
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the validation step back."""
        self._unwrap("validation_step")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give both steps back."""
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give both steps back, and let the model go."""
        for name in list(self._undo):
            self._unwrap(name)
        self._adapted = None

    def _find(self, module: pl.LightningModule) -> None:
        if adapted_root(module) is None:
            raise PETError(
                f"DriftCallback compares with the base, and nothing in this {type(module).__name__} can be switched "
                "off: no method was applied, or only ones that train whole weights without keeping the base's. Use a "
                "method with a delta, such as LoRACallback."
            )
        adapted = Adapted(module)
        if adapted.record.together:
            raise PETError("DriftCallback compares one delta with the base; leave it out beside TasksCallback.")
        with adapted.disabled():
            pass  # refuses what cannot be switched off
        self._adapted = adapted

    def _wrap(self, module: pl.LightningModule, name: str, by: Callable[..., Any]) -> None:
        self._unwrap(name)
        original = getattr(module, name)

        def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return by(module, original, *args, **kwargs)

        self._undo[name] = private.replace_method(module, name, step)
        getattr(module, name).__wrapped__ = original  # Lightning reads the signature

    def _unwrap(self, name: str) -> None:
        self._undo.pop(name, lambda: None)()

    # --- within the steps ----------------------------------------------------------------------------

    def _measured(self, module: pl.LightningModule, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        index = kwargs.get("batch_idx", args[1] if len(args) > 1 else 0)
        if self.batches is not None and index >= self.batches:
            return original(*args, **kwargs)
        output, call = self._recorded(original, *args, **kwargs)
        with torch.no_grad():
            mean, count = self._compare(call, _batch_of(args, kwargs), "validation_step")
        assert self._sums is not None
        self._sums += torch.tensor([float(mean) * count, count], dtype=torch.float64)
        return output

    def _penalised(self, module: pl.LightningModule, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output, call = self._recorded(original, *args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return output  # no step is made of this batch
        mean, count = self._compare(call, _batch_of(args, kwargs), "training_step")
        module.log("train/drift", mean.detach(), batch_size=max(count, 1))
        total = loss + self.weight * mean.to(loss.dtype if loss.dtype.itemsize >= 4 else mean.dtype)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _recorded(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What a step returns, and what the root was first called with in it."""
        assert self._adapted is not None
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not calls and named.get("past_key_values") is None:  # a cache is not what it was, after the call
                calls.append((given, dict(named)))

        with self._adapted.root.register_forward_pre_hook(record, prepend=True, with_kwargs=True):
            output = step(*args, **kwargs)
        return output, calls[0] if calls else None

    def _compare(self, call: Any, batch: Any, step: str) -> tuple[Tensor, int]:
        """Mean divergence of the predictions of a call, and how many there are."""
        assert self._adapted is not None
        root = self._adapted.root
        if call is None:
            raise ArgumentError(
                f"DriftCallback: {step} has not called the adapted {type(root).__name__} itself, only parts of it, so "
                "its logits are unknown. Call the model as a whole, or leave the callback out."
            )
        args, kwargs = call
        with evaluating(root):
            with torch.no_grad(), self._adapted.disabled():
                base = _logits(root(*args, **kwargs), root)
            tuned = _logits(root(*args, **kwargs), root)
        if base.shape != tuned.shape:
            raise ArgumentError(
                f"DriftCallback: the base's logits have the shape {tuple(base.shape)}, the tuned model's "
                f"{tuple(tuned.shape)}: they predict other things, so nothing can be compared. Leave it out."
            )
        keep = _counted(root, tuned, kwargs, batch if isinstance(batch, Mapping) else {})
        kept, fixed = (tuned.flatten(0, -2), base.flatten(0, -2)) if keep is None else (tuned[keep], base[keep])
        return _divergence(kept, fixed) / max(len(kept), 1), len(kept)


def _batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("batch")


def _logits(output: Any, root: nn.Module) -> Tensor:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise ArgumentError(
            f"DriftCallback: the adapted {type(root).__name__} returns {type(output).__name__}, expected logits: a "
            "tensor (…, classes), an object with .logits, or a mapping with 'logits'."
        )
    return found


def _counted(root: nn.Module, logits: Tensor, call: Mapping[str, Any], batch: Mapping[Any, Any]) -> Tensor | None:
    """Which predictions count, in the shape of the logits without classes; ``None``: all."""
    shape = logits.shape[:-1]

    def given(name: str) -> Tensor | None:
        for source in (call, batch):
            if isinstance(value := source.get(name), Tensor) and value.shape == shape:
                return value.to(logits.device)
        return None

    seq2seq = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    labels = given("labels")
    if labels is not None and not labels.is_floating_point():
        keep = labels != IGNORED
        if not seq2seq and getattr(root, "loss_type", "") in (None, "ForCausalLM"):  # transformers' rule for labels
            keep = F.pad(keep[:, 1:], (0, 1))
        return keep
    mask = given("decoder_attention_mask" if seq2seq else "attention_mask")
    return None if mask is None else mask != 0


def _divergence(tuned: Tensor, base: Tensor) -> Tensor:
    """Sum of KL(base ‖ tuned) over rows of logits (rows, classes), in at least float32; differentiable in ``tuned``."""
    return cast(Tensor, _Divergence.apply(tuned, base))  # type: ignore[no-untyped-call]


class _Divergence(torch.autograd.Function):
    """Keeps the gradient, softmax(tuned) − softmax(base), and neither of the two."""

    @staticmethod
    def forward(ctx: Any, tuned: Tensor, base: Tensor) -> Tensor:
        dtype = tuned.dtype if tuned.dtype.itemsize >= 4 else torch.float32
        total = torch.zeros((), dtype=dtype, device=tuned.device)
        wanted = ctx.needs_input_grad[0]
        # Half precision has no room for small shares, before a scaler makes them larger.
        gradient = torch.empty_like(tuned, dtype=dtype if tuned.dtype == torch.float16 else None) if wanted else None
        size = max(_CHUNK // tuned.shape[-1], 1)
        for begin in range(0, len(tuned), size):
            part = slice(begin, begin + size)
            ours, theirs = (logits[part].to(dtype).log_softmax(-1) for logits in (tuned, base))
            share = theirs.exp()
            # What a mask has set to minus infinity in both is predicted by neither.
            total += torch.where(share > 0, share * (theirs - ours), 0).sum()
            if gradient is not None:
                gradient[part] = ours.exp() - share
        ctx.gradient, ctx.dtype = gradient, tuned.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (ctx.gradient.to(gradients[0].dtype) * gradients[0]).to(ctx.dtype), None
