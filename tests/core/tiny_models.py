"""Tiny models for the tests of the structure probe."""

import functools

import torch
from torch import nn


@functools.cache
def _config(name: str, **sizes):
    from transformers import AutoConfig

    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 99,
        "pad_token_id": 0,
    }
    own = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99},
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
        "bart": {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": 99,
        },
        "vit": {
            **{k: v for k, v in common.items() if k not in ("vocab_size", "pad_token_id")},
            "image_size": 32,
            "patch_size": 8,
        },
        "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "vocab_size": 99},
        "albert": {**common, "embedding_size": 16},
    }
    grouped = {"num_key_value_heads": 2} if name in ("llama", "mistral", "mixtral", "phi3", "gpt_oss") else {}
    if name == "gpt_oss":
        grouped |= {"head_dim": 8, "num_local_experts": 4}
    return AutoConfig.for_model(name, **{**own.get(name, common), **grouped, **sizes})


def hf(name: str, kind: str = "AutoModel", attention: str | None = None, **sizes) -> nn.Module:
    """A tiny Hugging Face model with random weights."""
    import transformers

    torch.manual_seed(0)
    chosen = {} if attention is None else {"attn_implementation": attention}
    return getattr(transformers, kind).from_config(_config(name, **sizes), **chosen)


def ids(rows: int = 1, length: int = 8) -> torch.Tensor:
    """Token ids without special ones."""
    return torch.arange(10, 10 + rows * length).reshape(rows, length) % 90 + 5
