"""Prefixes: trained keys and values that every query of an attention sees before the real ones."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers.delta import Delta, Path
from lightning_pet.layers.transforms import is_transformed

_FOLDED = ("key", "value")
_AGREES = 1e-3  # largest relative difference between a stored prefix and the one its network gives


class PrefixNetwork(Delta):
    r"""The part of the re-parametrisation that the layers share: :math:`h = \tanh(P' A^\top + a)`.

    Args:
        length: positions of the prefix, l.
        width: features of an input row, d.
        size: hidden features, m.
        device: where the parameters are made.
        dtype: their type.
    """

    path: ClassVar[Path] = "shared"

    def __init__(
        self,
        length: int,
        width: int,
        size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Parameter(torch.empty(length, width, **made))
        self.weight = nn.Parameter(torch.empty(size, width, **made))
        self.bias = nn.Parameter(torch.empty(size, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rows from a normal distribution of variance 1, the linear map as torch starts one."""
        nn.init.normal_(self.embedding)
        _reset_linear(self.weight, self.bias)

    def forward(self) -> Tensor:
        """Hidden features (l × m)."""
        return torch.tanh(F.linear(self.embedding, self.weight, self.bias))

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """As for every delta; but a file may hold the folded prefix alone, and then nothing of the network."""
        return super().misfits(tensors) if tensors else []

    def unheld(self, tensors: Mapping[str, Tensor]) -> int:
        """All of it, if the file holds the folded prefix alone."""
        return 0 if tensors else sum(parameter.nbytes for parameter in self.parameters())


