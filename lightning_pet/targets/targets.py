r"""From what a user writes to the parameters that are meant.

A pattern is one of

===================================  ==============================================================
``attention.q``, ``ffn.up`` ...      a role; ``attention`` and ``ffn`` stand for all of theirs
``attention.self.q``, ``...cross.v`` a role in self- or in cross-attention only
``embedding``                        the token embedding
``all-linear``                       every projection except output embedding, task head and routers (whose
                                     output weighs other features)
``all-conv``                         every convolution except those of the task head
``q_proj``, ``self.query``           whole components at the end of a module's name
``encoder.layer.*.output.dense``     a glob over module names (``*`` also crosses dots)
``re:.*\.(q|v)_proj``                a regular expression that matches the whole name
``mlp.experts.gate_up_proj``         a parameter, in any of these forms
===================================  ==============================================================

Every pattern must hit something, otherwise :class:`~lightning_pet.errors.TargetError`.
"""

import difflib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.model.layer_kinds import is_bias, is_made, reader_of
from lightning_pet.model.named_roles import (
    gives_one_number,
    is_linear,
    is_named_gate,
    is_router,
    layer_index,
    named_places,
)
from lightning_pet.model.naming import canonical, is_below, join, named_modules
from lightning_pet.model.structure import Structure, Target, overlap
from lightning_pet.targets.patterns import GROUPS, KINDS, has_role, is_role, name_matcher, names_from_above

Hosts = Callable[[nn.Module, str], bool]

_log = logging.getLogger(__name__)
_CONVOLUTION = nn.modules.conv._ConvNd

_HEAD_NAMES = frozenset(
    ("lm_head", "score", "classifier", "classification_head", "qa_outputs", "cls", "head", "heads", "fc", "logits_proj")
)
_SHOWN = 8


def resolve_targets(
    model: nn.Module,
    patterns: Sequence[str] | str,
    structure: Structure,
    *,
    exclude: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    layers_pattern: Sequence[str] | None = None,
    hosts: Hosts | None = None,
) -> tuple[Target, ...]:
    """Find the parameters that ``patterns`` name.

    Args:
        model: the model that ``structure`` describes.
        patterns: one pattern or several; see the top of this file.
        structure: roles of the model, from :func:`lightning_pet.probe.probe.analyse`.
        exclude: patterns of places to leave out, or names of modules around them; each must hit as well.
        layers: keep only places in the layers of these indices (the first number in the module's name). Some of
            every pattern must be left.
        layers_pattern: names of the lists of layers: a layer's index is the number right behind one of them.
        hosts: ``(module, parameter name) -> bool``: what the method can sit on. Default: any weight with two
            or more dimensions.

    Returns:
        Targets in module order, each parameter (or part of a fused one) once.

    Raises:
        TargetError: a pattern hits nothing or nothing that can host, a role is missing or its rows in a
            fused projection are unknown, a layer does not exist, a whole projection and a part of it are
            both targeted, or nothing is left.
    """
    wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    unwanted = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if not wanted:
        raise TargetError("no target pattern given; name at least one, for example 'attention.q' or 'all-linear'.")
    scope = _Scope(model, structure, hosts or _is_matrix, layers_pattern)
    dropped = [target for pattern in unwanted for target in scope.match_below(pattern)]
    scope.ignore(dropped)
    indices = None if layers is None else scope.check_layers(layers)
    found = [target for pattern in wanted for target in scope.in_layers(pattern, scope.match(pattern), indices)]
    kept = [target for target in dict.fromkeys(found) if not any(_same_place(target, other) for other in dropped)]
    if not kept:
        raise TargetError(
            f"nothing is left of target_modules={list(wanted)} after exclude_modules={list(unwanted)}"
            f"{'' if layers is None else f' and layers_to_transform={list(layers)}'}. Relax one of them."
        )
    # One projection may play two roles with all of its rows (keys and values from one latent): it is one place.
    places = {(target.module, target.parameter, target.rows): target for target in reversed(kept)}
    result = scope.ordered(list(places.values()))
    _check_overlap(result)
    return result


