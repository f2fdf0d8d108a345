"""From residual additions to the modules at which a method can sit."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_pet.model.named_roles import named_places
from lightning_pet.model.structure import Site, SiteKind
from lightning_pet.probe.columns import mixes_positions
from lightning_pet.probe.graph import Edge, Graph
from lightning_pet.probe.residual import Addition
from lightning_pet.probe.softmaxes import Softmax
from lightning_pet.probe.trace import Call, Trace

_ATTENTION_CLASS = re.compile(r"attention|attn", re.I)
_FFN_CLASS = re.compile(r"ffn|mlp|feed_?forward", re.I)
_MAX_BRANCH = 16


@dataclass(frozen=True)
class Tap:
    """A module call, seen from a graph node."""

    order: int
    call: Call


class Taps:
    """Which calls take or return the tensor behind a node."""

    def __init__(self, model: nn.Module, graph: Graph, trace: Trace) -> None:
        self._modules = named_places(model)
        self.inputs: dict[int, list[Tap]] = defaultdict(list)
        self.outputs: dict[int, list[Tap]] = defaultdict(list)
        self.calls = trace.calls
        for order, call in enumerate(trace.calls):
            for node, table in ((graph.of(call.input), self.inputs), (graph.of(call.output), self.outputs)):
                if node is not None:
                    table[node].append(Tap(order, call))

    def module(self, path: str) -> nn.Module:
        """The module of that name."""
        return self._modules[path]

    def transparent(self, path: str) -> bool:
        """No projection inside: a norm, a dropout, an activation."""
        module = self._modules[path]
        return all(parameter.dim() <= 1 for parameter in module.parameters())

    def owner(self, first: int, last: int) -> str:
        """Innermost module whose call contains both sequence numbers."""
        around = [c for c in self.calls if c.start <= first and last < c.end]
        return max(around, key=lambda call: call.depth).path if around else ""


def build_sites(
    graph: Graph, taps: Taps, additions: Sequence[Addition], softmaxes: Sequence[Softmax], ffn: Iterable[int]
) -> list[tuple[Addition, Site]]:
    """A :class:`Site` for every addition that has a branch module.

    Args:
        graph: the graph.
        taps: calls by node.
        additions: what :func:`find_additions` returned.
        softmaxes: all attentions.
        ffn: nodes of gemms known to be a feed-forward's down-projection.
    """
    down = frozenset(ffn)
    found = [(addition, branch) for addition in additions if (branch := _branch(graph, taps, addition))]
    known = {tap.order for _, branch in found for tap in branch}
    strays = {call.path for order, call in enumerate(taps.calls) if call.output is not None and order not in known}
    pairs = []
    for addition, branch in found:
        # A dropout that acts inside f as well (on its hidden features, say) does not stand for f(x).
        own = [tap for tap in branch if tap.call.path not in strays] or branch
        pairs.append((addition, _site(graph, taps, addition, own, softmaxes, down)))
    return _outermost(pairs)


def _site(
    graph: Graph,
    taps: Taps,
    addition: Addition,
    branch: Sequence[Tap],
    softmaxes: Sequence[Softmax],
    ffn: frozenset[int],
) -> Site:
    start, end = graph.sequence[addition.x], graph.sequence[addition.add]
    width, kept = _last_dimension(taps, branch)
    inputs = [
        tap.call.path
        for tap in taps.inputs[addition.x]
        if start < tap.call.start and 0 <= tap.call.end <= end and graph.of(tap.call.output) in addition.region
    ]
    total = graph.canonical(addition.stream)
    readers = [tap.call.path for tap in taps.inputs[total]]
    norms = [p for p in readers if taps.transparent(p) and any(True for _ in taps.module(p).parameters())]
    blocks = sorted(taps.outputs[total], key=lambda tap: (-tap.call.depth, tap.order))
    return Site(
        kind=_kind(graph, taps, addition, branch, softmaxes, ffn),
        branch=_unique(tap.call.path for tap in kept or branch),
        inputs=_unique(inputs),
        after_norm=_unique(norms),
        after_out=_unique(tap.call.path for tap in blocks if not kept or tap.call.output_shape[-1:] == (width,)),
        width=width,
        channels_first=not kept,
    )


def _unique(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))


def _last_dimension(taps: Taps, branch: Sequence[Tap]) -> tuple[int, list[Tap]]:
    """Width of the stream, and those branch calls that return it as their last dimension."""
    first = branch[0]
    module, shape = taps.module(first.call.path), first.call.output_shape
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.BatchNorm1d | nn.BatchNorm2d)
    ahead = convolution and len(shape) > 2
    width = shape[1] if ahead else shape[-1] if shape else 0
    kept = []
    for tap in branch:
        if tap.call.output_shape != shape:  # a change of layout shows, unless all sizes are equal
            shape = tap.call.output_shape
            ahead = shape[-1:] != (width,)
        if not ahead:
            kept.append(tap)
    return width, kept


def _branch(graph: Graph, taps: Taps, addition: Addition) -> list[Tap]:
    """Calls whose output is f(x), farthest from the sum first; stops at the first that holds a projection."""
    groups: list[list[Tap]] = []
    node, region = graph.canonical(addition.branch), addition.region
    end = graph.sequence[addition.add]
    for _ in range(_MAX_BRANCH):
        found = [tap for tap in taps.outputs.get(node, ()) if 0 <= tap.call.end <= end]
        found.sort(key=lambda tap: (-tap.call.depth, tap.order))
        groups.append(found)
        if node in graph.gemms or any(not taps.transparent(tap.call.path) for tap in found):
            break
        above = graph.of(found[0].call.input) if found else None
        if above is None or above == node:
            if not graph.is_thin(node):
                break
            above = graph.canonical(graph.data[node][0])
        if above not in region:
            break
        node = above
    taps_found = [tap for group in reversed(groups) for tap in group]
    return taps_found if any(not taps.transparent(tap.call.path) for tap in taps_found) else []


def _kind(
    graph: Graph,
    taps: Taps,
    addition: Addition,
    branch: Sequence[Tap],
    softmaxes: Sequence[Softmax],
    ffn: frozenset[int],
) -> SiteKind:
    softmax = addition.softmax(softmaxes)
    if softmax is not None:
        return "cross" if softmax.cross else "attention"
    if addition.region & ffn:
        return "ffn"
    classes = [type(taps.module(tap.call.path)).__name__ for tap in branch]
    if any(_ATTENTION_CLASS.search(name) for name in classes):
        return "attention"
    if any(_FFN_CLASS.search(name) for name in classes):  # with a depthwise convolution in it (Mix-FFN)
        return "ffn"
    return "mixer" if mixes_positions(graph, Edge(addition.branch, 0), addition.x) else "ffn"


def _outermost(pairs: list[tuple[Addition, Site]]) -> list[tuple[Addition, Site]]:
    """Without the sums inside another site's sub-layer (a shared expert), and without wrappers of whole blocks."""
    around = _around([site.branch for _, site in pairs])
    inner = Counter(j for i, found in enumerate(around) for j in found if pairs[i][0].add in pairs[j][0].region)
    wrappers = {j for j, count in inner.items() if count > 1}
    return [pair for i, pair in enumerate(pairs) if i not in wrappers and around[i] <= wrappers]


def _around(branches: Sequence[Sequence[str]]) -> list[set[int]]:
    """For each branch, which others have a module that holds all modules of this one strictly inside.

    >>> _around([["0.ffn"], ["0.ffn.expert.down", "0.ffn.expert"], ["1.ffn"]])
    [set(), {0}, set()]
    """
    holders: dict[str, set[int]] = {}
    for i, branch in enumerate(branches):
        for path in branch:
            holders.setdefault(path, set()).add(i)
    found = []
    for i, branch in enumerate(branches):
        above = [{path[:at] for at, letter in enumerate(path) if letter == "."} for path in branch]
        common = set.intersection(*above) if above else set(holders)
        found.append(set[int]().union(*[holders[path] for path in common if path in holders]) - {i})
    return found
