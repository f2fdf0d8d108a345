"""Activations of a decoder by a formula: for a quick estimate, and where a training step cannot be rehearsed."""

from typing import Any

from torch import nn

_LOGIT = 12  # bytes: float32 logits, their log-softmax and their gradient


def activations_of_decoder(
    tokens: int,
    layers: int,
    width: int,
    inner: int,
    vocabulary: int = 0,
    *,
    itemsize: int = 2,
    checkpointing: bool = False,
) -> int:
    """Bytes that forward and backward of a decoder keep at the worst moment, with fused attention.

    A layer keeps for each token about eight numbers per unit of width (inputs and outputs of its norms, queries,
    attention's output) and three per unit of the feed-forward's inner width; with checkpointing only its input. The
    loss takes 12 bytes per logit.

    Args:
        tokens: of all sequences of a process's batch.
        layers: number of layers.
        width: hidden size.
        inner: width of the feed-forward block.
        vocabulary: number of classes of the output; 0 without one.
        itemsize: bytes of a number: 2 in 16 bits, 4 in float32.
        checkpointing: whether layers are computed again in the backward.

    >>> activations_of_decoder(4096, 32, 4096, 14336, 128256, checkpointing=True) / 2**30  # Llama 8B
    6.87109375
    """
    layer = itemsize * tokens * (8 * width + 3 * inner)
    logits = _LOGIT * tokens * vocabulary
    if checkpointing:
        return itemsize * tokens * width * layers + max(layer, logits)
    return layer * layers + logits


def estimate(root: nn.Module, tokens: int) -> int | None:
    """The formula for a transformers model, by its configuration; ``None`` if that does not tell what is needed."""
    config: Any = getattr(root, "config", None)
    config = getattr(config, "text_config", None) or config
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    layers, width, inner, vocabulary = (getattr(config, name, None) for name in names)
    if not (isinstance(layers, int) and isinstance(width, int) and isinstance(inner, int)):
        return None
    getter = getattr(root, "get_output_embeddings", None)
    predicts = getter is not None and getter() is not None
    itemsize = next((p.itemsize for p in root.parameters() if p.is_floating_point()), 4)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in root.modules())
    return activations_of_decoder(
        tokens,
        layers,
        width,
        inner,
        vocabulary if predicts and isinstance(vocabulary, int) else 0,
        itemsize=itemsize,
        checkpointing=checkpointing,
    )