def resolve_excluded(
    model: nn.Module, patterns: Sequence[str], structure: Structure, *, hosts: Hosts | None = None
) -> tuple[Target, ...]:
    """All places that patterns of ``exclude_modules`` take out; every pattern must hit.

    Raises:
        TargetError: naming the pattern that hits nothing.
    """
    scope = _Scope(model, structure, hosts or _is_matrix)
    return tuple(dict.fromkeys(target for pattern in patterns for target in scope.match_below(pattern)))


def linear_targets(model: nn.Module, structure: Structure) -> tuple[Target, ...]:
    """What ``all-linear`` hits; unlike a pattern, it may be nothing."""
    scope = _Scope(model, structure, _is_matrix)
    return scope.ordered(scope.every("all-linear"))


def role_names(structure: Structure) -> tuple[str, ...]:
    """Role patterns that hit in this model."""
    found = dict.fromkeys(target.role for target in structure.targets if target.role is not None)
    return tuple(found)


def suggest(name: str, candidates: Iterable[str]) -> str:
    """A sentence with the nearest of ``candidates``, or an empty string.

    >>> suggest("q_prj", ["q_proj", "mlp"])
    " Did you mean 'q_proj'?"
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(candidates)), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def output_heads(model: nn.Module) -> frozenset[str]:
    """Paths of modules that turn features into predictions: the output embedding and task heads.

    In a model that knows its own base (``base_model_prefix``, also as a part of ``model``) these are all
    other children with parameters; elsewhere direct children with one of the usual names (``classifier``,
    ``score`` ...).
    """
    places = named_places(model)
    heads = {name for name, _ in model.named_children() if name in _HEAD_NAMES}
    for path, module in places.items():
        prefix = getattr(module, "base_model_prefix", "")
        if isinstance(prefix, str) and prefix and isinstance(getattr(module, prefix, None), nn.Module):
            others = [name for name, _ in module.named_children() if name != prefix]
            heads.update(join(path, name) for name in others if any(True for _ in getattr(module, name).parameters()))
        output = _output_embedding(module)
        heads.update(place for place, other in places.items() if output is not None and other is output)
    return frozenset(canonical(head) for head in heads)


def _output_embedding(module: nn.Module) -> Any:
    getter = getattr(module, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except Exception:  # models without one raise all kinds of errors here
        return None


class _Scope:
    """All places of one model that can host, and the ways to name them."""

    def __init__(
        self, model: nn.Module, structure: Structure, hosts: Hosts, layers_pattern: Sequence[str] | None = None
    ) -> None:
        self.layers_pattern = layers_pattern
        self.model = model
        self.structure = structure
        self.hosts = hosts
        self.modules = named_places(model)
        self.first = {module: path for path, module in self.modules.items()}
        self.names: dict[str, list[str]] = {path: [] for path in self.modules}
        for name, module in model.named_modules(remove_duplicate=False):
            if module in self.first:
                self.names[self.first[module]] += dict.fromkeys(
                    (canonical(name), join(structure.prefix, canonical(name)))
                )
        self.parameters = {path: _parameters(module) for module, path in self.first.items()}
        places = [(path, name) for path, names in self.parameters.items() for name in names]
        self.place = {place: i for i, place in enumerate(places)}
        self.unresolved: Sequence[Target] = structure.unresolved
        self.roles: dict[tuple[str, str], list[Target]] = {}
        for target in structure.targets:
            self.roles.setdefault((target.module, target.parameter), []).append(target)

    # -- one pattern ------------------------------------------------------------------------------

    def match(self, pattern: str) -> list[Target]:
        """Targets of one pattern; raises if there are none."""
        if not isinstance(pattern, str) or not pattern:
            raise TargetError(f"a target pattern must be a non-empty string, got {pattern!r}.")
        if pattern in KINDS:
            if targets := self.every(pattern):
                return targets
            heads = ", ".join(sorted(output_heads(self.model))) or "none"
            raise TargetError(
                f"{pattern!r} hits nothing: the model has no {KINDS[pattern]} that can host this method outside its "
                f"output head ({heads}). Name the modules instead."
            )
        if is_role(pattern):
            targets = self._by_role(pattern)
            if targets:
                return targets
        paths = self._by_name(pattern)
        if paths:
            return paths
        raise TargetError(self._missing_role(pattern) if is_role(pattern) else self._missing(pattern))

    def match_below(self, pattern: str) -> list[Target]:
        """Targets of one pattern and of everything below the modules that it names; raises if there are none."""
        if not isinstance(pattern, str) or not pattern or pattern in KINDS:
            return self.match(pattern)
        if is_role(pattern) and any(has_role(t, pattern) for t in (*self.structure.targets, *self.unresolved)):
            return self.match(pattern)
        matches, prefix = name_matcher(pattern), self.structure.prefix
        inside = set()
        for path, names in self.names.items():
            bare = [name.removeprefix(f"{prefix}.") for name in names]
            if any(matches(above) for name in bare for above in names_from_above(name, prefix)):
                inside.add(path)
        found = [self._target(path, name) for path, name in self.place if path in inside and self._hosts(path, name)]
        return list(dict.fromkeys((*found, *self._by_name(pattern)))) or self.match(pattern)

    def ignore(self, dropped: Sequence[Target]) -> None:
        """Forget the excluded places, so that what is unknown about them no longer matters."""
        places = {(target.module, target.parameter) for target in dropped}
        self.unresolved = [t for t in self.structure.unresolved if (t.module, t.parameter) not in places]

    def _by_role(self, pattern: str) -> list[Target]:
        unknown = [target for target in self.unresolved if has_role(target, pattern)]
        if unknown:
            first = unknown[0]
            ran = self.structure.called is None or first.module in self.structure.called
            why = "" if ran else " (it did not run in the probing forward)"
            raise TargetError(
                f"target pattern {pattern!r}: {first.module!r} computes {first.role} together with others in one "
                f"projection, and which of its rows those are could not be found out{why}. Pass a batch "
                f"that runs it to the structure probe, leave it out (exclude {first.module.rpartition('.')[2]!r} or "
                "'re:...'), or target the whole projection by its name."
            )
        hits = [target for target in self.structure.targets if has_role(target, pattern)]
        return [target for target in hits if self._hosts(target.module, target.parameter)]

    def every(self, kind: str) -> list[Target]:
        """All layers of a kind outside of heads; those that cannot host the method are named in the log."""
        heads = output_heads(self.model)
        targets: list[Target] = []
        without: list[str] = []
        for module, path in self.first.items():
            wanted = self._is_projection(module, path) if kind == "all-linear" else isinstance(module, _CONVOLUTION)
            if not wanted or any(is_below(name, head) for name in self.names[path] for head in heads):
                continue
            weights = [name for name in _weights(module) if self._hosts(path, name)]
            targets.extend(self._target(path, name) for name in weights)
            without += [] if weights else [f"{path} ({type(module).__name__})"]
        if targets and without:
            _log.warning(
                "%s leaves out %d layers that this method cannot adapt: %s%s",
                *(kind, len(without), ", ".join(without[:4]), " …" if len(without) > 4 else ""),
            )
        return targets

    def _is_projection(self, module: nn.Module, path: str) -> bool:
        if not (is_linear(module) or isinstance(module, nn.MultiheadAttention) or _is_experts(module)):
            return False
        if is_router(module):
            return False
        if not gives_one_number(module):
            return True
        ran = self.structure.called is not None and path in self.structure.called
        return path not in self.structure.weighing if ran else not is_named_gate(path)

    def _by_name(self, pattern: str) -> list[Target]:
        matches = name_matcher(pattern)
        targets: list[Target] = []
        for module, path in self.first.items():
            if any(matches(name) for name in self.names[path]):
                targets.extend(self._target(path, name) for name in _weights(module) if self._hosts(path, name))
                continue
            for name in self.parameters[path]:
                full = [f"{alias}.{name}".lstrip(".") for alias in self.names[path]]
                if any(matches(alias) for alias in full) and self._hosts(path, name):
                    targets.append(self._target(path, name))
        return targets

    def _hosts(self, path: str, parameter: str) -> bool:
        return self.hosts(self.modules[path], parameter)

    def _target(self, path: str, parameter: str) -> Target:
        """The whole parameter, with its role where it has just one."""
        known = self.roles.get((path, parameter), [])
        role = known[0].role if len({target.role for target in known}) == 1 else None
        return Target(path, parameter, role, any(target.cross for target in known))

    # -- messages ---------------------------------------------------------------------------------

    def _missing_role(self, pattern: str) -> str:
        found = role_names(self.structure)
        listed = ", ".join(found) if found else "none"
        how = "" if self.structure.source == "probe" else " (by names only: no forward was run; a batch finds more)"
        blocked = [target for target in self.structure.targets if has_role(target, pattern)]
        if blocked:
            module = self.modules[blocked[0].module]
            return (
                f"target pattern {pattern!r} hits {blocked[0].path!r} ({type(module).__name__}), which this method "
                "cannot adapt. Choose another role or method."
            )
        return (
            f"target pattern {pattern!r}: no such role was found in {type(self.model).__name__}. Roles found{how}: "
            f"{listed}. Name the modules instead, for example {self._examples()}; "
            "all names: [n for n, _ in model.named_modules()]."
        )

    def _missing(self, pattern: str) -> str:
        containers = [p for m, p in self.first.items() if any(map(name_matcher(pattern), self.names[p])) and p]
        if containers:
            inside = [path for path, _ in self._hostable() if path.startswith(f"{containers[0]}.")]
            hint = f"name a part of it, for example {inside[0]!r}" if inside else "choose another module"
            kind = type(self.modules[containers[0]]).__name__
            return (
                f"target pattern {pattern!r} hits {containers[0]!r} ({kind}), which has no weight that this method "
                f"can adapt; {hint}."
            )
        names = [*role_names(self.structure), *GROUPS, *KINDS, *self._suffixes()]
        tail = pattern.rpartition(":")[2]
        return (
            f"target pattern {pattern!r} hits no module of {type(self.model).__name__}."
            f"{suggest(tail, names)} Names that exist: {self._examples()}; "
            "all of them: [n for n, _ in model.named_modules()]."
        )

    def _hostable(self) -> Iterator[tuple[str, str]]:
        return (place for place in self.place if self._hosts(*place))

    def _suffixes(self) -> list[str]:
        names: dict[str, None] = {}
        for path, parameter in self._hostable():
            parts = path.split(".")
            full = path if parameter == "weight" else f"{path}.{parameter}"
            names.update(dict.fromkeys((full, ".".join(parts[-2:]), parts[-1])))
        return [name for name in names if name and not name.isdigit()]

    def _examples(self) -> str:
        leaves = dict.fromkeys(path.rpartition(".")[2] for path, _ in self._hostable())
        shown = [repr(leaf) for leaf in leaves if leaf and not leaf.isdigit()][:_SHOWN]
        return ", ".join(shown) or "none that can host this method"

    # -- selection --------------------------------------------------------------------------------

    def _layer(self, path: str) -> int | None:
        return layer_index(path, self.layers_pattern)

    def check_layers(self, layers: Sequence[int]) -> frozenset[int]:
        """The indices as a set; raises if the model has no such layer."""
        present = {index for path in self.first.values() if (index := self._layer(path)) is not None}
        unknown = sorted(set(layers) - present)
        if unknown:
            found = f"0 to {max(present)}" if present else "no numbered layers"
            under = f" of layers_pattern={list(self.layers_pattern)}" if self.layers_pattern else ""
            raise TargetError(
                f"layers_to_transform={list(layers)}: the model has no layer {unknown[0]}{under}; it has {found}."
            )
        return frozenset(layers)

    def in_layers(self, pattern: str, hits: Sequence[Target], layers: Collection[int] | None) -> Sequence[Target]:
        """Those of a pattern's targets that are in these layers; raises if none is: they would be lost silently."""
        kept = [target for target in hits if layers is None or self._layer(target.module) in layers]
        if hits and not kept:
            elsewhere = sorted({index for t in hits if (index := self._layer(t.module)) is not None})
            where = f"the layers {elsewhere}" if elsewhere else "no numbered layer"
            raise TargetError(
                f"layers_to_transform={sorted(layers or ())}: nothing is left of target pattern {pattern!r}, since "
                f"{hits[0].path!r} and the like are in {where}. Leave the pattern out, or adapt these places by a "
                "callback of their own (name='second') without layers_to_transform."
            )
        return kept

    def ordered(self, targets: Collection[Target]) -> tuple[Target, ...]:
        """The same targets in module order."""
        last = len(self.place)
        return tuple(sorted(targets, key=lambda t: (self.place.get((t.module, t.parameter), last), t.rows or ())))


