"""Which columns of a projection feed which use of it, and whether a piece of the graph mixes positions.

Both are read off gradients between two edges of a graph that already exists; no forward is run and
no parameter gradient is written.
"""

import torch
from torch import Tensor

from lightning_pet.model.structure import Rows
from lightning_pet.probe.graph import Edge, Graph


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


def feature_axis(graph: Graph, source: int) -> int:
    """Axis of the output features: 1 for a convolution, else the last."""
    return 1 if "Convolution" in graph.names[source] else len(graph.shape(Edge(source, 0))) - 1


def rows_feeding(graph: Graph, edge: Edge, source: int) -> Rows | None:
    """Output features of the gemm ``source`` that reach the tensor on ``edge``, as half-open ranges.

    Exact through reshapes, rotary embeddings and head interleaving. ``None`` where it cannot be told.
    """
    gradient = _gradient(graph, edge, source)
    if gradient is None:
        return None
    axis = feature_axis(graph, source)
    others = [i for i in range(gradient.dim()) if i != axis]
    used = (gradient != 0).sum(others) > 0 if others else gradient != 0
    return ranges(used.tolist())


def mixes_positions(graph: Graph, edge: Edge, source: int) -> bool:
    """One position of the tensor on ``edge`` depends on several positions of the output of ``source``."""
    shape = graph.shape(edge)
    metadata = graph.nodes[edge.node]._input_metadata[edge.output]
    if len(shape) < 2 or metadata.device.type == "meta":
        return False
    axis = feature_axis(graph, edge.node) if edge.node in graph.gemms else len(shape) - 1
    weight = torch.zeros(shape, dtype=metadata.dtype, device=metadata.device)
    where = tuple(slice(None) if i == axis else size - 1 for i, size in enumerate(shape))
    weight[where] = torch.empty_like(weight[where]).uniform_(0.5, 1.5)
    gradient = _gradient(graph, edge, source, weight)
    if gradient is None:
        return False
    source_axis = feature_axis(graph, source)
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
