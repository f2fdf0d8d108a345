"""From the graph to places: softmax attention, residual additions, and the modules at which a method can sit."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_pet.model.named_roles import named_places
from lightning_pet.model.structure import Site, SiteKind
from lightning_pet.probe.graph import Edge, Graph, mixes_positions
from lightning_pet.probe.trace import Call, Trace

# --- softmax attention: where it is, and what feeds it --------------------------------------------


_FUSED = re.compile(r"ScaledDotProduct|FlexAttention|FlashAttn|flash_attn", re.I)
_MAX_STEPS = 400  # nodes looked at between softmax and a product; real models need a few dozen


@dataclass(frozen=True)
class Softmax:
    """One softmax(q kᵀ) v.

    Attributes:
        node: the softmax, or the fused attention node.
        first: earliest node that belongs to it (the score product).
        last: latest node that belongs to it (the value product).
        q: tensor edge of the queries; likewise ``k`` and ``v``.
        cross: keys come from another sequence than the queries.
    """

    node: int
    first: int
    last: int
    q: Edge
    k: Edge
    v: Edge
    cross: bool = False

    @property
    def inner(self) -> frozenset[int]:
        """Nodes that a walk from outside must not cross."""
        return frozenset((self.node, self.first, self.last))


def find_softmaxes(graph: Graph) -> list[Softmax]:
    """All softmax attentions, in execution order."""
    softmaxes = []
    for i, name in enumerate(graph.names):
        softmax = None
        if _FUSED.search(name) and len(graph.operands[i]) >= 3:
            q, k, v = graph.operands[i][:3]
            softmax = Softmax(i, i, i, q, k, v)
        elif "Softmax" in name and "LogSoftmax" not in name:
            softmax = _from_softmax(graph, i)
        if softmax is not None:
            softmaxes.append(softmax)
    return _with_cross(graph, softmaxes)


def _operands(graph: Graph, i: int) -> tuple[Edge, Edge] | None:
    """Both data operands of a product without a weight."""
    if not graph.is_product(i) or i in graph.gemms:
        return None
    edges = [edge for edge in graph.operands[i] if not graph.constant[edge.node]][-2:]
    return (edges[0], edges[1]) if len(edges) == 2 else None


def _nearest(start: Iterable[int], step: Callable[[int], Iterable[int]], graph: Graph) -> list[int]:
    """Products of two data tensors reached from ``start``; gemms and other softmaxes are not crossed."""
    found: list[int] = []
    seen: set[int] = set()
    todo = list(start)
    while todo and len(seen) < _MAX_STEPS:
        i = todo.pop()
        if i in seen:
            continue
        seen.add(i)
        if _operands(graph, i) is not None:
            found.append(i)
        elif not graph.is_product(i) and "Softmax" not in graph.names[i] and not graph.names[i].startswith("Embedding"):
            todo.extend(step(i))
    return sorted(found)


def _from_softmax(graph: Graph, softmax: int) -> Softmax | None:
    scores = _nearest(graph.data[softmax], lambda i: graph.data[i], graph)
    values = _nearest(graph.successors[softmax], lambda i: graph.successors[i], graph)
    if not scores or not values:
        return None
    score = _content(graph, scores)
    value = values[0]
    floor = softmax
    operands, score_operands = _operands(graph, value), _operands(graph, score)
    if operands is None or score_operands is None:
        return None
    below = [softmax in graph.ancestors([edge.node], floor) for edge in operands]
    if below[0] == below[1]:
        return None
    v = operands[1] if below[0] else operands[0]
    return Softmax(softmax, score, value, score_operands[0], score_operands[1], v)


def _content(graph: Graph, scores: list[int]) -> int:
    """Of several score products (relative positions add some), the one in which both operands come from the input."""
    if len(scores) == 1:
        return scores[0]
    sources = _sources(graph, frozenset())

    def shared(i: int) -> int:
        operands = _operands(graph, i)
        return 0 if operands is None else sources[operands[0].node] & sources[operands[1].node]

    return max(scores, key=lambda i: (shared(i).bit_count(), -i))


def _sources(graph: Graph, stop: frozenset[int]) -> list[int]:
    """For every node a bit set of the inputs (lookups, graph inputs) that reach it without passing ``stop``."""
    bits: list[int] = []
    count = 0
    for i, before in enumerate(graph.data):
        mask = 0
        if i not in stop:
            for j in before:
                mask |= bits[j]
            if not before and not graph.constant[i]:
                mask, count = 1 << count, count + 1
        bits.append(mask)
    return bits


def _with_cross(graph: Graph, softmaxes: list[Softmax]) -> list[Softmax]:
    """Mark cross-attention: without going through an attention, queries and keys have no input in common."""
    stop = frozenset(i for softmax in softmaxes for i in softmax.inner)
    sources = _sources(graph, stop)
    marked = []
    for softmax in softmaxes:
        q, k = sources[softmax.q.node], sources[softmax.k.node]
        same_input = _gemm_input(graph, softmax.q.node, stop) & _gemm_input(graph, softmax.k.node, stop)
        cross = not (q & k) and not same_input
        marked.append(Softmax(softmax.node, softmax.first, softmax.last, softmax.q, softmax.k, softmax.v, cross))
    return marked


def _gemm_input(graph: Graph, start: int, stop: frozenset[int]) -> set[int]:
    gemms = graph.gemms_above([start], stop)
    return {graph.canonical(j) for i in gemms for j in graph.gemms[i].data} | set(gemms)


# --- residual additions ---------------------------------------------------------------------------


_MAX_PEEL = 8


@dataclass(frozen=True)
class Addition:
    """One ``s = x + f(x)``.

    Attributes:
        add: node of s.
        x: canonical node of x.
        branch: node of f(x).
        region: nodes of f: above ``branch`` and later than x.
        stream: last of the additions that belong together (``x + attention + mlp``).
    """

    add: int
    x: int
    branch: int
    region: frozenset[int]
    stream: int

    def softmax(self, softmaxes: Iterable[Softmax]) -> Softmax | None:
        """The first attention inside f."""
        return next((softmax for softmax in softmaxes if softmax.node in self.region), None)


def find_additions(graph: Graph, kept: frozenset[int]) -> list[Addition]:
    """All residual additions, in execution order.

    Args:
        graph: the graph.
        kept: canonical nodes that are some module's output: such an inner sum is not split.
    """
    found: dict[int, Addition] = {}
    for i in range(len(graph.nodes)):
        if graph.is_add(i) and (addition := _addition(graph, i)) is not None:
            found[i] = addition
    joined = _joined(graph, found)
    return [part for addition in joined for part in _split(graph, addition, kept)]


def _addition(graph: Graph, i: int) -> Addition | None:
    left, right = graph.data[i]
    for x, f in ((left, right), (right, left)):
        if not _only_used_by(graph, f, i):
            continue
        for candidate in _behind(graph, x):
            region = _region(graph, candidate, f)
            if region is not None:
                return Addition(i, candidate, f, region, i)
    return None


def _only_used_by(graph: Graph, f: int, user: int) -> bool:
    """Nothing else reads f: otherwise f is the stream, and x an addend such as position embeddings."""
    while graph.successors[f] == [user]:
        if not graph.is_view(f):
            return True
        f, user = graph.data[f][0], f
    return False


def _behind(graph: Graph, i: int) -> list[int]:
    """Canonical nodes that may be x: ``i`` seen through views, scales and partial sums, nearest first."""
    found: list[int] = []
    todo = [i]
    while todo and len(found) < _MAX_PEEL:
        node = graph.canonical(todo.pop(0))
        if node in found:
            continue
        found.append(node)
        if graph.is_thin(node) or graph.is_add(node):
            todo.extend(graph.data[node])
    return found


def _region(graph: Graph, x: int, f: int) -> frozenset[int] | None:
    """Nodes of f if x is above f with a weight in between, else ``None``."""
    if graph.canonical(f) == x or x > f:
        return None
    above = graph.ancestors([f], x, stop=frozenset((x,)))
    if x not in above:
        return None
    above.discard(x)
    return frozenset(above) if any(i in graph.gemms for i in above) else None


def _joined(graph: Graph, found: dict[int, Addition]) -> list[Addition]:
    """``(x + a) + b`` with the same x: both parts belong to the last sum."""
    result: dict[int, Addition] = dict(found)
    for i in sorted(found, reverse=True):
        outer = result[i]
        for operand in graph.data[i]:
            inner = result.get(graph.canonical(operand))
            if inner is not None and inner.x == outer.x and operand != outer.branch:
                result[inner.add] = replace(inner, stream=outer.stream)
    return [result[i] for i in sorted(result)]


def _split(graph: Graph, addition: Addition, kept: frozenset[int]) -> list[Addition]:
    """``x + (attention + mlp)`` is two additions, unless a module computes the inner sum."""
    inner = graph.canonical(addition.branch)
    if not graph.is_add(inner) or inner in kept:
        return [addition]
    regions = [_region(graph, addition.x, operand) for operand in graph.data[inner]]
    left, right = regions
    if left is None or right is None:
        return [addition]
    return [
        part
        for operand, region in zip(graph.data[inner], (left, right), strict=True)
        for part in _split(graph, replace(addition, branch=operand, region=region), kept)
    ]


# --- sites ----------------------------------------------------------------------------------------


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
