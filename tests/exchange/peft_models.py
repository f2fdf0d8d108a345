"""Small models of several kinds, and what to call them with, for the exchange with HF PEFT."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(5))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
    )
    return transformers.LlamaForCausalLM(config)


def tied() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        num_local_experts=3,
    )
    return transformers.MixtralForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=32, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=3,
    )
    return transformers.RobertaForSequenceClassification(config)


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


class Stack(nn.Module):
    """Two matrices in one parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.zeros(2, width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x.unsqueeze(-3) @ self.both.transpose(-1, -2)).sum(-3)
        return out


class Free(nn.Module):
    """A matrix of no layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x @ self.matrix
        return out


class Plain(nn.Module):
    """One layer of every kind, of plain torch."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(64, width)
        self.turned = transformers.pytorch_utils.Conv1D(width, width)
        self.line = nn.Conv1d(width, width, 3, padding=1)
        self.image = nn.Conv2d(width, width, (3, 1), padding=(1, 0))
        self.grouped = nn.Conv2d(width, width, (3, 1), padding=(1, 0), groups=2)
        self.volume = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.stack, self.free = Stack(width), Free(width)
        self.linear, self.norm, self.head = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.turned(x)
        x = x + self.line(x.mT).mT
        for layer in (self.image, self.grouped):
            x = x + layer(x.mT[..., None])[..., 0].mT
        x = x + self.volume(x.mT[..., None, None])[..., 0, 0].mT
        x = x + self.attention(x, x, x)[0]
        x = x + self.stack(x) + self.free(x)
        out: Tensor = self.head(self.norm(x + self.linear(x).tanh()))
        return out


class Convolutions(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3)
        self.second = nn.Conv2d(4, 6, 3, groups=groups)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.second(self.first(x).relu()).mean((-1, -2)))
        return out


class Kernels(nn.Module):
    """Convolutions of one and two dimensions, with kernels of several places and of one."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.point = nn.Conv1d(4, 12, 3), nn.Conv1d(12, 8, 1)
        self.plane, self.spot = nn.Conv2d(4, 12, 3), nn.Conv2d(12, 8, 1)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        line = self.point(self.line(x.flatten(2)).relu()).mean(-1)
        out: Tensor = self.linear(line + self.spot(self.plane(x).relu()).mean((-1, -2)))
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.attention(x, x, x)[0])
        return out


def made(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with values of a size at which differences show."""
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.5, std=0.2)
    return model


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    generator, dtype = torch.Generator().manual_seed(6), next(model.parameters()).dtype
    if isinstance(model, Convolutions | Kernels):
        return {"x": torch.randn(2, 4, 8, 8, generator=generator, dtype=dtype)}
    if isinstance(model, Attention):
        return {"x": torch.randn(2, 5, 8, generator=generator, dtype=dtype)}
    if isinstance(model, Plain):
        return {"ids": IDS}
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator, dtype=dtype)}
    if model.config.model_type == "whisper":
        return {
            "input_features": torch.randn(2, 8, 24, generator=generator, dtype=dtype),
            "decoder_input_ids": IDS,
        }
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return inputs | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})


def output_of(model: nn.Module) -> Tensor:
    inner: Any = getattr(model, "base_model", model)
    inner = getattr(inner, "model", inner) if hasattr(model, "peft_config") else model
    with torch.no_grad():
        out = model(**inputs_of(inner))
    return out if isinstance(out, Tensor) else out.logits
