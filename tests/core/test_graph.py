"""The private corners of torch that the probe reads: if one moves, this file says which."""

import torch
from torch import nn

from lightning_pet.probe.graph import Edge, Graph
from lightning_pet.probe.trace import sequence_number, tensors


def graph_of(output, model):
    return Graph([output.grad_fn], {id(p): p.dim() for p in model.parameters()})


def test_names_of_torch_that_are_not_public():
    x = torch.randn(2, 3, requires_grad=True)
    before = sequence_number()
    y = x * 2
    assert before <= y.grad_fn._sequence_nr() < sequence_number()
    assert tuple(y.grad_fn._input_metadata[0].shape) == (2, 3)
    convolution = nn.Conv1d(4, 4, 3, groups=2)(torch.randn(1, 4, 8))
    node = convolution.grad_fn
    while "Convolution" not in node.name():
        node = node.next_functions[0][0]
    assert node._saved_groups == 2
    assert node._saved_weight.shape == (4, 2, 3)


def test_linears_are_gemms_and_biases_are_not():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
    graph = graph_of(model(torch.randn(2, 5, 4)), model)
    weights = [gemm.weight for gemm in graph.gemms.values()]
    assert weights == [id(model[0].weight), id(model[2].weight)]
    first, last = graph.gemms
    assert graph.gemms_above(graph.data[last]) == [first]
    assert graph.gemms_below(first) == [last]


def test_in_place_writes_keep_operands_before_users():
    layer = nn.Linear(4, 4)
    y = torch.zeros(3, 4) + layer(torch.randn(3, 4))
    y[1:] += layer(torch.randn(2, 4))
    graph = graph_of(y.sum(), layer)
    assert all(edge.node < i for i, edges in enumerate(graph.operands) for edge in edges)


def test_a_scaled_weight_is_constant_but_a_lookup_is_data():
    table, layer = nn.Embedding(7, 4), nn.Linear(4, 4)
    model = nn.ModuleList([table, layer])
    output = layer(table(torch.tensor([1, 2]))) + (layer.bias * 2)
    graph = graph_of(output, model)
    assert not graph.is_add(len(graph.nodes) - 1)  # the second operand is no data
    assert graph.shape(Edge(len(graph.nodes) - 1, 0)) == (2, 4)


def test_tensors_walks_nests():
    a, b, c = (torch.tensor(i) for i in range(3))
    assert [int(x) for x in tensors({"a": a, "b": [b, (c, None, "text")]})] == [0, 1, 2]
