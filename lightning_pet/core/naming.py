"""Parameter names as the user knows them, whatever wrapped the modules since."""

from collections.abc import Iterator

from torch import Tensor, nn

CHILD = "pet"
"""Name under which a host holds its deltas."""

# torch.compile, FSDP1 and activation checkpointing each put a level into the names of what they wrap.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical(name: str) -> str:
    """Strip the levels that compilers, shards and checkpointing put into a dotted name.

    >>> canonical("net._orig_mod.layer.0._checkpoint_wrapped_module.weight")
    'net.layer.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def join(*parts: str) -> str:
    """Join dotted names, leaving out empty ones.

    >>> join("", "layer", "weight")
    'layer.weight'
    """
    return ".".join(part for part in parts if part)


def named_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Every module under its canonical name; a shared module appears under each of its names."""
    return {canonical(name): module for name, module in root.named_modules(remove_duplicate=False)}


def named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and *persistent* buffers under canonical names, each tensor under each of its names."""
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield canonical(join(prefix, name)), parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield canonical(join(prefix, name)), buffer
