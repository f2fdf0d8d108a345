"""The autograd graph of one forward, read as data flow.

A :class:`Graph` numbers the nodes in the order in which they were created, so "later" is an integer
comparison, and classifies those that matter here: views, weights, and *gemms* (a weight of two or
more dimensions applied to data). It knows nothing about attention or residuals.

Names of torch that are not public but that this file relies on: ``Node._sequence_nr``,
``Node._input_metadata``, ``torch._C._autograd._get_sequence_nr`` and the ``_saved_*`` attributes of
convolutions. ``tests/core/test_graph.py`` pins them.
"""

import heapq
import itertools
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_pet.model.structure import Rows

_GEMM = re.compile(r"^(?:Addmm|Mm|Bmm|Baddbmm|Addbmm|Mv|Addmv|Linear|MkldnnLinear|.*Convolution|.*grouped_?mm)", re.I)
_LEAF = "torch::autograd::AccumulateGrad"
# Same numbers, other shape or type: the tensor behind such a node *is* the tensor before it.
_VIEW = re.compile(
    r"^(?:View|UnsafeView|Reshape|ReshapeAlias|Transpose|Permute|T|Mt|Squeeze|Unsqueeze|Alias|Clone|ToCopy|Unflatten"
    r"|AsStrided|Contiguous|ViewAs|MovedimBackward|LiftFresh|Numpy_?T)(?:Backward)?\d*$"
)
# A part, a repetition or a rearrangement of the numbers.
_PART = re.compile(r"^(?:Slice|Select|Split|SplitWithSizes|Narrow|Unbind|Index|IndexSelect|Gather|Expand|Repeat"
                   r"|Roll|ConstantPadNd|Chunk|Cat|Stack|Flip)(?:Backward)?\d*$")  # fmt: skip
_SCALE = re.compile(r"^(?:Mul|Div)Backward\d*$")
_MAX_WEIGHT_CHAIN = 12


def is_view_name(name: str) -> bool:
    """Whether a node of this name holds the same numbers as its operand."""
    return bool(_VIEW.match(name))


@dataclass(frozen=True)
class Edge:
    """One output of one node: the index of the node, and which of its outputs."""

    node: int
    output: int


@dataclass(frozen=True)
class Gemm:
    """A weight applied to data.

    Attributes:
        node: index of the node.
        weight: ``id()`` of the parameter, or the path of an opaque (quantised) module.
        data: nodes of the data operand (empty where the input is outside the graph).
        groups: groups of a convolution, else 1.
        kernel: spatial kernel sizes of a convolution, else ``()``.
    """

    node: int
    weight: int | str
    data: tuple[int, ...]
    groups: int = 1
    kernel: tuple[int, ...] = ()

    @property
    def pointwise(self) -> bool:
        """The weight mixes features only, never positions."""
        return all(size == 1 for size in self.kernel)


