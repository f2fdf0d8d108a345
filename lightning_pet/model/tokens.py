"""Token ids that new rows start from: given words, class labels, or a sample of the vocabulary."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from lightning_pet.errors import ArgumentError

IGNORED = -100
"""Label of a position without a target, as transformers and torch's cross-entropy have it."""

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


def common_ids(length: int, vocabulary: int, config: Any, tokenizer: Any = None) -> tuple[list[int], bool]:
    """Different common tokens of a model at random, none of them special or unused.

    Args:
        length: how many.
        vocabulary: rows of the model's table.
        config: the model's configuration; what it names as special is left out.
        tokenizer: tells which others are no text; ``None``: the one that lies beside the model's weights, if any.

    Returns:
        The ids, and whether a tokenizer was asked.

    Raises:
        ArgumentError: if there are fewer such tokens.
    """
    tokenizer = _tokenizer_beside(config) if tokenizer is None else tokenizer
    left_out = special_ids(config) + ([] if tokenizer is None else control_ids(tokenizer, vocabulary))
    return [row[0] for row in sampled_ids(length, vocabulary, left_out)], tokenizer is not None


def _tokenizer_beside(config: Any) -> Any | None:
    """The tokenizer of the folder, or the place in the local cache, that a model was loaded from; no hub is asked."""
    name = getattr(config, "name_or_path", None)
    if not name:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):  # none there, or one of a kind that is not known
        return None


def unknown_rows(vocabulary: int) -> str:
    """What to warn of where no tokenizer was asked."""
    return (
        f"init='vocabulary': no tokenizer tells which of the model's {vocabulary} rows are text, so special or unused "
        "ones may be among those that the new rows start from. Pass tokenizer='…', the model's name or folder."
    )


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
