"""Every transformers architecture, tiny: default configurations shrunk to two layers of width 32, random weights.

For benchmarks that ask how many architectures something works on.
"""

import contextlib
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.probe.trace import candidate_forwards

SECONDS = 90

# (pattern of a configuration attribute, value). The first match wins.
SHRINK: tuple[tuple[str, int], ...] = (
    (r"(vocab_size|vocabulary_size)$", 120),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts)$", 2),
    (r"(n_routed_experts|num_local_experts|num_experts|moe_num_experts|n_experts)$", 4),
    (r"(n_group|topk_group|n_groups|num_groups)$", 1),
    (r"(q_lora_rank|kv_lora_rank)$", 16),
    (r"(qk_rope_head_dim|qk_nope_head_dim|v_head_dim|head_dim|d_kv|attention_head_dim|kv_channels|qk_head_dim)$", 8),
    (r"(rotary_dim|d_head)$", 8),
    (r"(num_key_value_heads|num_kv_heads|multi_query_group_num|n_head_kv)$", 2),
    (r"(head|heads|n_head|num_attention_heads|num_heads)$", 4),
    (r"(num_(hidden_)?layers|n_layers?|num_(en|de)coder_layers|(en|de)coder_layers|depth|num_blocks)$", 2),
    (r"(num_.*_layers|.*_depth|n_.*layers)$", 2),
    (r"(intermediate_size|ffn_dim|d_ff|n_inner|(en|de)coder_ffn_dim|ffn_hidden_size|mlp_dim)$", 48),
    (r"(.*_intermediate_size|.*feedforward_dim|dim_feedforward|hidden_dim|d_inner|hidden_mlp_dim)$", 48),
    (r"(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|emb_dim|d_embed|projection_dim)$", 32),
    (r"(word_embed_proj_dim|.*_hidden_size|.*_hidden_dim|encoder_width|hidden_channels|width)$", 32),
    (r"(image_size|img_size|input_size)$", 32),
    (r"patch_size$", 8),
    (r"(max_position_embeddings|max_source_positions|max_target_positions|n_positions|n_ctx|max_seq_len)$", 64),
)
LAYERS = r"(num_(hidden_)?layers|n_layers?|num_(en|de)coder_layers|(en|de)coder_layers)$"
# Configurations whose sizes depend on each other need another choice: tried in this order until a forward runs.
CHOICES: tuple[dict[str, int | None], ...] = (
    {},
    {r"num_key_value_heads$": 4},
    {r"(head_dim|num_key_value_heads|num_kv_heads)$": None, r"(hidden_size|d_model|n_embd)$": 64},
    {r"(hidden_size|d_model|embed_dim|.*_hidden_size|dim|projection_dim)$": None, r"(image_size|patch_size)$": None},
    {LAYERS: None},
    {"layers only": 0},
)
DEEP: dict[str, int | None] = {LAYERS: 8}
LARGEST = 60_000_000


def running(
    name: str, result: dict[str, Any], choices: Sequence[dict[str, int | None]]
) -> tuple[nn.Module, Callable[[], Any]]:
    """The first choice of sizes whose model builds and runs, and its forward."""
    result["status"], first = "does not build", None
    for choice in choices:
        try:
            model = build(name, choice)
            if result["status"] == "does not build":
                result["status"], first = "does not run", None
            forward = working_forward(model)
        except TimeoutError:
            raise
        except Exception as error:
            first = first or error
        else:
            result["status"] = "probe failed"
            return model, forward
    raise first or RuntimeError("no choice of sizes")


def build(name: str, choice: dict[str, int | None]) -> nn.Module:
    """The architecture with a shrunk default configuration and random weights."""
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = shrink(CONFIG_MAPPING[name], choice)
    with contextlib.suppress(Exception):
        config._attn_implementation = "eager"
    with torch.device("meta"), contextlib.suppress(NotImplementedError, RuntimeError):
        size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size:,} parameters are too many for this benchmark")
    model = AutoModel.from_config(config)
    model.eval()
    return model


def shrink(config_class: type, choice: dict[str, int | None]) -> Any:
    """An instance of the configuration with small sizes, also in nested configurations."""
    default = config_class()
    values: dict[str, Any] = {}
    nested_names = getattr(config_class, "sub_configs", {})
    for key, value in default.to_dict().items():
        if key not in nested_names and not key.startswith("_") and type(value) is int:
            small = smaller(key, value, choice)
            if small is not None:
                values[key] = small
    for key in nested_names:
        nested = getattr(default, key, None)
        if nested is not None and hasattr(nested, "to_dict"):
            values[key] = shrink(type(nested), choice)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        value = getattr(default, key, None)
        if isinstance(value, int) and value >= 120:
            values[key] = 1
    return config_class(**values)


def smaller(key: str, value: int, choice: dict[str, int | None]) -> int | None:
    """The small value of one attribute, ``None`` to keep the default."""
    if "layers only" in choice:
        return min(value, 2) if re.search(LAYERS, key) else None
    for pattern, size in (*choice.items(), *SHRINK):
        if re.match(pattern, key) or re.search(rf"_{pattern}", key):
            return None if size is None else size if pattern in choice else min(value, size)
    return None


def working_forward(model: nn.Module) -> Any:
    """The first forward that runs."""
    errors = []
    for forward in candidate_forwards(model):
        try:
            with torch.no_grad():
                forward()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error)[:150]}")
        else:
            return forward
    raise TargetError(errors[0] if errors else "no inputs are known for it")


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise ``TimeoutError`` in the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