class Graph:
    """Nodes between some outputs and the leaves, in order of creation.

    Args:
        roots: nodes to start from (``grad_fn`` of the outputs).
        parameters: ``id(parameter) -> number of dimensions`` of all parameters of the model.
    """

    def __init__(self, roots: Iterable[Node], parameters: Mapping[int, int]) -> None:
        nodes = _in_order(_reachable(roots))
        self.nodes: list[Node] = nodes
        self.index: dict[Node, int] = {node: i for i, node in enumerate(nodes)}
        self.names: list[str] = [node.name() for node in nodes]
        self.sequence: list[int] = [_sequence(node) for node in nodes]
        self.operands: list[tuple[Edge, ...]] = [
            tuple(Edge(self.index[prev], slot) for prev, slot in node.next_functions if prev is not None)
            for node in nodes
        ]
        self._parameters = parameters
        self.weights: list[int | None] = [self._weight(i) for i in range(len(nodes))]
        self.constant: list[bool] = self._constants()
        self.data: list[tuple[int, ...]] = [
            tuple(dict.fromkeys(edge.node for edge in edges if not self.constant[edge.node])) for edges in self.operands
        ]
        self.successors: list[list[int]] = [[] for _ in nodes]
        for i, before in enumerate(self.data):
            for j in before:
                self.successors[j].append(i)
        self.gemms: dict[int, Gemm] = {}
        for i in range(len(nodes)):
            if (gemm := self._gemm(i)) is not None:
                self.gemms[i] = gemm

    def reads(self) -> list[tuple[int, int]]:
        """(sequence number of the node, ``id()`` of the parameter) for each direct use of a parameter."""
        return [
            (self.sequence[i], weight)
            for i, edges in enumerate(self.operands)
            for edge in edges
            if (weight := self.weights[edge.node]) is not None and self.names[edge.node].startswith(_LEAF)
        ]

    # -- classification ---------------------------------------------------------------------------

    def _weight(self, i: int) -> int | None:
        """``id()`` of the parameter of which this node is a view, else ``None``."""
        for _ in range(_MAX_WEIGHT_CHAIN):
            name = self.names[i]
            if name.startswith(_LEAF):
                leaf: Any = self.nodes[i]
                key = id(leaf.variable)
                return key if key in self._parameters else None
            if len(self.operands[i]) != 1 or not (_VIEW.match(name) or _PART.match(name)):
                return None
            i = self.operands[i][0].node
        return None

    def _constants(self) -> list[bool]:
        """Nodes computed from parameters alone (a relative-position table, a scaled weight)."""
        constant: list[bool] = []
        for i, edges in enumerate(self.operands):
            if self.names[i].startswith(_LEAF):
                constant.append(self.weights[i] is not None)
            elif self.names[i].startswith("Embedding") or self.is_product(i):
                constant.append(False)
            else:
                constant.append(bool(edges) and all(constant[edge.node] for edge in edges))
        return constant

    def is_product(self, i: int) -> bool:
        """The node multiplies matrices or convolves."""
        return bool(_GEMM.match(self.names[i]))

    def _gemm(self, i: int) -> Gemm | None:
        if not self.is_product(i):
            return None
        weights = [
            key
            for edge in self.operands[i]
            if (key := self.weights[edge.node]) is not None and self._parameters[key] >= 2
        ]
        if not weights or len(self.data[i]) > 1:
            return None
        node: Any = self.nodes[i]
        if "Convolution" not in self.names[i]:
            return Gemm(i, weights[-1], self.data[i])
        return Gemm(i, weights[-1], self.data[i], int(node._saved_groups), tuple(node._saved_weight.shape[2:]))

    def add_opaque(self, node: int, path: str, data: int) -> None:
        """Register the output of a module whose weight the graph does not show (a quantised linear)."""
        self.gemms.setdefault(node, Gemm(node, path, (data,)))

    def is_view(self, i: int) -> bool:
        """The node holds the same numbers as its one operand."""
        return len(self.data[i]) == 1 and bool(_VIEW.match(self.names[i])) and i not in self.gemms

    def is_thin(self, i: int) -> bool:
        """The node is a view, a part or a scaled copy of one data operand."""
        name = self.names[i]
        one = len(self.data[i]) == 1 and i not in self.gemms
        return one and bool(_VIEW.match(name) or _PART.match(name) or _SCALE.match(name))

    def is_add(self, i: int) -> bool:
        """The node adds two data tensors."""
        return self.names[i].startswith("AddBackward") and len(self.data[i]) == 2

    def depthwise(self, i: int) -> bool:
        """A convolution that keeps channels apart."""
        gemm = self.gemms.get(i)
        return gemm is not None and gemm.groups > 1 and gemm.groups == self.shape(Edge(i, 0))[1]

    # -- geometry ---------------------------------------------------------------------------------

    def shape(self, edge: Edge) -> tuple[int, ...]:
        """Shape of the tensor on an edge."""
        return tuple(int(size) for size in self.nodes[edge.node]._input_metadata[edge.output].shape)

    def features(self, i: int) -> int:
        """Output features of a gemm."""
        return self.shape(Edge(i, 0))[1 if "Convolution" in self.names[i] else -1]

    def canonical(self, i: int) -> int:
        """The node behind all views: two tensors are the same data if this is the same number."""
        while self.is_view(i):
            i = self.data[i][0]
        return i

    def of(self, tensor_node: Node | None) -> int | None:
        """Canonical index of a recorded ``grad_fn``, ``None`` where it is not in this graph."""
        i = None if tensor_node is None else self.index.get(tensor_node)
        return None if i is None else self.canonical(i)

    def ancestors(self, start: Iterable[int], floor: int = -1, stop: frozenset[int] = frozenset()) -> set[int]:
        """``start`` and all data nodes above it; nodes before ``floor`` and those above ``stop`` are left out."""
        seen: set[int] = set()
        todo = [i for i in start if i >= floor]
        while todo:
            i = todo.pop()
            if i in seen:
                continue
            seen.add(i)
            if i not in stop:
                todo.extend(j for j in self.data[i] if j >= floor and j not in seen)
        return seen

    def gemms_above(self, start: Iterable[int], stop: frozenset[int] = frozenset()) -> list[int]:
        """The nearest gemms at or above ``start``, in order; nodes in ``stop`` are not crossed.

        Depthwise convolutions are walked through: they refine a projection, they are not one.
        Where one of the gemms lies above another, only the lower one is kept.
        """
        found = self._nearest_gemms(start, stop, lambda i: self.data[i])
        lower = {j for i in found for j in self.ancestors(self.data[i], min(found)) if j != i}
        return sorted(found - lower)

    def gemms_below(self, start: int, stop: frozenset[int] = frozenset()) -> list[int]:
        """The nearest gemms below ``start``; nodes in ``stop`` and products without a weight are not crossed."""

        def onward(i: int) -> Iterable[int]:
            return self.successors[i] if not self.is_product(i) or self.depthwise(i) else ()

        return sorted(self._nearest_gemms(self.successors[start], stop, onward))

    def _nearest_gemms(
        self, start: Iterable[int], stop: Container[int], onward: Callable[[int], Iterable[int]]
    ) -> set[int]:
        """The first gemms on every way from ``start`` along ``onward``; nodes in ``stop`` are not crossed."""
        found: set[int] = set()
        seen: set[int] = set()
        todo = list(start)
        while todo:
            i = todo.pop()
            if i in seen or i in stop:
                continue
            seen.add(i)
            if i in self.gemms and not self.depthwise(i):
                found.add(i)
            else:
                todo.extend(onward(i))
        return found

    def gradient_edge(self, edge: Edge) -> GradientEdge:
        """The edge in the form that :func:`torch.autograd.grad` takes."""
        return GradientEdge(self.nodes[edge.node], edge.output)


