"""Writers of other libraries, which do not know what a delta is."""

import warnings
from copy import deepcopy
from typing import Any

from torch import nn

_NAME = "save_pretrained"


class WatchedSave:
    """In place of a model's ``save_pretrained`` while it has a delta: says what the folder will not hold, and writes.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Warn, and write as the model's class does."""
        warnings.warn(
            f"{_NAME} of an adapted {type(self.module).__name__}: the folder will hold the base, from which "
            "from_pretrained makes a model without the delta. Keep the delta with lightning_pet.save_delta(model, "
            "path); or call lightning_pet.Adapted(model).merge_() first, to write the sum.",
            stacklevel=2,
        )
        return getattr(type(self.module), _NAME)(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WatchedSave":
        return WatchedSave(deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return WatchedSave, (self.module,)


def watch_saves(root: nn.Module) -> None:
    """Let every model in an adapted root that can write itself say what the delta is to that."""
    for module in root.modules():
        if callable(getattr(type(module), _NAME, None)):
            module.__dict__.setdefault(_NAME, WatchedSave(module))


def leave_saves(root: nn.Module) -> None:
    """Put the models' own methods back."""
    for module in root.modules():
        if isinstance(module.__dict__.get(_NAME), WatchedSave):
            del module.__dict__[_NAME]
