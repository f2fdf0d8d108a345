"""Each run's gradients are clipped by its own norm: that of all runs together would let one scale the others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn


def clip_each(runs: Mapping[str, Sequence[nn.Parameter]], clip: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Clip as often as there are runs, each time with the gradients of one run only.

    Args:
        runs: the parameters of each.
        clip: the module's own ``configure_gradient_clipping``.
        args: its own.
        kwargs: its own.
    """
    hidden: dict[str, list[tuple[nn.Parameter, Any]]] = {
        name: [(p, p.grad) for p in own if p.grad is not None] for name, own in runs.items()
    }
    for own in hidden.values():
        for parameter, _ in own:
            parameter.grad = None
    try:
        for own in hidden.values():
            for parameter, gradient in own:
                parameter.grad = gradient
            try:
                clip(*args, **kwargs)
            finally:
                for place, (parameter, _) in enumerate(own):
                    own[place] = (parameter, parameter.grad)
                    parameter.grad = None
    finally:
        for own in hidden.values():
            for parameter, gradient in own:
                parameter.grad = gradient
