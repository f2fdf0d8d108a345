"""Residual additions in an autograd graph."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lightning_pet.probe.graph import Graph
from lightning_pet.probe.softmaxes import Softmax

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
