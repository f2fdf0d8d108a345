"""LN tuning (Zhao et al. 2023): train the weights and biases of norms."""

from collections.abc import Sequence
from typing import Any, ClassVar, Final

from torch import nn

from lightning_pet.arguments import some
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import TargetError
from lightning_pet.insertion.method import Insertion, key_of
from lightning_pet.model.named_roles import is_norm, named_places, names_of_base
from lightning_pet.model.naming import named_modules
from lightning_pet.model.structure import Site, Structure, Target
from lightning_pet.targets.heads import HEAD
from lightning_pet.targets.patterns import listed, listed_if_given
from lightning_pet.targets.targets import resolve_excluded, resolve_targets

_ROLES: Final[dict[str, tuple[str, ...]]] = {
    "attention.norm": ("attention", "cross"),
    "ffn.norm": ("ffn",),
    "mixer.norm": ("mixer",),
}


class LNTuningCallback(PETCallback):
    r"""Train the weight and the bias of norms: :math:`y = \gamma\,\hat x + \beta`, and nothing else but the head.

    The base's own parameters train as they are, so that nothing is inserted and there is nothing to merge. None of
    them decays: a decay would pull γ to zero. Source: Zhao et al. 2023.

    Args:
        target_modules: ``"all"``: every norm outside of the head; or which ones: ``"attention.norm"``, ``"ffn.norm"``,
            ``"mixer.norm"`` (the norms before, or where the model has none there behind, such a sub-layer),
            suffixes (``"input_layernorm"``), globs or ``"re:…"`` of modules or parameters (``"norm.weight"``).
        exclude_modules: suffixes, globs or ``"re:…"``, taken out again.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if ``target_modules`` is empty.

    Example:
        >>> import torch
        >>> from lightning_pet import LNTuningCallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
        >>> apply(net, [LNTuningCallback(modules_to_save=[])]).record.trained_names
        ('1.weight', '1.bias')
    """

    method: ClassVar[str] = "ln_tuning"
    in_place = True
    shards = True

    def __init__(
        self,
        target_modules: list[str] | str = "all",
        exclude_modules: list[str] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.target_modules = listed(target_modules)
        self.exclude_modules = listed_if_given(exclude_modules)
        some("target_modules", self.target_modules, "use 'all', or name at least one role, suffix or pattern.")

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the parameters of the norms.

        Raises:
            TargetError: if a pattern hits no norm, or none is left.
        """
        heads = set(self.heads_within(root))
        split = [name.rpartition(".") for name in names_of_base(root) if name not in heads]
        modules = named_modules(root)
        every = [Target(module, own) for module, _, own in split if is_norm(modules[module])]
        found = [place for pattern in self.target_modules for place in _named(root, structure, pattern, every)]
        dropped = {place.path for place in resolve_excluded(root, self.exclude_modules or (), structure, hosts=_norm)}
        kept = [place for place in dict.fromkeys(found) if place.path not in dropped]
        if not kept:
            why = f"after exclude_modules={self.exclude_modules}" if found else f"{type(root).__name__} has no norm"
            raise TargetError(f"nothing is left of target_modules={self.target_modules}: {why}. Choose other modules.")
        return tuple(kept)

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build nothing."""
        return []

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of heads and of the norms' parameters."""
        own = (place.path for place in targets if place.role != HEAD)
        return tuple(dict.fromkeys((*self.head_parameters(root, targets), *own)))

    def group_options(self, delta_names: Sequence[str]) -> dict[str, dict[str, float]]:
        """No norm decays; a head does as the user says."""
        applied = [applied for applied in self.adapted.record.applied if applied.key == key_of(self)]
        own = {target.path for method in applied for target in method.targets if target.role != HEAD}
        return {name: {"weight_decay": 0.0} for name in delta_names if name in own}


def _named(root: nn.Module, structure: Structure, pattern: str, every: Sequence[Target]) -> list[Target]:
    """All parameters of the norms that a pattern names, or those that it names themselves."""
    if pattern == "all":
        return list(every)
    if pattern in _ROLES:
        sites = [site for site in structure.sites if site.kind in _ROLES[pattern]]
        paths = {path for site in sites for path in _norms_of(root, site)}
        if found := [place for place in every if place.module in paths]:
            return found
        how = "in what a forward shows" if structure.source == "probe" else "as no forward could be run to look"
        raise TargetError(
            f"target_modules={pattern!r}: no norm of such a sub-layer was found in {type(root).__name__}, {how}. Name "
            "the norms, for example 'input_layernorm', or use 'all'."
        )
    hits = resolve_targets(root, pattern, structure, hosts=_norm)
    modules, found = named_modules(root), []
    for hit in hits:
        named = pattern.endswith(hit.parameter)
        own = [hit.parameter] if named else [n for n, p in modules[hit.module]._parameters.items() if p is not None]
        found += [Target(hit.module, name) for name in own]
    return found


def _norms_of(root: nn.Module, site: Site) -> list[str]:
    """The norms of a sub-layer: those before and in it, or where there are none the one that reads its sum."""
    modules = named_places(root)
    before = [path for path in (*site.inputs, *site.branch) if is_norm(modules[path])]
    return before or [path for path in site.after_norm if is_norm(modules[path])]


def _norm(module: nn.Module, parameter: str) -> bool:
    return is_norm(module)
