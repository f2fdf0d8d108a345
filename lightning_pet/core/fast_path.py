"""Where torch runs a transformer layer past its parts, and how to stop that."""

from typing import Any

from torch import nn

# In eval mode the fast path hands a layer's raw weights to one fused operator, past every delta, and the
# encoder packs its input into a nested tensor for it. These flags are conditions of the two, and nothing else.
_FAST_PATH: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def forbid(module: nn.Module) -> None:
    """Take the slow path, and remember what was set."""
    for cls, flag, off in _FAST_PATH:
        if isinstance(module, cls) and hasattr(module, flag):
            module.__dict__.setdefault("_pet_fast_path", getattr(module, flag))
            setattr(module, flag, off)


def restore(module: nn.Module) -> None:
    """Put back what was set."""
    if "_pet_fast_path" in module.__dict__:
        for cls, flag, _ in _FAST_PATH:
            if isinstance(module, cls):
                setattr(module, flag, module.__dict__.pop("_pet_fast_path"))
