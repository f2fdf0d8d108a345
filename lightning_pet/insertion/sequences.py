"""Hosts that run or list their children one after the other."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_pet.model.naming import CHILD

SEQUENCES = (nn.Sequential, nn.ModuleList)


class WithoutDeltas(nn.Module):
    """Mixed into such a host: its deltas are none of the children that it goes through."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for name, module in self._modules.items() if name != CHILD and module is not None])

    def __len__(self) -> int:
        return len(self._modules) - (CHILD in self._modules)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return list(self)[index]
        own = [(name, module) for name, module in self._modules.items() if name != CHILD][index]
        cls: Any = type(self).__pet_base__  # type: ignore[attr-defined]  # every host has it
        return cls(OrderedDict(own)) if isinstance(self, nn.Sequential) else cls(module for _, module in own)
