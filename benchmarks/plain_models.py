"""Modules of plain torch for the census: torch's own transformers, a vision block, recurrent and convolutional nets."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, Callable[[], Any]]


def _bound(model: nn.Module, *inputs: Tensor) -> Built:
    return model, lambda: model(*inputs)


def encoder_train() -> Built:
    """nn.TransformerEncoder in training mode (without dropout)."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), 2)
    return _bound(model.train(), torch.randn(3, 5, 16))


def encoder_fast_path() -> Built:
    """nn.TransformerEncoder in evaluation mode with padding: torch's fused operator and nested tensors."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    # What stands at padded places is nobody's business: zero from the fused operator, anything without it.
    return model, lambda: model(x, src_key_padding_mask=padding)[~padding]


def encoder_pre_norm() -> Built:
    """The same with the norm first."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=True)
    return _bound(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(3, 5, 16))


def encoder_decoder() -> Built:
    """nn.Transformer."""
    model = nn.Transformer(16, 2, 2, 2, 24, dropout=0.0, batch_first=True).eval()
    return _bound(model, torch.randn(2, 5, 16), torch.randn(2, 4, 16))


class VisionBlock(nn.Module):
    """A block of a vision transformer as timm writes it: fused qkv, layer scale."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention."""
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(rows, tokens, width))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Rows × tokens × width."""
        x = x + self.gamma1 * self.attend(self.norm1(x))
        return x + self.gamma2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


def vision_blocks() -> Built:
    """Two such blocks."""
    return _bound(nn.Sequential(VisionBlock(), VisionBlock()).eval(), torch.randn(2, 5, 16))


class Recurrent(nn.Module):
    """An LSTM over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(20, 8), nn.LSTM(8, 12, 2, batch_first=True), nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows × tokens to rows × classes."""
        out: Tensor = self.out(self.lstm(self.embed(ids))[0][:, -1])
        return out


def lstm() -> Built:
    """A recurrent classifier."""
    return _bound(Recurrent().eval(), torch.arange(12).view(2, 6))


def cnn() -> Built:
    """A convolutional classifier."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.Flatten(),
        nn.Linear(72, 5),
    )  # fmt: skip
    return _bound(model.eval(), torch.randn(2, 3, 8, 8))


ALL: dict[str, Callable[[], Built]] = {
    f"torch.{builder.__name__}": builder
    for builder in (encoder_train, encoder_fast_path, encoder_pre_norm, encoder_decoder, vision_blocks, lstm, cnn)
}
