"""Where torch runs a transformer layer past its parts, bitsandbytes past autograd, and how to stop that."""

from typing import Any

from torch import nn

# In eval mode the fast path hands a layer's raw weights to one fused operator, past every delta, and the
# encoder packs its input into a nested tensor for it. These flags are conditions of the two, and nothing else.
_FAST_PATH: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)

_KEPT = "_pet_fast_path"


def forbid(module: nn.Module) -> None:
    """Take the slow path, and remember what was set."""
    for cls, flag, off in _FAST_PATH:
        if isinstance(module, cls) and hasattr(module, flag):
            module.__dict__.setdefault(_KEPT, getattr(module, flag))
            setattr(module, flag, off)


def restore(module: nn.Module) -> None:
    """Put back what was set."""
    if _KEPT in module.__dict__:
        for cls, flag, _ in _FAST_PATH:
            if isinstance(module, cls):
                setattr(module, flag, module.__dict__.pop(_KEPT))


def set_aside(module: nn.Module) -> dict[str, Any]:
    """What was set, as attributes."""
    kept = module.__dict__
    return {flag: kept[_KEPT] for cls, flag, _ in _FAST_PATH if isinstance(module, cls) and _KEPT in kept}


# On some CPUs a 4-bit layer of bitsandbytes repacks its weight when it is first evaluated: in place, with its scales
# rounded, and into a form whose product has no gradient. A validation would end the training of all that is before it.
_REPACKS = "support_avx512bf16_for_cpu"


def forbid_repacking(root: nn.Module) -> None:
    """Leave quantised weights as they are when layers are evaluated, and remember what was set."""
    for module in root.modules():
        if vars(module).get(_REPACKS):
            module.__dict__[f"_pet_{_REPACKS}"] = True
            setattr(module, _REPACKS, False)


def restore_repacking(root: nn.Module) -> None:
    """Put back what was set."""
    for module in root.modules():
        if module.__dict__.pop(f"_pet_{_REPACKS}", False):
            setattr(module, _REPACKS, True)
