"""Small models of every kind that a method must work on, with an input for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def _on(value: Any, **kwargs: Any) -> Callable[[nn.Module], Tensor]:
    """A forward on a fixed input, cast to the model's floating dtype, returning one tensor."""

    def run(model: nn.Module) -> Tensor:
        parameter = next(model.parameters())

        def fit(item: Any) -> Any:
            if isinstance(item, Tensor):
                item = item.to(parameter.device)
                return item.to(parameter.dtype) if item.is_floating_point() else item
            return item

        out = model(*[fit(v) for v in value], **{k: fit(v) for k, v in kwargs.items()})
        return first_tensor(out)

    return run


def first_tensor(out: Any) -> Tensor:
    """Logits or the first tensor of any output."""
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "logits"):
        return out.logits
    return first_tensor(next(iter(out.values())) if isinstance(out, dict) else out[0])


def mlp() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = _seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    return model, _on((torch.randn(5, 6, generator=torch.Generator().manual_seed(1)),))


class Embedder(nn.Module):
    """Embedding, mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6, padding_idx=0)
        self.out = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids).mean(1))


def embedding() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return _seeded(Embedder), _on((torch.tensor([[1, 2, 3, 3], [4, 11, 0, 1]]),))


class Recurrent(nn.Module):
    """LSTM, last state, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


def lstm() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return _seeded(Recurrent), _on((torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1)),))


def conv1d() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = _seeded(lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, stride=2), nn.Tanh(), nn.Conv1d(6, 4, 1)))
    return model, _on((torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1)),))


def conv2d() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, dilation=1, stride=2), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.Flatten()
        )

    return _seeded(build), _on((torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)),))


def conv3d() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv3d(2, 6, (1, 3, 2), padding=(0, 1, 0), stride=(1, 2, 1)), nn.Tanh(), nn.Flatten())

    return _seeded(build), _on((torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1)),))


class Turned(nn.Module):
    """A linear layer of its own class, whose weight is [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.4)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Gated(Turned):
    """One whose product is no plain one."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (self.weight * 2)).tanh() * x.mean(-1, keepdim=True)


class StandardisedConv(nn.Conv2d):
    """A convolution with its weight standardised in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Positions(nn.Embedding):
    """A table that is asked for positions, two places further on."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.arange(ids.shape[1], device=ids.device) + 2).expand(*ids.shape, -1)


class Own(nn.Module):
    """Layers of their own classes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(12, 6), Positions(9, 6)
        self.turned, self.gated = Turned(6, 6), Gated(6, 6)
        self.conv = StandardisedConv(1, 3, 2, groups=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions(ids)
        return self.conv((x + self.gated(self.turned(x))).unsqueeze(1))


def own() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return _seeded(Own), _on((torch.tensor([[1, 2, 3, 3], [4, 11, 0, 1]]),))


class Kernels(nn.Module):
    """Weights of a convolution, a table and a layer deeper inside that are read and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, groups=2)
        self.table = nn.Embedding(5, 4)
        self.inner = nn.ModuleDict({"down": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.conv1d(x, self.conv.weight, self.conv.bias, groups=2).mT.contiguous()
        scores = nn.functional.linear(x, self.table.weight)
        return scores, nn.functional.linear(x, self.inner["down"].weight, self.inner["down"].bias)


class Reading(nn.Module):
    """A layer whose parts are read by what is around them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = Kernels()

    def forward(self, x: Tensor) -> Tensor:
        scores, features = self.kernels(x)
        return torch.cat([scores, features], -1)


def reading() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return _seeded(Reading), _on((torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)),))


def transformer_encoder() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    generator = torch.Generator().manual_seed(1)
    return _seeded(build), _on((torch.randn(3, 5, 16, generator=generator),))


def _ids(rows: int = 2, length: int = 6, vocabulary: int = 50) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def bert() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
        initializer_range=0.2,
    )
    return _seeded(lambda: BertForSequenceClassification(config)), _on((), input_ids=_ids())


def gpt2() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    return _seeded(lambda: GPT2LMHeadModel(config)), _on((), input_ids=_ids(), use_cache=False)


def llama() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(lambda: LlamaForCausalLM(config)), _on((), input_ids=_ids(), use_cache=False)


def t5() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    run = _on((), input_ids=_ids(), decoder_input_ids=_ids(2, 4), use_cache=False)
    return _seeded(lambda: T5ForConditionalGeneration(config)), run


def gemma2() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        sliding_window=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(lambda: Gemma2ForCausalLM(config)), _on((), input_ids=_ids(), use_cache=False)


def bart() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    run = _on((), input_ids=_ids(), decoder_input_ids=_ids(2, 4), use_cache=False)
    return _seeded(lambda: BartForConditionalGeneration(config)), run


def mixtral() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=3,
        bos_token_id=1,
        eos_token_id=2,
    )
    forward = _on((), input_ids=_ids(), use_cache=False)

    def run(model: nn.Module) -> Tensor:
        # torch's grouped product has no float64 kernel; the loop over experts does not compile in one graph
        double = next(model.parameters()).dtype == torch.float64
        model.config._experts_implementation = "eager" if double else "grouped_mm"
        return forward(model)

    return _seeded(lambda: MixtralForCausalLM(config)), run


def vit() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return _seeded(lambda: ViTForImageClassification(config)), _on((), pixel_values=pixels)


def whisper() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=60,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    features = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    run = _on((), input_features=features, decoder_input_ids=_ids(2, 4), use_cache=False)
    return _seeded(lambda: WhisperForConditionalGeneration(config)), run


def bloom() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return _seeded(lambda: BloomForCausalLM(config)), _on((), input_ids=_ids(), use_cache=False)


class _Scale(nn.Module):
    """LayerScale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _FusedAttention(nn.Module):
    """Self-attention with one projection for q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(rows, length, width))


class ScaledBlock(nn.Module):
    """A vision block as in timm: norms in front, LayerScale behind."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _FusedAttention(width, heads)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ScaledBlocks(nn.Module):
    """Patches, blocks, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.ModuleList([ScaledBlock(), ScaledBlock()])
        self.norm = nn.LayerNorm(16)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def scaled_blocks() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return _seeded(ScaledBlocks), _on((pixels,))
