"""A small chat model of dates, trained on the spot in about a minute: the base of the offline chat task.

A user writes a date, the assistant answers in ISO 8601. As with :mod:`lightning_pet.modules.date_model`, the base has
met ``3/4/2021`` in both orders, so only a delta can know which one is meant.
"""

import hashlib
import json
import string
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.model.tokens import IGNORED
from lightning_pet.modules.cache import cached_folder
from lightning_pet.modules.date_model import DateKind, draw_days, save_trained, train_on, write_date
from lightning_pet.modules.token_loss import token_loss

PAD, USER, ASSISTANT, SYSTEM, END, UNKNOWN = "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|unk|>"

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_CONFIG: dict[str, Any] = {
    "vocab_size": 101,  # printable characters, and six special tokens
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
_RECIPE: dict[str, Any] = {"version": 1, "steps": 500, "batch": 64, "lr": 4e-3, "seed": 0}


def date_chat_folder() -> Path:
    """Folder of the trained model and its tokenizer; trains it when the cache does not have it."""
    recipe = json.dumps([_CONFIG, _RECIPE, TEMPLATE], sort_keys=True)
    with torch.device("cpu"):  # a caller may be building on the meta device, and this trains
        return cached_folder(f"date-chat-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}", _build)


def character_tokenizer() -> Any:
    """A tokenizer with one token for each printable ASCII character, and a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, UNKNOWN, USER, ASSISTANT, SYSTEM, END]
    characters = [chr(code) for code in range(32, 127)]
    assert set(characters) <= set(string.printable)
    vocabulary = {token: place for place, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=END, padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": [USER, ASSISTANT, SYSTEM]})
    fast.chat_template = TEMPLATE
    return fast


def _build(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = character_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RECIPE["seed"])
        model = LlamaForCausalLM(LlamaConfig(**_CONFIG, **ends))
    save_trained(folder, model, tokenizer, lambda: _pretrain(model, tokenizer))


def _batches(tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    random = Random(_RECIPE["seed"])
    days = draw_days(random, held_out=False)
    kinds: list[DateKind] = ["long", "long", "long", "us", "eu"]
    for _ in range(_RECIPE["steps"]):
        rows = []
        for _ in range(_RECIPE["batch"]):
            day = next(days)
            asked = tokenizer(f"{USER}{write_date(day, random.choice(kinds), random)}{END}{ASSISTANT}")["input_ids"]
            rows.append((asked, tokenizer(f"{day.isoformat()}{END}")["input_ids"]))
        width = max(len(asked) + len(answer) for asked, answer in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        for row, (asked, answer) in enumerate(rows):
            end = len(asked) + len(answer)
            ids[row, :end] = torch.tensor([*asked, *answer])
            labels[row, len(asked) : end] = torch.tensor(answer)
        yield {"input_ids": ids, "labels": labels}


def _pretrain(model: nn.Module, tokenizer: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RECIPE["lr"], betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RECIPE["lr"], total_steps=_RECIPE["steps"] + 5)
    title, steps = "Training the date chat (once)", _RECIPE["steps"]
    train_on(_batches(tokenizer), model, lambda batch: token_loss(model, batch).mean, optimizer, schedule, title, steps)
