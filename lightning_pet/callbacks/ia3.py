"""(IA)³ (Liu et al. 2022): learned vectors rescale keys, values and feed-forward activations."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import nn

from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.low_rank_places import is_called
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.delta import Delta, options_beside
from lightning_pet.layers.scaling import InputScaling, OutputScaling, ScaledBias, ScaledKernel, ScaledWeight
from lightning_pet.model.layer_kinds import bias_of, host_kind, transposed, weight_of
from lightning_pet.model.named_roles import features
from lightning_pet.model.naming import module_at
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.patterns import listed, listed_if_given, listed_layers
from lightning_pet.targets.targets import resolve_targets, with_readers

_HOSTS = ("linear", "conv1d_hf", "conv", "weight")


class IA3Callback(PETCallback):
    r"""Infused adapter by inhibiting and amplifying inner activations.

    :math:`\mathrm{softmax}(Q (l_k \odot K)^T / \sqrt{d_k}) (l_v \odot V)` and
    :math:`W_2 (l_{ff} \odot \gamma(W_1 x))`. The vectors start at one, so the model starts as the base,
    bit for bit, and they merge exactly. Encoder-decoder models get vectors in both self-attentions and in
    the cross-attention. Source: Liu et al. 2022 (T-Few).

    Args:
        target_modules: projections whose output is rescaled: roles, suffixes, globs or ``"re:…"``; see
            :class:`~lightning_pet.LoRACallback`. In a fused projection only the rows of the role are.
        feedforward_modules: projections whose input is rescaled, that is, the output of the non-linearity
            before them; in a gated feed-forward layer, its product with the gate. Wins where both hit.
        exclude_modules: patterns of the same kinds, taken out again.
        layers_to_transform: only these layer indices. Every pattern must have a target in one of them.
        layers_pattern: name of the list of layers whose indices are meant (``"blocks"``), where the first number in
            the names of modules is that of something else, such as a stage.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if there is no pattern at all.

    Example:
        >>> import torch
        >>> from lightning_pet import IA3Callback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> apply(net, [IA3Callback(target_modules=["0"], feedforward_modules=["2"])]).plan().trainable
        6
    """

    method: ClassVar[str] = "ia3"
    shards = True
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "target_modules",
        "feedforward_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __init__(
        self,
        target_modules: list[str] | str = ["attention.k", "attention.v"],  # noqa: B006  # never mutated; the CLI shows it
        feedforward_modules: list[str] | str = ["ffn.down"],  # noqa: B006
        exclude_modules: list[str] | str | None = None,
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.target_modules = listed(target_modules)
        self.feedforward_modules = listed(feedforward_modules)
        self.exclude_modules = listed_if_given(exclude_modules)
        self.layers_to_transform = listed_layers(layers_to_transform)
        self.layers_pattern = listed_if_given(layers_pattern)
        if not self.target_modules and not self.feedforward_modules:
            raise ArgumentError("target_modules and feedforward_modules are empty: name at least one projection.")

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the projections; the role ``ffn.down`` says that it is the input that is rescaled."""
        options: dict[str, Any] = {
            "exclude": self.exclude_modules or (),
            "layers": self.layers_to_transform,
            "layers_pattern": self.layers_pattern,
            "hosts": _can_host,
        }
        inner: tuple[Target, ...] = ()
        if self.feedforward_modules:
            inner = resolve_targets(root, self.feedforward_modules, structure, **options)
        if parts := [target.path for target in inner if target.rows is not None]:
            raise TargetError(
                f"feedforward_modules: only some outputs of {parts[0]} are meant, but it has one input for all. "
                "Name another projection."
            )
        places = {(target.module, target.parameter) for target in inner}
        every = resolve_targets(root, [*self.target_modules, *self.feedforward_modules], structure, **options)
        known = tuple(replace(t, role=_role(t, (t.module, t.parameter) in places)) for t in every)
        return with_readers(root, known, structure)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build one vector per place; a weight that is read without a call also has its bias rescaled."""
        insertions = super().insertions(root, [target for target in targets if not _is_bias(target)])
        for insertion in tuple(insertions):
            target, delta = insertion.target, insertion.delta
            host = module_at(root, target.module)
            found = bias_of(host, target.parameter, target.rows)
            if isinstance(delta, ScaledWeight | ScaledKernel) and target.role != "ffn.down" and found is not None:
                name, rows = found
                features = host._parameters[name].shape[-1]  # type: ignore[union-attr]
                place = replace(target, parameter=name, rows=rows)
                suffix = f"{insertion.suffix}_bias".lstrip("_")
                insertions.append(Insertion(place, ScaledBias(delta, features, rows), suffix))
        return insertions

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the vector that fits the host's class."""
        host = module_at(root, target.module)
        weight = weight_of(host, target.parameter)
        assert weight is not None  # resolve_targets returned it
        options = options_beside(weight)
        inner = target.role == "ffn.down"
        kind, called = host_kind(host, target.parameter), is_called(root, target)
        if kind == "conv":
            return _on_convolution(cast(nn.Conv2d, host), inner, called, options)
        turned = transposed(host, target.parameter)
        if not called:
            if turned is None:
                raise TargetError(
                    f"{target.path} is {'×'.join(map(str, weight.shape))} in a {type(host).__name__}, whose forward is "
                    "no plain product: whether its rows or its columns are the outputs cannot be told. Exclude it with "
                    "exclude_modules."
                )
            axis = -1 if inner is not turned else -2
            return ScaledWeight(weight.shape, axis, target.rows, **options)
        inputs, outputs = features(host)
        if inner:
            return InputScaling(inputs, transposed=bool(turned), **options)
        return OutputScaling(outputs, target.rows, transposed=bool(turned), **options)


def _on_convolution(conv: nn.Conv2d, inner: bool, called: bool, options: dict[str, Any]) -> Delta:
    if not called:
        channels = conv.in_channels if inner else conv.out_channels
        return ScaledKernel(channels, inner=inner, groups=conv.groups, **options)
    spatial = len(conv.kernel_size)
    if inner:
        return InputScaling(conv.in_channels, spatial=spatial, groups=conv.groups, **options)
    return OutputScaling(conv.out_channels, spatial=spatial, **options)


def _can_host(module: nn.Module, parameter: str) -> bool:
    return host_kind(module, parameter) in _HOSTS and not isinstance(module, nn.RNNBase)


def _role(target: Target, inner: bool) -> Any:
    if inner:
        return "ffn.down"
    return None if target.role == "ffn.down" else target.role


def _is_bias(target: Target) -> bool:
    return "bias" in target.parameter
