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
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return inputs | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})


def output_of(model: nn.Module) -> Tensor:
    inner: Any = getattr(model, "base_model", model)
    inner = getattr(inner, "model", inner) if hasattr(model, "peft_config") else model
    with torch.no_grad():
        out = model(**inputs_of(inner))
    return out if isinstance(out, Tensor) else out.logits