# -- pieces -----------------------------------------------------------------------------------------


def _is_matrix(module: nn.Module, parameter: str) -> bool:
    weight = getattr(module, parameter, None)
    return weight is not None and getattr(weight, "ndim", 0) >= 2


def _is_experts(module: nn.Module) -> bool:
    # A class token or a table of positions has three dimensions too, one of them of size 1; a parametrized
    # convolution keeps its weight apart.
    others = (_CONVOLUTION, nn.utils.parametrize.ParametrizationList)
    return not isinstance(module, others) and any(
        parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1
        for parameter in module._parameters.values()
    )


def _parameters(module: nn.Module) -> list[str]:
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if "weight" not in names and (is_linear(module) or is_made(module)):
        names.append("weight")  # a quantised weight is a buffer
    return names


def _weights(module: nn.Module) -> list[str]:
    """What a module's name stands for: its ``weight``, else all its matrices that are no biases."""
    names = _parameters(module)
    if "weight" in names:
        return ["weight"]
    shapes = {name: tuple(getattr(module, name).shape) for name in names if _is_matrix(module, name)}
    experts = {shape[0] for shape in shapes.values() if len(shape) == 3}
    return [
        name
        for name, shape in shapes.items()
        # A vector may be stored with dimensions of size 1, and those of all experts together.
        if not is_bias(name) and sum(size > 1 for size in shape) > 1 and not (len(shape) == 2 and shape[0] in experts)
    ]


