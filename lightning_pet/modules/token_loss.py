"""Cross-entropy of trained tokens only: the logits of a batch are never whole in memory.

Answers are often less than half of a batch, so the output layer gets the positions that are trained and no others; the
model itself does whatever it does behind that layer. Where even these logits would be large, they are made in chunks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_pet.model.tokens import IGNORED

MAX_LOGITS: Final = 1 << 28
"""Logits above which they are made in chunks: one GiB in float32."""
CHUNK_LOGITS: Final = 1 << 25


@dataclass(frozen=True)
class TokenLoss:
    """Losses of the trained tokens of a batch.

    Attributes:
        total: sum of their negative log-likelihoods, float32, with a gradient.
        tokens: their number.
        right: how many of them were the likeliest; not counted where the logits are made in chunks in training.
    """

    total: Tensor
    tokens: int
    right: Tensor | None

    @property
    def mean(self) -> Tensor:
        """Loss per trained token."""
        return self.total / max(self.tokens, 1)


def token_loss(model: nn.Module, batch: Mapping[str, Tensor], max_logits: int = MAX_LOGITS) -> TokenLoss:
    """Run a causal language model, and sum its losses over the trained tokens.

    Args:
        model: of transformers, with or without deltas.
        batch: ``input_ids``, ``labels`` (-100 where a token is not trained), and what else the model takes.
        max_logits: logits above which they are made in chunks; those of a chunk are made again in the backward pass
            where the output layer is trained.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1)).eval()
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, -100, 3]])}
        >>> bool(torch.isclose(token_loss(model, batch).mean, model(**batch).loss))
        True
    """
    found = _run(model, batch, max_logits)
    if isinstance(found.source, Tensor):
        return _whole(found.source, found.targets)
    return _in_chunks(found.source, found.head, found.hidden, found.targets)


def row_log_probs(model: nn.Module, batch: Mapping[str, Tensor], max_logits: int = MAX_LOGITS) -> tuple[Tensor, Tensor]:
    """Run a causal language model, and sum the log-probabilities of the trained tokens of each row.

    Args:
        model: of transformers, with or without deltas.
        batch: as for :func:`token_loss`.
        max_logits: as there.

    Returns:
        Sums, (rows,), float32 with a gradient; and how many tokens each has, (rows,).
    """
    found = _run(model, batch, max_logits)

    def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(logits.float(), targets, reduction="none")

    source = found.source
    if isinstance(source, Tensor):
        each = log_probs(source, found.targets)
    else:
        make = source

        def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
            return log_probs(make(hidden), targets)

        pairs = zip(*_split(found.head, found.hidden, found.targets), strict=True)
        each = torch.cat([cast(Tensor, checkpoint(chunk, *pair, use_reentrant=False)) for pair in pairs])
    trained = batch["labels"][:, 1:] != IGNORED
    rows = trained.nonzero()[:, 0]
    return each.new_zeros(len(trained)).index_add(0, rows, each), trained.sum(1)


@dataclass(frozen=True)
class _Run:
    """The logits of trained tokens, or what makes them of the hidden states before the output layer."""

    source: Tensor | Callable[[Tensor], Tensor]
    targets: Tensor
    head: nn.Module
    hidden: Tensor


def _run(model: nn.Module, batch: Mapping[str, Tensor], max_logits: int) -> _Run:
    given = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    trained = labels != IGNORED
    targets = labels[trained]
    head = cast(Callable[[], nn.Module | None], model.get_output_embeddings)()
    if head is None:
        logits = model(**given, use_cache=False).logits[:, :-1][trained]
        return _Run(logits, targets, model, logits)
    chunked = len(targets) * int(getattr(head, "out_features", 1)) > max_logits
    select = _Select(trained, chunked)
    with head.register_forward_pre_hook(select, with_kwargs=True):
        logits = model(**given, use_cache=False).logits
    if not select.done:
        return _Run(logits[:, :-1][trained], targets, head, logits)
    if not chunked:
        return _Run(logits.flatten(0, -2), targets, head, select.hidden)
    after = _behind(model, head, select.hidden[:1], logits.flatten(0, -2))
    return _Run(lambda hidden: after(head(hidden)), targets, head, select.hidden)


class _Select:
    """Gives the output layer the hidden states of trained positions only; of a chunked loss only the first of them."""

    def __init__(self, trained: Tensor, first: bool) -> None:
        self.trained, self.first = trained, first
        self.done = False
        self.hidden = torch.empty(0)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else None
        if self.done or not isinstance(hidden, Tensor) or hidden.dim() != 3:
            return None
        if hidden.shape[:2] != (self.trained.shape[0], self.trained.shape[1] + 1):
            return None  # virtual tokens stand before those of the batch, and are cut off behind the layer
        self.done = True
        self.hidden = hidden[:, :-1][self.trained]
        shown = self.hidden[:1] if self.first else self.hidden
        return (shown.unsqueeze(0), *args[1:]), kwargs


def _whole(logits: Tensor, targets: Tensor) -> TokenLoss:
    right = (logits.detach().argmax(-1) == targets).sum()
    return TokenLoss(F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets), right)


def _behind(model: nn.Module, head: nn.Module, hidden: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """What the model does to logits behind its output layer, found by the logits of one position.

    Raises:
        ValueError: it is nothing that is known.
    """
    config = getattr(model, "config", None)
    cap = getattr(config, "final_logit_softcapping", None) or 1.0
    scales = [getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling")]
    with torch.no_grad():
        raw = head(hidden)
        ways: list[Callable[[Tensor], Tensor]] = [
            lambda found: found,
            lambda found: torch.tanh(found / cap) * cap,
            lambda found: found * scales[0],
            lambda found: found / scales[1],
        ]
        for way in ways:
            if torch.allclose(way(raw).float(), logits.float(), rtol=1e-3, atol=1e-4):
                return way
    raise ValueError(
        f"{type(model).__name__} changes its logits behind the output layer in an unknown way, so they cannot "
        "be made in chunks. Use smaller batches, so that the logits of the trained tokens fit whole."
    )


def _in_chunks(logits: Callable[[Tensor], Tensor], head: nn.Module, hidden: Tensor, targets: Tensor) -> TokenLoss:
    def loss(part: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits(part).float(), target, reduction="sum")

    parts = list(zip(*_split(head, hidden, targets), strict=True))
    if not torch.is_grad_enabled():
        found = [_whole(logits(part), target) for part, target in parts]
        right = torch.stack([cast(Tensor, part.right) for part in found]).sum()
        return TokenLoss(torch.stack([part.total for part in found]).sum(), len(targets), right)
    if any(parameter.requires_grad for parameter in head.parameters()):
        losses = [cast(Tensor, checkpoint(loss, part, target, use_reentrant=False)) for part, target in parts]
    else:
        losses = [cast(Tensor, _AtOnce.apply(loss, part, target)) for part, target in parts]  # type: ignore[no-untyped-call]
    return TokenLoss(torch.stack(losses).sum(), len(targets), None)


def _split(head: nn.Module, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    size = max(CHUNK_LOGITS // int(getattr(head, "out_features", 1)), 1)
    return [torch.split(tensor, size) for tensor in tensors]


class _AtOnce(torch.autograd.Function):
    """The gradient of a loss in its forward pass: logits through a frozen layer are made once, and not kept."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, target: Tensor) -> Tensor:
        """The loss; its gradient to ``hidden`` is kept."""
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            value = loss(leaf, target)
            (ctx.gradient,) = torch.autograd.grad(value, leaf)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The kept gradient, times the one that comes in."""
        return None, ctx.gradient * gradients[0], None