def _reachable(roots: Iterable[Node]) -> list[Node]:
    seen: dict[Node, None] = {}
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen[node] = None
        todo.extend(prev for prev, _ in node.next_functions if prev is not None and prev not in seen)
    return list(seen)


def _sequence(node: Node) -> int:
    """When the node was made; leaves come before everything."""
    return -1 if node.name().startswith(_LEAF) else node._sequence_nr()


def _in_order(nodes: list[Node]) -> list[Node]:
    """Operands before their users, and otherwise as created (an in-place write changes the order of creation)."""
    users: dict[Node, list[Node]] = {node: [] for node in nodes}
    missing: dict[Node, int] = {}
    for node in nodes:
        operands = {prev for prev, _ in node.next_functions if prev is not None}
        missing[node] = len(operands)
        for prev in operands:
            users[prev].append(node)
    ticket = itertools.count()  # nodes themselves cannot be compared
    ready = [(_sequence(node), next(ticket), node) for node in nodes if not missing[node]]
    heapq.heapify(ready)
    ordered: list[Node] = []
    while ready:
        *_, node = heapq.heappop(ready)
        ordered.append(node)
        for user in users[node]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, (_sequence(user), next(ticket), user))
    return ordered


# --- which columns of a projection feed which use of it, and whether a piece of the graph mixes positions ---

