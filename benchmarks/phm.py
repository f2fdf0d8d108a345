"""A PHM layer beside one that forms its Kronecker sum: time of a forward and backward, side by side.

Both have the same parameters and give the same numbers. The reference forms ``sum(kron(A_i, B_i))`` with
``torch.kron`` and multiplies by it. Times are CPU seconds on one thread, the best of many turns that the two take
in alternation. *factored* are Compacter's layers (rank 1); *full* are those of a PHM adapter, where the product itself
costs as much as a dense one, so that the gap closes as rows grow.

    python benchmarks/phm.py [--quick] [--json PATH]

It exits with 1 if a layer with n = 4 is less than twice as fast: a factored one at up to 512 rows, a full one at 16.
With more rows, reading and writing them is what both pay for.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_pet.layers.phm import factored_phm_product, phm_product

WIDTH, BOTTLENECK = 768, 24
BOUND = 2.0
Product = Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """What was measured of one layer: milliseconds of a forward and backward."""

    layer: str
    n: int
    inputs: int
    outputs: int
    rows: int
    reference: float
    ours: float
    bounded: bool

    @property
    def ratio(self) -> float:
        """How many times as fast."""
        return self.reference / self.ours


def formed(x: Tensor, rule: Tensor, weight: Tensor) -> Tensor:
    """The product with the sum."""
    matrix = torch.kron(rule[0], weight[0])
    for a, b in zip(rule[1:], weight[1:], strict=True):
        matrix = matrix + torch.kron(a, b)
    return x @ matrix


def formed_factored(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The same with factored slices."""
    return formed(x, rule, left @ right)


def step(product: Product, tensors: list[Tensor]) -> float:
    """CPU seconds of one forward and backward."""
    start = time.process_time()
    torch.autograd.grad(product(*tensors).sum(), tensors)
    return time.process_time() - start


def measure(factored: bool, n: int, inputs: int, outputs: int, rows: int, turns: int) -> Row:
    """Time one layer against its reference, in alternation."""
    torch.manual_seed(0)
    sizes = [(rows, inputs), (n, n, n)]
    sizes += [(n, inputs // n, 1), (n, 1, outputs // n)] if factored else [(n, inputs // n, outputs // n)]
    tensors = [torch.randn(size).mul_(0.1).requires_grad_() for size in sizes]
    pair: tuple[Product, Product] = (formed_factored, factored_phm_product) if factored else (formed, phm_product)
    torch.testing.assert_close(pair[0](*tensors), pair[1](*tensors), rtol=1e-3, atol=1e-4)
    times = [[step(product, tensors) for product in pair] for _ in range(turns)]
    reference, ours = (min(column) * 1000 for column in zip(*times, strict=True))
    layer = "factored" if factored else "full"
    return Row(layer, n, inputs, outputs, rows, reference, ours, bounded=n == 4 and rows <= (512 if factored else 16))


def main() -> int:
    """Measure, print a table, and say whether the bound is kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns, no square layers")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [(WIDTH, BOTTLENECK), (BOTTLENECK, WIDTH)] + [(WIDTH, WIDTH)] * (not options.quick)
    table = []
    print(f"{'layer':<10}{'n':>3}{'in':>6}{'out':>6}{'rows':>7}{'formed ms':>11}{'ours ms':>9}{'ratio':>8}")
    for factored in (True, False):
        for n in (4, 12):
            for inputs, outputs in shapes:
                for rows in (16, 64, 512, 2048):
                    row = measure(factored, n, inputs, outputs, rows, 10 if options.quick else 40)
                    print(
                        f"{row.layer:<10}{n:>3}{inputs:>6}{outputs:>6}{rows:>7}{row.reference:>11.2f}{row.ours:>9.2f}"
                        f"{row.ratio:>8.2f}{'' if row.bounded else '  (no bound)'}"
                    )
                    table.append(row)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in table], indent=1))
    slow = [row for row in table if row.bounded and row.ratio < BOUND]
    print(f"{'fails' if slow else 'keeps'} the bound of {BOUND} times as fast")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
