"""Toy models: few layers one behind the other, under the names by which HF PEFT's own tests know theirs."""

from collections.abc import Callable
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

Conv1D = transformers.pytorch_utils.Conv1D


class Toy(nn.Module):
    """Its layers one behind the other, with ReLU between them.

    Args:
        shapes: what a layer's input is viewed as, by the name of the layer.
        layers: by name.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]] | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.shapes, self.names = shapes or {}, [*layers]
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = x.reshape(self.shapes[name]) if name in self.shapes else x
            layer: Any = getattr(self, name)
            x = layer(x, x, x)[0] if name == "mha" else layer(x)
            x = x.relu() if name not in ("emb", self.names[-1]) else x
        return x.flatten(1).log_softmax(-1)


class Product(nn.Module):
    """A product with a matrix that is stored as [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x @ self.weight + self.bias
        return out


def _flat(features: int) -> dict[str, tuple[int, ...]]:
    return {"lin0": (-1, features)}


_BIG: Final = {"lin0": (-1, 90), "conv2d": (-1, 16, 3, 3), "lin1": (-1, 16)}
TOYS: Final[dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "MLP": (lambda: Toy(lin0=nn.Linear(10, 20), lin1=nn.Linear(20, 2)), (9, 10)),
    "MLP2": (lambda: Toy(lin0=nn.Linear(10, 32), lin1=nn.Linear(32, 2)), (9, 10)),
    "MLP_LayerNorm": (
        lambda: Toy(
            layernorm0=nn.LayerNorm(10), lin0=nn.Linear(10, 20), layernorm1=nn.LayerNorm(20), lin1=nn.Linear(20, 2)
        ),
        (9, 10),
    ),
    "MlpUsingParameters": (lambda: Toy(lin0=Product(10, 20), lin1=Product(20, 2)), (9, 10)),
    "EmbConv1D": (
        lambda: Toy(_flat(10), emb=nn.Embedding(100, 5), conv1d=Conv1D(1, 5), lin0=nn.Linear(10, 2)),
        (9, 10),
    ),
    "Conv1d": (lambda: Toy(_flat(9), conv1d=nn.Conv1d(1, 1, 2), lin0=nn.Linear(9, 2)), (9, 1, 10)),
    "Conv1dBigger": (lambda: Toy(_flat(144), conv1d=nn.Conv1d(64, 16, 2), lin0=nn.Linear(144, 2)), (9, 64, 10)),
    "Conv1dGroups": (lambda: Toy(_flat(64), conv1d=nn.Conv1d(8, 8, 3, groups=2), lin0=nn.Linear(64, 2)), (9, 8, 10)),
    "Conv2d": (lambda: Toy(_flat(10), conv2d=nn.Conv2d(5, 10, 3), lin0=nn.Linear(10, 2)), (2, 5, 3, 3)),
    "Conv2d2": (
        lambda: Toy(
            {"conv2d": (-1, 8, 3, 3), "lin1": (-1, 32)},
            lin0=nn.Linear(10, 40),
            conv2d=nn.Conv2d(8, 32, 3),
            lin1=nn.Linear(32, 2),
        ),
        (9, 10),
    ),
    "Conv2d1x1": (lambda: Toy(_flat(90), conv2d=nn.Conv2d(1, 10, 1), lin0=nn.Linear(90, 2)), (2, 1, 3, 3)),
    "Conv2dGroups": (
        lambda: Toy(_BIG, lin0=nn.Linear(90, 288), conv2d=nn.Conv2d(16, 16, 3, groups=8), lin1=nn.Linear(16, 2)),
        (2, 90),
    ),
    "Conv2dGroups2": (
        lambda: Toy(_flat(512), conv2d=nn.Conv2d(16, 32, 3, padding=1, groups=2), lin0=nn.Linear(512, 2)),
        (2, 16, 4, 4),
    ),
    "Conv3d": (lambda: Toy(_flat(10), conv3d=nn.Conv3d(5, 10, 3), lin0=nn.Linear(10, 2)), (2, 5, 3, 3, 3)),
    "MHA": (lambda: Toy(mha=nn.MultiheadAttention(10, 2), lin0=nn.Linear(10, 2)), (9, 10)),
}


def toy(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A model with values of a size at which differences show, and a batch for it."""
    build, shape = TOYS[name]
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.5, std=0.3)
    generator = torch.Generator().manual_seed(2)
    if name == "EmbConv1D":
        return model, torch.arange(90).view(9, 10)
    return model, torch.randn(shape, generator=generator, dtype=dtype)
