"""Whether a tensor carries more than its values: forward-mode derivatives, or levels of ``torch.func``.

torch's custom operators drop a forward-mode derivative without a word, and values that are kept from one call to
the next do not belong to a level of ``torch.func``. Whoever uses either asks here first.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def _in_forward_mode() -> bool:
    """Derivatives are carried forward: ``torch.func.jvp`` and what builds on it, ``torch.autograd.forward_ad``."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """The same, or any other transform of ``torch.func`` (``grad``, ``vmap``, …); a compiler sees only the first."""
    if _in_forward_mode():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def apply_node(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` for a call that is not transformed, with all arguments given.

    ``apply`` binds arguments to the signature of ``forward`` and looks for levels of ``torch.func``, in Python, before
    it calls its own base: a third of what a small node costs.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def is_ordinary(tensor: Tensor) -> bool:
    """Whether neither a compiler nor a mode looks at what is done with a tensor, and it has values."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not torch.compiler.is_compiling()
