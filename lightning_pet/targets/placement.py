"""Where on the residual stream a method sits: from ``s = x + f(x)`` to hosts.

===========  ===================================  ====================================================
placement    the delta sees                       host
===========  ===================================  ====================================================
houlsby      f(x), before the sum                 last module of f (role ``….output``)
pfeiffer     s, behind the sum and its norm       the norm that reads s (post-norm, role ``….norm``),
                                                  else the module that returns s (``….output``)
parallel     x beside f, and adds to f(x)         as houlsby; ``reads`` names a module whose input is x
===========  ===================================  ====================================================

``Target.sizes`` is the width of the stream and, for a place in a numbered layer, the depth of that layer in its stack.
A model may have several stacks (encoder and decoder); each counts its layers from 0.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, cast, get_args

from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.layers.delta import options_beside
from lightning_pet.model.named_roles import layer_index, named_places, without_numbers
from lightning_pet.model.naming import is_below, module_at
from lightning_pet.model.structure import Role, Site, SiteKind, Structure, Target, host_parameter
from lightning_pet.targets.patterns import name_matcher, names_from_above

Placement = Literal["houlsby", "pfeiffer", "parallel"]
Sublayer = Literal["attention", "mixer", "ffn"]

DEFAULT_SUBLAYERS: dict[Placement, tuple[Sublayer, ...]] = {
    "houlsby": get_args(Sublayer),
    "pfeiffer": ("ffn",),
    "parallel": ("ffn",),
}
_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.|$)")
_log = logging.getLogger(__name__)


def resolve_sites(
    root: nn.Module,
    structure: Structure,
    placement: Placement = "houlsby",
    *,
    sublayers: Sequence[Sublayer] | None = None,
    cross_attention: bool = False,
    layers: Sequence[int] | None = None,
    drop_layers: int = 0,
    exclude: Sequence[str] = (),
    covered: Sequence[Target] = (),
) -> tuple[Target, ...]:
    """Find one place per residual sum.

    Args:
        root: the model that ``structure`` describes.
        structure: what is known about it; residual sums are only known where a forward was run.
        placement: see the top of this file.
        sublayers: which f: ``"attention"`` (self-attention), ``"mixer"`` (Mamba, convolution …), ``"ffn"``. Each must
            exist. Default: whichever exist with ``"houlsby"``, and ``"ffn"`` with the others.
        cross_attention: cross-attention, too; it must exist.
        layers: only layers of these indices (the first number in the module's name).
        drop_layers: none in the first so many layers of every stack.
        exclude: names of modules of the sums to leave out, or of modules around them, in the forms of
            :func:`~lightning_pet.targets.targets.resolve_targets`. Every one must hit.
        covered: places that a method has already: the layers that hold one are passed over, and nothing may be left.

    Returns:
        Targets in execution order with ``parameter=""``. A module that runs in every layer is one place.

    Raises:
        TargetError: if a wanted sub-layer does not exist, a place in the model cannot be adapted (the message names
            it), a pattern or a layer does not exist, or nothing is left.
    """
    finder = _Finder(root, structure, placement)
    kinds: list[SiteKind] = list(sublayers or DEFAULT_SUBLAYERS[placement])
    kinds += ["cross"] if cross_attention else []
    optional = get_args(Sublayer) if sublayers is None and placement == "houlsby" else ()
    finder.check_present(kinds, [kind for kind in kinds if kind not in optional])
    keep = finder.selection(layers, exclude)
    sites = [site for site in structure.sites if site.kind in kinds and keep(*finder.names(site))]
    sites = [site for site in sites if not finder.is_served(site, covered)]
    finder.check_covered(kinds, keep, covered)
    targets = finder.targets(sites)
    kept = [target for target in targets if len(target.sizes) < 2 or target.sizes[1] >= drop_layers]
    if not kept and not covered:
        given = {"layers": layers, "drop_layers": drop_layers, "exclude": list(exclude)}
        options = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        raise TargetError(f"no place for an adapter is left in {finder.model} after {options}. Relax one of them.")
    return tuple({target.module: target for target in kept}.values())


@dataclass(frozen=True)
class _Selection:
    """Which places the user wants, by the names of their modules."""

    prefix: str
    layers: frozenset[int] | None
    exclude: tuple[str, ...]

    def __call__(self, *paths: str) -> bool:
        if self.layers is not None and layer_index(paths[0]) not in self.layers:
            return False
        return not any(self.hits(pattern, *paths) for pattern in self.exclude)

    def hits(self, pattern: str, *paths: str) -> bool:
        """Whether a pattern names one of these modules or one around them."""
        matches = name_matcher(pattern)
        return any(matches(name) for path in paths for name in names_from_above(path, self.prefix))


class _Finder:
    """The residual sums of one model."""

    def __init__(self, root: nn.Module, structure: Structure, placement: Placement) -> None:
        self.model = type(root).__name__
        self.structure = structure
        self.placement = placement
        self.modules = named_places(root)
        self.uses = _uses(structure.sites)
        self.layers = _layers(structure.sites)
        self.depths = _depths(self.layers)

    @staticmethod
    def names(site: Site) -> tuple[str, ...]:
        """All modules at a site; the first tells its layer."""
        return (*site.branch, *site.after_norm, *site.inputs)

    # -- what there is ----------------------------------------------------------------------------

    def check_present(self, kinds: Sequence[SiteKind], required: Sequence[SiteKind]) -> None:
        """Every required kind must be there, and any of ``kinds``."""
        found = {site.kind for site in self.structure.sites}
        missing = [kind for kind in required if kind not in found]
        if found.intersection(kinds) and not missing:
            return
        if not found:
            why = (
                "the model has none that a forward shows"
                if self.structure.source == "probe"
                else "no forward could be run to look for them; pass a batch (forward=…, or example_input_array)"
            )
            raise TargetError(
                f"placement={self.placement!r} needs sub-layers with a residual sum x + f(x), and {self.model} has no "
                f"known one: {why}. LoRACallback adapts single layers of any model."
            )
        label = "cross-attention" if "cross" in missing else f"sub-layer of kind {(missing or list(kinds))[0]!r}"
        listed = ", ".join(sorted(found))
        others = sorted(found - {"cross"})
        own = (
            f"sublayers=[{others[0]!r}]" if others else "cross_attention=True with sublayers left out, or LoRACallback"
        )
        advice = "cross_attention=False" if "cross" in missing else own
        raise TargetError(f"{self.model} has no {label} with a residual sum. Found: {listed}. Use {advice}.")

    def selection(self, layers: Sequence[int] | None, exclude: Sequence[str]) -> _Selection:
        """The user's choice of places; raises if it speaks of what does not exist."""
        chosen = _Selection(self.structure.prefix, None if layers is None else frozenset(layers), tuple(exclude))
        groups = [self.names(site) for site in self.structure.sites] + [(t.module,) for t in self.structure.targets]
        for pattern in exclude:
            if not any(chosen.hits(pattern, *names) for names in groups):
                shown = ", ".join(repr(site.branch[-1]) for site in self.structure.sites[:4])
                raise TargetError(f"exclude_modules: {pattern!r} names no place of {self.model}; there are {shown} …")
        present = {layer_index(site.branch[0]) for site in self.structure.sites} - {None}
        unknown = sorted(set(layers or ()) - present)
        if unknown:
            found = ", ".join(map(str, sorted(cast(set[int], present)))) or "no numbered layers"
            asked = f"layers_to_transform={list(layers or ())}"
            raise TargetError(f"{asked}: the model has no layer {unknown[0]}; it has {found}.")
        return chosen

    def is_served(self, site: Site, places: Sequence[Target]) -> bool:
        """Whether one of these places lies in the layer of a site, or in its sub-layer where it is in no layer."""
        around = (self.layers[site],) if self.layers[site] is not None else site.branch
        return any(is_below(place.module, str(path)) for place in places for path in around)

    def check_covered(self, kinds: Sequence[SiteKind], keep: _Selection, covered: Sequence[Target] = ()) -> None:
        """Every layer with projections of a wanted kind must have a sum of it: nothing is passed over in silence."""
        summed = {(layer, site.kind) for site, layer in self.layers.items()}
        branches = [branch for site in self.structure.sites for branch in site.branch]
        patterns = {without_numbers(layer) for layer, _ in summed if layer is not None}
        called = self.structure.called
        lost: dict[tuple[str, SiteKind], list[Target]] = defaultdict(list)
        for target in self.structure.targets:
            kind = _kind(target)
            if kind is None or kind not in kinds or not keep(target.module):
                continue
            around = _numbered(target.module)
            layer = _first((path for path in reversed(around) if without_numbers(path) in patterns), around)
            if (layer, kind) in summed or any(is_below(target.module, branch) for branch in branches):
                continue
            if any(place.module == target.module or (layer and is_below(place.module, layer)) for place in covered):
                continue
            ran = called is None or bool(called.intersection((target.module, target.module.rpartition(".")[0])))
            if layer is not None and ran:
                lost[layer, kind].append(target)
            else:
                why = "is in no layer" if ran else "did not run in the probing forward"
                _log.warning("%s (%s) %s: no adapter there.", target.path, target.role, why)
        for (layer, kind), targets in lost.items():
            names = list(dict.fromkeys(target.module for target in targets))
            raise TargetError(
                f"{layer!r} has a sub-layer of kind {kind!r} ({names[0]!r} is its {targets[0].role}), but into which "
                "sum its output goes could not be found out. Leave it out by "
                f"exclude_modules={names}, or use LoRACallback."
            )

    # -- one site ---------------------------------------------------------------------------------

    def targets(self, sites: Sequence[Site]) -> list[Target]:
        """The hosts for these sites. One outside of all layers (a pooling head) may have none, which is said."""
        layered = any(self.layers[site] is not None for site in sites)
        found = []
        for site in sites:
            try:
                found.append(self.target(site))
            except TargetError as error:
                if self.layers[site] is not None or not layered:
                    raise
                _log.warning("no adapter outside of the layers: %s", error)
        return found

    def target(self, site: Site) -> Target:
        """The host for a site.

        Raises:
            TargetError: if there is none; it names the site.
        """
        if site.channels_first:
            raise self._refusal(site, "returns its features as the second dimension (a convolutional block)")
        if self.placement == "pfeiffer":
            return self._behind_sum(site)
        tap = next((path for path in reversed(site.branch) if len(self.uses[path]) == 1), None)
        if tap is None:
            raise self._refusal(site, "consists of modules that other sub-layers call as well")
        reads = self._reader(site, tap) if self.placement == "parallel" else None
        return self._at(site, tap, "output", reads)

    def _behind_sum(self, site: Site) -> Target:
        reader = self.modules[site.inputs[-1]] if site.inputs else None
        prenorm = reader is not None and _is_norm_like(reader)
        norms = [path for path in site.after_norm if len(self.uses[path]) == 1]
        # Around the whole sub-layer it returns this very sum; a dropout behind several sums would not tell them apart.
        outs = [path for path in site.after_out if is_below(site.branch[0], path) or len(self.uses[path]) == 1]
        if norms and not prenorm and not site.after_out:
            return self._at(site, norms[0], "norm")
        if not outs:
            raise self._refusal(site, "is summed where no module returns the sum")
        return self._at(site, outs[0], "output")

    def _reader(self, site: Site, tap: str) -> str | None:
        if tap in site.inputs:
            return None
        if not site.inputs:
            raise self._refusal(site, "has an input x that no module of it receives as it is")
        if any(isinstance(self.modules[path], nn.Conv1d | nn.Conv2d | nn.Conv3d) for path in site.inputs):
            raise self._refusal(site, "takes its features as the second dimension (a convolutional block)")
        return next((path for path in reversed(site.inputs) if len(self.uses[path]) == 1), site.inputs[-1])

    def _at(self, site: Site, path: str, end: str, reads: str | None = None) -> Target:
        role = f"{'attention' if site.kind == 'cross' else site.kind}.{end}"
        depth = self.depths.get(site)
        sizes = (site.width,) if depth is None else (site.width, depth)
        return Target(path, "", cast(Role, role), site.kind == "cross", reads=reads, sizes=sizes)

    def _refusal(self, site: Site, why: str) -> TargetError:
        path = site.branch[-1]
        return TargetError(
            f"placement={self.placement!r}: the {site.kind} sub-layer {path!r} ({type(self.modules[path]).__name__}) "
            f"{why}, so it cannot be adapted. Leave it out by exclude_modules=[{path!r}], or choose another placement."
        )


def check_narrower(bottleneck_size: int | None, targets: Sequence[Target]) -> None:
    """Refuse a bottleneck that is wider than the narrowest place around it.

    Raises:
        TargetError: naming both sizes.
    """
    narrowest = min(target.sizes[0] for target in targets)
    if bottleneck_size is not None and bottleneck_size > narrowest:
        raise TargetError(f"bottleneck_size={bottleneck_size}: the features around it are only {narrowest}.")


def delta_options(root: nn.Module, target: Target) -> dict[str, Any]:
    """Device and dtype for the parameters of a delta at a place."""
    path, _, name = host_parameter(root, target).rpartition(".")
    like = module_at(root, path)._parameters.get(name)
    if like is None:
        raise TargetError(f"{type(root).__name__} has no parameters, so there is nothing to adapt.")
    return options_beside(like)


def _uses(sites: Sequence[Site]) -> Mapping[str, set[tuple[SiteKind, str]]]:
    """In which sub-layers a module plays a part. A layer that runs several times is one sub-layer."""
    uses: dict[str, set[tuple[SiteKind, str]]] = defaultdict(set)
    for site in sites:
        for path in {*site.branch, *site.inputs, *site.after_norm, *site.after_out}:
            uses[path].add((site.kind, site.branch[0]))
    return uses


def _kind(target: Target) -> SiteKind | None:
    """The kind of sub-layer that a projection belongs to."""
    family = (target.role or "").partition(".")[0]
    return "cross" if target.cross else family if family in ("attention", "ffn") else None  # type: ignore[return-value]


def _layers(sites: Sequence[Site]) -> dict[Site, str | None]:
    """The layer that each site is in.

    It is the innermost numbered module with several sums in it (``encoder.block.0``, not its part
    ``encoder.block.0.layer.1``; ``layers.0.blocks.1`` in models with stages), else the outermost numbered one.
    """
    inside: dict[str, int] = defaultdict(int)
    for site in sites:
        for path in _numbered(site.branch[0]):
            inside[path] += 1
    layers: dict[Site, str | None] = {}
    for site in sites:
        around = _numbered(site.branch[0])
        layers[site] = _first((path for path in reversed(around) if inside[path] > 1), around)
    return layers


def _depths(layers: Mapping[Site, str | None]) -> dict[Site, int]:
    """How many layers of its stack run before that of a site. A stack is what stands before the first number."""
    stacks: dict[str, dict[str, int]] = defaultdict(dict)
    depths: dict[Site, int] = {}
    for site, layer in layers.items():
        if layer is not None:
            stack = stacks[_numbered(layer)[0].rpartition(".")[0]]
            depths[site] = stack.setdefault(layer, len(stack))
    return depths


def _numbered(path: str) -> list[str]:
    """``a.0.b.1.c`` → ``a.0``, ``a.0.b.1``."""
    return [path[: found.end()] for found in _NUMBER.finditer(path)]


def _first(preferred: Iterable[str], otherwise: Sequence[str]) -> str | None:
    return next(chain(preferred, otherwise), None)


def _is_norm_like(module: nn.Module) -> bool:
    dropout = "drop" in type(module).__name__.lower()
    return not dropout and all(parameter.dim() <= 1 for parameter in module.parameters())
