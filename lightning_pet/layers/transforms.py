"""Whether a tensor carries more than its values: forward-mode derivatives, or levels of ``torch.func``.

torch's custom operators drop a forward-mode derivative without a word, and values that are kept from one call to
the next do not belong to a level of ``torch.func``. Whoever uses either asks here first.
"""

import torch
from torch.autograd import forward_ad


def in_forward_mode() -> bool:
    """Derivatives are carried forward: ``torch.func.jvp`` and what builds on it, ``torch.autograd.forward_ad``."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """The same, or any other transform of ``torch.func`` (``grad``, ``vmap``, …); a compiler sees only the first."""
    if in_forward_mode():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
