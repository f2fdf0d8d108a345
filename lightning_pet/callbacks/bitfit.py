"""BitFit (Ben Zaken et al. 2022): train the biases only."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from lightning_pet.arguments import some
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import TargetError
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.added_bias import AddedBias, BiasBeside, BiasRows
from lightning_pet.layers.delta import Delta, options_beside
from lightning_pet.model.layer_kinds import base_class, bias_of, host_kind, reader_of
from lightning_pet.model.named_roles import features, is_linear, is_norm, named_places, names_of_base
from lightning_pet.model.naming import module_at
from lightning_pet.model.quantised import is_quantised
from lightning_pet.model.structure import Structure, Target
from lightning_pet.targets.patterns import listed, listed_if_given
from lightning_pet.targets.targets import linear_targets, resolve_excluded, resolve_targets


class BitFitCallback(PETCallback):
    """Train the biases of a model, and nothing else of it but the head.

    The base's own bias parameters train as they are. Where only a part of one is asked for (v in a fused
    projection), a vector for those rows is added to it. A model without biases (T5, Llama) can be given
    some that start at zero. Source: Ben Zaken et al. 2022.

    Args:
        biases: ``"all"``, or which ones: roles (``["attention.q", "ffn.up"]`` are the paper's
            {b_q, b_m2}), ends of names, globs or ``"re:…"`` of the modules that have them. ``"all"`` may be
            one of several. A parameter is a bias if its own name has "bias" in it; those of the head
            train with the head.
        exclude_modules: patterns of the same kinds, taken out again.
        add_missing: give the chosen modules without a bias one that starts at zero; with ``"all"``
            these are all linear layers outside of the head and all norms. Such a delta stays
            attached: the base has no place to merge it into.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if ``biases`` is empty.

    Example:
        >>> import torch
        >>> from lightning_pet import BitFitCallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> apply(net, [BitFitCallback()]).record.trained_names
        ('0.bias', '2.bias')
    """

    method: ClassVar[str] = "bitfit"
    in_place = True
    shards = True

    def __init__(
        self,
        biases: list[str] | str = "all",
        exclude_modules: list[str] | str | None = None,
        add_missing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.biases = listed(biases)
        self.exclude_modules = listed_if_given(exclude_modules)
        self.add_missing = add_missing
        some("biases", self.biases, "use 'all', or name at least one role, suffix or pattern.")

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the biases, and the modules that get one.

        Raises:
            TargetError: if a pattern hits no module, or none with a bias and ``add_missing`` is off.
        """
        found: list[Target] = []
        for pattern in self.biases:
            here = self._present(root) if pattern == "all" else ()
            wanted = () if here and not self.add_missing else self._places(root, structure, pattern)
            places = [_bias_at(root, place) for place in wanted]
            missing = [place for place in places if not place.parameter]
            here = here or [place for place in places if place.parameter]
            if not here and not self.add_missing:
                raise TargetError(
                    f"biases={pattern!r}: {type(root).__name__} has no bias there. Set add_missing=True to add biases "
                    "that start at zero, or choose another method."
                )
            found += [*here, *(place for place in missing if self.add_missing and _can_add(root, structure, place))]
        dropped = {place.module for place in self._excluded(root, structure)}
        kept = [place for place in dict.fromkeys(found) if place.module not in dropped]
        if not kept:
            if not found:
                raise TargetError(
                    f"biases={self.biases}: {type(root).__name__} has no bias outside of its head, and no linear layer "
                    "or norm that one could be added to. Choose another method."
                )
            raise TargetError(f"nothing is left of biases={self.biases} after exclude_modules={self.exclude_modules}.")
        return tuple(kept)

    def _present(self, root: nn.Module) -> list[Target]:
        heads = set(self.heads_within(root))
        split = [name.rpartition(".") for name in names_of_base(root) if name not in heads]
        found = [Target(module, parameter) for module, _, parameter in split if "bias" in parameter]
        return [_in_full_precision(root, place) for place in found]

    def _places(self, root: nn.Module, structure: Structure, pattern: str) -> list[Target]:
        """Weights that a bias may belong to."""
        if pattern != "all":
            return list(resolve_targets(root, pattern, structure, hosts=_any))
        norms = [
            Target(path)
            for path, module in named_places(root).items()
            if is_norm(module) and module._parameters.get("weight") is not None
        ]
        heads = {name.rpartition(".")[0] for name in self.heads_within(root)}
        return [place for place in (*linear_targets(root, structure), *norms) if place.module not in heads]

    def _excluded(self, root: nn.Module, structure: Structure) -> Sequence[Target]:
        return resolve_excluded(root, self.exclude_modules or (), structure, hosts=_any)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build a delta where a bias is missing, or where only some of its rows train."""
        return super().insertions(root, [place for place in targets if not _trains_as_it_is(place)])

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the vector for one place."""
        host = module_at(root, target.module)
        own = [*host._parameters.values(), *host._buffers.values()]  # a quantised weight may be a buffer
        reference = host._parameters[target.parameter] if target.parameter else next(t for t in own if t is not None)
        assert reference is not None  # resolve chose it
        options = options_beside(reference)
        if target.parameter:
            kind = BiasBeside if _casts_its_bias(host) else BiasRows
            return kind(reference.shape, target.rows, **options)
        return AddedBias([_width(host)], target.rows, **options)

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of heads and of the biases that train as they are."""
        own = (place.path for place in targets if _trains_as_it_is(place))
        return tuple(dict.fromkeys((*self.head_parameters(root, targets), *own)))


def _bias_at(root: nn.Module, place: Target) -> Target:
    """The bias that goes with a weight; ``parameter=""`` if there is none."""
    found = bias_of(module_at(root, place.module), place.parameter, place.rows)
    if found is None:
        return replace(place, parameter="")
    return _in_full_precision(root, replace(place, parameter=found[0], rows=found[1]))


def _in_full_precision(root: nn.Module, place: Target) -> Target:
    """Where the host casts its bias, all rows of it get a vector beside it."""
    host = module_at(root, place.module)
    bias = host._parameters.get(place.parameter)
    if place.rows is None and bias is not None and _casts_its_bias(host):
        return replace(place, rows=((0, bias.shape[-1]),))
    return place


def _casts_its_bias(host: nn.Module) -> bool:
    """Quantised layers with a forward of their own: those of bitsandbytes cast their bias to the input's dtype."""
    weight = host._parameters.get("weight")
    return weight is not None and is_quantised(weight) and base_class(host) is not nn.Linear


def _trains_as_it_is(place: Target) -> bool:
    return bool(place.parameter) and place.rows is None


def _can_add(root: nn.Module, structure: Structure, place: Target) -> bool:
    module = module_at(root, place.module)
    called = reader_of(root, Target(place.module), structure.called) is None
    # A linear layer with a forward of its own may return anything: no bias is missing there.
    scales = is_norm(module) and module._parameters.get("weight") is not None
    return called and (scales or (is_linear(module) and host_kind(module) != "weight"))


def _width(host: nn.Module) -> int:
    return features(host)[1] if is_linear(host) else len(host._parameters["weight"])  # type: ignore[arg-type]


def _any(module: nn.Module, parameter: str) -> bool:
    return True
