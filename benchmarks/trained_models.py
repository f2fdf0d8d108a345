"""The models that the benchmarks train, with random weights, and a batch for each.

Without dropout of their own, so that all variants compute the same; the base models without heads, whose loss is the
mean square of their last hidden state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Built = tuple[nn.Module, Batch]


def _ids(rows: int, tokens: int) -> Batch:
    return {"input_ids": torch.randint(1000, (rows, tokens))}


def bert(width: int = 384, layers: int = 6, rows: int = 32, tokens: int = 48) -> Built:
    """An encoder of text."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    batch = _ids(rows, tokens)
    return BertModel(config, add_pooling_layer=False), batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def llama(width: int = 512, layers: int = 6, rows: int = 4, tokens: int = 128) -> Built:
    """A decoder of text."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 if width > 64 else 4,
        num_key_value_heads=width // 64 if width > 64 else 4,
        intermediate_size=43 * width // 16,
        pad_token_id=0,
        use_cache=False,
    )
    return LlamaModel(config), _ids(rows, tokens)


def t5(width: int = 384, layers: int = 3, rows: int = 16, tokens: int = 48) -> Built:
    """An encoder and a decoder of text."""
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=1000,
        d_model=width,
        d_kv=32,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=width // 32,
        dropout_rate=0.0,
        use_cache=False,
    )
    batch = _ids(rows, tokens)
    return T5Model(config), batch | {"decoder_input_ids": batch["input_ids"].flip(0)}


def vit(width: int = 384, layers: int = 6, rows: int = 8, patches: int = 14) -> Built:
    """An encoder of pictures; one token more than patches."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        image_size=8 * patches,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(rows, 3, 8 * patches, 8 * patches)}


def checkpointed(built: Built) -> Built:
    """With gradient checkpointing on."""
    built[0].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return built


MODELS: dict[str, Callable[[], Built]] = {
    "BERT 6×384": bert,
    "Llama 6×512": llama,
    "width 64": lambda: llama(64, 4, 4, 16),
    "BERT 2×128, 8×16": lambda: bert(128, 2, 8, 16),
    "Llama 6×512, 2×128": lambda: llama(rows=2),
    "Llama 6×512, 1×32": lambda: llama(rows=1, tokens=32),
    "ViT 6×384, 8×197": vit,
    "T5 3+3×384": t5,
    "Llama 6×512, checkpointing": lambda: checkpointed(llama()),
    "Llama 6×512, bf16": lambda: (llama()[0].bfloat16(), _ids(4, 128)),
}
SHORT: dict[str, Callable[[], Built]] = {
    "BERT": lambda: bert(64, 2, 2, 8),
    "Llama": lambda: llama(64, 2, 2, 8),
    "width": lambda: llama(64, 2, 2, 8),
    "ViT": lambda: vit(32, 2, 2, 2),
    "T5": lambda: t5(32, 1, 2, 8),
}


def build(name: str, short: bool = False) -> Built:
    """A model by its name, the same at every call; ``short`` builds a tiny one of its kind."""
    torch.manual_seed(0)
    if not short:
        return MODELS[name]()
    made = SHORT[name.partition(" ")[0]]()
    if "checkpointing" in name:
        checkpointed(made)
    return (made[0].bfloat16(), made[1]) if "bf16" in name else made


def linears(model: nn.Module, targets: str) -> list[str]:
    """Paths of the linear layers that are meant: all of them, or queries and values."""
    ends = {"q,v": ("query", "value", "q_proj", "v_proj", ".q", ".v"), "all": ("",)}[targets]
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(ends)]


def embeddings(model: nn.Module) -> list[nn.Module]:
    """From whose outputs on there are gradients, in every variant but full fine-tuning."""
    found = [m for m in model.modules() if type(m).__name__ in ("BertEmbeddings", "ViTEmbeddings")]
    return found or [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == 1000]


def with_gradients(model: nn.Module) -> nn.Module:
    """The same model, whose gradients flow down to the embeddings' output."""

    def let_flow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()

    for module in embeddings(model):
        module.register_forward_hook(let_flow)
    return model


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean square of the last hidden state."""
    loss: Tensor = model(**batch).last_hidden_state.float().square().mean()
    return loss