class Prefix(Delta):
    r"""Keys and values of l positions for one attention, direct or re-parametrised.

    Direct: the keys and values are parameters. Re-parametrised: they are :math:`h B^\top + b`, with the
    hidden features h of a :class:`PrefixNetwork` and a last layer B, b of this attention's own. Without
    autograd the product is kept (folded) until one of its parameters changes, so that inference pays for
    keys and values only. Source: Li and Liang 2021.

    Args:
        length: positions, l.
        heads: key/value heads, H.
        key_dim: features of one key head.
        value_dim: features of one value head.
        network: the shared part of the re-parametrisation; ``None``: direct.
        device: where the parameters are made.
        dtype: their type.
    """

    path: ClassVar[Path] = "around"

    def __init__(
        self,
        length: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        network: PrefixNetwork | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length, self.heads, self.key_dim, self.value_dim = length, heads, key_dim, value_dim
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        # Outside of module registration: it has one name, at the root.
        self.__dict__["network"] = network
        self._folded: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
        if network is None:
            self.key = nn.Parameter(torch.empty(heads, length, key_dim, **made))
            self.value = nn.Parameter(torch.empty(heads, length, value_dim, **made))
        else:
            features = heads * (key_dim + value_dim)
            self.weight = nn.Parameter(torch.empty(features, network.weight.shape[0], **made))
            self.bias = nn.Parameter(torch.empty(features, **made))
        self.reset_parameters()

    @property
    def network(self) -> PrefixNetwork | None:
        """The shared part of the re-parametrisation."""
        network: PrefixNetwork | None = self.__dict__["network"]
        return network

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"length={self.length}, heads={self.heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"

    def reset_parameters(self) -> None:
        """Direct: from a normal distribution of variance 1. Else the last layer as torch starts one."""
        if self.network is None:
            nn.init.normal_(self.key)
            nn.init.normal_(self.value)
        else:
            _reset_linear(self.weight, self.bias)

    def key_value(self) -> tuple[Tensor, Tensor]:
        """Keys (H × l × key_dim) and values (H × l × value_dim)."""
        if self.__dict__["network"] is None:
            return self.key, self.value
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
            return self._unfolded()
        # In training a forward without autograd may be the first of a reentrantly checkpointed layer, whose second
        # is made from the parameters: both have to see the same, and an engine may write past a tensor's version.
        if self.training:
            return self._unfolded()
        return self.folded()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Keys and values without their history, kept until a parameter changes."""
        if self.network is None:
            return self.key.detach(), self.value.detach()
        stamp, folded = self._stamp(), self._folded  # another thread may exchange it meanwhile
        if folded is None or stamp is None or folded[0] != stamp:
            with torch.inference_mode(False), torch.no_grad():
                self._folded = folded = (stamp or (), *self._unfolded())
        return folded[1], folded[2]

    def _unfolded(self) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.weight.device.type, enabled=False):
            return self._split(F.linear(self._hidden(), self.weight, self.bias))

    def _hidden(self) -> Tensor:
        assert self.network is not None
        hidden: Tensor = self.network()
        return hidden

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = rows.tensor_split((self.heads * self.key_dim,), dim=-1)
        return (
            keys.reshape(self.length, self.heads, self.key_dim).transpose(0, 1),
            values.reshape(self.length, self.heads, self.value_dim).transpose(0, 1),
        )

    def _join(self, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([x.transpose(0, 1).reshape(self.length, -1) for x in (key, value)], dim=-1)

    def _stamp(self) -> tuple[Any, ...] | None:
        """Changes with every parameter behind the prefix; ``None`` where changes cannot be seen."""
        assert self.network is not None
        theirs, own = self.network._parameters, self._parameters
        try:  # generation asks in every layer for every token
            tensors = (theirs["embedding"], theirs["weight"], theirs["bias"], own["weight"], own["bias"])
        except KeyError:  # an engine holds them
            tensors = (self.network.embedding, self.network.weight, self.network.bias, self.weight, self.bias)
        stamp: list[Any] = []
        for tensor in tensors:
            if tensor is None or tensor.is_inference():
                return None
            stamp += (tensor.data_ptr(), tensor._version, tensor.dtype)
        return tuple(stamp)

    def train(self, mode: bool = True) -> "Prefix":
        """As for every module. It also drops the folded prefix: engines may write past a tensor's version."""
        self._folded = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Without the folded prefix, which can be made again."""
        return {**self.__dict__, "_folded": None}

    @torch.no_grad()
    def set_key_value(self, key: Tensor, value: Tensor) -> None:
        """Make these the keys (H × l × key_dim) and values (H × l × value_dim) of the prefix.

        With a re-parametrisation the last layer is solved for: the one of least norm that gives them. It gives
        them up to rounding if the network has at least l hidden features, else as nearly as it can.
        """
        if self.network is None:
            self.key.copy_(key)
            self.value.copy_(value)
            return
        wanted = self._join(key, value).to(self.weight.device, torch.float64)
        hidden = self._hidden().double()
        offset = wanted.mean(0)
        self.bias.copy_(offset)
        self.weight.copy_((torch.linalg.pinv(hidden) @ (wanted - offset)).T)

    # --- in files: the folded prefix, and what it came from --------------------------------------

    def packed(self) -> dict[str, Tensor]:
        """The folded prefix, and the last layer of the re-parametrisation if there is one."""
        key, value = self.folded()
        return {**super().packed(), "key": key, "value": value}

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The folded prefix, the re-parametrisation, or both; each whole, and of this size."""
        sizes = {"key": (self.heads, self.length, self.key_dim), "value": (self.heads, self.length, self.value_dim)}
        network = {"weight", "bias"} & tensors.keys()
        folded = sizes.keys() & tensors.keys()
        if self.network is not None and network:
            rest = {name: tensor for name, tensor in tensors.items() if name not in folded}
            problems = super().misfits(rest)
        else:
            problems = [f"{name} is unexpected" for name in sorted(tensors.keys() - folded - network)]
        if folded or self.network is None or not network:
            problems += [f"{name} is missing" for name in sizes if name not in folded]
        return problems + [
            f"{name} ({tensors[name].dtype}) has shape {tuple(tensors[name].shape)}, expected {sizes[name]}"
            for name in sorted(folded)
            if tuple(tensors[name].shape) != sizes[name] or not tensors[name].is_floating_point()
        ]

    def unheld(self, tensors: Mapping[str, Tensor]) -> int:
        """The last layer, if the file holds the folded prefix alone."""
        return sum(parameter.nbytes for name, parameter in self.named_parameters() if name not in tensors)

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a file holds; where the folded prefix and the network do not agree, the prefix counts."""
        own = self.state_dict()
        super().unpack({name: tensor for name, tensor in tensors.items() if name in own})
        if self.network is None or "key" not in tensors or self.weight.is_meta:
            return
        key, value = (tensors[name].to(self.weight.device, self.weight.dtype) for name in _FOLDED)
        with torch.no_grad():
            given, made = self._join(key, value), self._join(*self._unfolded())
        if (given - made).abs().max() > _AGREES * (1 + given.abs().max()):
            self.set_key_value(key, value)
        if (stamp := self._stamp()) is not None:
            self._folded = (stamp, key, value)


def attend_with_prefix(scores: Tensor, prefix: Tensor, **softmax: Any) -> tuple[Tensor, Tensor]:
    """One softmax over prefix and real positions, returned in two parts.

    Args:
        scores: … × queries × positions.
        prefix: scores of the prefix, … × queries × l.
        **softmax: further arguments of :func:`torch.softmax`.

    Returns:
        The shares of the real positions and of the prefix; together they sum to 1.
    """
    shares = torch.softmax(torch.cat([prefix, scores], dim=-1), dim=-1, **softmax)
    ours, theirs = shares.tensor_split((prefix.shape[-1],), dim=-1)
    return theirs, ours


def _reset_linear(weight: Tensor, bias: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(weight.shape[1])
    nn.init.uniform_(bias, -bound, bound)
