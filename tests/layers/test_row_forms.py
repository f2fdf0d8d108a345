"""What is kept of the low-rank deltas of a batch's rows is that of the deltas as they are."""

import torch
from torch import Tensor, nn

from lightning_pet.layers.low_rank import LowRankLinear

IDS = torch.tensor([1, 0, 1])


def at_once(deltas: list[LowRankLinear], x: Tensor, output: Tensor) -> Tensor:
    found = LowRankLinear.row_form(deltas, IDS, x, output, lambda: (torch.empty(0), None))
    assert found is not None
    return found


def expected(deltas: list[LowRankLinear], x: Tensor) -> Tensor:
    rows = zip(IDS.tolist(), x, strict=True)
    return torch.stack([deltas[i].scale * row @ deltas[i].a.t() @ deltas[i].b.t() for i, row in rows])


@torch.no_grad()
def test_a_parameter_in_the_memory_of_another_is_not_taken_for_it() -> None:
    deltas = [LowRankLinear(5, 6, r, scale=0.5) for r in (2, 3)]
    for delta in deltas:
        delta.b = nn.Parameter(torch.randn_like(delta.b))
    x, output = torch.randn(3, 4, 5), torch.zeros(3, 4, 6)
    torch.testing.assert_close(at_once(deltas, x, output), expected(deltas, x))
    before = deltas[1].b
    before.data.mul_(2)  # no version tells of it
    deltas[1].b = nn.Parameter(before.data)
    assert (before.data_ptr(), before._version) == (deltas[1].b.data_ptr(), deltas[1].b._version)
    torch.testing.assert_close(at_once(deltas, x, output), expected(deltas, x))
    deltas[0].a.mul_(3)
    torch.testing.assert_close(at_once(deltas, x, output), expected(deltas, x))
