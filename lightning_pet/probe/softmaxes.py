"""Softmax attention in an autograd graph: where it is, and what feeds it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lightning_pet.probe.graph import Edge, Graph

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