def _same_place(target: Target, other: Target) -> bool:
    if (target.module, target.parameter) != (other.module, other.parameter):
        return False
    return target.rows is None or other.rows is None or overlap(target.rows, other.rows)


def _check_overlap(targets: Sequence[Target]) -> None:
    by_place: dict[tuple[str, str], list[Target]] = {}
    for target in targets:
        others = by_place.setdefault((target.module, target.parameter), [])
        for other in others:
            if _same_place(target, other) and target.rows != other.rows:
                raise TargetError(
                    f"{target.path!r} is targeted twice: as a whole and as {target.role or other.role}, which is a "
                    "part of it. Keep one of the two patterns."
                )
        others.append(target)


def with_readers(root: nn.Module, targets: Sequence[Target], structure: Structure) -> tuple[Target, ...]:
    """Note who reads a weight without a call of its own module: who was seen to, or the module right around it.

    A delta there must act on the weight: its host's call never comes, or is not all that the weight is for.
    """
    found = []
    for target in targets:
        called = structure.called is None or target.module in structure.called
        seen = structure.reader(target.module, target.parameter)
        if seen is not None and called and _holders(root, target) > 1:
            seen = None  # by which of its names it was read cannot be told; each place has its own delta
        near = reader_of(root, target, structure.called)
        if seen is None and near == target.module.rpartition(".")[0]:
            seen = near
        found.append(target if seen is None else replace(target, reads=seen))
    return tuple(found)


def _holders(root: nn.Module, target: Target) -> int:
    """How many places hold the tensor of a target."""
    weight = named_modules(root)[target.module]._parameters.get(target.parameter)
    return sum(p is weight for module in named_places(root).values() for p in module._parameters.values())


def seen_reader(root: nn.Module, target: Target, structure: Structure | None) -> str | None:
    """The module in whose call a parameter is read outside of its own module's calls, as far as is known."""
    seen = None if structure is None else structure.reader(target.module, target.parameter)
    return reader_of(root, target, structure.called if structure else None) if seen is None else seen