# Both are read off gradients between two edges of a graph that already exists; no forward is run and no parameter
# gradient is written.


def _gradient(graph: Graph, edge: Edge, source: int, weight: Tensor | None = None) -> Tensor | None:
    """Gradient of ``(tensor on edge · weight).sum()`` with respect to the output of ``source``.

    ``None`` where it cannot be computed: meta tensors, or a saved tensor that the model overwrote.
    """
    metadata = graph.nodes[edge.node]._input_metadata[edge.output]
    if metadata.device.type == "meta":
        return None
    if weight is None:
        weight = torch.empty(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device).uniform_(0.5, 1.5)
    try:
        gradient: Tensor | None = torch.autograd.grad(
            graph.gradient_edge(edge),
            [graph.gradient_edge(Edge(source, 0))],
            grad_outputs=weight,
            retain_graph=True,
            allow_unused=True,
        )[0]
    except RuntimeError:
        return None
    return torch.zeros(graph.shape(Edge(source, 0))) if gradient is None else gradient.detach()


def _feature_axis(graph: Graph, source: int) -> int:
    """Axis of the output features: 1 for a convolution, else the last."""
    return 1 if "Convolution" in graph.names[source] else len(graph.shape(Edge(source, 0))) - 1


def rows_feeding(graph: Graph, edge: Edge, source: int) -> Rows | None:
    """Output features of the gemm ``source`` that reach the tensor on ``edge``, as half-open ranges.

    Exact through reshapes, rotary embeddings and head interleaving. ``None`` where it cannot be told.
    """
    gradient = _gradient(graph, edge, source)
    if gradient is None:
        return None
    axis = _feature_axis(graph, source)
    others = [i for i in range(gradient.dim()) if i != axis]
    used = (gradient != 0).sum(others) > 0 if others else gradient != 0
    return ranges(used.tolist())


def mixes_positions(graph: Graph, edge: Edge, source: int) -> bool:
    """One position of the tensor on ``edge`` depends on several positions of the output of ``source``."""
    shape = graph.shape(edge)
    metadata = graph.nodes[edge.node]._input_metadata[edge.output]
    if len(shape) < 2 or metadata.device.type == "meta":
        return False
    axis = _feature_axis(graph, edge.node) if edge.node in graph.gemms else len(shape) - 1
    weight = torch.zeros(shape, dtype=metadata.dtype, device=metadata.device)
    where = tuple(slice(None) if i == axis else size - 1 for i, size in enumerate(shape))
    weight[where] = torch.empty_like(weight[where]).uniform_(0.5, 1.5)
    gradient = _gradient(graph, edge, source, weight)
    if gradient is None:
        return False
    source_axis = _feature_axis(graph, source)
    return int((gradient != 0).any(source_axis).sum()) > 1


def ranges(used: list[bool]) -> Rows:
    """Half-open ranges of the true entries.

    >>> ranges([True, True, False, True])
    ((0, 2), (3, 4))
    """
    edges = [i for i in range(len(used) + 1) if (i > 0 and used[i - 1]) != (i < len(used) and used[i])]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def without(rows: Rows, other: Rows) -> Rows:
    """The features of ``rows`` that are not in ``other``."""
    size = max((stop for _, stop in (*rows, *other)), default=0)
    used = [False] * size
    for start, stop in rows:
        used[start:stop] = [True] * (stop - start)
    for start, stop in other:
        used[start:stop] = [False] * (stop - start)
    return ranges(used)


def count(rows: Rows) -> int:
    """Number of features in ``rows``."""
    return sum(stop - start for start, stop in rows)
