"""Token ids that new rows start from: given words, class labels, or a sample of the vocabulary."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from lightning_pet.errors import ArgumentError

COMMON = 5000
"""Vocabularies list their tokens by frequency, or in the order of merges, which is nearly the same."""


def load_tokenizer(name: str | None, purpose: str) -> Any:
    """The tokenizer of a name or folder.

    Args:
        name: what ``transformers.AutoTokenizer`` takes, or ``"bytes"`` for UTF-8 bytes (ByT5).
        purpose: the option that needs it, for the message.

    Raises:
        ArgumentError: if no name is given, or none of that name can be loaded.
    """
    if name is None:
        raise ArgumentError(f"{purpose} needs a tokenizer: pass tokenizer='…', the model's name or folder.")
    from transformers import AutoTokenizer, ByT5Tokenizer

    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"tokenizer={name!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens.

    Raises:
        ArgumentError: if nothing is left of the text.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ArgumentError(f"{text!r} has no tokens.")
    return ids


def sampled_ids(length: int, vocabulary: int, special: Sequence[int] = ()) -> list[list[int]]:
    """Different common tokens at random, from torch's generator.

    Raises:
        ArgumentError: if the vocabulary has fewer tokens.
    """
    left_out = set(special)
    allowed = [token for token in range(vocabulary) if token not in left_out][:COMMON]
    if length > len(allowed):
        raise ArgumentError(
            f"length={length}: the vocabulary has only {len(allowed)} rows to start from; lower length, or use "
            "init='random'."
        )
    order = torch.randperm(len(allowed))[:length].tolist()
    return [[allowed[index]] for index in order]


def control_ids(tokenizer: Any, vocabulary: int) -> list[int]:
    """Ids of tokens that are no text: special ones, and all in brackets, such as ``[unused7]`` or ``<0x0A>``."""
    tokens = tokenizer.convert_ids_to_tokens(range(min(vocabulary, len(tokenizer))))
    bracketed = [index for index, token in enumerate(tokens) if re.fullmatch(r"\[.+\]|<.+>", str(token))]
    return [*tokenizer.all_special_ids, *bracketed]


def special_ids(config: Any) -> list[int]:
    """Ids that a model's configuration names as special (padding, begin, end, …)."""
    found: list[int] = []
    for name, value in vars(config).items() if config is not None else ():
        if name.endswith("_token_id"):
            found += [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
    return found
